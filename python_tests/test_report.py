"""The page that a run leaves: it needs no network, says what metrics.jsonl says, marks what is not private."""

import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from small import digits_npz, vit_folder

from lalora_kernels import charts
from lalora_kernels.cli import main
from lalora_kernels.display import Display
from lalora_kernels.federated.client import Client
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.diagnostics import noise_variance
from lalora_kernels.federated.run import Run, Watch, prepare
from lalora_kernels.reference.privatize import smooth
from lalora_kernels.report import MARK, SHORT, show_epsilon, write_report

HOSTILE = """<script>alert("1")</script>'"&<img src=x onerror=alert(2)>"""
SMALL = {
    "clients": 3, "fraction": 0.7, "rounds": 3, "local_steps": 4, "rank": 2, "batch_size": 8, "epsilon": 6.0,
    "delta": 1e-4, "partition": "dirichlet", "dirichlet_alpha": 1.0, "device": "cpu",
}  # fmt: skip
SECTIONS = ["What is guaranteed", "Accuracy and ε over rounds", "Clients", "Gradients", "Time, memory, traffic",
            "Ledger", "Settings"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = Run.start(prepare(make_config(SMALL | {"model": world[0], "dataset": world[1]})), folder)
    done.train()
    return done


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run.folder, tmp_path / "first")


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, text by tag, tables by caption."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text, self.tables = [], [], {}, {}
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text.setdefault(tag, []).append(data)
        if tag == "caption":
            self.caption += data
        if tag in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(part for parts in self.text.values() for part in parts)


def page(*folders, **options) -> Page:
    return Page(write_report(*folders, **options).read_text())


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_needs_no_network_and_runs_no_script(folder):
    text = write_report(folder).read_text()
    found = Page(text)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "base"} == set()
    attributes = {name for _, given in found.tags for name in given}
    assert not {name for name in attributes if name in ("src", "href", "xlink:href") or name.startswith("on")}
    assert dict(found.tags)["html"] == {"lang": "en"} and "width=device-width" in str(found.tags)
    assert "prefers-color-scheme: dark" in text


def test_every_section_is_there_and_every_drawing_has_words(folder):
    found = page(folder)
    assert found.text["h2"] == SECTIONS
    drawings = [given for tag, given in found.tags if tag == "svg" and given.get("aria-hidden") != "true"]
    assert len(drawings) >= 6 and all(d["role"] == "img" and d["aria-label"] for d in drawings)
    assert all(given["role"] == "region" and given["tabindex"] == "0" for tag, given in found.tags
               if given.get("class") == "wide")  # fmt: skip


def test_the_numbers_are_those_of_the_run(run, folder):
    found, history = page(folder), metrics(folder)
    rounds = found.tables["Every round"][1:]
    for row, record in zip(rounds, history, strict=True):
        assert row[0] == str(record["round"]) and row[1] == f"{100 * record['accuracy']:.1f}"
        assert row[2] == f"{record['loss']:.3f}" and row[3] == show_epsilon(record["epsilon"])
        assert row[4] == (", ".join(map(str, record["clients"])) or "–") and row[6] == f"{record['bytes_sent']:,}"
    dots = [t for t in found.text["title"] if t.startswith("after the round")]
    assert dots == [f"after the round: round {r['round']}, {100 * r['accuracy']:.1f} %" for r in history]
    dots = [t for t in found.text["title"] if t.startswith("most exposed")]
    assert dots == [f"most exposed client: round {r['round']}, {show_epsilon(r['epsilon'])}" for r in history]
    for row, client in zip(found.tables["Each client"][1:], run.plan.clients, strict=True):
        assert row[1:5] == [str(client.records), f"{client.sample_rate:.4f}", str(client.steps),
                            f"{client.noise_multiplier:.3f}"]  # fmt: skip
        assert row[5] == show_epsilon(history[-1]["epsilons"][client.client])
    released = {row[0]: row for row in found.tables["What was released"][1:]}
    assert [int(released[c.name][2]) for c in run.clients if c.ledger.steps] == [
        c.ledger.steps for c in run.clients if c.ledger.steps
    ]
    shown = dict(found.tables["Settings, versions and fingerprints"][1:])
    assert shown["local_steps"] == "4" and shown["torch"] == torch.__version__
    assert show_epsilon(history[-1]["epsilon"]) in found.text["dd"] and "0.0001" in " ".join(found.text["p"])


def test_the_distribution_is_the_one_that_was_dealt(run, folder):
    rows = page(folder).tables["Records of each class at each client"][1:]
    labels = run.task.data.train.labels
    for row, part in zip(rows, run.task.parts, strict=True):
        assert [int(n) for n in row[1:]] == [int((labels[torch.as_tensor(part)] == c).sum()) for c in range(10)]


def test_what_is_not_private_is_marked_and_left_out_of_the_public_page(folder, tmp_path):
    whole = page(folder)
    public = page(folder, public=True, out=tmp_path / "public.html")
    assert sum(text.strip() == MARK for text in whole.text["p"]) == 3 and "Parts of this page" in whole.words
    private = {"Records of each class at each client", "Norm of a record's gradient / C", "Each client's round"}
    rest = set(whole.tables) - private - {"Time and traffic"} | {"Traffic"}
    assert private <= set(whole.tables) and rest == set(public.tables)
    assert MARK not in public.words and "left out*" not in str(public.tables["Each client"])
    assert public.text["h2"] == SECTIONS
    marked = {"data", "partition", "whole run, seconds", "mean of a round, seconds", "seconds"}
    cells = {cell for rows in whole.tables.values() for row in rows for cell in row}
    assert {cell.removesuffix(SHORT) for cell in cells if cell.endswith(SHORT)} == marked
    assert SHORT not in public.words


def test_a_public_page_is_the_same_whatever_the_private_figures_are(folder, tmp_path):
    """One other label has other fingerprints, other draws take another time; on a page alone and beside a run."""
    other = shutil.copytree(folder, tmp_path / "other" / "first")
    about, books, history = (json.loads((other / "config.json").read_text()),
                             json.loads((other / "ledger.json").read_text()), metrics(other))  # fmt: skip
    about["fingerprints"] |= {"data": "0" * 32, "partition": "1" * 32}
    for book in books["clients"].values():
        book["nonfinite_samples"] += 77
    for record in history:
        record |= {"seconds": 1000.0 * record["round"] + 1, "not_private": {"clients": {}}}
    (other / "config.json").write_text(json.dumps(about))
    (other / "ledger.json").write_text(json.dumps(books))
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    third, out = shutil.copytree(folder, tmp_path / "third"), tmp_path / "page.html"
    for beside in ((), (third,)):
        for public in (True, False):
            one, two = (write_report(run, *beside, out=out, public=public).read_text() for run in (folder, other))
            assert (one == two) is public
    assert about["fingerprints"]["base model"] in page(folder, public=True, out=out).words


def test_the_guarantee_is_the_ledgers_also_where_the_metrics_are_behind(folder, tmp_path):
    """As after a kill between a checkpoint and its metrics: what was spent is what the ledgers say."""
    history = metrics(folder)
    spent, before = show_epsilon(history[-1]["epsilon"]), show_epsilon(history[1]["epsilon"])
    assert spent != before and "The ledgers hold more steps" not in page(folder).words
    books = json.loads((folder / "ledger.json").read_text())
    for book in books["clients"].values():
        book["epsilon"] = 0.5  # what the file claims beside a ledger is not the ledger
    (folder / "ledger.json").write_text(json.dumps(books))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history[:2]))
    found = page(folder)
    assert spent in found.text["dd"] and "1 of 3" in found.text["dd"] and "The ledgers hold more steps" in found.words
    assert any(f"({spent}, 0.0001)" in text for text in found.text["p"])
    for caption in ("Each client", "What was released"):
        column = found.tables[caption][0].index("ε spent")
        assert {row[column] for row in found.tables[caption][1:]} == {show_epsilon(e) for e in history[-1]["epsilons"]}
    both = page(folder, shutil.copytree(folder, tmp_path / "b"), out=tmp_path / "c.html")
    assert [row[3] for row in both.tables["Every run"][1:]] == [spent, spent]
    history[1]["epsilon"] = 7.5  # and of two that disagree the larger counts
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history[:2]))
    assert "ε = 7.50" in page(folder).text["dd"]


def test_what_an_interrupted_round_has_paid_is_in_the_guarantee(world, tmp_path):
    """Ctrl-C once the first update of a round is stored."""
    settings = SMALL | {"model": world[0], "dataset": world[1], "clients": 2, "fraction": 1.0, "rounds": 2}
    run, steps = Run.start(prepare(make_config(settings)), tmp_path / "run"), []

    def stop():
        steps.append(1)
        if len(steps) > 3 * SMALL["local_steps"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(Watch(on_step=stop))
    shown, spent = metrics(run.folder)[-1], max(c.ledger.epsilon(1e-4) for c in run.clients)
    assert shown["round"] == 1 and show_epsilon(shown["epsilon"]) != show_epsilon(spent)
    assert show_epsilon(spent) in page(run.folder).text["dd"]


def test_several_runs_beside_each_other(world, folder, tmp_path, capsys, monkeypatch):
    settings = SMALL | {"model": world[0], "dataset": world[1], "epsilon": math.inf, "rounds": 1}
    Run.start(prepare(make_config(settings | {"method": "ffa-lora"})), tmp_path / "a" / "first").train()
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(folder), str(tmp_path / "a" / "first")]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    found = Page((tmp_path / "comparison.html").read_text())
    rows = found.tables["Every run"][1:]
    for row, one in zip(rows, (folder, tmp_path / "a" / "first"), strict=True):
        last = metrics(one)[-1]
        assert row[1] == f"{100 * last['accuracy']:.1f}" and row[5] == str(last["round"])
        assert row[6] == f"{sum(record['bytes_sent'] for record in metrics(one)):,}"
    assert [row[0] for row in rows] == ["first", "first (2)"] and [row[3] for row in rows][1] == "ε = ∞"
    differ = {row[0]: row[1:] for row in found.tables["Settings that differ"][1:]}
    assert differ["method"] == ["la-lora-unfiltered", "ffa-lora"] and "rank" not in differ
    assert found.text["h2"].count("What is guaranteed") == 2 and "guarantees nothing" in found.words


def test_where_clients_have_models_of_their_own_accuracy_is_called_a_mean(world, folder, tmp_path):
    settings = SMALL | {"model": world[0], "dataset": world[1], "epsilon": math.inf, "rounds": 1}
    own = Run.start(prepare(make_config(settings | {"method": "fedsa-lora"})), tmp_path / "own")
    out = io.StringIO()
    Display(console=Console(file=out, width=200)).begin(own)
    own.train()
    mean, one = page(tmp_path / "own"), page(folder)
    assert "mean test accuracy of the clients' models" in mean.text["dt"] and "test accuracy" in one.text["dt"]
    assert "Mean test accuracy of the clients' models " in mean.text["figcaption"]
    assert mean.tables["Every round"][0][1:3] == ["mean accuracy, %", "mean test loss"]
    said = ("no one model", "mean", "means over")
    assert all(word in mean.words for word in said) and not any(word in one.words for word in said[::2])
    assert "means over all clients' models" in out.getvalue()
    both = page(folder, tmp_path / "own", out=tmp_path / "both.html")
    assert [row[1].endswith("*") for row in both.tables["Every run"][1:]] == [False, True]
    assert "own (mean over clients)" in both.text["li"] and "* own: the mean over the clients' models." in both.words


def test_hostile_names_are_text(folder, tmp_path):
    about = json.loads((folder / "config.json").read_text())
    about["settings"] |= {"dataset": HOSTILE, "model": HOSTILE}
    (folder / "config.json").write_text(json.dumps(about))
    history = metrics(folder)
    history[0]["not_private"]["labels"]["classes"] = [HOSTILE] * 10
    history[1]["dropped"] = {"1": HOSTILE}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    other = shutil.copytree(folder, tmp_path / "<b onclick=alert(3)>'\"&amp;")
    for text in (write_report(folder).read_text(), write_report(folder, other, out=tmp_path / "c.html").read_text()):
        found = Page(text)
        assert {tag for tag, _ in found.tags} & {"script", "img", "b"} == set()
        assert not {name for _, given in found.tags for name in given if name.startswith("on")}
        assert HOSTILE in found.words and HOSTILE in str(found.tables["Every round"]).replace("\\'", "'")


def test_a_broken_chain_is_no_report(folder, capsys):
    text = (folder / "ledger.json").read_text()
    (folder / "ledger.json").write_text(text.replace('"count": ', '"count": 1', 1))
    assert main(["report", str(folder)]) == 2
    assert "the report would not be true: client" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"round": 0}'])
def test_half_a_run_is_said(folder, text, capsys):
    (folder / "metrics.jsonl").write_text("")
    if text:
        (folder / "config.json").write_text(text)
    assert main(["report", str(folder)]) == 2
    assert "is not a complete run" in capsys.readouterr().err


def test_a_server_that_has_no_ledgers_says_so(folder):
    """As the Flower server's folder: ledgers and sizes stay with the clients."""
    about = json.loads((folder / "config.json").read_text())
    del about["plan"]
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "ledger.json").unlink()
    drop = ("epsilons", "not_private", "diagnostics")
    history = [{k: v for k, v in r.items() if k not in drop} | {"epsilon": None} for r in metrics(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    found = page(folder)
    assert found.text["h2"] == SECTIONS and "Each client keeps its own ledger." in found.words
    assert "ε = " not in found.words.replace("ε = 6.0", "") and MARK not in found.words


# ---------------------------------------------------------------- what the run notes for it


def test_notes_are_the_round_s_own_norms(world, tmp_path):
    """Against float64 gradients of single records: without noise and with q = 1 everything is known."""
    settings = SMALL | {"model": world[0], "dataset": world[1], "epsilon": math.inf, "clients": 2, "fraction": 1.0,
                        "batch_size": 80, "min_records": 80, "local_steps": 1, "rounds": 1, "method": "dp-lora",
                        "max_grad_norm": 0.5, "partition": "iid", "train_head": "yes"}  # fmt: skip
    task = prepare(make_config(settings))
    run = Run.start(task, tmp_path / "run")
    model, norms = task.classifier.model.double().train(), {}
    for client in run.clients:
        for i in range(len(client.records)):
            x, y = task.classifier.collate([client.records[i]])
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x.double()).logits, y).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.setdefault(client.name, []).append(float(torch.stack([g.norm() for g in grads]).norm()) / 0.5)
        model.zero_grad()
    model.float()
    run.train()
    notes = metrics(tmp_path / "run")[1]["not_private"]["clients"]
    for name, found in norms.items():
        found = torch.tensor(found, dtype=torch.float64)
        assert notes[name]["drawn"] == 80
        assert notes[name]["clipped"] == pytest.approx(float((found > 1).double().mean()))
        expected = torch.quantile(found, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        assert notes[name]["norms"] == pytest.approx(expected, rel=1e-4)


def test_a_private_run_s_gradients_are_noise_where_noise_is_large(world, tmp_path):
    """With σ far above C the released norm is the noise's, by a formula that smoothing does not upset."""
    settings = SMALL | {"model": world[0], "dataset": world[1], "epsilon": 0.05, "rounds": 1, "local_steps": 20,
                        "rank": 16}  # fmt: skip
    Run.start(prepare(make_config(settings)), tmp_path / "run").train()
    found = metrics(tmp_path / "run")[1]["diagnostics"]
    assert found and all(note["released"][1] == pytest.approx(1.0, abs=0.05) for note in found.values())


@pytest.mark.parametrize("length", [4, 5, 9, 64])
def test_the_noise_that_the_filter_leaves(length):
    matrix = smooth(torch.eye(length, dtype=torch.float64), 0)
    assert noise_variance((3, length), 1) == pytest.approx(3 * float(matrix.square().sum()))
    assert noise_variance((3, length), None) == 3 * length


def test_nothing_of_it_is_in_what_a_client_sends(world, tmp_path, monkeypatch):
    sent, train_round = [], Client.train_round
    monkeypatch.setattr(Client, "train_round", lambda self, *a: sent.append(train_round(self, *a)) or sent[-1])
    settings = make_config(SMALL | {"model": world[0], "dataset": world[1], "rounds": 1})
    run = Run.start(prepare(settings), tmp_path / "run")
    run.train()
    assert sent and all(set(update) == set(run.at.state) for update in sent)  # la-lora: every factor, nothing else


# ---------------------------------------------------------------- drawings


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0), (55.7, 63.2), (1e-4, 3e-4), (0, 1500), (2, 2), (-1, 4)])
@pytest.mark.parametrize("whole", [False, True])
def test_ticks_are_round_and_hold_the_range(low, high, whole):
    found = charts.ticks(low, high, 5, whole)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    assert found[0] <= low + 1e-12 and (whole or found[-1] >= high - 1e-12)
    assert not whole or all(t == int(t) for t in found)


def test_points_stand_where_their_numbers_say():
    line = charts.Line("l", [(0, 0.0), (1, 5.0), (2, 10.0)])
    drawn = charts.line_chart("t", [line], x_label="x", y_label="y")
    spots = [tuple(map(float, spot)) for spot in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (x0, y0), (x1, y1), (x2, y2) = spots
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT) and (y0, y2) == (
        charts.HEIGHT - charts.BOTTOM, charts.TOP,
    )  # fmt: skip
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)

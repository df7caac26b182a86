"""``lalora reproduce``: a tiny grid end to end, resumed in pieces; tuning kept apart; bytes and costs."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import digits_npz, vit_folder

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run
from lalora_kernels.reproduce import cost, runs, tables
from lalora_kernels.reproduce.command import _publish, answer
from lalora_kernels.reproduce.presets import (
    PRESETS,
    Preset,
    Question,
    tuning_key,
)

ARMS = {"dp": {"method": "dp-lora", "smoothing": "none"}, "la": {"method": "la-lora", "smoothing": "binomial5"}}
QUESTION = Question("Which?", ARMS, "la", (3.0,))
TINY = Preset("tiny", {}, {"digits": {}}, seeds=(0, 1), tuning_seed=7, tuning={"lr": (0.25, 0.5)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {
        "model": vit_folder(folder / "vit"), "dataset": digits_npz(folder / "d.npz", 80, 20), "clients": 2,
        "fraction": 1.0, "rounds": 2, "local_steps": 2, "rank": 2, "batch_size": 8, "partition": "iid", "device": "cpu",
        "train_head": "yes", "lr": 0.1,
    }  # fmt: skip


def quiet(text):
    pass


def rows(out, number=1):
    return [json.loads(line) for line in (out / f"question-{number}.jsonl").read_text().splitlines()]


def test_a_tiny_grid_is_tuned_trained_and_reported_and_nothing_is_done_twice(base, tmp_path, monkeypatch):
    assert answer(1, QUESTION, TINY, base, tmp_path, tune=True, say=quiet)
    found = rows(tmp_path)
    assert [(r["arm"], r["seed"]) for r in found] == [("dp", 0), ("dp", 1), ("la", 0), ("la", 1)]
    assert all(r["epsilon"] == 3.0 >= r["epsilon_spent"] > 2.5 for r in found)
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert sorted(tuned) == ["dp-lora, plain, ε = 3", "la-lora, filtered, ε = 3"]
    for choice in tuned.values():  # the same budget for each, and the best of it
        assert [t["lr"] for t in choice["tried"]] == [0.25, 0.5] and choice["seed"] == 7
        best = min(choice["tried"], key=lambda t: t["loss"])
        assert choice["settings"] == {"lr": best["lr"]}
    for r in found:
        assert r["settings"]["lr"] == tuned[tuning_key(ARMS[r["arm"]], 3.0)]["settings"]["lr"]
        assert r["seed"] != 7
    text = (tmp_path / "question-1.md").read_text()
    accuracies = [100 * r["accuracy"] for r in found if r["arm"] == "dp"]
    assert f"| dp | {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f} |" in text
    assert "same budget on seed 7" in text and "<svg" in (tmp_path / "question-1.svg").read_text()
    monkeypatch.setattr(Run, "train", lambda *a: pytest.fail("a complete run was trained again"))
    assert answer(1, QUESTION, TINY, base, tmp_path, tune=True, say=quiet)
    shown = []
    assert answer(1, QUESTION, TINY, base, tmp_path, tune=True, against="dp", say=shown.append)
    assert (tmp_path / "question-1.md").read_text() == text  # the question's own table stays
    assert (tmp_path / "question-1-against-dp.md").read_text() == shown[-1]
    mine, theirs = ({r["seed"]: 100 * r["accuracy"] for r in found if r["arm"] == arm} for arm in ("la", "dp"))
    assert f"| la | {tables.cell(mine)} | {tables.difference(mine, theirs)} |" in shown[-1]
    assert "| − dp, ε = 3 |" in shown[-1]
    with pytest.raises(BadInput, match="no arm 'ffa' in this question; there are dp, la"):
        answer(1, QUESTION, TINY, base, tmp_path, against="ffa", say=quiet)


def test_results_are_published_and_put_into_a_page(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, settings=base | {"rounds": 1}))
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- evidence-tiny-1:begin -->\nold\n<!-- evidence-tiny-1:end -->\nbelow\n")
    command = "reproduce tiny --arms la-lora --epsilons inf --seeds 0".split()
    command += ["--out", str(tmp_path / "out"), "--publish", str(tmp_path / "results"), "--into", str(page)]
    assert main(command) == 0
    made = (tmp_path / "out" / "question-1.md").read_text()
    assert (tmp_path / "results" / "tiny-question-1.md").read_text() == made
    assert sorted(p.suffix for p in (tmp_path / "results").iterdir()) == [".jsonl", ".md", ".svg"]
    heading, _, table = made.partition("\n")
    assert heading.startswith("## Four methods") and "| la-lora |" in table
    text = page.read_text()
    assert text.startswith("above\n<!-- evidence-tiny-1:begin -->\n\n" + table.strip())
    assert text.endswith("\n\n<!-- evidence-tiny-1:end -->\nbelow\n") and "old" not in text
    page.write_text("<!-- evidence-tiny-1-against-la-lora:begin -->\n<!-- evidence-tiny-1-against-la-lora:end -->\n")
    assert main([*command, "--against", "la-lora"]) == 0
    assert (tmp_path / "results" / "tiny-question-1-against-la-lora.md").read_text() == made
    assert (tmp_path / "results" / "tiny-question-1.md").read_text() == made and table.strip() in page.read_text()
    assert main("reproduce tiny --question 6 --against la-lora".split()) == 2
    assert "question 6 has costs" in capsys.readouterr().err


def test_what_was_published_is_not_run_again_anywhere(base, tmp_path, monkeypatch, capsys):
    """A second machine: other folders, the published files; it trains the seed that is missing and shows them all."""
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, settings=base | {"rounds": 1}))
    command = "reproduce tiny --question 2 --tune --epsilons 3 --arms alternation --publish".split()
    assert main([*command, str(tmp_path / "results"), "--out", str(tmp_path / "one"), "--seeds", "0"]) == 0
    first = (tmp_path / "results" / "tiny-question-2.jsonl").read_text()
    assert len(first.splitlines()) == 2  # and what it is compared with
    copied = shutil.copy(base["dataset"], tmp_path / Path(base["dataset"]).name)
    elsewhere = base | {"rounds": 1, "dataset": str(copied)}
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, settings=elsewhere))
    trained = []
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda run, watch: (trained.append(run.task.config.seed), train(run, watch)))
    assert main([*command, str(tmp_path / "results"), "--out", str(tmp_path / "two"), "--seeds", "1"]) == 0
    assert trained == [1, 1]
    both = (tmp_path / "results" / "tiny-question-2.jsonl").read_text().splitlines()
    assert set(first.splitlines()) < set(both) and len(both) == 4
    text = (tmp_path / "results" / "tiny-question-2.md").read_text()
    assert "seeds 0, 1;" in text and "Incomplete: 4 of 16 runs." in text
    assert main([*command, str(tmp_path / "results"), "--out", str(tmp_path / "three"), "--seeds", "0", "1"]) == 0
    assert trained == [1, 1] and not (tmp_path / "three" / "runs").exists()
    other = json.dumps(json.loads(both[0]) | {"seed": 9, "settings": {"method": "flora", "seed": 9}})
    published = tmp_path / "results" / "tiny-question-2.jsonl"
    published.write_text("\n".join([*both, other]) + "\n")  # of an arm or a seed that nobody asks for now
    assert main([*command, str(tmp_path / "results"), "--out", str(tmp_path / "three"), "--seeds", "0", "1"]) == 0
    assert published.read_text().splitlines() == [*both, other]


def test_metrics_that_a_crash_left_behind_are_mended(base, tmp_path):
    question = replace(QUESTION, arms={"la": ARMS["la"]})
    assert answer(1, question, TINY, base, tmp_path, seeds=[0], say=quiet)
    first = rows(tmp_path)
    (path,) = tmp_path.glob("runs/*/metrics.jsonl")
    whole = path.read_text()
    for kept in ("".join(whole.splitlines(True)[:-1]), whole[:-9], ""):
        path.write_text(kept)
        assert answer(1, question, TINY, base, tmp_path, seeds=[0], say=quiet)
        assert rows(tmp_path) == first and path.read_text() == whole


def test_a_run_that_ends_without_a_result_stops_no_other(base, tmp_path, monkeypatch):
    read, said = runs._read_result, []
    monkeypatch.setattr(runs, "_read_result", lambda job, folder: None if job.arm == "dp" else read(job, folder))
    assert not answer(1, QUESTION, TINY, base, tmp_path, seeds=[0], say=said.append)
    assert [r["arm"] for r in rows(tmp_path)] == ["la"]
    lost = next((tmp_path / "runs").glob("dp-lora-*"))
    assert any(line.startswith(f"{lost.name} has ended") and f"remove {lost}" in line for line in said)


def test_tuning_is_added_to_what_was_published_which_counts_where_both_have_it(tmp_path):
    (tmp_path / "out").mkdir(), (tmp_path / "results").mkdir()
    published = tmp_path / "results" / "tiny-tuned.json"
    published.write_text(json.dumps({"a": {"settings": {"lr": 1.0}}, "b": {"settings": {"lr": 2.0}}}))
    own = tmp_path / "out" / "tuned.json"
    own.write_text(json.dumps({"b": {"settings": {"lr": 9.0}}, "c": {"settings": {"lr": 3.0}}}))
    both = {key: {"settings": {"lr": lr}} for key, lr in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    assert runs.read_tuned(published, own) == both  # what is trained is what is published
    _publish(tmp_path / "out", "question-1", "tiny", tmp_path / "results", None)
    assert list(json.loads(published.read_text()).items()) == list(both.items())
    tried = {"tried": [{"lr": 1.0}]}
    published.write_text(json.dumps({"a": tried, "b": {"tried": [{"lr": 2.0}]}, "c": tried | {"then": []}}))
    own.write_text(json.dumps(dict.fromkeys("abc", tried | {"then": [{"lr": 5.0}]})))
    found = runs.read_tuned(published, own)  # what goes on from what is published, and nothing else, is added to it
    assert found == {"a": tried | {"then": [{"lr": 5.0}]}, "b": {"tried": [{"lr": 2.0}]}, "c": tried | {"then": []}}


def test_batch_and_bound_are_tuned_on_top_of_the_grid_for_questions_that_ask_for_it(base, tmp_path, monkeypatch):
    """At one ε, for all of them."""
    preset = replace(TINY, seeds=(0,), then=(({"batch_size": 4}, {"batch_size": 16}), ({"@C": 0.25},)))
    question = replace(QUESTION, arms={"la": ARMS["la"]}, then=True)
    base = base | {"rounds": 1, "max_grad_norm": 0.5}
    assert answer(1, question, preset, base, tmp_path, tune=True, epsilons=[1.0], say=quiet)
    path, (one, three) = tmp_path / "tuned.json", (f"la-lora, filtered, ε = {e}" for e in (1, 3))
    tuned = json.loads(path.read_text())
    found = tuned[three]["then"]
    grid = {"with": {}, "loss": min(t["loss"] for t in tuned[three]["tried"])}
    before = min([grid, *found[:2]], key=lambda t: t["loss"])["with"]  # the bound is tried with the best batch
    assert [t["with"] for t in found] == [*preset.then[0], before | {"@C": 0.25}] and "then" not in tuned[one]
    lr, names = tuned[three]["settings"]["lr"], {p.parent.name for p in tmp_path.glob("runs/*/config.json")}
    last = {**before, "max_grad_norm": 0.25, "lr": 2 * lr}
    for settings, line in zip((*preset.then[0], last), found):
        job = runs.Job("tuning", make_config(base | ARMS["la"] | {"lr": lr, "seed": 7} | settings))
        assert job.name in names and runs.result_of(job, tmp_path)["loss"] == line["loss"]
    assert "then batch size and C for each method at ε = 3," in (tmp_path / "question-1.md").read_text()

    trained = []
    monkeypatch.setattr(runs, "_one", lambda job, *a: trained.append(job.config))
    path.write_text(json.dumps({one: tuned[one], three: {k: tuned[three][k] for k in ("settings", "tried", "seed")}}))
    answer(1, question, preset, base, tmp_path, tune=True, epsilons=[1.0], say=quiet)
    assert json.loads(path.read_text()) == tuned and not trained  # its runs are there: they are read
    tuned[three]["then"][1:] = [{"with": {"@C": 0.25}, "accuracy": 0.0, "loss": 0.0}]
    tuned[one]["settings"] = tuned[one]["tried"][0] | {"loss": 0.0}
    tuned[one]["tried"] = [tuned[one]["settings"]]
    path.write_text(json.dumps(tuned))
    for alone, by in ((False, "loss"), (True, "loss"), (False, "accuracy")):
        answer(1, question, preset, base, tmp_path, epsilons=[1.0], seeds=[5], by=by, alone=alone, say=quiet)
    assert [(c.max_grad_norm, c.lr) for c in trained] == [(0.25, 0.5), (0.5, 0.25), (0.5, 0.25)]
    assert {p.stem for p in tmp_path.glob("*.md")} == {
        "question-1", "question-1-grid-alone", "question-1-by-accuracy",
    }  # fmt: skip
    del tuned[three]["then"]
    path.write_text(json.dumps(tuned))
    answer(1, question, preset, base, tmp_path, epsilons=[1.0], seeds=[5], say=quiet)
    assert trained[-1].max_grad_norm == 0.5


def test_a_table_tells_what_was_tuned_with_less(base, tmp_path):
    question = replace(QUESTION, arms={"la": ARMS["la"]}, then=True)
    tried = [{"lr": 0.25, "accuracy": 0.5, "loss": 1.0}]
    (tmp_path / "tuned.json").write_text(json.dumps({"la-lora, filtered, ε = 3": {"tried": tried}}))
    preset, base = replace(TINY, seeds=(0,), then=(({"batch_size": 4},),)), base | {"rounds": 1}
    assert answer(1, question, preset, base, tmp_path, say=quiet)
    assert "Not yet tuned in batch size: la-lora, filtered, ε = 3." in (tmp_path / "question-1.md").read_text()


def test_a_run_with_measures_serves_a_question_without_and_not_the_other_way_round(base, tmp_path):
    config = make_config(base | ARMS["la"] | {"rounds": 1})
    plain, measured = runs.Job("la", config), runs.Job("la", config, measure=True)
    assert list(runs.train([plain], tmp_path)) == [plain]
    line = runs.result_of(plain, tmp_path)
    assert runs.result_of(measured, tmp_path) is None
    assert runs.result_of(measured, tmp_path / "else", {runs.same(line["settings"]): line}) is None
    shutil.rmtree(tmp_path / "runs")
    assert list(runs.train([measured], tmp_path)) == [measured]
    line = runs.result_of(plain, tmp_path)
    assert line["run"] == measured.name and line["measures"]["eigenvalue"]
    assert runs.result_of(measured, tmp_path / "else", {runs.same(line["settings"]): line}) == line
    assert list(runs.train([plain, measured], tmp_path)) == []


def test_measuring_a_published_run_again_does_not_change_what_was_published(base, tmp_path):
    config = make_config(base | ARMS["la"])
    told = {"settings": runs._told(config), "arm": "la"}
    first, again = told | {"accuracy": 0.5}, told | {"accuracy": 0.6, "measures": {"eigenvalue": 1.0}}
    runs.save_lines([first], tmp_path / "tiny-question-1.jsonl")
    runs.save_lines([again], tmp_path / "tiny-question-5.jsonl")
    known = runs.read_known(tmp_path, "tiny")
    assert runs.result_of(runs.Job("la", config), tmp_path, known) == first
    assert runs.result_of(runs.Job("la", config, measure=True), tmp_path, known) == again


POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from lalora_kernels.reproduce.runs import _follow_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _follow_parent) as pool:
        pool.submit(os.getpid).result()
        print("started", flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    with subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        assert not parent.stdout.read()  # that ends with the worker, which holds the pipe as well


def test_pieces_end_between_rounds_and_reach_the_end(base, tmp_path, monkeypatch):
    question, preset = replace(QUESTION, arms={"la": ARMS["la"]}), replace(TINY, seeds=(0,))
    base = base | {"rounds": 3}
    one = runs.jobs_of(question, base, {}, [3.0], [0])[0]
    # the clock jumps past the deadline as soon as the piece has begun
    for complete in (1, 2, 3):
        times = iter([0.0, 0.0])
        monkeypatch.setattr(runs.time, "time", lambda times=times: next(times, 100.0))
        done = answer(1, question, preset, base, tmp_path, deadline=10.0, say=quiet)
        lines = (tmp_path / "runs" / one.name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["round"] == complete
        assert done is (complete == 3)
        assert ("Incomplete" in (tmp_path / "question-1.md").read_text()) is not done
    monkeypatch.undo()
    result = runs.result_of(one, tmp_path)
    assert 0 < result["epsilon_spent"] <= 3.0
    assert not answer(1, question, replace(preset, seeds=(1,)), base, tmp_path, deadline=0.0, say=quiet)


def test_the_seed_that_was_tuned_on_is_refused(base, tmp_path):
    with pytest.raises(BadInput, match="seed 7 is what the settings are tuned on"):
        answer(1, QUESTION, TINY, base, tmp_path, seeds=[0, 7], say=quiet)
    for preset in PRESETS.values():
        assert preset.tuning_seed not in preset.seeds


@pytest.mark.parametrize("flags", ["--question 2", "--question 6", "--by accuracy"])
def test_the_grid_alone_is_nothing_new_for_what_uses_nothing_else(flags, capsys):
    assert main(["reproduce", "small-vision", "--grid-alone", *flags.split()]) == 2
    assert "--grid-alone is what all but question 1 by loss do anyway; leave it out" in capsys.readouterr().err


def test_two_processes_train_what_one_does(base, tmp_path):
    jobs = runs.jobs_of(QUESTION, base | {"rounds": 1, "local_steps": 2, "epsilon": math.inf}, {}, [math.inf], [0])
    assert {job.name for job in runs.train(jobs, tmp_path, 2)} == {job.name for job in jobs}
    assert [r["epsilon"] for r in runs.results_of(jobs, tmp_path)] == ["inf", "inf"]
    assert list(runs.train(jobs, tmp_path, 2)) == []


def test_measured_runs_have_a_second_table(base, tmp_path):
    question = replace(QUESTION, measure=True)
    assert answer(5, question, replace(TINY, seeds=(0,)), base, tmp_path, say=quiet)
    second = (tmp_path / "question-5.md").read_text().split("\n\n| arm | ε |")[1].splitlines()
    names = [name.strip() for name in second[0].split("|")[:-1]]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[3:-1]] for line in second[2:4]}
    found = {arm: dict(zip(names, map(float, values))) for arm, values in cells.items()}
    assert found["dp"]["noise, N_B N_A"] > 0 == found["la"]["noise, N_B N_A"]
    assert all(0 < v["filter gain, A"] < 1.92 > v["filter gain, random order, B"] > 0 for v in found.values())
    assert all(v["sigma"] > 0.5 and v["eigenvalue"] and -1 <= v["cosine"] <= 1 for v in found.values())


# ---------------------------------------------------------------- cost


def test_bytes_of_a_round(base):
    # 2 layers of 16 -> 16, 24 and back: q, k, v, out, 16 -> 24, 24 -> 16; r = 2, two clients; a head of 16 x 10 + 10
    sizes = 2 * [(16, 16)] * 4 + 2 * [(24, 16), (16, 24)]
    head, A, B = 4 * 170, sum(4 * 2 * n for m, n in sizes), sum(4 * 2 * m for m, n in sizes)
    up = lambda method: cost.round_bytes(make_config(base | {"method": method}), 10, "image")  # noqa: E731
    assert up("dp-lora") == {"up": head + A + B, "down": head + A + B}
    assert up("ffa-lora") == {"up": head + B, "down": head + B}
    assert up("rolora")["up"] == head + (A + B) // 2
    assert up("fedsvd") == {"up": head + B, "down": head + A + B}
    assert up("fedsa-lora") == {"up": head + A, "down": head + A}
    assert up("flora") == {"up": head + A + B, "down": head + 2 * (A + B)}
    assert up("fedex-lora") == {"up": head + A + B, "down": head + 3 * (A + B)}


def test_costs_are_medians_of_passes_and_ratios_within_a_pass(base, tmp_path, monkeypatch):
    """Of made-up times; whose steps are the same is measured once; an interrupted measurement goes on."""
    asked = []

    def dry_run(config, classes, kind, contender):
        asked.append((config.rank, contender))
        slow = {0: 1.0, 1: 3.0, 2: 2.0}[len(asked) // (len(cost.TIMED) * len(cost.RANKS)) % 3]  # a noisy machine
        seconds = slow * {"opacus": 2.0, "dp-lora": 1.0}.get(contender, 0.5)
        return {"factors": {"B": seconds, "A": seconds}, "peak": 9e8, "step": 2e8 * seconds / slow, "device": None}

    monkeypatch.setattr(cost, "dry_run", dry_run)
    config, path = make_config(base | {"local_steps": 10}), tmp_path / "c.jsonl"
    for _ in itertools.islice(cost.measure(config, 10, "image", path, None), 20):
        pass
    assert not cost.complete(list(map(json.loads, path.read_text().splitlines())))
    list(cost.measure(config, 10, "image", path, None))
    lines = list(map(json.loads, path.read_text().splitlines()))
    assert cost.complete(lines)
    assert len(asked) == len(lines) == len({(x["pass"], x["rank"], x["contender"]) for x in lines})
    assert ("flora" in cost.CONTENDERS) and not any(contender == "flora" for _, contender in asked)
    time, memory, sent = cost.markdown(lines, config, 10, "image").split("\n\n| method ")[1:]
    # 10 steps: medians of 1, 3 and 2 times 10 s; the ratios do not see how slow a pass was
    assert "| dp-lora | 20 (0.50 [0.50, 0.50]) |" in time and "| dp-lora in Opacus | 40 |" in time
    assert "| flora | 20 (0.50" in time and "| fedsvd | 10 (0.25" in time
    assert "| la-lora | 100 (0.25 [0.25, 0.25]) |" in memory
    up = cost.round_bytes(replace(config, rank=4, method="ffa-lora"), 10, "image")
    assert f"| ffa-lora | {up['up'] / 1e6:.2f} / {up['down'] / 1e6:.2f} |" in sent
    cost.figure(lines, config, tmp_path / "c.svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in cost.TIMED if name != cost.OPACUS)

"""``lalora plan``: what it says before a run is what the run then does; what it measures; what it refuses."""

import itertools
import json
import shutil

import pytest
from small import bert_folder, digits_npz, vit_folder

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.dry_run import OPACUS, dry_run, measure
from lalora_kernels.federated.client import get_state
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.methods import METHODS
from lalora_kernels.federated.run import Run, prepare
from lalora_kernels.models import load_model
from lalora_kernels.placeholders import placeholder_model, placeholder_records

SMALL = {
    "clients": 3, "fraction": 0.6, "rounds": 3, "local_steps": 3, "rank": 2, "batch_size": 8, "epsilon": 4.0,
    "delta": 1e-4, "dirichlet_alpha": 2.0, "device": "cpu", "optimizer": "adamw",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]


def planned(capsys, *args: str) -> dict:
    assert main(["plan", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *args: str) -> str:
    assert main(["plan", *args]) == 2
    return capsys.readouterr().err


def test_an_adapted_embedding_counts_among_what_is_trained(tmp_path, capsys):
    model = bert_folder(tmp_path / "bert")
    settings = SMALL | {"model": model, "targets": "word_embeddings", "train_head": "no"}
    plan = planned(capsys, *flags(settings), "--records", "160", "--classes", "2", "--no-dry-run")
    about = json.loads((tmp_path / "bert/config.json").read_text())
    a, b = (SMALL["rank"] * about[size] for size in ("vocab_size", "hidden_size"))
    counts = {row["method"]: row["trainable_parameters"] for row in plan["ranks"][0]["methods"]}
    assert counts == {"dp-lora": a + b, "ffa-lora": b, "rolora": a + b, "la-lora": a + b}


@pytest.mark.parametrize("method, head", list(zip(METHODS, ["no", "yes", "yes", "no"])))
def test_the_plan_is_what_the_run_then_does(world, tmp_path, capsys, method, head):
    # these layers' A and B differ in size, so that rounds of RoLoRA do
    settings = SMALL | {"model": world[0], "dataset": world[1], "train_head": head, "targets": "q_proj,fc1"}
    plan = planned(capsys, *flags(settings), "--no-dry-run")
    run = Run.start(prepare(make_config(settings | {"method": method})), tmp_path / "run")
    before = get_state(run.task.classifier.model)
    run.train()
    assert plan["clients"] == [vars(client) for client in run.plan.clients]
    assert plan["clients"] == json.loads((tmp_path / "run/config.json").read_text())["plan"]["clients"]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    curve = [{key: record[key] for key in ("round", "epsilon", "epsilons")} for record in metrics]
    assert plan["epsilon_curve"] == curve and 3.9 < curve[-1]["epsilon"] <= 4.0
    row = next(row for row in plan["ranks"][0]["methods"] if row["method"] == method)
    assert row["bytes_sent_per_round"] == [record["bytes_sent"] for record in metrics[1:]]
    assert row["bytes_sent"] == sum(record["bytes_sent"] for record in metrics)
    after = run.at.state
    assert row["trainable_parameters"] == sum(v.numel() for k, v in after.items() if not v.equal(before[k]))
    assert row["private_steps"] == sum(client.ledger.steps for client in run.clients)


@pytest.mark.parametrize("more", [{"records": 0}, {"records": 10**14}, {"classes": 1}, {"classes": 10**12}])
def test_records_and_classes_that_nobody_has_are_refused(capsys, more):
    asked = {"records": 300, "classes": 10} | more
    told = refused(capsys, "--records", str(asked["records"]), "--classes", str(asked["classes"]))
    assert f"got {asked['records']} and {asked['classes']}" in told


def test_a_method_for_which_there_are_too_few_steps_is_refused(world, capsys):
    args = [*flags(SMALL | {"model": world[0], "local_steps": 9}), "--records", "300", "--no-dry-run", "--methods"]
    assert main(["plan", *args, "la-lora-2-1"]) == 0
    assert "la-lora-10-10 trains A and B in turn" in refused(capsys, *args, "la-lora-2-1", "la-lora-10-10")


def test_ranks_side_by_side_and_a_long_run_s_curve(world, capsys):
    settings = SMALL | {"model": world[0], "rounds": 100, "partition": "iid"}
    settings.pop("rank")
    plan = planned(capsys, *flags(settings), "--records", "300", "--ranks", "2", "4", "--no-dry-run")
    low, high = (rank["methods"] for rank in plan["ranks"])
    assert [row["method"] for row in low] == list(METHODS)
    for a, b in zip(low, high):
        assert 2 * a["bytes_sent"] == b["bytes_sent"] and 2 * a["trainable_parameters"] == b["trainable_parameters"]
    assert [client["records"] for client in plan["clients"]] == [100] * 3
    rounds = [point["round"] for point in plan["epsilon_curve"]]
    spent = [point["epsilon"] for point in plan["epsilon_curve"]]
    assert rounds[0] == 0 and rounds[-1] == 100 and len(rounds) <= 13
    assert spent == sorted(spent) and spent[0] == 0.0 and 3.9 < spent[-1] <= 4.0


def test_a_run_without_noise_has_no_curve(world, capsys):
    args = [*flags(SMALL | {"model": world[0], "epsilon": "inf"}), "--records", "300", "--no-dry-run"]
    assert planned(capsys, *args)["epsilon_curve"] == []
    assert main(["plan", *args]) == 0
    out = capsys.readouterr().out
    assert "no noise, and no guarantee" in out and "not measured" in out and "\x1b" not in out


def test_a_name_with_brackets_is_shown_as_it_is(world, tmp_path, capsys):
    folder = shutil.copytree(world[0], tmp_path / "vit [b] :dog:")
    assert main(["plan", *flags(SMALL | {"model": folder}), "--records", "300", "--no-dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}, 300 records")


# ---------------------------------------------------------------- the dry run


@pytest.mark.parametrize(
    "contender, steps, factors",
    [("la-lora", 3, {"A", "B"}), ("rolora", 3, {"A", "B"}), ("ffa-lora", 3, {"B"}), ("dp-lora", 3, {"AB"}),
     ("la-lora-5-5", 10, {"A", "B"}), ("la-lora-25-25", 26, {"A", "B"})],
)  # fmt: skip
def test_a_dry_run_takes_the_method_s_own_steps(world, contender, steps, factors):
    settings = {"model": world[0], "method": contender, "physical_batch_size": 3, "local_steps": steps}
    config = make_config(SMALL | settings)
    found = measure(config, 10, "image", contender)
    assert set(found["factors"]) == factors and all(seconds > 0 for seconds in found["factors"].values())
    assert found["peak"] > found["step"] >= 0 and found["device"] is None


def test_every_factor_has_a_step_to_warm_up_and_three_that_count(world, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("lalora_kernels.dry_run._clock", lambda _: 2.0 ** next(ticks))
    config = make_config(SMALL | {"model": world[0], "local_steps": 6})
    found = measure(config, 10, "image", "la-lora-4-1")["factors"]
    # the clock is read once before four steps and once after each: medians of its 3rd step, of 2^n - 2^(n-1)
    assert found == {"B": 2.0**2, "A": 2.0**7}


def test_opacus_is_measured_on_the_same_adapters(world, monkeypatch):
    import opacus.optimizers

    seen = []

    class Watched(opacus.optimizers.DPOptimizer):
        def pre_step(self, closure=None):
            shapes = sorted(tuple(p.shape) for p in self.params)
            seen.append((shapes, {len(p.grad_sample) for p in self.params if p.grad_sample is not None}))
            return super().pre_step(closure)

    monkeypatch.setattr(opacus.optimizers, "DPOptimizer", Watched)
    config = make_config(SMALL | {"model": world[0], "dataset": world[1], "train_head": "yes"})
    found = measure(config, 10, "image", OPACUS)
    ours = sorted(tuple(v.shape) for v in get_state(prepare(config).classifier.model).values())
    assert seen == [(ours, {8})] * 4  # eight records, four steps
    assert set(found["factors"]) == {"AB"}


def test_tables_hold_what_fresh_processes_measured(world, capsys):
    args = [*flags(SMALL | {"model": world[0]}), "--records", "300", "--methods", "la-lora"]
    plan = planned(capsys, *args)
    (row,), opacus = plan["ranks"][0]["methods"], plan["ranks"][0]["opacus"]
    share = row["steps_by_factor"]
    assert share == {"B": 6, "A": 3}
    mean = (6 * row["seconds_by_factor"]["B"] + 3 * row["seconds_by_factor"]["A"]) / 9
    assert row["seconds_per_step"] == pytest.approx(mean)
    assert row["seconds"] == pytest.approx(mean * row["private_steps"])
    assert row["against_opacus"]["seconds_per_step"] == row["seconds_per_step"] / opacus["seconds_per_step"]
    assert row["against_opacus"]["bytes_sent"] == 1.0


@pytest.mark.parametrize("method, share, mean", [("la-lora-5-5", {"B": 15, "A": 15}, 2.0),
                                                 ("la-lora-2-1", {"B": 21, "A": 9}, 1.6)])  # fmt: skip
def test_a_factor_counts_as_often_as_it_comes(world, capsys, monkeypatch, method, share, mean):
    def measured(config, classes, kind, contender):
        times = {"AB": 4.0} if contender == OPACUS else {"B": 1.0, "A": 3.0}
        return {"factors": times, "peak": 2, "step": 1, "device": None}

    monkeypatch.setattr("lalora_kernels.dry_run.dry_run", measured)
    args = [*flags(SMALL | {"model": world[0], "local_steps": 10}), "--records", "300", "--methods", method]
    row = planned(capsys, *args)["ranks"][0]["methods"][0]
    assert row["steps_by_factor"] == share and row["seconds_per_step"] == pytest.approx(mean)


def test_what_cannot_be_measured_is_said(world, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "opacus" else found(name))
    monkeypatch.setattr("lalora_kernels.dry_run.dry_run", lambda *_: {"error": "killed by signal 9 (out of memory?)"})
    args = [*flags(SMALL | {"model": world[0]}), "--records", "300", "--methods", "la-lora"]
    assert main(["plan", *args]) == 0
    out = capsys.readouterr().out
    assert "Opacus was not measured: opacus not installed" in out
    assert "la-lora was not measured: killed by signal 9 (out of memory?)" in out and "trainable parameters" in out


def test_a_dry_run_that_fails_says_why():
    failed = dry_run(make_config({"model": "nonsense"}), 10, "image", "la-lora")
    assert failed == {"error": "unknown model 'nonsense'; give embedded, timm:NAME, hf:NAME or a transformers folder"}


# ---------------------------------------------------------------- models without weights


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("make, kind", [(vit_folder, "image"), (bert_folder, "text")])
def test_a_configuration_alone_gives_the_model_that_its_weights_would(tmp_path, make, kind, classes):
    real = load_model(make(tmp_path / "full", 2), classes, kind=kind)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        if (tmp_path / "full" / name).exists():
            shutil.copy(tmp_path / "full" / name, tmp_path / "bare")
    bare = placeholder_model(str(tmp_path / "bare"), classes)
    full = placeholder_model(str(tmp_path / "full"), classes)
    for found in (bare, full):
        assert (found.kind, found.head, found.new_modules) == (real.kind, real.head, real.new_modules)
        expected = {name: p.shape for name, p in real.model.named_parameters()}
        assert {name: p.shape for name, p in found.model.named_parameters()} == expected
        inputs, labels = found.collate(placeholder_records(found, 5, classes))
        assert found.logits(inputs).shape == (5, classes) and len(labels) == 5
    if kind == "text":
        assert inputs["input_ids"].shape == (5, 16)  # as long as the model takes


@pytest.mark.parametrize("classes", [1000, 3])
def test_a_timm_model_without_its_weights(classes):
    found = placeholder_model("timm:vit_tiny_patch16_224", classes, image_size=32)
    assert found.head == ["head"] and found.new_modules == ([] if classes == 1000 else ["head"])
    assert found.logits(found.collate(placeholder_records(found, 2, classes))[0]).shape == (2, classes)


def test_the_embedded_model_without_its_training(monkeypatch):
    monkeypatch.setattr("lalora_kernels.embedded.train_on_digits", lambda *_: pytest.fail("a plan trains nothing"))
    assert placeholder_model("embedded", 10).new_modules == []
    assert placeholder_model("embedded", 4).new_modules == ["classifier"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "args, says",
    [
        (["--records", "300", "--dataset", "digits"], "two ways to say how much data there is"),
        (["--classes", "3"], "--classes goes with --records"),
        (["--records", "300", "--classes", "1"], "--classes of at least 2"),
        (["--records", "0"], "--records of at least 1"),
        (["--records", "300", "--methods", "sgd"], "--methods are of dp-lora, ffa-lora, rolora, la-lora"),
        (["--records", "300", "--ranks", "0"], "--rank is a whole number >= 1"),
        (["--records", "30"], "30 records cannot give each of 8 clients 128"),
        (["--records", "3000", "--delta", "1e-11"], "delta"),
        (["--records", "3000", "--delta", "0.1"], "promises nothing to"),
        (["--records", "3000", "--model", "resnet"], "unknown model 'resnet'"),
        (["--records", "3000", "--model", "timm:no_such"], "timm knows no model 'no_such'"),
        (["--records", "3000", "--targets", "wq"], "wq"),
        (["--dataset", "no-such-set"], "unknown data set 'no-such-set'"),
    ],
)
def test_what_does_not_fit_is_one_line(capsys, args, says):
    found = refused(capsys, "--no-dry-run", *args)
    assert says in found and len(found.strip().splitlines()) == 1


def test_a_hub_name_without_a_network(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = refused(capsys, "--records", "3000", "--model", "hf:someone/no-such-model")
    assert "its config.json could not be read" in found and "name a folder" in found


def test_placeholders_refuse_what_load_model_refuses(tmp_path):
    with pytest.raises(BadInput, match="classifies images, but the data are texts"):
        placeholder_model("embedded", 10, kind="text")
    with pytest.raises(BadInput, match="give embedded, timm:NAME"):
        placeholder_model("resnet", 10)
    with pytest.raises(BadInput, match="leave the image size out"):
        placeholder_model("embedded", 10, image_size=32)

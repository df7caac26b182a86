"""What does not fit is refused before the first step: exit code 2, one line that names the culprit and the cure.

Data files: test_bad_data.py.
"""

import json
import shutil

import pytest
from small import bert_folder, digits_npz, text_tsv, vit_folder

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.plan import make_plan
from lalora_kernels.federated.run import Run, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*flags(world), "--out", str(folder), "--quiet"]) == 0
    return folder


def flags(world, **changes) -> list[str]:
    values = {
        "model": world[0], "dataset": world[1], "clients": 4, "rounds": 1, "local_steps": 2, "rank": 2, "batch_size": 8,
        "partition": "iid", "device": "cpu",
    } | changes  # fmt: skip
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def refused(capsys, args: list[str]) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("lalora: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in out
    return err


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"epsilon": 0}, "--epsilon is a number > 0"),
        ({"epsilon": -1.0}, "--epsilon is a number > 0"),
        ({"epsilon": "nan"}, "--epsilon is a number > 0"),
        ({"delta": 0}, "--delta is a number > 0 and < 1"),
        ({"delta": 1}, "--delta is a number > 0 and < 1"),
        ({"delta": 1e-30}, "delta"),
        ({"max_grad_norm": 0}, "--max-grad-norm is a number > 0"),
        ({"max_grad_norm": "inf"}, "--max-grad-norm is a number > 0"),
        ({"max_grad_norm": 1e300}, "--max-grad-norm is a number > 0 and <= 1e+15"),
        ({"lr": 1e300}, "--lr is a number > 0 and <= 1e+15"),
        ({"fraction": 1.5}, "--fraction is a number > 0 and <= 1"),
        ({"local_steps": 1}, "la-lora-unfiltered trains A and B in turn, anew in every round, and has trained both"),
        ({"local_steps": 5, "method": "la-lora-5-5"}, "--local-steps is 5: la-lora-5-5"),
        ({"local_steps": 4, "method": "la-lora-4-1"}, "after 5 steps; --local-steps 5 or more, or another --method"),
        ({"rounds": 0}, "--rounds is a whole number >= 1"),
        ({"rounds": 10**7, "local_steps": 4}, "of --local-steps 4 are 20,000,000 private steps"),
        ({"rank": 10**20}, "--rank is a whole number >= 1 and <= 100000"),
        ({"clients": 10**400}, "clients but only 160 records"),
        ({"rounds": 10**400}, "--rounds is a whole number >= 1 and <= 1e+07"),
        ({"lr": "nan"}, "--lr is a number > 0"),
        ({"momentum": 1.0}, "--momentum is a number >= 0 and < 1"),
        ({"batch_size": 0}, "--batch-size is a whole number >= 1"),
        ({"batch_size": 41, "min_records": 40}, "fewer than the batch of 41"),
        ({"clients": 21}, "160 records cannot give each of 21 clients 16; take fewer --clients, or"),
        ({"clients": 161, "min_records": 1}, "161 clients but only 160 records"),
        ({"partition": "dirichlet", "dirichlet_alpha": 1e-3, "clients": 8, "min_records": 20}, "no Dirichlet(0.001)"),
        ({"epsilon": 1e8}, "no noise_multiplier in"),
        ({"rank": 0}, "--rank is a whole number >= 1"),
        ({"targets": "nonesuch"}, "no module is named 'nonesuch'"),
        ({"device": "moon"}, "--device moon"),
        ({"device": "meta"}, "--device meta: its tensors have no values"),
        ({"model": "nonesuch"}, "unknown model 'nonesuch'"),
        ({"model": "timm:nonesuch"}, "timm knows no model 'nonesuch'"),
        ({"weights": "w.pth"}, "a weights file goes with a timm model"),
        ({"model": "timm:test_vit", "weights": "missing.pth"}, "missing.pth: no such file"),
        ({"dataset": "nonesuch"}, "unknown data set 'nonesuch'"),
        ({"dataset": "missing.npz"}, "missing.npz: no such file"),
        ({"test_dataset": "t.tsv"}, "test records of their own go with a .tsv, .csv, .jsonl or a folder"),
    ],
)
def test_settings_out_of_range(world, tmp_path, capsys, setting, message):
    assert message in refused(capsys, [*flags(world, **setting), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("args", [["train", "--clients", "many"], ["train", "--method", "x"], ["fly"], []])
def test_argparse_refuses_with_the_same_code(args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("clients = ", "not a readable TOML file"),
        ("client = 3", "unknown setting 'client'; did you mean 'clients'?"),
        ("clients = 3.5", "c.toml: clients is a whole number, got 3.5"),
        ('lr = "fast"', "c.toml: lr is a number, got 'fast'"),
        ("[lora]\nrank = true", "c.toml: rank is a whole number, got True"),
        ("clients = 3\n[federation]\nclients = 4", "clients is given twice"),
        (f"epsilon = 1{'0' * 400}", "c.toml: epsilon is a number > 0 and <= 1e+300, or inf"),
        ('method = "sgd"', "c.toml: method is one of dp-lora, ffa-lora, rolora, la-lora"),
    ],
)
def test_toml_that_does_not_fit(tmp_path, capsys, text, message):
    (tmp_path / "c.toml").write_text(text)
    assert message in refused(capsys, ["train", "--config", str(tmp_path / "c.toml")])


def test_an_unset_variable_for_a_folder_starts_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not a run that can be resumed" in refused(capsys, ["train", "--resume", ""])
    assert "not a readable TOML file" in refused(capsys, ["train", "--config", ""])
    assert not list(tmp_path.iterdir())


def test_resume_takes_no_other_settings(finished, capsys):
    assert "with its own settings" in refused(capsys, ["train", "--resume", str(finished), "--rounds", "3"])


def test_a_run_folder_is_not_overwritten(world, finished, capsys):
    assert "holds a run already" in refused(capsys, [*flags(world), "--out", str(finished)])


def test_a_client_without_data_or_with_less_than_a_batch_is_named():
    config = make_config({"clients": 3, "batch_size": 8})
    with pytest.raises(BadInput, match="client 1 has no data"):
        make_plan(config, [20, 0, 9])
    with pytest.raises(BadInput, match="client 2 has 7 records, fewer than the batch of 8"):
        make_plan(config, [20, 9, 7])


def test_a_relative_name_resumed_from_another_folder(world, tmp_path, capsys, monkeypatch):
    """It is kept as it was given, so that a run can move together with its data; the error says where it was sought."""
    monkeypatch.chdir(tmp_path)
    digits_npz("rel.npz", 160, 40)
    assert main([*flags((world[0], "rel.npz")), "--out", "run", "--quiet"]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    message = refused(capsys, ["train", "--resume", str(tmp_path / "run")])
    assert f"rel.npz: no such file in {tmp_path / 'other'}; a relative name counts from" in message
    assert f"there is none at {tmp_path / 'other/vit'}" in refused(capsys, flags(("vit", world[1])))


# ---------------------------------------------------------------- models


def test_a_text_model_for_images_and_the_other_way_round(world, tmp_path, capsys):
    bert, tsv = bert_folder(tmp_path / "bert"), text_tsv(tmp_path / "t.tsv")
    assert "is a bert model, which classifies text; the data are images" in refused(capsys, flags(world, model=bert))
    assert "is a vit model, which classifies image; the data are texts" in refused(capsys, flags((world[0], tsv)))
    assert "embedded classifies images, but the data are texts" in refused(capsys, flags(("embedded", tsv)))


def test_a_tokenizer_that_pads_on_the_side_for_which_the_model_was_not_made(tmp_path, capsys):
    bert, tsv = bert_folder(tmp_path / "bert"), text_tsv(tmp_path / "t.tsv")
    settings = tmp_path / "bert/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    message = refused(capsys, flags((bert, tsv), out=tmp_path / "run"))
    assert "changes when the padding of its batch is cut away" in message


def test_no_epsilon_is_claimed_for_what_the_embedded_model_was_trained_on(capsys):
    assert "is pre-trained on these very digits" in refused(capsys, flags(("embedded", "digits")))


def test_a_model_folder_with_a_truncated_weights_file(world, tmp_path, capsys):
    shutil.copytree(world[0], tmp_path / "vit")
    path = tmp_path / "vit/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "could not be loaded" in refused(capsys, flags((str(tmp_path / "vit"), world[1])))


def test_timm_weights_that_are_corrupt_or_another_models(world, tmp_path, capsys):
    import timm
    import torch

    (tmp_path / "junk.pth").write_bytes(b"not a zip file")
    torch.save(timm.create_model("test_vit2", num_classes=10).state_dict(), tmp_path / "other.pth")
    model = {"model": "timm:test_vit", "image_size": 32}
    assert "corrupt, truncated" in refused(capsys, flags(world, weights=tmp_path / "junk.pth", **model))
    assert "could not be loaded" in refused(capsys, flags(world, weights=tmp_path / "other.pth", **model))


def test_a_model_with_batchnorm_is_refused_before_anything_is_written(world, tmp_path, capsys):
    import timm
    import torch

    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "w.pth")
    args = flags(
        world, model="timm:test_resnet", weights=tmp_path / "w.pth", targets="fc", train_head="auto", image_size=32
    )
    message = refused(capsys, [*args, "--out", str(tmp_path / "run")])
    assert "BatchNorm2d" in message and "mixes the records" in message
    assert not (tmp_path / "run/config.json").exists()


def test_a_trainable_parameter_that_no_rule_covers(world, tmp_path):
    task = prepare(make_config({"model": world[0], "dataset": world[1], "batch_size": 8, "device": "cpu"}))
    next(p for n, p in task.classifier.model.named_parameters() if n.endswith("cls_token")).requires_grad_(True)
    with pytest.raises(ValueError, match="cls_token is trainable, but no rule"):
        Run.start(task, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_a_model_that_mixes_records(world, tmp_path):
    import torch

    class Mixing(torch.nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    task = prepare(make_config({"model": world[0], "dataset": world[1], "batch_size": 8, "device": "cpu"}))
    model = task.classifier.model
    model.vit.layernorm = torch.nn.Sequential(model.vit.layernorm, Mixing())
    with pytest.raises(ValueError, match="layernorm.1: the output for one record depends on the other records"):
        Run.start(task, tmp_path / "run")


# ---------------------------------------------------------------- run folders


DAMAGE = {
    "checkpoint.safetensors": "checkpoint.safetensors is corrupt or truncated",
    "ledger.json": "ledger.json is corrupt or truncated",
    "config.json": "config.json is corrupt or truncated",
}


@pytest.mark.parametrize("name, message", DAMAGE.items())
@pytest.mark.parametrize("keep", [0, 0.5, -7])
def test_files_of_a_run_cut_short(finished, tmp_path, capsys, name, message, keep):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))] if 0 <= keep < 1 else content[:keep])
    assert message in refused(capsys, ["train", "--resume", str(tmp_path / "run")])


def test_a_checkpoint_with_a_flipped_bit(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert "checksum" in refused(capsys, ["train", "--resume", str(tmp_path / "run")])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_without_one_of_its_files(finished, tmp_path, capsys, name):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    assert f"{name} is missing" in refused(capsys, ["train", "--resume", str(tmp_path / "run")])


def test_a_ledger_that_was_edited(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/ledger.json"
    books = json.loads(path.read_text())
    spent = next(b for b in books["clients"].values() if b["ledger"]["entries"])
    spent["ledger"]["entries"][0]["noise_multiplier"] *= 2
    path.write_text(json.dumps(books))
    assert "changed after it was written" in refused(capsys, ["train", "--resume", str(tmp_path / "run")])


def test_data_that_changed_since_the_run_began(world, tmp_path, capsys):
    data = digits_npz(tmp_path / "d.npz", 160, 40)
    assert main([*flags((world[0], data)), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    digits_npz(tmp_path / "d.npz", 161, 40)
    message = refused(capsys, ["train", "--resume", str(tmp_path / "run")])
    assert "the data is not the one that this run was started with; put it back as it was, or start a new" in message


def test_a_budget_that_is_spent_refuses_the_step_before_it_is_taken(world, tmp_path):
    """More rounds than the plan calibrated for, by hand: the ledger stops the client."""
    from lalora_kernels.privacy.ledger import BudgetExceeded

    task = prepare(make_config({"model": world[0], "dataset": world[1], "batch_size": 8, "clients": 1, "fraction": 1.0,
                                "rounds": 1, "local_steps": 2, "device": "cpu"}))  # fmt: skip
    run = Run.start(task, tmp_path / "run")
    run.plan.participation.append([0])
    object.__setattr__(task.config, "rounds", 2)
    with pytest.raises(BudgetExceeded, match="would exceed the budget"):
        run.train()
    assert run.at.round == 1 and run.clients[0].ledger.steps == 2 == run.clients[0].noise.next_release


def test_a_table_folder_with_other_settings(world, tmp_path, capsys):
    args = flags(world)[1:]
    grid = ["--methods", "la-lora", "--smoothings", "none", "--epsilons", "3", "--seeds", "0", "--out", str(tmp_path)]
    (tmp_path / "la-lora-none-eps3-seed0").mkdir()
    settings = json.loads(make_config({}).to_json())
    (tmp_path / "la-lora-none-eps3-seed0/config.json").write_text(json.dumps({"settings": settings}))
    assert "holds a run with another model, dataset" in refused(capsys, ["table", *args, *grid])


def test_table_says_what_does_not_fit(world, tmp_path, capsys):
    grid = ["--methods", "la-lora", "--smoothings", "none", "--epsilons", "3", "--seeds", "0", "--out", str(tmp_path)]
    assert "no module is named 'nonesuch'" in refused(capsys, ["table", *flags(world, targets="nonesuch")[1:], *grid])


def test_report_of_something_that_is_no_run(finished, tmp_path, capsys):
    assert "is not a run: config.json is missing; give the folder" in refused(capsys, ["report", str(tmp_path)])
    assert "no run folder, ledger.json is missing; give the one that" in refused(capsys, ["ledger", str(tmp_path)])
    file = finished / "config.json"
    assert f"{file} is not a run: config.json is missing" in refused(capsys, ["report", str(file)])
    said = refused(capsys, ["report", str(finished), "--out", str(tmp_path)])
    assert f"{tmp_path} is a folder; --out names a file" in said and not list(tmp_path.iterdir())

"""examples/*.py, as a user runs them: in a folder of their own, offline, on small real data."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from small import shared

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in ``tmp_path`` as a command with arguments; returns its last line."""

    def example(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        out = capsys.readouterr().out
        last = out.splitlines()[-1]
        epsilon = float(re.search(r"ε = (\d+\.\d+)$", last)[1])
        assert 0 < epsilon <= 3.0 and re.search(r"accuracy (0\.\d+|1\.000) ", last), out
        return last

    return example


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_is_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_text_with_peft(run, tmp_path):
    from safetensors.torch import load_file

    run("text_peft.py", "--steps", 2)
    assert any(t.abs().sum() > 0 for k, t in load_file(tmp_path / "text-adapter/adapter_model.safetensors").items()
               if "lora_B" in k)  # fmt: skip


def test_text_with_peft_on_a_file(run, tmp_path):
    head, *lines = shared("sst2/dev.tsv").read_text().splitlines()
    data = tmp_path / "sst2.tsv"  # the tiny model's texts have at most 16 tokens
    data.write_text("\n".join([head, *(line for line in lines if len(line.split()) < 14)]) + "\n")
    run("text_peft.py", "--model", small.bert_folder(tmp_path / "bert"), "--data", data, "--steps", 2)


def test_vision_with_timm(run, tmp_path):
    run("vision_timm.py", "--data", small.digits_npz(tmp_path / "d.npz"), "--steps", 2)


def test_vision_with_timms_weights(run, tmp_path):
    weights = shared("vit_tiny_patch16_224_imagenet1k_fp32.safetensors")
    with np.load(shared("cifar100_10k_2k.npz")) as all:
        part = {k: all[k] if k == "classes" else all[k][:: 50 if k.endswith("train") else 40] for k in all.files}
    np.savez(tmp_path / "cifar100.npz", **part)
    run("vision_timm.py", "--weights", weights, "--data", "cifar100.npz", "--steps", 2,
        "--image-size", 32, "--patch-size", 8)  # fmt: skip


def test_custom_loop(run):
    """Enough steps to learn: far above the tenth that guessing gets."""
    last = run("custom_loop.py", "--steps", 60)
    assert "after 60 steps" in last and float(last.split()[1]) > 0.5

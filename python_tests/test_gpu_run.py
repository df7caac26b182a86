"""bench/gpu.sh without a card: its parts on the interpreter and the emulated machine, and what counts as proof."""

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

from lalora_kernels import cuda, gpu

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import gpu_run  # noqa: E402
import harness  # noqa: E402

OPS = {"cuda": ["chacha20_normal", "privatize"], "triton": ["chacha20_normal", "privatize", "sample_grad"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "PROVEN", tmp_path / "proven.json")
    gpu_run.PROVEN.write_text("{}\n")
    return gpu_run.Run(dry=True, out=tmp_path, minutes=4)


def test_a_dry_run_writes_a_row_of_every_operation_and_proves_nothing(run, monkeypatch):
    monkeypatch.setattr(cuda, "_module", emulated.load(emulated.build()))
    run.result["passed"] = OPS
    gpu_run.run_ops(run)
    gpu_run.run_tuning(run)
    result = json.loads((run.out / "gpu-dry.json").read_text())
    rows = {(r["what"], r.get("backend")) for r in result["rows"]}
    assert rows >= {
        ("privatize", "cuda"),
        ("privatize", "triton"),
        ("sample_grad", "triton"),
        ("chacha20_normal", "cuda"),
        ("tuning", None),
    }
    assert all(r["median"] > 0 and r["met"] is None for r in result["rows"])
    assert {"device", "commit", "torch", "triton"} <= set(result)
    tuned = [r for r in result["rows"] if r["what"] == "tuning"]
    assert [r["case"][-2:].strip(" ,") for r in tuned] == ["B", "dz", "A"]
    assert all(len(r["seconds"]) >= 2 and r["pinned"] in r["seconds"] for r in tuned)
    text = (run.out / "gpu-dry.md").read_text()
    assert "nothing is proven" in text and "| sample_grad | (2, 5, 24, 4) bf16, B | copy (triton) |" in text
    assert gpu_run.PROVEN.read_text() == "{}\n"


def test_steps_are_compared_with_peft_opacus_and_the_recipes(run):
    import gpu_steps

    rows = list(gpu_steps.step_rows(gpu_steps.TINY[0], {}, 1))
    against = {r["against"] for r in rows if r["what"] == "step"}
    assert {"Opacus hooks", "Opacus ghost", "fastDP's recipe", "FlashDP's recipe"} <= against
    assert any("PEFT" in a for a in against)
    assert all(r["note"] == "not installed" for r in rows if r["median"] is None)


def test_every_contender_is_checked_before_it_is_timed(monkeypatch):
    import contenders
    import gpu_steps
    import recipes

    checked = []

    def relative_error(got, want):
        checked.append(harness.relative_error(got, want))
        return checked[-1]

    monkeypatch.setattr(gpu_steps, "relative_error", relative_error)
    assert gpu_steps.wrong("cpu") == {}
    contended = 1 + len(gpu_steps.PRIVATE) + 2 * len(gpu_steps.OURS)  # PEFT's; ours with either factor
    assert len(checked) == len(gpu_steps.TINY) * contended and max(checked) < 1e-6

    # Each fault is one that a careless recipe has; vit's Gram matrices, the other two models' direct norms.
    monkeypatch.setattr(gpu_steps, "TINY", gpu_steps.TINY[:1])
    monkeypatch.setattr(gpu_steps, "OURS", {})
    monkeypatch.setattr(recipes.LayerByLayer, "_weights", lambda self, G: torch.ones(len(G)))
    monkeypatch.setattr(contenders.OpacusHooks, "backward", lambda self: None)
    found = gpu_steps.wrong("cpu")
    assert set(found) == {"FlashDP's recipe", "Opacus hooks"}
    assert "not timed" in found["FlashDP's recipe"] and found["Opacus hooks"].startswith("failed: ")
    rows = list(gpu_steps.step_rows(gpu_steps.TINY[0], {}, 1, found))
    assert {r["against"] for r in rows if r["median"] is None} == set(found)
    assert not {r["against"] for r in rows if r["median"] is not None} & set(found)
    monkeypatch.setattr(gpu_steps, "enter", lambda *_: pytest.fail("a round was timed against what is wrong"))
    rounds = list(gpu_steps.round_rows(gpu_steps.TINY[0], 1, found))
    assert [r["against"] for r in rounds] == ["Opacus hooks"] and rounds[0]["median"] is None


def test_swins_windows_are_one_record_to_every_contender(monkeypatch):
    """Names of models differ ("swin-b"); who takes a window for a record is off by much."""
    import contenders
    import gpu_steps

    monkeypatch.setattr(gpu_steps, "TINY", [s for s in gpu_steps.TINY if s.model == "tiny-swin"])
    monkeypatch.setattr(gpu_steps, "OURS", {})
    monkeypatch.setattr(contenders, "_folded", lambda kind, records: kind)
    assert set(gpu_steps.wrong("cpu")) == {"Opacus hooks", "Opacus ghost"}


def test_a_contender_that_fails_is_a_row():
    import gpu_steps

    def broken():
        raise ValueError("no such layer")

    entries, failures = gpu_steps.enter({"broken": broken}, "cpu")
    assert not entries and failures == {"broken": "failed: ValueError: no such layer"}


REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="kernel" value="triton.privatize"/></properties></testcase>
<testcase name="b"><properties><property name="kernel" value="triton.privatize"/></properties><failure/></testcase>
<testcase name="c"><properties><property name="kernel" value="triton.smooth"/></properties></testcase>
<testcase name="d"><properties><property name="kernel" value="triton.smooth"/></properties><skipped/></testcase>
<testcase name="e"><properties><property name="kernel" value="cuda.sample_grad_clip"/></properties><skipped/></testcase>
<testcase name="f"><properties><property name="kernel" value="cuda.clip_reduce"/></properties><error/></testcase>
<testcase name="g"/></testsuite></testsuites>"""


def test_one_failure_takes_the_proof_and_a_skipped_test_gives_none(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    tested, failed, steps = gpu_run.outcomes(report)
    assert tested == {"triton.privatize": False, "triton.smooth": True, "cuda.clip_reduce": False}
    assert failed == ["b", "f"] and steps is True
    report.write_text(REPORT.replace('name="g"/>', 'name="g"><failure/></testcase><testcase name="h"/>'))
    assert gpu_run.outcomes(report)[2] is False


def test_proofs_are_added_and_lost(run, monkeypatch):
    run.result["family"] = "sm_90"
    before = {"triton": {"privatize": {"sm_90": "old.json", "sm_80": "old.json"}, "clip_reduce": {"sm_90": "old.json"}}}
    gpu_run.PROVEN.write_text(json.dumps(before))
    run.result["passed"] = {"triton": ["smooth"]}
    kernels = {"triton.privatize": False, "triton.smooth": True}
    run.result["tests"] = {"triton": {"kernels": kernels, "failed": ["x"], "steps": True}}
    gpu_run.prove(run)
    gpu.proven.cache_clear()
    assert json.loads(gpu_run.PROVEN.read_text())["triton"] == {
        "privatize": {"sm_80": "old.json"},
        "clip_reduce": {"sm_90": "old.json"},
        "smooth": {"sm_90": "gpu-sm_90.json"},
    }


@pytest.mark.parametrize("steps", [None, False])
def test_nothing_is_proven_where_whole_steps_did_not_pass(run, steps):
    run.result.update(family="sm_90", passed={"triton": ["smooth"], "cuda": []})
    run.result["tests"] = {"triton": {"kernels": {"triton.smooth": True}, "failed": [], "steps": steps}}
    gpu_run.prove(run)
    gpu.proven.cache_clear()
    assert json.loads(gpu_run.PROVEN.read_text()) == {}


def test_the_cards_tests_name_their_kernels(tmp_path):
    """What test_gpu_card.py reports is what gpu_run.py counts."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(gpu_run.TESTS), "-k", "words"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    done = subprocess.run(command, env={**os.environ, "LALORA_GPU_DRY": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert gpu_run.outcomes(report) == ({"triton.chacha20_words": True, "cuda.chacha20_words": True}, [], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_to_do():
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "bash bench/gpu.sh --dry" in done.stderr

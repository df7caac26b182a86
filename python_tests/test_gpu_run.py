"""bench/gpu.sh without a card: its parts on the interpreter and the emulated machine, and what counts as proof."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import torch

from lalora_kernels import cuda, gpu

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import gpu_outcomes  # noqa: E402
import gpu_run  # noqa: E402
import gpu_summary  # noqa: E402
import harness  # noqa: E402

OPS = {"cuda": ["chacha20_normal", "privatize"], "triton": ["chacha20_normal", "privatize", "sample_grad"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "PROVEN", tmp_path / "package/proven.json")
    gpu_run.PROVEN.parent.mkdir()
    gpu_run.PROVEN.write_text("{}\n")
    monkeypatch.setattr(gpu_run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_run, "DRY_RESULTS", tmp_path / "results")
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


NOTES = """{"test": "t::a", "kernel": "triton.privatize"}
{"test": "t::b", "kernel": "triton.privatize"}
{"test": "t::c", "kernel": "triton.smooth"}
{"test": "t::d", "kernel": "triton.smooth"}
{"test": "t::e", "kernel": "cuda.sample_grad_clip"}
{"test": "t::f", "kernel": "cuda.clip_reduce"}
{"test": "t::g", "kernel": "steps"}
{"test": "t::c", "outcome": "passed"}
{"test": "t::a", "outcome": "passed"}
{"test": "t::b", "outcome": "failed"}
{"test": "t::d", "outcome": "skipped"}
{"test": "t::e", "outcome": "skipped"}
{"test": "t::f", "outcome": "passed"}
{"test": "t::f", "outcome": "failed"}
{"test": "t::g", "outcome": "passed"}
"""


def test_one_failure_takes_the_proof_and_a_skipped_test_gives_none(tmp_path):
    notes = tmp_path / "notes.jsonl"
    notes.write_text(NOTES)
    found, failed = gpu_outcomes.read(notes)
    assert found == {
        "triton.privatize": False,
        "triton.smooth": True,
        "cuda.sample_grad_clip": None,
        "cuda.clip_reduce": False,  # its fixture, afterwards
        "steps": True,
    }
    assert failed == ["b", "f"]
    notes.write_text(NOTES[: NOTES.index('{"test": "t::d", "outcome"') + 9])  # stopped while it wrote
    found, failed = gpu_outcomes.read(notes)
    assert found["triton.smooth"] is None and found["steps"] is None and found["triton.privatize"] is False
    assert gpu_outcomes.read(tmp_path / "none") == ({}, [])


def groups(steps: bool | None = True, **kernels: bool | None) -> dict:
    triton = {"kernels": {f"triton.{name}": good for name, good in kernels.items()}, "failed": [], "exit": 0}
    return {"triton": triton, "steps": {"kernels": {"steps": steps}, "failed": [], "exit": 0}}


def prove(run, before: dict, **outcomes) -> dict:
    """proven.json after ``before`` and these outcomes on sm_90."""
    gpu_run.PROVEN.write_text(json.dumps(before))
    run.result.update(family="sm_90", tests=groups(**outcomes))
    gpu_run.prove(run)
    gpu.proven.cache_clear()
    assert (run.out / "proven.json").read_text() == gpu_run.PROVEN.read_text()
    return json.loads(gpu_run.PROVEN.read_text())


def test_proofs_are_added_and_lost(run):
    old = {"sm_90": "old.json", "sm_80": "old.json"}
    before = {"triton": {"privatize": old, "clip_reduce": {"sm_90": "old.json"}, "sample_grad": old}}
    assert prove(run, before, privatize=False, smooth=True, sample_grad=None) == {
        "triton": {
            "privatize": {"sm_80": "old.json"},
            "clip_reduce": {"sm_90": "old.json"},
            "smooth": {"sm_90": "gpu-sm_90.json"},
            "sample_grad": old,  # cut off: neither shown nor refuted
        }
    }


@pytest.mark.parametrize("steps", [None, False])
def test_where_whole_steps_did_not_pass_nothing_is_proven_and_nothing_that_passed_is_lost(run, steps):
    before = {"triton": {"privatize": {"sm_90": "old.json"}}}
    assert prove(run, before, steps=steps, smooth=True, privatize=True) == before


SLOW = """
import time
import pytest


@pytest.fixture
def late(of):
    yield
    assert of != "triton.late"


@pytest.mark.parametrize("of", ["cuda.quick", "cuda.slow", "triton.quick", "triton.failing", "triton.late"])
def test(of, late):
    assert of != "triton.failing"
    time.sleep(600 if of == "cuda.slow" else 0)


def test_a_step():
    pass
"""


def test_a_process_that_runs_out_of_time_leaves_what_passed(run, monkeypatch, tmp_path):
    """It takes neither its own kernels' proofs along nor those of others."""
    monkeypatch.setattr(gpu_run, "TESTS", tmp_path / "test_slow.py")
    gpu_run.TESTS.write_text(SLOW)
    monkeypatch.setattr(gpu_run, "TEST_SECONDS", 20)
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: None)  # no xdist
    run.dry, run.result["family"] = False, "sm_90"
    proven = []
    monkeypatch.setattr(gpu, "proven", SimpleNamespace(cache_clear=lambda: proven.append(gpu_run.PROVEN.read_text())))
    gpu_run.run_tests(run)
    tests = json.loads((run.out / "gpu-sm_90.json").read_text())["tests"]
    assert {name: t["exit"] for name, t in tests.items()} == {"cuda": "out of time", "steps": 0, "triton": 1}
    assert tests["cuda"]["kernels"] == {"cuda.quick": True, "cuda.slow": None}
    assert tests["triton"]["failed"] == ["test[triton.failing]", "test[triton.late]"]
    assert tests["steps"]["kernels"] == {"steps": True}
    assert run.result["passed"] == {"cuda": ["quick"], "triton": ["quick"]}
    shown = [sorted(f"{b}.{op}" for b, ops in json.loads(text).items() for op in ops) for text in proven]
    assert shown == [[], ["cuda.quick"], ["cuda.quick", "triton.quick"]], "as each process ends"


def outcomes_of(tmp_path, tests: Path, *options: str) -> tuple[dict, list, int]:
    """What ``gpu_outcomes`` reads, and how many lines its plugin wrote."""
    notes = tmp_path / "notes.jsonl"
    environment = {**os.environ, "LALORA_GPU_DRY": "1", "LALORA_GPU_OUTCOMES": str(notes)}
    environment["PYTHONPATH"] = str(ROOT / "bench")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_outcomes", str(tests)]
    subprocess.run([*command, *options], env=environment, cwd=ROOT, capture_output=True, text=True)
    return *gpu_outcomes.read(notes), len(notes.read_text().splitlines())


def test_the_cards_tests_name_their_kernels(tmp_path):
    """What test_gpu_card.py reports is what gpu_run.py counts."""
    kernels = {"triton.chacha20_words": True, "cuda.chacha20_words": True}
    assert outcomes_of(tmp_path, gpu_run.TESTS, "-k", "words") == (kernels, [], 4)


def test_many_workers_are_one_report(tmp_path):
    pytest.importorskip("xdist")
    tests = tmp_path / "test_quick.py"
    tests.write_text(SLOW.replace("600", "0"))
    found, failed, lines = outcomes_of(tmp_path, tests, "-n", "2")
    assert {kernel for kernel, good in found.items() if good} == {"cuda.quick", "cuda.slow", "triton.quick", "steps"}
    assert sorted(failed) == ["test[triton.failing]", "test[triton.late]"]
    assert lines == 6 + 7, "each test and each outcome once"


def test_every_test_of_the_card_belongs_to_one_process():
    def collected(chosen: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", str(gpu_run.TESTS), "-k", chosen]
        done = subprocess.run(command, env={**os.environ, "LALORA_GPU_DRY": "1"}, capture_output=True, text=True)
        return {line for line in done.stdout.splitlines() if "::" in line}

    rest = {name for name in collected("") if ("[cuda." in name) + ("[triton." in name) != 1}
    assert len(rest) > 9 and collected(gpu_run.TESTED["steps"]) == rest


def test_what_fails_is_a_row_and_the_run_goes_on(run, monkeypatch):
    """A contender's failure, ours too, and a group's own; all that came before it is saved."""
    import gpu_ops

    def broken(*_, **__):
        raise ValueError("no such layer")

    def half_broken():
        yield gpu_ops.missing("first", "case", "x", "note")
        broken()

    with run.attempt("a group"):
        run.add(half_broken())
    modules = {"good": gpu_ops_stub(), "broken": gpu_ops_stub(broken)}
    chosen = {"sample_grad": {"triton": modules["broken"]}}
    monkeypatch.setattr(gpu_run, "backends", lambda run, op: chosen.get(op, modules))
    gpu_run.run_ops(run)
    rows = json.loads((run.out / "gpu-dry.json").read_text())["rows"]
    notes = {(r["what"], r["against"]): r["note"] for r in rows if r["median"] is None}
    reason = "failed: ValueError: no such layer"
    assert notes.pop(("first", "x")) == "note" and set(notes.values()) == {reason}
    assert {("a group", "all"), ("privatize", "broken"), ("privatize", "broken, no noise")} <= set(notes)
    assert {("sample_grad", "triton"), ("chacha20_normal", "broken")} <= set(notes)
    figures = {(r["what"], r["backend"]) for r in rows if r["median"] is not None}
    assert figures == {("privatize", "good"), ("chacha20_normal", "good")}
    assert run.result["broken"] == ["a group"]


def gpu_ops_stub(call=lambda *_, **__: None) -> SimpleNamespace:
    return SimpleNamespace(privatize=call, chacha20_normal=call, sample_grad=call)


def test_a_fault_of_ours_is_a_row_and_ours_is_not_timed(monkeypatch):
    import gpu_steps

    def broken(*_, **__):
        raise ValueError("no such layer")

    monkeypatch.setattr(gpu_steps, "TINY", gpu_steps.TINY[:1])
    monkeypatch.setattr(gpu_steps, "PRIVATE", {})
    monkeypatch.setattr(gpu_steps, "LaLora", broken)
    found = gpu_steps.wrong("cpu")
    assert found == dict.fromkeys(gpu_steps.OURS.values(), "failed: ValueError: no such layer")


def test_all_that_is_written_is_in_out_as_well(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "DRY_RESULTS", tmp_path / "home")
    monkeypatch.setattr(gpu_run, "run_ops", lambda run: run.add([gpu_run_row()]))
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--dry", "--only", "ops", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(cuda, "_module", None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert gpu_run.main() == 0
    for name in ("gpu-dry.json", "gpu-dry.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "its only row" in text and text == (tmp_path / "home" / name).read_text()


def gpu_run_row() -> dict:
    return {"what": "its only row", "case": "c", "against": "x", "median": None, "met": None, "note": "n"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_to_do():
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "bash bench/gpu.sh --dry" in done.stderr


def test_the_readmes_table_is_made_from_the_committed_result():
    table = (ROOT / "README.md").read_text().partition("<!-- gpu:begin -->")[2].partition("<!-- gpu:end -->")[0]
    result = json.loads((ROOT / "bench/results/gpu-sm_90.json").read_text())
    assert table.strip() == gpu_summary.summary(result).strip()
    result["rows"][0]["met"] = not result["rows"][0]["met"]
    assert table.strip() != gpu_summary.summary(result).strip()

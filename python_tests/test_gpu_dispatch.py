"""Never run, never default: on a GPU a kernel serves unasked only where a committed result shows that it passed."""

import json
import re
from pathlib import Path

import pytest
import torch

from lalora_kernels import dispatch, gpu

ROOT = Path(__file__).resolve().parent.parent
GPU_OPS = {"triton": set(dispatch.OPS), "cuda": set(dispatch.OPS) - {"sample_grad"}}


@pytest.fixture
def proofs(monkeypatch):
    shown: dict = {}
    monkeypatch.setattr(gpu, "proven", lambda: shown)
    monkeypatch.setattr(gpu, "family", lambda: "sm_90")
    monkeypatch.delenv("LALORA_BACKEND", raising=False)
    return shown


def test_without_a_result_a_gpu_takes_the_reference(proofs):
    for op in dispatch.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert dispatch.choose("cuda", dtype, op=op) == "reference"
            assert dispatch.choose("cuda", dtype, "triton", op) == "triton"
    assert gpu.marked("triton", "privatize") == "triton (unproven)"
    assert gpu.marked("reference", "privatize") == "reference" and gpu.marked("cpp", "privatize") == "cpp"


def test_a_result_counts_for_its_operation_and_family(proofs):
    proofs["triton"] = {"privatize": {"sm_90": "gpu-sm_90.json"}, "clip_reduce": {"sm_80": "gpu-sm_80.json"}}
    assert dispatch.choose("cuda", torch.float32, op="privatize") == "triton"
    assert dispatch.choose("cuda", torch.float64, op="privatize") == "reference"
    assert dispatch.choose("cuda", torch.float32, op="clip_reduce") == "reference"
    assert dispatch.choose("cuda", torch.float32, op="sample_grad") == "reference"
    assert gpu.marked("triton", "privatize") == "triton" and gpu.marked("triton", "clip_reduce") == "triton (unproven)"
    proofs["cuda"] = {op: {"sm_90": "gpu-sm_90.json"} for op in ("privatize", "sample_grad_clip")}
    assert dispatch.choose("cuda", torch.float32, op="privatize") == "cuda"
    assert dispatch.choose("cuda", torch.bfloat16, op="sample_grad_clip") == "reference"  # it does not hold every shape
    with dispatch.use_backend("reference"):
        assert dispatch.choose("cuda", torch.float32, op="privatize") == "reference"


def test_every_proof_names_a_committed_result_that_passed():
    for backend, ops in gpu.proven().items():
        assert set(ops) <= GPU_OPS[backend]
        for op, families in ops.items():
            for family, name in families.items():
                result = json.loads((ROOT / "bench/results" / name).read_text())
                assert result["family"] == family and op in result["passed"][backend], name


def test_the_report_says_it(capsys):
    from lalora_kernels.__main__ import main

    main()
    printed = capsys.readouterr().out
    marks = re.findall(r"(?:triton|cuda) \(unproven\)", printed)
    assert len(marks) >= len(dispatch.OPS) - sum(len(ops) for ops in gpu.proven().values())
    assert "chosen only by name" in printed

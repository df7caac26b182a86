"""Every GPU kernel compiled: no spills, matrix instructions and 16-byte accesses where they belong.

Triton's in processes of their own, without ``TRITON_INTERPRET``, which other tests set; one configuration of each here,
the others in ``make gpu-compile``, whose table is committed. CUDA's are read from the built module.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton, which brings cuobjdump along, is not installed")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(600)  # a compiler on a busy machine


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_triton_kernels():
    done = run(str(ROOT / "bench/gpu_compile.py"), "--only", "triton", "--quick", "--archs", "80", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("sample_grad_kernel", "sample_grad_clip_kernel", "privatize_kernel", "chacha20_normal_kernel"):
        for arch in ("sm_80", "sm_90"):
            assert f"| {arch} | {kernel} |" in done.stdout


def test_cuda_kernels():
    pytest.importorskip("lalora_kernels._cuda", reason="csrc/cuda was not built: no nvcc")
    done = run(str(ROOT / "bench/gpu_compile.py"), "--only", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("release_kernel<true, true, true>", "chacha20_normal_kernel<true>", "Traits<BF16, 2, false, false>"):
        assert kernel in done.stdout


SPILLING = """
import sys
import gpu_compile, torch
from lalora_kernels.triton_ops import sample_grad
module = sys.modules["lalora_kernels.triton_ops.sample_grad"]
module.configs = lambda *_: (module.Config(512, 64, 4, 2),)
dy, h, B = torch.empty(16, 512, 4096).bfloat16(), torch.empty(16, 512, 64).bfloat16(), torch.empty(4096, 64).bfloat16()
gpu_compile.cases = lambda quick: [("spilling", ("ldg128",), lambda: sample_grad(dy, B, 1.0, h=h))]
print([fault for row in gpu_compile.compile_triton(("90",)) for fault in gpu_compile.faults(row)])
"""


def test_spills_are_found():
    """A configuration whose gradient no register file holds."""
    done = run("-c", SPILLING)
    assert "spills: " in done.stdout, done.stdout + done.stderr


def test_missing_instructions_are_found():
    code = (
        "import gpu_compile as g\n"
        "print(g.faults({**dict.fromkeys(g.COLUMNS, 0), 'arch': 'sm_90', 'wants': ['mma', 'ldg128']}))"
    )
    assert run("-c", code).stdout.strip() == "['no mma in its SASS', 'no ldg128 in its SASS']"


def test_the_committed_table_has_no_fault():
    kernels = json.loads((ROOT / "bench/results/gpu_compile.json").read_text())["kernels"]
    nvidia = [k for k in kernels if k["arch"].startswith("sm_")]
    assert {"sm_80", "sm_90", "sm_90a"} == {k["arch"] for k in nvidia}
    assert {"sample_grad_kernel", "sample_grad_clip_kernel", "privatize_kernel"} <= {k["kernel"] for k in nvidia}
    assert not [k for k in nvidia if k["stack"] or k["local"]]
    assert not [k for k in nvidia if "mma" in k["wants"] and not k["hmma"] + k["hgmma"]]

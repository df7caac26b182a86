"""gpu_suite.py on this machine's card: what ``bench/gpu.sh`` takes as proof that a kernel may serve unasked.

Each test names the kernel that it is about, "backend.operation", in its parameter ``of``. Without a card nothing runs,
but with LALORA_GPU_DRY=1 a part does, on Triton's interpreter and the emulated machine.
"""

import importlib
import os
from dataclasses import replace

import pytest
import torch
from cases import BF16, F32, GRAD_CASES, TENSOR_CASES, GradCase
from gpu_suite import (
    F16,
    Target,
    check_bad_record,
    check_clip_reduce,
    check_layouts,
    check_masked_samples,
    check_normals,
    check_outputs,
    check_privatize,
    check_repeats,
    check_sample_grad,
    check_sample_grad_clip,
    check_scales,
    check_smooth,
    check_words,
)
from models import adapted
from tolerances import AUTOCAST_BF16, BFLOAT16_CUT, PER_SAMPLE_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels import dispatch, gpu
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource

DRY = os.environ.get("LALORA_GPU_DRY") == "1"
if not DRY:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: bench/gpu.sh runs this on one", allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 keeps Triton off the card; bench/gpu.sh unsets it", allow_module_level=True)
card = pytest.mark.skipif(DRY, reason="needs a card")

HALVES = [GradCase(3, 19, 41, 35, 6, F16), GradCase(2, 70, 300, 130, 20, F16), GradCase(2, 130, 40, 600, 5, BF16)]
REAL = [GradCase(2, 512, 4096, 4096, 16), GradCase(2, 256, 4096, 1000, 16)]
REAL += [GradCase(3, 197, 768, 3072, 16), GradCase(1, 2048, 4096, 1024, 64)]
# Of a card's full turn every case in every dtype; of a dry one a few.
SHAPES = GRAD_CASES[3::16] if DRY else [c for c in GRAD_CASES + REAL if c.dtype == F32]
GRADS = [replace(c, dtype=d) for c in SHAPES for d in ((F32,) if DRY else (F32, BF16, F16))] + HALVES[: 1 if DRY else 3]
NS = (3,) if DRY else (0, 1, 9, 40)
TENSORS = TENSOR_CASES[:6] if DRY else TENSOR_CASES
SMALL = GradCase(3, 5, 17, 19, 4)


def target(backend: str) -> Target:
    module = importlib.import_module({"triton": "lalora_kernels.triton_ops", "cuda": "lalora_kernels.cuda"}[backend])
    if not DRY:
        getattr(module, "require", lambda: None)()
        return Target(module, "cuda")
    if backend == "cuda":
        import emulated

        module._module = module._module or emulated.load(emulated.build())
    return Target(module, "cpu", BFLOAT16_CUT if backend == "triton" else 2.0**-8)


@pytest.fixture
def of(request) -> Target:
    """The target of the test's parameter "backend.operation"."""
    backend, _, op = request.param.partition(".")
    if not DRY and backend == "cuda" and op in gpu.CLUSTERED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs thread-block clusters (sm_90)")
    return target(backend)


def proves(op: str, *backends: str):
    return pytest.mark.parametrize("of", [f"{b}.{op}" for b in backends or ("triton", "cuda")], indirect=True)


def held(of: Target, case: GradCase) -> bool:
    # Beyond T = 256 the matrix unit's sums, which truncate, are less exact than float16's tolerance.
    largest = 65_536 if case.dtype == BF16 or (case.dtype == F16 and case.T <= 256) else 32_768
    return not of.ops.__name__.endswith("cuda") or (case.r <= 64 and max(case.m, case.n) * case.r <= largest)


def asked(case: GradCase) -> tuple[str, ...]:
    return ("h", "x", "hx") if case.N * case.T * max(case.m, case.n) < 1_500 else ("hx",)


@pytest.mark.parametrize("case", GRADS, ids=str)
@proves("sample_grad")
def test_sample_grad(of, case):
    if not held(of, case):
        pytest.skip("no cluster holds this gradient")
    check_sample_grad(of, case, asked(case))


@pytest.mark.parametrize("case", GRADS, ids=str)
@proves("sample_grad_clip")
def test_sample_grad_clip(of, case):
    if not held(of, case):
        pytest.skip("no cluster holds this gradient")
    check_sample_grad_clip(of, case, asked(case))


@pytest.mark.parametrize("case", [GradCase(3, 7, 11, 13, 5), GradCase(2, 65, 97, 31, 8)], ids=str)
@proves("sample_grad")
def test_sample_grad_outputs(of, case):
    check_outputs(of, case)


@pytest.mark.parametrize("case", [GradCase(3, 7, 11, 13, 5), GradCase(2, 0, 5, 4, 3)], ids=str)
@proves("sample_grad_clip")
def test_sample_grad_clip_outputs(of, case):
    check_outputs(of, case, "sample_grad_clip")


@proves("sample_grad")
def test_sample_grad_of_every_scale_and_of_bad_records(of):
    check_scales(of, SMALL, "sample_grad")
    for dtype in (F32, BF16, F16):
        check_bad_record(of, replace(SMALL, dtype=dtype), "sample_grad", float("nan"))
        check_bad_record(of, replace(SMALL, dtype=dtype), "sample_grad", float("inf"))
    check_repeats(of, GradCase(1, 400, 33, 70, 5), "sample_grad", 3)


@proves("sample_grad_clip")
def test_sample_grad_clip_of_every_scale_and_of_bad_records(of):
    check_scales(of, SMALL, "sample_grad_clip")
    for dtype in (F32, BF16, F16):
        check_bad_record(of, replace(SMALL, dtype=dtype), "sample_grad_clip", float("nan"))
        check_bad_record(of, replace(SMALL, dtype=dtype), "sample_grad_clip", float("inf"))
    check_repeats(of, GradCase(23, 40, 90, 70, 5), "sample_grad_clip", 3)


@pytest.mark.parametrize("padding", ["symmetric", "reflect"])
@pytest.mark.parametrize("noise_std", [0.0, 0.8])
@proves("privatize")
def test_privatize(of, noise_std, padding):
    for N in NS:
        check_privatize(of, N, noise_std, padding, cases=TENSORS)
    for parts in ("g", "s", ""):
        check_privatize(of, 2, noise_std, padding, cases=TENSORS, parts=parts)
    check_privatize(of, 3, noise_std, padding, cases=[((16, 768), 1), ((300, 4), 0), ((100,), None)])


@proves("privatize")
def test_privatize_of_masked_samples_and_of_views(of):
    check_masked_samples(of, TENSORS)
    check_layouts(of, TENSORS)


@proves("clip_reduce")
def test_clip_reduce(of):
    for N in NS:
        check_clip_reduce(of, N, TENSORS)


@proves("smooth")
def test_smooth(of):
    check_smooth(of, TENSORS)


@proves("chacha20_words")
def test_words(of):
    check_words(of)


@proves("chacha20_normal")
def test_normals(of):
    check_normals(of)


# ---------------------------------------------------------------- whole steps

KEY = bytes(range(32))
EVERY = {
    "triton": gpu.CLUSTERED,
    "cuda": (*gpu.CLUSTERED, "privatize", "clip_reduce", "chacha20_normal"),
}


@pytest.fixture(params=["reference", "triton", "default"])
def backend(request, monkeypatch) -> str | None:
    """ "default": what dispatch will choose once all kernels are proven."""
    if request.param != "default":
        return request.param
    proofs = {b: {op: {gpu.family(): "this run"} for op in ops} for b, ops in EVERY.items()}
    monkeypatch.setattr(gpu, "proven", lambda: proofs)
    assert dispatch.choose("cuda", F32, op="privatize") == "cuda"
    return None


def private(device: str, backend: str | None, **kwargs):
    """A model, its private optimizer and the loader of 12 records; the same in every call."""
    torch.manual_seed(0)
    model, _, loss = adapted("mlp", dtype=F32)
    data = TensorDataset(torch.randn(12, 7), torch.randint(0, 2, (12,)))
    model.to(device)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    kwargs = {"noise_multiplier": 0.5, "max_grad_norm": 0.3, "sample_rate": 0.6, "check": False, **kwargs}
    loader = DataLoader(data, batch_size=6)
    return model, loss, *make_private(model, sgd, loader, noise=NoiseSource.fixed(KEY), backend=backend, **kwargs)


def trained(device: str, backend: str | None, autocast: torch.dtype | None = None, graph: bool = False, **kwargs):
    """All parameters after four steps."""
    kwargs = {"physical_batch_size": 8, **kwargs}
    model, loss, optimizer, loader = private(device, backend, **kwargs)

    def backward(x, y):
        with torch.autocast(torch.device(device).type, dtype=autocast or BF16, enabled=autocast is not None):
            value = loss(model, (x, y))
        value.backward()

    run = optimizer.graph(backward, rows=8) if graph else backward
    for x, y in loader.steps(4):
        run(x.to(device), y.to(device))
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten().double().cpu() for p in model.parameters()])


@card
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_a_private_step_is_the_cpus(backend, clipping):
    want = trained("cpu", "reference", clipping=clipping)
    got = trained("cuda", backend, clipping=clipping)
    assert (got - want).norm() <= PER_SAMPLE_F32 * want.norm()
    got = trained("cuda", backend, BF16, clipping=clipping)
    assert (got - want).norm() <= AUTOCAST_BF16 * want.norm()


@card
def test_nothing_in_a_step_waits_for_the_device(backend):
    model, loss, optimizer, loader = private("cuda", backend, sample_rate=1.0)
    for i, (x, y) in enumerate(loader.steps(6)):
        x, y = x.cuda(), y.cuda()
        if i == 4:  # both factors have had their first step, and its tables
            torch.cuda.set_sync_debug_mode("error")
        try:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@card
def test_a_captured_step_is_the_ordinary_one(backend):
    want = trained("cuda", backend)
    got = trained("cuda", backend, graph=True)
    assert (got - want).norm() <= PER_SAMPLE_F32 * want.norm()


@card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_a_step_on_a_card_that_is_not_the_current_one(backend, graph):
    want = trained("cpu", "reference")
    got = trained("cuda:1", backend, graph=graph)
    assert (got - want).norm() <= PER_SAMPLE_F32 * want.norm() and torch.cuda.current_device() == 0


@card
def test_a_graph_of_ones_own_is_refused():
    model, loss, optimizer, loader = private("cuda", "reference", sample_rate=1.0)
    x, y = next(iter(loader.steps(1)))
    x, y = x.cuda(), y.cuda()
    with pytest.raises(RuntimeError, match="optimizer.graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            loss(model, (x, y)).backward()

"""The CUDA kernels' own code on an emulated machine (csrc/cuda/emulate), against the reference in float64.

The machine is a hard one: threads run between barriers in any order, shared memory starts as NaN, asynchronous copies
arrive at the last moment, barriers must be reached by all, another block may not have started yet.
"""

import contextlib
import shutil

import emulated
import pytest
import torch
from cases import BF16, GRAD_CASES, GradCase
from gpu_suite import (
    F16,
    SCALING,
    Target,
    call,
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
    check_words,
)

from lalora_kernels import cuda, gpu

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
TARGET = Target(cuda, "cpu")
HALVES = [GradCase(3, 19, 41, 35, 6, F16), GradCase(2, 70, 150, 130, 20, F16), GradCase(2, 40, 40, 300, 33, F16)]
# N = 1: a cluster of eight, two tiles long, the last rank without features
CLUSTERS = [GradCase(1, 70, 460, 530, r, dtype) for r in (3, 17, 64) for dtype in (torch.float32, BF16, F16)]


@pytest.fixture(scope="session")
def machine():
    return emulated.load(emulated.build())


@pytest.fixture(autouse=True)
def emulation(machine, monkeypatch):
    monkeypatch.setattr(cuda, "_module", machine)
    monkeypatch.setattr(cuda, "_plans", {})
    machine.set_order(0)
    machine.set_device(0)
    yield machine
    machine.set_order(0)
    machine.fail_after(-1)


def held(case: GradCase) -> bool:
    return case.r <= 64


@pytest.mark.parametrize("case", [*filter(held, GRAD_CASES), *HALVES], ids=str)
def test_sample_grad(case):
    check_sample_grad(TARGET, case, ("h", "x", "hx", "") if case.N * case.T * max(case.m, case.n) < 1_500 else ("hx",))


@pytest.mark.parametrize("case", [*filter(held, GRAD_CASES), *HALVES], ids=str)
def test_sample_grad_clip(case):
    check_sample_grad_clip(TARGET, case)


@pytest.mark.parametrize("case", CLUSTERS, ids=str)
def test_sample_grad_clip_of_a_large_cluster(case):
    check_sample_grad_clip(TARGET, case, ("h", "x"))
    plans = list(cuda._plans.values())
    assert {p.cluster for p in plans} == {8} and {p.positions for p in plans} <= {32, 64}


@pytest.mark.parametrize("case", [GradCase(3, 7, 11, 13, 5), GradCase(2, 65, 97, 31, 8)], ids=str)
def test_sample_grad_outputs(case):
    check_outputs(TARGET, case)


ORDERED = [GradCase(1, 70, 460, 260, 17, F16), GradCase(23, 40, 90, 70, 5, BF16), GradCase(5, 40, 300, 170, 17, BF16)]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_the_order_of_threads_changes_no_bit(case, order, emulation):
    """A missing barrier shows as a difference between orders."""
    for need_dz in (True, False):
        for op in ("sample_grad", "sample_grad_clip"):
            emulation.set_order(0)
            check_repeats(TARGET, case, op, 2, lambda: emulation.set_order(order), need_dz=need_dz)
    check_privatize(TARGET, 2, 0.6, "reflect")


@pytest.mark.parametrize("case", [GradCase(3, 7, 11, 13, 5), GradCase(2, 0, 5, 4, 3)], ids=str)
def test_sums_are_added_to_and_returned(case):
    check_outputs(TARGET, case, "sample_grad_clip")


def test_which_factor_is_asked_for_is_no_matter_of_addresses(emulation):
    """At T = 0 all of torch's are null. No features or no records: nothing is launched, and no grid has 0 blocks."""
    inputs = {"dy": torch.zeros(2, 0, 300), "B": torch.ones(300, 3), "h": torch.zeros(2, 0, 3)}
    assert inputs["h"].data_ptr() == 0
    got, want = call(TARGET, "sample_grad_clip", inputs, "h", max_norm=1.0, S_B=torch.ones(300, 3))
    assert torch.equal(got[1].double(), want[1].double()) and got[2].tolist() == [0.0, 0.0]
    G = torch.full((2, 300, 3), float("nan"))
    got, want = call(TARGET, "sample_grad", inputs, "h", G_B=G)
    assert got[1] is G and torch.equal(G, torch.zeros(2, 300, 3)), "A's features are none: it would have been left"
    for N, n in ((0, 7), (2, 0)):
        rows, sq = (0, 0, 0), torch.zeros(2, dtype=torch.float64)
        grad = emulation.LayerGrad((N, 1, 5, n, 3), 0, 1.0, "A", rows, rows, 0, 0, sq.data_ptr())
        emulation.sample_grad_clip(grad, emulation.plan_sample_grad_clip(grad, 0), 1.0, 1.0, N, 0, 0, 0, 0)
        emulation.sample_grad(grad, emulation.plan_sample_grad(grad, 0), 0, 0, False, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_without_features_of_dy_all_is_zero(dtype):
    for N in (0, 2):
        check_sample_grad(TARGET, GradCase(N, 3, 0, 5, 4, dtype))
        check_sample_grad_clip(TARGET, GradCase(N, 3, 0, 5, 4, dtype))


def test_what_is_expanded_is_not_written():
    dy, B, h, x = torch.ones(3, 5, 6), torch.ones(6, 4), torch.ones(3, 5, 4), torch.ones(3, 5, 7)
    with pytest.raises(ValueError, match=r"sample_grad: G_B of shape \(3, 6, 4\) is expanded"):
        cuda.sample_grad(dy, B, 1.0, h=h, G_B=torch.zeros(1, 6, 4).expand(3, 6, 4))
    with pytest.raises(ValueError, match="sample_grad: G_A of shape .* is expanded"):
        cuda.sample_grad(dy, B, 1.0, x=x, G_A=torch.zeros(3, 4, 1).expand(3, 4, 7))
    with pytest.raises(ValueError, match="sample_grad_clip: S_B of shape .* is expanded"):
        cuda.sample_grad_clip(dy, B, 1.0, h=h, max_norm=1.0, S_B=torch.zeros(1, 4).expand(6, 4))
    G = torch.zeros(1, 6, 4).as_strided((1, 6, 4), (0, 4, 1))  # one sample: its stride means nothing
    assert cuda.sample_grad(dy[:1], B, 1.0, h=h[:1], G_B=G)[1] is G and G.eq(5).all()


@pytest.mark.parametrize("op", ["sample_grad", "sample_grad_clip"])
def test_results_repeat_and_hold_every_scale(op):
    check_repeats(TARGET, GradCase(23, 40, 90, 70, 5), op)
    check_scales(TARGET, GradCase(3, 5, 17, 19, 4), op)


def test_half_precision_keeps_dz_beyond_its_range():
    """dz of 1e6 in a float16 model: G_A is exact where dz itself overflows; tiles of very different sizes."""
    dy, B, x = torch.randn(2, 130, 40) * 300, torch.randn(40, 6) * 1000, torch.randn(2, 130, 30)
    dy[:, :40] *= 1e-4
    dy[1, 80:] *= 1e-2
    inputs = {"dy": dy.to(F16), "B": B.to(F16), "x": x.to(F16)}
    got, want = call(TARGET, "sample_grad_clip", inputs, "x", max_norm=1e30, need_dz=False)
    assert (SCALING * inputs["dy"].float() @ inputs["B"].float()).abs().max() > 65504
    torch.testing.assert_close(got[3].double(), want[3], rtol=1e-5, atol=1e-6 * want[3].abs().max().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_a_bad_record_spoils_no_other(bad, dtype):
    for op in ("sample_grad", "sample_grad_clip"):
        check_bad_record(TARGET, GradCase(12, 5, 17, 19, 4, dtype), op, bad)


def test_what_no_cluster_holds_is_refused():
    def ask(m: int, r: int):
        cuda.sample_grad_clip(torch.zeros(1, 1, m), torch.zeros(m, r), 1.0, h=torch.zeros(1, 1, r), max_norm=1.0)

    with pytest.raises(RuntimeError, match="sample_grad_clip: backend 'cuda' takes ranks to 64, got 65"):
        ask(8, 65)
    with pytest.raises(RuntimeError, match="cannot hold a gradient of 40000 x 16"):
        ask(40_000, 16)
    with pytest.raises(ValueError, match="needs h or x"):
        cuda.sample_grad_clip(torch.zeros(1, 1, 4), torch.zeros(4, 2), 1.0, max_norm=1.0)


def test_a_cluster_holds_whatever_the_dispatch_gives_it(emulation):
    """At the corners of ``gpu.small``; the emulated machine has the shared memory of sm_90."""
    for wide in (1, 63, 64, 1000, 4096):
        for T in (1, 63, 256):
            for r in (1, 16):
                N = min(256 // -(-T // 64), (1 << 24) // (T * wide))
                dy, B, h = (torch.empty(s, dtype=BF16, device="meta") for s in ((N, T, wide), (wide, r), (N, T, r)))
                assert gpu.small(dy, B, h, dy) and not gpu.small(dy, B, None, None)
                for factor in "AB":
                    sizes, rows = (N, T, wide, wide if factor == "A" else 0, r), (16, T * wide, wide)
                    grad = emulation.LayerGrad(sizes, 1, 1.0, factor, rows, rows, 16, 16, 16)
                    for plan in (emulation.plan_sample_grad(grad, 0), emulation.plan_sample_grad_clip(grad, 0)):
                        assert plan.clusters >= 1 and plan.shared <= 227 * 1024


def test_more_positions_than_the_kernel_counts_are_refused(emulation):
    grad = emulation.LayerGrad((1, 2**31, 1, 0, 1), 1, 1.0, "B", (16, 16, 1), (16, 16, 1), 16, 16, 16)
    for op in ("sample_grad", "sample_grad_clip"):
        with pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' takes fewer than 2.31 positions, got 2147483648"):
            getattr(emulation, f"plan_{op}")(grad, 0)


def test_shapes_without_end_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(cuda, "_plans", {i: None for i in range(4096)})
    check_sample_grad(TARGET, GradCase(2, 3, 4, 4, 2), ("h",))
    assert len(cuda._plans) < 4096


def test_words_are_the_same_bit_for_bit():
    check_words(TARGET)


def test_normals():
    check_normals(TARGET)


@pytest.mark.parametrize("padding", ["symmetric", "reflect"])
@pytest.mark.parametrize("noise_std", [0.0, 0.8])
def test_privatize(noise_std, padding):
    for N in (0, 1, 9):
        check_privatize(TARGET, N, noise_std, padding)
    for parts in ("g", "s", ""):
        check_privatize(TARGET, 2, noise_std, padding, parts=parts)


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_privatize_aligned(noise_std):
    """Every pointer and size a multiple of 16 bytes: the vectorized form; more tiles than the grid has blocks."""
    cases = [((16, 768), 1), ((300, 4), 0), ((100,), None), ((64, 64), 0), ((30_000,), None), ((5, 4000), 1)]
    check_privatize(TARGET, 9, noise_std, "reflect", cases=cases)
    check_privatize(TARGET, 3, noise_std, "symmetric", cases=cases[2:3])


def test_masked_samples_are_not_read():
    check_masked_samples(TARGET)


def test_clip_reduce():
    for N in (0, 1, 9):
        check_clip_reduce(TARGET, N)


def test_views_and_strides():
    check_layouts(TARGET)


OPERATIONS = {
    "privatize": lambda: cuda.smooth(torch.zeros(8, 2), 0),
    "clip_reduce": lambda: cuda.clip_reduce([torch.zeros(2, 8)], torch.zeros(1, 2), [torch.zeros(8)]),
    "chacha20_normal": lambda: cuda.chacha20_normal(8, key=bytes(32), release=0, tensor_index=0, device="cpu"),
    "chacha20_words": lambda: cuda.chacha20_words(bytes(32), (0, 0, 0), 0, 2, device="cpu"),
    "sample_grad": lambda: cuda.sample_grad(torch.zeros(1, 1, 8), torch.zeros(8, 2), 1.0, h=torch.zeros(1, 1, 2)),
    "sample_grad_clip": lambda: cuda.sample_grad_clip(
        torch.zeros(1, 1, 8), torch.zeros(8, 2), 1.0, h=torch.zeros(1, 1, 2), max_norm=1.0
    ),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_failing_call_becomes_an_exception_that_names_the_operation(op, emulation):
    """The runtime's calls fail one after another: each is checked."""
    failures = 0
    for calls in range(30):
        cuda._plans.clear()
        emulation.fail_after(calls)
        try:
            OPERATIONS[op]()
        except RuntimeError as error:
            assert str(error).startswith(f"{op}: cuda") and "unspecified launch failure" in str(error)
            assert emulation.last_error() == 0, "the next launch of this thread would be told of this one's error"
            failures += 1
        else:
            break
        finally:
            emulation.fail_after(-1)
    assert failures >= 3, "set the device, ask for its size, launch"
    OPERATIONS[op]()


def test_an_error_that_somebody_else_left_is_none_of_ours(emulation):
    """The sum is added to before its launch could be told: an exception would say that it was not."""
    emulation.leave_error()
    out = torch.zeros(8)
    cuda.clip_reduce([torch.ones(2, 8)], torch.ones(1, 2), [out])
    assert torch.equal(out, torch.full((8,), 2.0)) and emulation.last_error() != 0


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_callers_current_device_stays_current(op, emulation, monkeypatch):
    """torch's guard, here of the emulated machine, is around all that the C++ side does."""

    @contextlib.contextmanager
    def device_of(t):
        before = emulation.current_device()
        yield
        emulation.set_device(before)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    emulation.set_device(1)
    OPERATIONS[op]()  # of tensors of device 0
    assert emulation.current_device() == 1

"""The Triton kernels in Triton's interpreter, on every case of cases.py, against the reference in float64."""

import contextlib
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated

import pytest
import torch
from cases import BF16, GRAD_CASES, GradCase, grad_inputs
from gpu_suite import (
    F16,
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
    compare,
)
from tolerances import BFLOAT16_CUT

pytest.importorskip("triton", reason="triton is not installed")

import lalora_kernels.triton_ops as triton_ops
from lalora_kernels import gpu, segments
from lalora_kernels.gpu import refuse_capture
from lalora_kernels.triton_ops import common

# NumPy interprets, and says what it thinks of Inf - Inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TARGET = Target(triton_ops, "cpu", BFLOAT16_CUT)
NOISY = [((7, 150), 1), ((400, 3), 0), ((1, 1), 0), ((3, 501), 1), ((130, 10), 0), ((11, 13), None), ((), None)]
OUTPUTS = [GradCase(3, 7, 11, 13, 5), GradCase(2, 65, 97, 31, 8), GradCase(2, 0, 5, 4, 3)]
HALVES = [GradCase(3, 19, 41, 35, 6, F16), GradCase(2, 70, 300, 130, 20, F16), GradCase(2, 130, 40, 600, 5, BF16)]


def test_the_interpreter_runs():
    assert common.INTERPRET


def small(case: GradCase) -> bool:
    return case.N * case.T * max(case.m, case.n) < 1_500


@pytest.mark.parametrize("case", GRAD_CASES + HALVES, ids=str)
def test_sample_grad(case):
    check_sample_grad(TARGET, case, ("h", "x", "hx", "") if small(case) else ("hx",))


@pytest.mark.parametrize("case", GRAD_CASES + HALVES, ids=str)
def test_sample_grad_clip(case):
    check_sample_grad_clip(TARGET, case, ("h", "x", "hx", "") if small(case) else ("hx",))


@pytest.mark.parametrize("op", ["sample_grad", "sample_grad_clip"])
@pytest.mark.parametrize("case", OUTPUTS, ids=str)
def test_outputs_are_written_added_to_and_returned(case, op):
    check_outputs(TARGET, case, op)


def test_sums_over_spans_of_T_are_added_to_and_repeat(monkeypatch):
    """Long samples and few of them: T is cut, and the pieces are added up by a second launch."""
    monkeypatch.setattr(common, "assumed", common.Chip(80, 64))
    case = GradCase(1, 400, 33, 70, 5)
    check_sample_grad(TARGET, case)
    check_outputs(TARGET, case)
    check_repeats(TARGET, case, "sample_grad")


def test_work_is_cut_only_where_the_chip_would_stand_idle():
    """Of a sum over T: 128 programs on 132 multiprocessors are left alone, fewer are cut into at most two turns."""
    from lalora_kernels.triton_ops.sample_grad import FILL_DZ, FILL_G, spans

    assert spans(132, 128, 2048, 64, FILL_G) == (1, 2048)
    assert spans(132, 64, 2048, 64, FILL_G) == (4, 512)
    assert spans(132, 128, 4096, 256, FILL_DZ) == (2, 2048)
    assert spans(132, 64, 100, 64, FILL_G)[0] == 1  # two blocks a piece at least
    for programs in range(1, 300):
        for length in (1, 65, 197, 2048):
            for fill in (FILL_G, FILL_DZ):
                pieces, span = spans(132, programs, length, 32, fill)
                assert (pieces - 1) * span < length <= pieces * span and span % 32 == 0
                assert pieces == 1 or programs * pieces <= 2 * 132


@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("dtype", [BF16, F16, torch.float32])
def test_dz_beside_the_gradient_of_A_is_the_same_cut_or_not(monkeypatch, dtype, multiprocessors):
    """The gradient takes it in float32, the caller in dy's dtype: both come from one launch, or a sum of pieces."""
    launched = []
    module = sys.modules["lalora_kernels.triton_ops.sample_grad"]
    finish = module.finish
    monkeypatch.setattr(module, "finish", lambda z, *a: launched.append(z is not None) or finish(z, *a))
    monkeypatch.setattr(common, "assumed", common.Chip(80, multiprocessors))
    check_sample_grad(TARGET, GradCase(2, 40, 1100, 9, 4, dtype), ("x",))
    assert any(launched) == (multiprocessors > 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_configuration_of_each_architecture(arch, monkeypatch):
    monkeypatch.setattr(common, "assumed", common.Chip(arch, 3))
    for dtype in (BF16, F16):
        check_sample_grad(TARGET, GradCase(2, 70, 270, 300, 16, dtype), ("hx",))
        check_sample_grad_clip(TARGET, GradCase(5, 70, 130, 70, 16, dtype), ("hx",))


def test_inputs_of_several_dtypes():
    """float32 factors beside a bfloat16 base: computed in float32, dz in dy's dtype."""
    inputs = grad_inputs(GradCase(2, 9, 20, 18, 4, BF16))
    inputs.update(B=inputs["B"].float(), h=inputs["h"].float())
    for op, kwargs in (("sample_grad", {}), ("sample_grad_clip", dict(max_norm=3.0))):
        got, want = call(TARGET, op, inputs, "hx", **kwargs)
        assert got[0].dtype == BF16
        compare(TARGET, BF16, got, want)


@pytest.mark.parametrize("op", ["sample_grad", "sample_grad_clip"])
def test_every_scale(op):
    check_scales(TARGET, GradCase(3, 5, 17, 19, 4), op)


@pytest.mark.parametrize(
    "dtype, bad",
    [
        *((torch.float32, bad) for bad in (math.nan, math.inf, -math.inf)),
        (BF16, math.nan),
        (F16, math.inf),
    ],
)
def test_a_bad_record_spoils_no_other(dtype, bad):
    check_bad_record(TARGET, GradCase(3, 5, 17, 19, 4, dtype), "sample_grad", bad)
    check_bad_record(TARGET, GradCase(3, 5, 17, 19, 4, dtype), "sample_grad_clip", bad)  # fused
    check_bad_record(TARGET, GradCase(3, 2, 1100, 19, 8, dtype), "sample_grad_clip", bad)  # through sample_grad


def test_without_features_of_dy_all_is_zero():
    check_sample_grad(TARGET, GradCase(2, 3, 0, 5, 4))
    check_sample_grad_clip(TARGET, GradCase(2, 3, 0, 5, 4))


def test_words_are_the_same_bit_for_bit():
    check_words(TARGET)


def test_normals():
    check_normals(TARGET)


@pytest.mark.parametrize("padding", ["symmetric", "reflect"])
@pytest.mark.parametrize("parts", ["gs", "g", "s", ""])
def test_privatize_without_noise(parts, padding):
    for N in (0, 1, 3) if parts == "gs" else (2,):
        check_privatize(TARGET, N, 0.0, padding, parts=parts)


def test_privatize_with_noise():
    """Also across the edge of a tile, and where a row does not begin at a block of the stream."""
    check_privatize(TARGET, 2, 0.8, "symmetric", cases=NOISY)


def test_privatize_aligned():
    """Every pointer and size a multiple of 16 bytes: the vectorized form."""
    check_privatize(TARGET, 3, 0.5, "reflect", cases=[((16, 768), 1), ((300, 4), 0), ((100,), None)])


def test_masked_samples_are_not_read():
    check_masked_samples(TARGET)


def test_clip_reduce():
    for N in (0, 1, 5):
        check_clip_reduce(TARGET, N)


def test_views_and_strides():
    check_layouts(TARGET)


def test_a_rank_that_no_tile_holds_is_refused():
    with pytest.raises(ValueError, match="rank 2049"):
        triton_ops.smooth(torch.zeros(6, 2049), 0)


def test_a_sum_that_no_grid_adds_up_is_refused():
    from lalora_kernels.triton_ops.sample_grad import FINISH

    assert gpu.MAX_SUM == 65_535 * FINISH
    dy, B, h = (torch.empty(*s, device="meta") for s in ((0, 1, 65_536), (65_536, 1024), (0, 1, 1024)))
    with pytest.raises(ValueError, match="S_B has 67108864 elements; .* take backend='reference'"):
        triton_ops.sample_grad_clip(dy, B, 1.0, h=h, max_norm=1.0)
    assert gpu.sums("sample_grad_clip", None, "S_A", (1024, 65_535), torch.device("meta"))[0].numel() == gpu.MAX_SUM


def test_bad_inputs():
    with pytest.raises(TypeError, match="float64"):
        triton_ops.sample_grad(torch.zeros(2, 3, 4).double(), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="h has shape"):
        triton_ops.sample_grad(torch.zeros(2, 3, 4), torch.zeros(4, 2), 1.0, h=torch.zeros(2, 3, 3))
    with pytest.raises(TypeError, match="G_B"):
        triton_ops.sample_grad(
            torch.zeros(1, 1, 4), torch.zeros(4, 2), 1.0, h=torch.zeros(1, 1, 2), G_B=torch.zeros(1, 4, 2).double()
        )
    with pytest.raises(ValueError, match="32 bytes"):
        triton_ops.chacha20_normal(4, key=b"short", release=0, tensor_index=0, device="cpu")
    with pytest.raises(ValueError, match="G_B of shape .* is expanded"):
        triton_ops.sample_grad(
            torch.ones(3, 1, 4), torch.ones(4, 2), 1.0, h=torch.ones(3, 1, 2), G_B=torch.ones(1, 4, 2).expand(3, 4, 2)
        )
    with pytest.raises(ValueError, match="S_A of shape .* is expanded"):
        triton_ops.sample_grad_clip(
            torch.ones(3, 1, 4), torch.ones(4, 2), 1.0, x=torch.ones(3, 1, 5), max_norm=1.0,
            S_A=torch.ones(2, 1).expand(2, 5),
        )  # fmt: skip
    out = [torch.zeros(6, 2)]
    kwargs = dict(noise_std=0.0, key=None, release=0, tensor_index=[0], smooth_dim=[0], divisor=1.0)
    with pytest.raises(ValueError, match=r"G\[0\] has shape"):
        triton_ops.privatize([torch.zeros(3, 5, 2)], [None], torch.zeros(1, 3), out, **kwargs)
    with pytest.raises(TypeError, match=r"S\[0\]"):
        triton_ops.privatize([None], [out[0].double()], None, out, **kwargs)
    with pytest.raises(ValueError, match="no axis"):
        triton_ops.privatize([None], [None], None, out, **{**kwargs, "smooth_dim": [2]})


def test_noise_is_refused_while_a_graph_is_captured(monkeypatch):
    """A replay would draw the same noise twice."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="one \\(key, release\\) pair at every replay"):
        refuse_capture("privatize", torch.device("cuda"))
    refuse_capture("privatize", torch.device("cpu"))


def test_a_table_is_built_once_for_a_set_of_tensors(monkeypatch):
    segments._tables.clear()
    built = []
    build = segments._build
    monkeypatch.setattr(segments, "_build", lambda *a: built.append(a) or build(*a))
    G, out = [torch.randn(3, 8, 2)], [torch.zeros(8, 2)]
    for weight in (0.5, 2.0, 0.0):
        out[0].zero_()
        triton_ops.clip_reduce(G, torch.full((1, 3), weight), out)
        torch.testing.assert_close(out[0], weight * G[0].sum(0))
    assert len(built) == 1
    for _ in range(2 * segments.KEPT):
        triton_ops.clip_reduce(G, torch.zeros(1, 3), [torch.zeros(8, 2)])
    assert len(segments._tables) <= segments.KEPT


def test_float32_products_take_tf32_only_where_torchs_own_may(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.allow_tf32, []

    class Launch:
        def __getitem__(self, grid):
            return lambda *_, PRECISION, **__: seen.append(PRECISION)

    monkeypatch.setattr(sys.modules["lalora_kernels.triton_ops.sample_grad"], "sample_grad_kernel", Launch())
    try:
        for allowed in (False, True):
            matmul.allow_tf32 = allowed
            triton_ops.sample_grad(torch.ones(1, 3, 4), torch.ones(4, 2), 1.0, h=torch.ones(1, 3, 2))
        monkeypatch.setattr(torch.version, "hip", "6.2")
        assert common.precision(torch.float32) == "ieee"
        monkeypatch.setattr(torch.version, "hip", None)
        if hasattr(matmul, "fp32_precision"):  # which forbids to read allow_tf32 from then on
            for setting in ("ieee", "tf32"):
                matmul.fp32_precision = setting
                assert common.precision(torch.float32) == setting
    finally:
        matmul.allow_tf32 = before
    assert seen == ["ieee", "tf32"]


def test_configurations_are_timed_only_on_request(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(common, "_tuned", {})
    ran = []
    times = {"slow": 2.0, "fast": 1.0}
    monkeypatch.setattr(common.triton.testing, "do_bench", lambda run, **_: run() or times[ran[-1]])
    monkeypatch.delenv("LALORA_TRITON_AUTOTUNE", raising=False)
    assert common.pick(("op",), ("slow", "fast"), ran.append) == "slow" and not ran
    monkeypatch.setenv("LALORA_TRITON_AUTOTUNE", "1")
    for _ in range(2):
        assert common.pick(("op",), ("slow", "fast"), ran.append) == "fast" and ran == ["slow", "fast"]

"""The public operations. Each runs on the backend that ``dispatch`` chooses; ``backend=`` forces one.

All take and return plain tensors and record no autograd history. docs/ops.md defines them; the reference
(``lalora_kernels.reference``) is the oracle that every backend is tested against. It leaves shapes that do not fit to
torch, which raises RuntimeError or IndexError; the compiled backends raise ValueError, and TypeError for dtypes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lalora_kernels import dispatch


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def sample_grad(
    dy: Tensor,
    B: Tensor,
    scaling: float,
    *,
    h: Tensor | None = None,
    x: Tensor | None = None,
    need_dz: bool = True,
    G_B: Tensor | None = None,
    G_A: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Per-sample gradients of one LoRA layer: ``(dz, G_B, sq_B, G_A, sq_A)``, None for what was not asked.

    Args:
        dy: (N, T, m), gradient of the summed loss with respect to the layer's output; any strides.
        B: (m, r), ``lora_B``.
        scaling: lora_alpha / r.
        h: (N, T, r) = x A^T; asks for ``G_B[i] = scaling * dy_i^T h_i`` (m, r).
        x: (N, T, n); asks for ``G_A[i] = dz_i^T x_i`` (r, n).
        need_dz: return ``dz = scaling * dy B`` (N, T, r), in dy's dtype.
        G_B, G_A: written in place where given, float32 (float64 for float64 inputs).
        accumulate: add to what stands in G_B and G_A (a module called twice); sq is of the sum.
        backend: see ``lalora_kernels.dispatch``.

    Guarantee: row i of every output depends on row i of the inputs alone. ``sq_F[i]`` is ||G_F[i]||^2 in float64, so a
    finite float32 gradient has a finite norm. Products accumulate in float32 for float32 and bfloat16 inputs.

    ===================  ====================================================================
    case                 result
    ===================  ====================================================================
    N = 0                empty tensors
    T = 0                zero gradients and norms
    NaN or Inf in row i  NaN or Inf in row i of the outputs, nowhere else
    ===================  ====================================================================

    Raises ValueError for a scaling that is not finite or shapes that do not fit, BackendError for a backend that cannot
    serve the inputs.
    """
    scaling = _finite("sample_grad: scaling", scaling)
    op = dispatch.get("sample_grad", dy, backend)
    return op(dy, B, scaling, h=h, x=x, need_dz=need_dz, G_B=G_B, G_A=G_A, accumulate=accumulate)


def sample_grad_clip(
    dy: Tensor,
    B: Tensor,
    scaling: float,
    *,
    max_norm: float,
    grad_scale: float = 1.0,
    valid: int | None = None,
    h: Tensor | None = None,
    x: Tensor | None = None,
    need_dz: bool = True,
    S_B: Tensor | None = None,
    S_A: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``sample_grad`` with each sample's gradient clipped and summed: ``(dz, S_B, sq_B, S_A, sq_A)``.

    ``S_F += sum_i c_i G_F[i]``, ``c_i = grad_scale * min(1, max_norm / (grad_scale * ||G_F[i]||))``. A and B are
    separate tensors, each clipped to ``max_norm``. ``S_B`` (m, r) and ``S_A`` (r, n) are added to, made if None.
    ``valid``: samples from this index on are placeholders (default: all are records). sq is taken before clipping.

    Guarantee: adding or removing one record changes S_F by at most ``max_norm`` in L2 (times 1 + 1e-5 in float32):
    the sensitivity of each of the two sums, and of a layer with both active sqrt(2) max_norm.

    ===================  ====================================================================
    case                 contribution of sample i
    ===================  ====================================================================
    N = 0                none; S is unchanged
    ||G[i]|| = 0         zero (c_i = grad_scale)
    NaN or Inf in G[i]   zero: c_i = 0 and G[i] is not read, so 0 * Inf cannot leak
    c_i under 1e-36      zero: float32 could not hold the factor exactly enough for the bound
    i >= valid           zero
    ===================  ====================================================================

    Raises ValueError for a max_norm or grad_scale that is not positive, a scaling that is not finite, or shapes that do
    not fit.
    """
    scaling = _finite("sample_grad_clip: scaling", scaling)
    if not max_norm > 0:
        raise ValueError(f"sample_grad_clip: max_norm must be positive, got {max_norm}")
    if not (grad_scale > 0 and math.isfinite(grad_scale)):
        raise ValueError(f"sample_grad_clip: grad_scale must be positive and finite, got {grad_scale}")
    if valid is not None and not 0 <= valid <= len(dy):
        raise ValueError(f"sample_grad_clip: valid is between 0 and the {len(dy)} samples, got {valid}")
    op = dispatch.get("sample_grad_clip", dy, backend)
    return op(
        dy,
        B,
        scaling,
        max_norm=max_norm,
        grad_scale=grad_scale,
        valid=valid,
        h=h,
        x=x,
        need_dz=need_dz,
        S_B=S_B,
        S_A=S_A,
    )


def clip_reduce(G: Sequence[Tensor], weights: Tensor, out: Sequence[Tensor], *, backend: str | None = None) -> None:
    """``out[l] += sum_i weights[l, i] G[l][i]`` in place; G[l] (N, *shape_l), weights (L, N), out[l] shape_l.

    Guarantee: with ``weights[:, i] = c_i`` and ``c_i ||g_i|| <= C`` over all l, one record changes the outputs by at
    most C. A sample of weight 0 is not read, whatever it holds. N = 0 leaves ``out`` as it is.
    """
    if not out:
        return
    dispatch.get("clip_reduce", out[0], backend)(G, weights, out)


def privatize(
    G: Sequence[Tensor | None],
    S: Sequence[Tensor | None],
    weights: Tensor,
    out: Sequence[Tensor],
    *,
    noise_std: float,
    key: bytes | None,
    release: int,
    tensor_index: Sequence[int],
    smooth_dim: Sequence[int | None],
    divisor: float,
    padding: str = "symmetric",
    backend: str | None = None,
) -> None:
    """One release: ``out[l] = smooth(S[l] + sum_i weights[l, i] G[l][i] + noise_std * xi_l) / divisor`` for all l.

    Args:
        G: per tensor (N, *shape_l), or None.
        S: per tensor the clipped sum so far, shape_l, or None.
        weights: (L, N), clip factors; read only where G[l] is given.
        out: per tensor shape_l; written.
        noise_std: sigma C. 0 releases without noise, and then no epsilon holds.
        key, release, tensor_index: the noise stream (docs/privacy.md). One (key, release) pair serves one call, ever.
        smooth_dim: per tensor the feature axis (0 for lora_B, 1 for lora_A), or None: not smoothed.
        divisor: the expected batch size.
        padding: "symmetric" or "reflect", as NumPy names them.

    Guarantee: if one record changes ``S + sum_i w_i G_i`` over all l by at most C in L2, the outputs are a Gaussian
    mechanism with noise multiplier noise_std / C: filter and division come after the noise (post-processing).

    ==========================  ==============================================================
    case                        result
    ==========================  ==============================================================
    N = 0, or all G and S None  noise alone, filtered and divided: an empty batch is noised too
    weight 0                    the sample is not read (NaN cannot leak)
    feature axis shorter than 5 filtered under the same padding rule; length 1 is unchanged
    out[l] is S[l]              allowed
    ==========================  ==============================================================

    Raises ValueError for noise without a 256-bit key, a stream number outside the nonce, repeated tensor indices (two
    tensors would share their noise), a divisor of 0, or shapes that do not fit.
    """
    if not (noise_std >= 0 and math.isfinite(noise_std)):
        raise ValueError(f"privatize: noise_std must be >= 0 and finite, got {noise_std}")
    if not (divisor > 0 and math.isfinite(divisor)):
        raise ValueError(f"privatize: divisor must be positive and finite, got {divisor}")
    if noise_std:
        if key is None or len(key) != 32:
            raise ValueError("privatize: noise_std > 0 needs a key of 32 bytes")
        check_stream("privatize", release, tensor_index)
        if len(set(tensor_index)) != len(tensor_index):
            raise ValueError("privatize: two tensors with one tensor_index would share their noise")
    if not out:
        return
    dispatch.get("privatize", out[0], backend)(
        G,
        S,
        weights,
        out,
        noise_std=noise_std,
        key=key,
        release=release,
        tensor_index=tensor_index,
        smooth_dim=smooth_dim,
        divisor=divisor,
        padding=padding,
    )


def check_stream(op: str, release: int, tensor_index: Sequence[int]) -> None:
    """Raise ValueError where a stream's numbers do not fit the nonce: a number cut short would repeat a stream."""
    if not 0 <= release < 1 << 64:
        raise ValueError(f"{op}: release {release} does not fit the nonce's 64 bits")
    for index in tensor_index:
        if not 0 <= index < 1 << 32:
            raise ValueError(f"{op}: tensor index {index} does not fit the nonce's 32 bits")


def smooth(t: Tensor, dim: int, padding: str = "symmetric", *, backend: str | None = None) -> Tensor:
    """The low-pass filter [1,4,6,4,1]/16 along ``dim``; same shape. DC gain 1; white noise keeps 70/256 of its power.

    Only ever applied after noise (post-processing): filtering before it would change the sensitivity that the noise
    was scaled to. Source: Muhammad et al. 2026 (LA-LoRA, 2602.19926).
    """
    return dispatch.get("smooth", t, backend)(t, dim, padding)


def chacha20_normal(
    count: int,
    *,
    key: bytes,
    release: int,
    tensor_index: int,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Elements ``start .. start + count - 1`` of a noise stream, standard normal, shape (count,).

    Every backend draws the same ChaCha20 words (RFC 8439), bit for bit, and the same normals to 1e-5. Each normal is
    a sum of four (Holohan & Braghin 2021, 2107.10138). Raises ValueError for a key that has not 32 bytes, a release or
    tensor index that the nonce cannot hold, or a range outside the stream's 2^34 elements.
    """
    check_stream("chacha20_normal", release, [tensor_index])
    op = dispatch.get("chacha20_normal", (device, dtype), backend)
    return op(count, key=key, release=release, tensor_index=tensor_index, start=start, dtype=dtype, device=device)

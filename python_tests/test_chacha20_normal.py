"""The noise source: RFC 8439's vectors, the same words everywhere, the right distribution."""

import importlib
import math
from functools import lru_cache

import pytest
import torch
from scipy import stats
from tolerances import KS_ACCEPT, KS_REJECT, NORMAL_F32
from torch.utils._python_dispatch import TorchDispatchMode

from lalora_kernels import functional, native, reference
from lalora_kernels.reference.chacha20_normal import normals_from_words

KEY = bytes(range(32))
WORDS = {"reference": reference.chacha20_words, "cpp": native.chacha20_words}


def nonce_words(hexadecimal: str) -> tuple[int, int, int]:
    raw = bytes.fromhex(hexadecimal)
    return tuple(int.from_bytes(raw[i : i + 4], "little") for i in (0, 4, 8))


def stream(backend: str, nonce: str, counter: int, size: int) -> bytes:
    words = WORDS[backend](KEY, nonce_words(nonce), counter, -(-size // 64))
    return b"".join(int(w).to_bytes(4, "little") for w in words.flatten())[:size]


def test_rfc_8439_block(backend):
    """Section 2.3.2."""
    want = """10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e
              d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"""
    assert stream(backend, "000000090000004a00000000", 1, 64) == bytes.fromhex(want)


def test_rfc_8439_encryption(backend):
    """Section 2.4.2: two blocks, the second cut."""
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    want = """6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b
              f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8
              07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736
              5af90bbf74a35be6b40b8eedf2785e42874d"""
    key_stream = stream(backend, "000000000000004a00000000", 1, len(plain))
    assert bytes(a ^ b for a, b in zip(plain, key_stream, strict=True)) == bytes.fromhex(want)


@lru_cache
def reference_words(nonce, start, blocks):
    return reference.chacha20_words(KEY, nonce, start, blocks)


@lru_cache
def reference_normals(start, count, release):
    stream = dict(key=KEY, release=release, tensor_index=release % 7919, start=start)
    return reference.chacha20_normal(count, **stream, dtype=torch.float64)


@pytest.mark.parametrize("start", [0, 5, 2**16 - 3, 2**31 - 20, 2**32 - 41])
@pytest.mark.parametrize("blocks", [0, 1, 17, 41])
def test_words_are_the_same_bit_for_bit(start, blocks, isa):
    for nonce in ((0, 0, 0), (1, 2, 3), (2**32 - 1, 2**32 - 1, 2**32 - 1)):
        assert torch.equal(native.chacha20_words(KEY, nonce, start, blocks), reference_words(nonce, start, blocks))


@pytest.mark.parametrize("release", [1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("start, count", [(0, 1), (0, 50_000), (3, 70), (2**34 - 1001, 1001), (2**33 + 5, 130), (7, 0)])
def test_normals_equal_float64(start, count, release, isa):
    stream = dict(key=KEY, release=release, tensor_index=release % 7919, start=start)
    got = native.chacha20_normal(count, **stream)
    want = reference_normals(start, count, release)
    assert got.dtype == torch.float32 and got.shape == (count,)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=NORMAL_F32)


def test_an_element_is_the_same_in_every_range(isa, threads):
    stream = dict(key=KEY, release=9, tensor_index=2)
    whole = native.chacha20_normal(30_000, **stream)
    for start, count in ((1, 5), (63, 66), (129, 29_000), (4097, 1), (16_384, 8_192)):
        assert torch.equal(native.chacha20_normal(count, start=start, **stream), whole[start : start + count])
    threads(1)
    assert torch.equal(native.chacha20_normal(30_000, **stream), whole)


def test_extreme_words():
    """The largest and smallest uniforms give finite normals: no logarithm of 0, no root of a negative number."""
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    words = torch.cartesian_prod(*[torch.tensor(edges)] * 4)
    normals = normals_from_words(words)
    assert torch.isfinite(normals).all()
    assert normals.abs().max() <= 2 * math.sqrt(2) * math.sqrt(2 * 33 * math.log(2)) / math.sqrt(2)


def test_distribution(backend):
    """Accepts sigma, rejects two thirds and one and a half of it."""
    x = functional.chacha20_normal(100_000, key=KEY, release=1, tensor_index=0, backend=backend).double().numpy()
    assert stats.kstest(x, "norm").pvalue > KS_ACCEPT
    for wrong in (2 / 3, 1.5):
        assert stats.kstest(x * wrong, "norm").pvalue < KS_REJECT
    neighbours = stats.pearsonr(x[:-1], x[1:])
    assert neighbours.pvalue > KS_ACCEPT
    assert stats.pearsonr(x[:-4], x[4:]).pvalue > KS_ACCEPT


def test_streams_differ():
    base = dict(key=KEY, release=1, tensor_index=0)
    streams = [base, {**base, "release": 2}, {**base, "tensor_index": 1}, {**base, "release": 1 + 2**32}]
    streams.append({**base, "key": bytes(31) + b"\x01"})
    drawn = [functional.chacha20_normal(64, **s) for s in streams]
    for i, a in enumerate(drawn):
        assert not any(torch.equal(a, b) for b in drawn[i + 1 :])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=b"short"), "32 bytes"),
        (dict(release=-1), "64 bits"),
        (dict(release=2**64), "64 bits"),
        (dict(tensor_index=2**32), "32 bits"),
        (dict(start=2**34), "outside"),
        (dict(start=-1), "outside"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_bad_streams(change, message, backend):
    with pytest.raises(ValueError, match=message):
        functional.chacha20_normal(4, **{**dict(key=KEY, release=0, tensor_index=0), **change}, backend=backend)


@pytest.mark.parametrize("most", [1, 10, 1 << 18])
def test_streams_together_are_the_streams_one_by_one(monkeypatch, most):
    module = importlib.import_module("lalora_kernels.reference.chacha20_normal")  # its package names the function so
    monkeypatch.setattr(module, "PASS", most)
    counts, indices, release = [5, 0, 4, 1, 33, 40, 3], [7, 0, 2**32 - 1, 3, 1, 2, 9], 2**33 + 5
    together = module.each_streams_start(counts, key=KEY, release=release, tensor_index=indices, device="cpu")
    for count, index, got in zip(counts, indices, together, strict=True):
        want = module.chacha20_normal(count, key=KEY, release=release, tensor_index=index, dtype=torch.float64)
        assert torch.equal(got, want)


def test_the_noise_of_a_release_is_one_pass_of_operations():
    """On a card that has no proven kernel each is a launch: a model of a hundred tensors would wait for 200,000."""

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.calls += 1
            return op(*args, **(kwargs or {}))

    def operations(tensors: int) -> int:
        out = [torch.empty(3, 4) for _ in range(tensors)]
        nothing = [None] * tensors
        with Counting() as counted:
            reference.privatize(
                nothing, nothing, None, out, noise_std=1.0, key=KEY, release=1, tensor_index=range(tensors),
                smooth_dim=nothing, divisor=1.0,
            )  # fmt: skip
        return counted.calls

    one = operations(1)
    assert one > 2000 and operations(11) < one + 10 * 20

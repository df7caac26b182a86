"""ChaCha20 (RFC 8439, section 2.3) as a counter-based source of normals."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
MASK = 0xFFFFFFFF
TWO_PI = 2.0 * math.pi
PASS = 1 << 18  # blocks; 128 bytes of state each, a few times over
MAX_ELEMENTS = 4 << 32  # the block counter is 32 bits wide and a block serves 4 elements


def key_words(key: bytes) -> list[int]:
    """The eight little-endian 32-bit words of a 256-bit key."""
    if len(key) != 32:
        raise ValueError(f"a ChaCha20 key has 32 bytes, got {len(key)}")
    return [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]


def _rotl(x: Tensor, n: int) -> Tensor:
    return ((x << n) & MASK) | (x >> (32 - n))


def _quarter_round(s: list[Tensor], a: int, b: int, c: int, d: int) -> None:
    s[a] = (s[a] + s[b]) & MASK
    s[d] = _rotl(s[d] ^ s[a], 16)
    s[c] = (s[c] + s[d]) & MASK
    s[b] = _rotl(s[b] ^ s[c], 12)
    s[a] = (s[a] + s[b]) & MASK
    s[d] = _rotl(s[d] ^ s[a], 8)
    s[c] = (s[c] + s[d]) & MASK
    s[b] = _rotl(s[b] ^ s[c], 7)


def chacha20_words(
    key: bytes,
    nonce: tuple[int, int, int],
    start: int,
    blocks: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Key stream words of blocks ``start .. start + blocks - 1``, int64 of shape (blocks, 16).

    Every value lies in [0, 2^32). Source: RFC 8439, section 2.3.
    Raises ValueError for a key of another length or a counter past 2^32.
    """
    if start < 0 or blocks < 0 or start + blocks > 1 << 32:
        raise ValueError(f"ChaCha20's block counter has 32 bits; blocks {start}..{start + blocks} do not fit")
    counter = torch.arange(start, start + blocks, dtype=torch.int64, device=device)
    return _words(key, counter, [torch.full_like(counter, w & MASK) for w in nonce])


def _words(key: bytes, counter: Tensor, nonce: list[Tensor]) -> Tensor:
    """(blocks, 16); counter and the nonce's three words (blocks,)."""
    initial = [torch.full_like(counter, w) for w in (*CONSTANTS, *key_words(key))]
    initial += [counter, *nonce]
    s = list(initial)
    for _ in range(10):
        for q in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            _quarter_round(s, *q)
        for q in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            _quarter_round(s, *q)
    return torch.stack([(a + b) & MASK for a, b in zip(s, initial)], dim=1)


def normals_from_words(words: Tensor) -> Tensor:
    """Four words an element, shape (..., 4), to one float64 normal: the mean of four Gaussians times two.

    Against floating-point reconstruction; Holohan & Braghin 2021 (2107.10138).
    """
    u = (words.to(torch.float64) + 0.5) * 2.0**-32
    u0, u1, u2, u3 = u.unbind(-1)
    radius0, radius1 = (-2.0 * u0.log()).sqrt(), (-2.0 * u2.log()).sqrt()
    angle0, angle1 = TWO_PI * u1, TWO_PI * u3
    return (radius0 * (angle0.cos() + angle0.sin()) + radius1 * (angle1.cos() + angle1.sin())) / 2.0


def chacha20_normal(
    count: int,
    *,
    key: bytes,
    release: int,
    tensor_index: int,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements ``start .. start + count - 1`` of the noise stream (key, release, tensor_index); shape (count,).

    Nonce word 0 is the tensor index, words 1 and 2 are the release number, low word first; the block counter is
    element / 4 and element e takes words 4(e mod 4) .. +3 of its block. Evaluated in float64, then
    rounded to ``dtype``.
    """
    if count < 0 or start < 0 or start + count > MAX_ELEMENTS:
        raise ValueError(f"elements {start}..{start + count} lie outside a noise stream of {MAX_ELEMENTS}")
    first, last = start // 4, -(-(start + count) // 4)
    nonce = (tensor_index, release & MASK, release >> 32)
    words = chacha20_words(key, nonce, first, max(last - first, 0), device)
    normals = normals_from_words(words.view(-1, 4, 4)).reshape(-1)
    offset = start - 4 * first
    return normals[offset : offset + count].to(dtype)


def each_streams_start(
    counts: Sequence[int], *, key: bytes, release: int, tensor_index: Sequence[int], device: torch.device | str
) -> Iterator[Tensor]:
    """The first ``counts[l]`` elements of stream ``tensor_index[l]`` in float64, for one l after another.

    ChaCha20 is some 2,500 operations of torch whatever the number of blocks, each a launch on a GPU; so the blocks of
    many tensors go through them together, up to PASS of them.
    """
    if any(count > MAX_ELEMENTS for count in counts):
        raise ValueError(f"a noise stream has {MAX_ELEMENTS} elements, {max(counts)} were asked for")
    blocks = [-(-count // 4) for count in counts]
    first = 0
    while first < len(counts):
        last, total = first + 1, blocks[first]
        while last < len(counts) and total + blocks[last] <= PASS:
            total, last = total + blocks[last], last + 1
        part = range(first, last)
        counter = torch.cat([torch.arange(blocks[l], dtype=torch.int64, device=device) for l in part])
        index = torch.cat([torch.full((blocks[l],), tensor_index[l] & MASK, device=device) for l in part])
        nonce = [index, torch.full_like(counter, release & MASK), torch.full_like(counter, release >> 32 & MASK)]
        normals = normals_from_words(_words(key, counter, nonce).view(-1, 4, 4)).reshape(-1)
        for l, z in zip(part, normals.split([4 * blocks[l] for l in part])):
            yield z[: counts[l]]
        first = last

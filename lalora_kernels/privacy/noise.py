"""Secret randomness: the noise key with its release numbers, the keyed uniform stream behind Poisson sampling, and
fresh seeds for what models and data sets draw.

The first two are ChaCha20 (RFC 8439) under 256-bit keys from the operating system. ε rests on nobody else
knowing a key and on no (key, nonce, block) being used twice, so keys cannot be printed, pickled, copied or saved,
numbers only move forward, and a forked process draws new keys.
"""

import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from lalora_kernels import dispatch

if TYPE_CHECKING:
    from typing_extensions import Self

KEY_BYTES = 32
MAX_RELEASES = 1 << 64  # nonce words 1 and 2
SAMPLING_NONCE = 0xFFFFFFFF  # nonce word 0 of the sampling stream; a tensor index never gets there
TWISTER_WORDS, TWISTER_AT = 624, 24  # of torch's CPU generator: 32 bits in 64 each, and where in its state they begin
_REFILL_BLOCKS = 4096  # 65,536 words: fewer, and the reference backend mostly pays for Python

_seeds: deque[int] = deque(maxlen=1024)  # of torch's generators, the latest ones of all threads

_live: "weakref.WeakSet[_KeyedSource]" = weakref.WeakSet()


class Key(bytes):
    """A 256-bit key that prints as ``<key hidden>`` in tracebacks, logs and debuggers, and that cannot be pickled."""

    __slots__ = ()

    def __new__(cls, value: bytes) -> "Key":
        if not isinstance(value, (bytes, bytearray)) or len(value) != KEY_BYTES:
            got = f"{len(value)} bytes" if isinstance(value, (bytes, bytearray)) else type(value).__name__
            raise ValueError(f"a key is bytes of length {KEY_BYTES}, got {got}; make one with os.urandom({KEY_BYTES})")
        return super().__new__(cls, value)

    def __repr__(self) -> str:
        return "<key hidden>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a key is never pickled or copied: whoever reads it can subtract the noise")


class _KeyedSource:
    """A key and a number that only moves forward. The two sources below say what the number counts."""

    __slots__ = ("_key", "_is_secret", "_next", "_lock", "__weakref__")
    _number = "number"

    def __init__(self) -> None:
        self._start(Key(os.urandom(KEY_BYTES)), is_secret=True)

    def _start(self, key: Key, is_secret: bool) -> None:
        self._key, self._is_secret, self._next = key, is_secret, 0
        self._lock = threading.RLock()
        _live.add(self)

    @classmethod
    def fixed(cls, key: bytes) -> "Self":
        """A source with a known 32-byte ``key``, for tests: reproducible, and therefore worth no ε (``is_secret``)."""
        source = cls.__new__(cls)
        source._start(Key(key), is_secret=False)
        return source

    @property
    def is_secret(self) -> bool:
        """True where the key came from the operating system in this process; False: no ε may be reported."""
        return self._is_secret

    def _rekey(self) -> None:
        if self._is_secret:
            self._key = Key(os.urandom(KEY_BYTES))

    def _take(self) -> int:
        with self._lock:
            if self._next >= MAX_RELEASES:
                raise OverflowError(f"all 2^64 {self._number}s of this key are used; make a new {type(self).__name__}")
            self._next += 1
            return self._next - 1

    def __repr__(self) -> str:
        kind = "secret key" if self._is_secret else "fixed key: test only, no epsilon"
        return f"{type(self).__name__}({kind}, next {self._number} {self._next})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is never pickled or copied: two holders of one key would use one stream twice. "
            f"Save state_dict() instead, or make a new {type(self).__name__} where it is needed"
        )


class NoiseSource(_KeyedSource):
    """The noise of a run: a key from ``os.urandom`` and the number of the next release.

    Element e of tensor t in release n is the ChaCha20 stream (key, nonce = (t, n), block = e/4); so one
    release number serves all tensors of one release, and no number is handed out twice under one key.
    """

    __slots__ = ()
    _number = "release"

    @property
    def key(self) -> Key:
        """The 32 bytes ``privatize`` takes. Prints as hidden."""
        return self._key

    @property
    def next_release(self) -> int:
        """The number that ``take_release`` will return next."""
        return self._next

    def take_release(self) -> int:
        """This release's number; the next call returns a larger one. Raises OverflowError after 2^64 of them."""
        return self._take()

    def uniform_source(self) -> "UniformSource":
        """A stream for sampling: its own random key, or, where this key is fixed, a stream that this key determines."""
        return UniformSource() if self._is_secret else UniformSource.fixed(self._key)

    def state_dict(self) -> dict[str, int]:
        """The next release number. Never the key."""
        return {"next_release": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Number on from ``state``, under a fresh key (a fixed one stays); never backwards. Raises ValueError."""
        number = state.get("next_release") if isinstance(state, dict) else None
        if type(number) is not int or not 0 <= number < MAX_RELEASES:
            raise ValueError(f"a noise state is {{'next_release': int in [0, 2^64)}}, got {state!r}")
        with self._lock:
            self._rekey()
            self._next = max(self._next, number)


class UniformSource(_KeyedSource):
    """Uniform 32-bit words for Poisson sampling, ChaCha20 under a key as secret as the noise: amplification by
    sampling holds only against someone who cannot tell which records were drawn.

    The stream is nonce (0xFFFFFFFF, refill number), which shares no block with any tensor's noise.
    """

    __slots__ = ("_words",)
    _number = "refill"

    def _start(self, key: Key, is_secret: bool) -> None:
        super()._start(key, is_secret)
        self._words = torch.empty(0, dtype=torch.int64)

    def _rekey(self) -> None:
        super()._rekey()
        if self._is_secret:
            self._words = self._words[:0]

    def words(self, count: int) -> Tensor:
        """The next ``count`` words, int64 in [0, 2^32), shape (count,); none is returned twice."""
        with self._lock:
            if count > self._words.numel():
                refill = self._take()
                nonce = (SAMPLING_NONCE, refill & 0xFFFFFFFF, refill >> 32)
                blocks = max(_REFILL_BLOCKS, -(-count // 16))
                # What is left of the old refill stays unused, so that every answer is one contiguous stretch.
                self._words = _chacha20_words()(self._key, nonce, 0, blocks).view(-1)
            taken, self._words = self._words[:count], self._words[count:]
            return taken


def seed_from_system() -> None:
    """Seed torch's generators of every device, NumPy's and Python's from the operating system.

    Dropout and augmentation draw from these, in the order in which records stand in a batch, so one record more shifts
    the draws of all behind it. That moves the sum by no more than the record's own share only where the draws are as
    unknown as the noise: with a seed that is public, or torch's, which is the same in every process, they are not.
    """
    seed = int.from_bytes(os.urandom(8), "big") >> 1  # torch tells it as a signed number
    _seeds.append(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # where there is no device, that takes half a millisecond to note where it was called
        torch.default_generator.manual_seed(seed)
    # Of a seed the CPU's Mersenne Twister takes 32 bits, few enough to be tried out: all its words are replaced.
    state = torch.default_generator.get_state()
    words = state.numpy()[TWISTER_AT : TWISTER_AT + 8 * TWISTER_WORDS].view(np.int64)
    words[:] = np.frombuffer(os.urandom(4 * TWISTER_WORDS), np.uint32)
    torch.default_generator.set_state(state)
    random.seed(os.urandom(KEY_BYTES))
    np.random.seed(np.frombuffer(os.urandom(KEY_BYTES), np.uint32))


def refuse_known_seed() -> None:
    """Raise RuntimeError where torch's generator was seeded since ``seed_from_system``."""
    if torch.default_generator.initial_seed() not in _seeds:
        raise RuntimeError(
            "torch's generator was seeded between the loader's batch and the model's forward, so that what dropout "
            "draws is known, and one record more would shift it for all behind it. Set seeds before the loop, and draw "
            "what must repeat from a torch.Generator of its own"
        )


def _chacha20_words() -> Callable[..., Tensor]:
    return dispatch.get("chacha20_words", ("cpu", torch.float32), host_backend())


def host_backend(asked: str | None = None) -> str:
    """Of what is drawn on the host even while another device's backend is asked for; the words are the same bits."""
    return "reference" if dispatch.choose("cpu", torch.float32, asked) == "reference" else "cpp"


def _after_fork() -> None:
    for source in list(_live):
        source._lock = threading.RLock()
        source._rekey()


os.register_at_fork(after_in_child=_after_fork)

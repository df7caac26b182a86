"""Keys stay secret, release numbers only move forward, and the sampling stream shares nothing with the noise."""

import copy
import hashlib
import json
import logging
import os
import pickle
import traceback

import pytest
import torch
from scipy import stats
from tolerances import FALSE_ALARM

from lalora_kernels.dispatch import use_backend
from lalora_kernels.privacy.noise import MAX_RELEASES, SAMPLING_NONCE, Key, NoiseSource, UniformSource
from lalora_kernels.reference import chacha20_words

KEY = bytes(range(100, 132))
SOURCES = [NoiseSource, UniformSource]


def shows(text: str, key: bytes) -> bool:
    """Whether ``text`` holds 8 bytes in a row of ``key``, raw, as hex, as a Python literal or as numbers."""
    key = bytes(key)
    for start in range(0, len(key) - 8, 4):
        part = key[start : start + 8]
        forms = (part.hex(), repr(part)[2:-1], ", ".join(map(str, part)))
        if any(form in text for form in forms) or part.decode("latin1") in text:
            return True
    return False


def test_the_search_for_a_shown_key_finds_one():
    assert shows(repr(KEY), KEY) and shows(KEY.hex(), KEY) and shows(str(list(KEY)), KEY)
    assert not shows(os.urandom(32).hex(), KEY)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("fixed", [False, True])
def test_a_key_is_never_shown(kind, fixed, caplog):
    source = kind.fixed(KEY) if fixed else kind()
    key = source._key
    texts = [repr(source), str(source), f"{source}", f"{key} {key!r:>40}", str([key]), str({"key": key})]
    if kind is NoiseSource:
        texts.append(json.dumps(source.state_dict()))
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").error("%s %r", key, source)
    texts.append(caplog.text)

    def fails(key, source):
        return pickle.dumps(source)

    try:
        fails(key, source)
    except TypeError as error:
        texts.append("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
    assert len(texts) >= 8 and not any(shows(text, key) for text in texts)


def test_a_key_of_another_length_is_refused_without_showing_it():
    for bad in (KEY[:31], KEY + b"x", KEY.hex(), 7):
        with pytest.raises(ValueError, match="32") as caught:
            NoiseSource.fixed(bad)
        assert not shows(str(caught.value), KEY)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy, lambda s: torch.save(s, os.devnull)])
def test_sources_and_keys_are_not_pickled_or_copied(kind, act):
    source = kind()
    with pytest.raises(TypeError, match="never pickled or copied"):
        act(source)
    with pytest.raises(TypeError, match="never pickled or copied"):
        act(source._key)


def test_secret_keys_differ_and_are_the_operating_systems(monkeypatch):
    asked = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda n: asked.append(n) or urandom(n))
    sources = [NoiseSource(), NoiseSource(), UniformSource(), NoiseSource().uniform_source()]
    assert asked == [32] * 5
    assert len({bytes(s._key) for s in sources}) == 4 and all(len(s._key) == 32 and s.is_secret for s in sources)


def test_a_fixed_key_is_not_secret_and_neither_is_its_sampling():
    source = NoiseSource.fixed(KEY)
    assert not source.is_secret and not source.uniform_source().is_secret
    assert source.key == KEY and isinstance(source.key, Key)
    assert torch.equal(source.uniform_source().words(9), NoiseSource.fixed(KEY).uniform_source().words(9))


def test_release_numbers_are_handed_out_once():
    source = NoiseSource()
    assert [source.next_release, source.take_release(), source.take_release(), source.next_release] == [0, 0, 1, 2]


def test_the_last_release_number_is_the_last():
    source = NoiseSource()
    source.load_state_dict({"next_release": MAX_RELEASES - 1})
    assert source.take_release() == MAX_RELEASES - 1
    for _ in range(2):
        with pytest.raises(OverflowError, match="2\\^64"):
            source.take_release()


def test_resuming_takes_the_number_and_a_fresh_key():
    source = NoiseSource()
    for _ in range(3):
        source.take_release()
    state = source.state_dict()
    assert state == {"next_release": 3}
    resumed = NoiseSource()
    before = bytes(resumed.key)
    resumed.load_state_dict(state)
    assert resumed.take_release() == 3 and bytes(resumed.key) not in (before, bytes(source.key))
    # Back to an older checkpoint: under the old key, numbers 3.. would come twice.
    old = bytes(resumed.key)
    resumed.load_state_dict({"next_release": 1})
    assert resumed.next_release == 4 and bytes(resumed.key) != old


@pytest.mark.parametrize(
    "state",
    [{}, None, 3, {"next_release": -1}, {"next_release": 1 << 64}, {"next_release": 1.0}, {"next_release": True}],
)
def test_a_noise_state_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match="next_release"):
        NoiseSource().load_state_dict(state)


def test_a_fork_draws_fresh_keys():
    secret, uniform, fixed = NoiseSource(), UniformSource(), NoiseSource.fixed(KEY)
    uniform.words(5)

    def digest():
        return [hashlib.sha256(bytes(s._key)).hexdigest() for s in (secret, uniform, fixed)]

    before = digest()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps([digest(), uniform._words.numel()]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        theirs, words_left = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert digest() == before
    assert theirs[0] != before[0] and theirs[1] != before[1] and theirs[2] == before[2]
    assert words_left == 0  # words drawn before the fork are the parent's


def test_the_uniform_stream_is_the_documented_one_on_every_host_backend():
    expected = torch.cat([chacha20_words(KEY, (SAMPLING_NONCE, refill, 0), 0, 4096).view(-1) for refill in (0, 1)])
    for backend in ("reference", "cpp", "triton"):  # a device's backend does not move the sampler off the host
        with use_backend(backend):
            source = UniformSource.fixed(KEY)
            taken = torch.cat([source.words(n) for n in (1, 7000, 58535, 65536)])
        assert torch.equal(taken, expected)
    many = UniformSource.fixed(KEY).words(100_001)  # which ends within a block
    assert torch.equal(many, chacha20_words(KEY, (SAMPLING_NONCE, 0, 0), 0, 6251).view(-1)[:100_001])


def test_refill_numbers_fill_two_words_of_the_nonce():
    source = UniformSource.fixed(KEY)
    source._next = (1 << 32) + 5
    assert torch.equal(source.words(16), chacha20_words(KEY, (SAMPLING_NONCE, 5, 1), 0, 1).view(-1))


def test_sampling_and_noise_share_no_block_even_under_one_key():
    source = UniformSource.fixed(KEY)
    blocks = [source.words(65536).view(-1, 16) for _ in range(3)]
    blocks += [chacha20_words(KEY, (tensor, release, 0), 0, 64) for tensor in range(8) for release in range(8)]
    rows = torch.cat(blocks)
    assert torch.unique(rows, dim=0).shape == rows.shape and len(rows) > 16_000


def test_words_are_uniform():
    words = UniformSource.fixed(KEY).words(200_000)
    for shift in (0, 12, 24):
        counts = torch.bincount((words >> shift) & 0xFF, minlength=256).numpy()
        assert stats.chisquare(counts).pvalue > FALSE_ALARM
    assert int(words.min()) >= 0 and int(words.max()) < 1 << 32

"""The fuzzer: ``fuzz`` makes a test of inputs that nobody would pass; ``make fuzz`` draws new ones for FUZZ_MINUTES."""

import json
import os
import random
import time
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
TARGETS: list = []  # the time is shared equally


def fuzz(strategy, examples: int = 60):
    """A test that calls ``body(case, folder)`` with what ``strategy()`` draws."""

    def decorate(body):
        def test(tmp_path_factory):
            folder = tmp_path_factory.mktemp(body.__name__)
            quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

            def run(decorator, **options):
                decorator(settings(**quiet, **options)(given(strategy())(lambda case: body(case, folder))))()

            if not MINUTES:
                run(lambda check: check, max_examples=examples, derandomize=True)
                return
            end = time.monotonic() + 60 * MINUTES / len(TARGETS)
            while time.monotonic() < end:
                run(hypothesis.seed(random.SystemRandom().getrandbits(64)), max_examples=50)

        TARGETS.append(test)
        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_json(draw, value):
    """A copy with one place replaced, removed or added, at any depth."""
    value = json.loads(json.dumps(value))
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    act = draw(st.sampled_from(["inside", "inside", "inside", "remove", "double"]))
    if act == "remove":
        del value[key]
    elif act == "double" and isinstance(value, list):
        value.insert(key, value[key])
    elif act == "double":
        value[draw(st.text(max_size=8))] = value[key]
    else:
        value[key] = draw(changed_json(value[key]))
    return value


@st.composite
def changed_bytes(draw, original: bytes):
    """The file after a few bit flips, cuts, insertions and repetitions; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        act = draw(st.sampled_from(["flip", "cut", "insert", "truncate", "repeat", "number"]))
        span = draw(st.integers(1, 40))
        if act == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif act == "cut":
            del data[at : at + span]
        elif act == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif act == "truncate":
            del data[at:]
        elif act == "repeat":
            data[at:at] = data[at : at + span]
        else:
            data[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**64 - 1])).to_bytes(8, "little")
    return bytes(data)


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path

"""Every reader of files and every public operation on what nobody would pass: the documented exceptions, and no others.

A few dozen inputs each in the suite, always the same; ``make fuzz`` draws new ones for FUZZ_MINUTES.
"""

import functools
import gzip
import inspect
import io
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from safetensors.torch import load, save
from small import digits_npz
from torch import nn

from lalora_kernels import functional
from lalora_kernels.adapt import adapt
from lalora_kernels.data import BadInput, load_data
from lalora_kernels.dispatch import BackendError
from lalora_kernels.federated import checkpoint as checkpoints
from lalora_kernels.federated.books import show_ledger
from lalora_kernels.federated.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lalora_kernels.federated.config import make_config, read_toml
from lalora_kernels.peft_io import load_adapter, save_adapter
from lalora_kernels.privacy import ledger as ledgers
from lalora_kernels.privacy.ledger import Ledger, LedgerError

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
                run(hypothesis.seed(random.getrandbits(64)), max_examples=50)

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


# ---------------------------------------------------------------- ledger and checkpoint


def a_ledger() -> Ledger:
    ledger = Ledger(target_epsilon=8.0, target_delta=1e-5)
    for _ in range(3):
        ledger.charge(2.0, 0.1, max_grad_norm=0.5, expected_batch_size=16)
    ledger.charge(3.0, 0.2, release=1 << 40)
    return ledger


LEDGER = a_ledger().state_dict()
RUN_BOOKS = {
    "delta": 1e-5,
    "clients": {
        name: {"epsilon": 0.0, "nonfinite_samples": 0, "ledger": LEDGER, "noise": {"next_release": 4}} for name in "01"
    },
}


@st.composite
def ledger_files(draw):
    """Damaged bytes, changed values, and changed values whose hash chain holds: a forgery."""
    if draw(st.booleans()):
        return draw(changed_bytes(json.dumps(LEDGER).encode()))
    state = draw(changed_json(LEDGER))
    if isinstance(state, dict) and draw(st.booleans()):
        try:
            hashes = ledgers._chain(state)
            for raw, digest in zip(state["entries"], hashes[1:]):
                raw["hash"] = digest
            state["head"] = hashes[-1]
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
    return state


@fuzz(ledger_files, 150)
def test_ledger(case, folder):
    try:
        ledger = Ledger.load(write(folder / "ledger.json", case))
    except LedgerError:
        return
    assert ledger.state_dict() == json.loads((folder / "ledger.json").read_text())


@fuzz(lambda: changed_json(RUN_BOOKS) | changed_bytes(json.dumps(RUN_BOOKS).encode()), 80)
def test_ledger_command(case, folder):
    try:
        assert "every hash chain holds" in show_ledger(write(folder / "ledger.json", case), accountant="rdp")
    except BadInput:
        pass


@functools.cache
def a_checkpoint() -> bytes:
    folder = Path(tempfile.mkdtemp())
    state = {"fc.lora_A": torch.ones(2, 3), "fc.lora_B": torch.zeros(4, 2, dtype=torch.bfloat16)}
    save_checkpoint(
        folder,
        Checkpoint(2, state, {1: {key: t + 1 for key, t in state.items()}}, [{"round": 0, "accuracy": 0.5}], 3.5),
    )
    content = (folder / checkpoints.FILE).read_bytes()
    shutil.rmtree(folder)
    return content


@st.composite
def checkpoint_files(draw):
    """Damaged bytes; or another content under a checksum that holds."""
    if draw(st.booleans()):
        return draw(changed_bytes(a_checkpoint()))
    rest = json.dumps(draw(changed_json({"round": 2, "history": [{"round": 0}], "seconds": 3.5})))
    names = st.sampled_from(["state/a", "update/1/a", "update/x/a", "update/1", "a", "", "state/", "update//a"])
    tensors = {draw(names | st.text(max_size=9)): torch.ones(draw(st.integers(0, 3)))}
    return save(tensors, metadata={"lalora": rest, "sha256": checkpoints._digest(tensors, rest)})


@fuzz(checkpoint_files, 120)
def test_checkpoint(case, folder):
    write(folder / checkpoints.FILE, case)
    try:
        found = load_checkpoint(folder)
    except BadInput:
        return
    assert found.round >= 0 and all(isinstance(t, torch.Tensor) for t in found.state.values())


# ---------------------------------------------------------------- adapters


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc1, model.fc2 = nn.Linear(4, 3), nn.Linear(3, 2)
    model.words, model.conv = nn.Embedding(5, 4), nn.Conv2d(2, 3, 2)
    return model


@functools.cache
def an_adapter() -> tuple[bytes, dict]:
    folder = Path(tempfile.mkdtemp())
    model = a_model()
    adapt(model, r=2, target_modules=["fc1", "words", "conv"], modules_to_save=["fc2"], verbose=False)
    save_adapter(model, folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "adapter_config.json").read_text())
    shutil.rmtree(folder)
    return weights, config


@st.composite
def changed_tensors(draw, weights: bytes) -> bytes:
    """A whole file whose tensors have other names, sizes or types, or are missing."""
    tensors = load(weights)
    for key in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        t = tensors.pop(key)
        layer, _, end = key.rpartition(".lora_")
        ends = [end, "A", "A.weight", "B.weight", "embedding_A", "embedding_B", "magnitude_vector"]
        name = draw(st.sampled_from([None, key, f"{layer}.base_layer.weight", *(f"{layer}.lora_{e}" for e in ends)]))
        if name is not None:
            shape = draw(st.sampled_from([t.shape, (), (0,), t.shape[::-1], (*t.shape, 1), (5, 4)]))
            tensors[name] = torch.zeros(shape, dtype=draw(st.sampled_from([t.dtype, torch.int64, torch.bfloat16])))
    return save(tensors)


@st.composite
def adapter_files(draw):
    weights, config = an_adapter()
    which = draw(st.sampled_from(["weights", "tensors", "config", "config", "both"]))
    if which == "tensors":
        weights = draw(changed_tensors(weights))
    elif which != "config":
        weights = draw(changed_bytes(weights))
    if which in ("config", "both"):
        config = draw(changed_json(config) | changed_bytes(json.dumps(config).encode()))
    return weights, config


@fuzz(adapter_files, 150)
def test_adapter(case, folder):
    weights, config = case
    write(folder / "adapter_model.safetensors", weights)
    write(folder / "adapter_config.json", config)
    model = a_model()
    before = [p.clone() for p in model.parameters()]
    try:
        load_adapter(model, folder)
    except (ValueError, FileNotFoundError):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))  # all or nothing


# ---------------------------------------------------------------- settings


TOML = b"""epsilon = 3.0
[federation]
clients = 8
rounds = 20
fraction = 0.5
[optimization]
lr = 0.5
optimizer = "sgd"
physical-batch-size = 16
"""


@fuzz(lambda: changed_bytes(TOML), 150)
def test_config_toml(case, folder):
    try:
        make_config(read_toml(write(folder / "c.toml", case)))
    except BadInput:
        pass


@fuzz(lambda: changed_json(json.loads(make_config({}).to_json())), 100)
def test_config_json(case, folder):
    try:
        made = make_config(case)
    except BadInput:
        return
    assert make_config(json.loads(made.to_json())) == made


# ---------------------------------------------------------------- data


@functools.cache
def an_npz() -> bytes:
    buffer = io.BytesIO()
    digits_npz(buffer, 20, 10)
    return buffer.getvalue()


@st.composite
def npz_files(draw):
    if draw(st.booleans()):
        return draw(changed_bytes(an_npz()))
    kinds = nps.integer_dtypes() | nps.floating_dtypes() | nps.unicode_string_dtypes(max_len=3) | nps.boolean_dtypes()
    shapes = nps.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
    names = st.sampled_from(["x_train", "y_train", "x_test", "y_test", "classes", "z"])
    buffer = io.BytesIO()
    np.savez(buffer, **draw(st.dictionaries(names, nps.arrays(kinds, shapes), max_size=6)))
    return buffer.getvalue()


@fuzz(npz_files, 80)
def test_npz(case, folder):
    try:
        data = load_data(str(write(folder / "d.npz", case)))
    except BadInput:
        return
    assert len(data.train) and len(data.test) and int(data.train.labels.max()) < len(data.classes)


TEXT = "label\tsentence\n" + "".join(f'{i % 3}\ta film, "{i}" é\n' for i in range(30))


@st.composite
def tables(draw):
    suffix = draw(st.sampled_from([".tsv", ".csv", ".tsv.gz", ".csv.gz"]))
    content = (TEXT if "tsv" in suffix else TEXT.replace("\t", ",")).encode()
    if suffix.endswith(".gz") and draw(st.booleans()):
        return suffix, draw(changed_bytes(gzip.compress(content)))
    content = draw(changed_bytes(content))
    return suffix, gzip.compress(content) if suffix.endswith(".gz") else content


@fuzz(tables, 100)
def test_tables(case, folder):
    suffix, content = case
    try:
        data = load_data(str(write(folder / f"t{suffix}", content)))
    except BadInput:
        return
    assert len(data.train) and len(data.test) and len(data.classes) >= 2


# ---------------------------------------------------------------- operations

# The reference leaves shapes that do not fit to torch, which raises RuntimeError (BackendError is one) or IndexError.
DOCUMENTED = {
    "cpp": (ValueError, TypeError, BackendError),
    "reference": (ValueError, TypeError, RuntimeError, IndexError),
}
NUMBERS = st.floats() | st.sampled_from([0.0, 1.0, -1.0, 1e-45, 3.4e38]) | st.integers(-3, 2**65)


@st.composite
def tensors(draw, *shape):
    """Of this shape, or nearly; any layout, dtype and content; rarely not on the CPU."""
    if draw(st.integers(0, 9)) == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from([torch.float32] * 6 + [torch.bfloat16, torch.float64, torch.float16, torch.int64]))
    t = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(tuple(shape)).sub(3).div(4)
    if t.numel():
        t.view(-1)[0] = draw(st.floats(width=32))
    t = t.to(dtype)
    layout = draw(st.sampled_from(["plain"] * 5 + ["transposed", "strided", "expanded", "meta", "empty"]))
    if layout == "transposed" and t.dim() > 1:
        t = t.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided" and t.dim():
        t = t.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded" and t.dim() and t.shape[-1]:
        t = t[..., :1].expand(t.shape)
    elif layout == "meta":
        t = t.to("meta")
    elif layout == "empty" and t.dim():
        t = t[:0]
    return t


@st.composite
def calls(draw):
    """(operation, arguments): mostly fitting, each argument sometimes not."""
    N, T, m, n, r = (draw(st.integers(0 if k < 2 else 1, 6)) for k in range(5))

    def maybe(strategy, none=True):
        return draw(st.one_of(strategy, strategy, st.none()) if none else strategy)

    backend = draw(st.sampled_from(["cpp", "cpp", "reference"]))
    name = draw(st.sampled_from(
        ["sample_grad", "sample_grad_clip", "clip_reduce", "privatize", "smooth", "chacha20_normal"]
    ))  # fmt: skip
    if name in ("sample_grad", "sample_grad_clip"):
        args = [draw(tensors(N, T, m)), draw(tensors(m, r)), draw(NUMBERS)]
        kwargs = {"h": maybe(tensors(N, T, r)), "x": maybe(tensors(N, T, n)), "need_dz": draw(st.booleans())}
        if name == "sample_grad":
            kwargs |= {
                "G_B": maybe(tensors(N, m, r)),
                "G_A": maybe(tensors(N, r, n)),
                "accumulate": draw(st.booleans()),
            }
        else:
            kwargs |= {
                "max_norm": draw(NUMBERS), "grad_scale": draw(NUMBERS), "valid": maybe(st.integers(-2, 8)),
                "S_B": maybe(tensors(m, r)), "S_A": maybe(tensors(r, n)),
            }  # fmt: skip
    elif name in ("clip_reduce", "privatize"):
        shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=3))
        G = [maybe(tensors(N, *shape), name == "privatize") for shape in shapes]
        out, weights = [draw(tensors(*shape)) for shape in shapes], draw(tensors(len(shapes), N))
        if name == "clip_reduce":
            args, kwargs = [G, weights, out], {}
        else:
            S = [maybe(tensors(*shape)) for shape in shapes]
            args = [G, S, weights, out]
            small = st.integers(-3, 3)
            kwargs = {
                "noise_std": draw(NUMBERS), "key": maybe(st.binary(min_size=32, max_size=32) | st.binary(max_size=40)),
                "release": draw(st.integers(-1, 2**64)), "divisor": draw(NUMBERS),
                "tensor_index": draw(st.lists(st.integers(0, 9) | st.integers(-1, 2**32), max_size=4)),
                "smooth_dim": draw(st.lists(st.none() | small, max_size=4)),
                "padding": draw(st.sampled_from(["symmetric", "reflect", "same"])),
            }  # fmt: skip
            if draw(st.booleans()):
                kwargs |= {"tensor_index": list(range(len(shapes))), "smooth_dim": [0 if s else None for s in shapes]}
    elif name == "smooth":
        args, kwargs = (
            [draw(tensors(m, n)), draw(st.integers(-3, 3)), draw(st.sampled_from(["symmetric", "reflect"]))],
            {},
        )
    else:
        args = [draw(st.integers(-2, 40))]
        kwargs = {
            "key": draw(st.binary(min_size=32, max_size=32) | st.binary(max_size=40)),
            "release": draw(st.integers(-1, 2**64)), "tensor_index": draw(st.integers(-1, 2**32)),
            "start": draw(st.integers(-1, 2**34 + 1)),
            "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])),
            "device": draw(st.sampled_from(["cpu", "cpu", "meta"])),
        }  # fmt: skip
    return name, args, {**kwargs, "backend": backend}


@fuzz(calls, 300)
def test_operations(case, folder):
    """A crash of the interpreter ends the test run: nothing else would be written out of bounds and live."""
    name, args, kwargs = case
    assert set(kwargs) <= set(inspect.signature(getattr(functional, name)).parameters)
    try:
        getattr(functional, name)(*args, **kwargs)
    except DOCUMENTED[kwargs["backend"]]:
        pass


@pytest.mark.parametrize("target", [test_ledger, test_tables, test_operations])
def test_the_fuzzer_finds_what_is_not_documented(target, monkeypatch, tmp_path_factory):
    """A reader that lets another exception out is caught."""
    broken = {test_ledger: (ledgers.Ledger, "load"), test_tables: (__import__("csv"), "reader"),
              test_operations: (functional.dispatch, "get")}  # fmt: skip

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(*broken[target], fail)
    monkeypatch.setattr("test_fuzz.MINUTES", 0)
    with pytest.raises(ZeroDivisionError):
        target(tmp_path_factory)

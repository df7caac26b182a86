"""Every reader of files on what nobody would pass: the documented exceptions, and no others.

A few dozen inputs each in the suite, always the same; ``make fuzz`` draws new ones for FUZZ_MINUTES.
"""

import functools
import gzip
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from fuzzing import changed_bytes, changed_json, fuzz, write
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image
from safetensors.torch import load, save
from small import digits_npz
from torch import nn

from lalora_kernels.adapt import adapt
from lalora_kernels.data import BadInput, load_data
from lalora_kernels.federated import checkpoint as checkpoints
from lalora_kernels.federated.books import show_ledger
from lalora_kernels.federated.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lalora_kernels.federated.config import make_config, read_toml
from lalora_kernels.peft_io import load_adapter, save_adapter
from lalora_kernels.privacy.entries import chain
from lalora_kernels.privacy.ledger import Ledger, LedgerError

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
            hashes = chain(state)
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
    state = json.loads((folder / "ledger.json").read_text())
    assert unhashed(ledger.state_dict()) == unhashed(state)  # 1 is read as 1.0, which hashes to something else
    assert Ledger._parse(ledger.state_dict()).state_dict() == ledger.state_dict()


def unhashed(state: dict) -> dict:
    entries = [{key: value for key, value in entry.items() if key != "hash"} for entry in state["entries"]]
    return {**state, "entries": entries, "head": None}


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


OBJECTS = [{"label": i % 3, "sentence": f'a film, "{i}" é'} for i in range(30)]
TEXT = "label\tsentence\n" + "".join(f'{i % 3}\ta film, "{i}" é\n' for i in range(30))


def lines(objects: list) -> bytes:
    return "\n".join(map(json.dumps, objects)).encode()


@st.composite
def tables(draw):
    suffix = draw(st.sampled_from([".tsv", ".csv", ".jsonl", ".tsv.gz", ".csv.gz", ".jsonl.gz"]))
    if "json" in suffix and draw(st.booleans()):
        changed, at = list(OBJECTS), draw(st.integers(0, len(OBJECTS) - 1))
        changed[at] = draw(changed_json(OBJECTS[at]))
        content = lines(changed)
        return suffix, gzip.compress(content) if suffix.endswith(".gz") else content
    content = lines(OBJECTS) if "json" in suffix else (TEXT if "tsv" in suffix else TEXT.replace("\t", ",")).encode()
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


@st.composite
def images(draw):
    suffix = draw(st.sampled_from([".png", ".jpg", ".gif", ".tiff", ".bmp", ".webp"]))
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, suffix[1:].replace("jpg", "jpeg"))
    return suffix, draw(changed_bytes(file.getvalue()))


@fuzz(images, 60)
def test_images(case, folder):
    suffix, content = case
    shutil.rmtree(folder / "p", ignore_errors=True)
    for place in ("train/a", "train/b", "test/a"):
        (folder / "p" / place).mkdir(parents=True)
        write(folder / f"p/{place}/x{suffix}", content)
    try:
        data = load_data(str(folder / "p"), image_size=8)
    except BadInput:
        return
    assert data.train.inputs.shape == (2, 3, 8, 8) and len(data.test) == 1

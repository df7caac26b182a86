"""Data sets of the Hugging Face hub, through its own package ``datasets``, which no extra installs."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lalora_kernels.data import BadInput, Data, Records, _images, _labels, _set_aside, _task, need
from lalora_kernels.data_table import LABEL_COLUMNS, _column, _join, _text_columns

TEST_SPLITS = ("test", "validation", "validation_matched", "valid", "val", "dev")  # the first that has labels


def load_hub(name: str, text_column: str | None, label_column: str | None) -> Data:
    """``load_data`` of "hf:NAME" or "hf:NAME:CONFIG"; raises BadInput as that does.

    A column of images is the input where there is one, in three channels each: were all grey only where all are, one
    record would change what the others are, and which of them are set aside.
    """
    datasets = need("datasets")
    path, _, config = name.removeprefix("hf:").partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, needs a config
        raise BadInput(f"{name}: could not be loaded from the hub ({type(error).__name__}: {error})") from error
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
    labels = [np.asarray(split[label]) for split in used]
    picture = next((c for c in columns if type(features[c]).__name__ == "Image"), None)
    if picture is None:
        kind, text = "text", _text_columns(name, columns, text_column, columns.index(label))
        texts = [_join([[str(t) for t in split[columns[i]]] for i in text]) for split in used]
        train, *rest = [Records(t, _labels(y, len(t), name)) for t, y in zip(texts, labels)]
    else:
        kind, images = "image", [[_pixels(row[picture]) for row in split] for split in used]
        train, *rest = [_images(_stack(split, name), y, name) for split, y in zip(images, labels)]
    if rest:
        return _task(name, kind, train, rest[0], classes)
    return _task(name, kind, *_set_aside(train), classes, set_aside=True)


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

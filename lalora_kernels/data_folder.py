"""Images in a folder that holds a folder for each class."""

from pathlib import Path
from typing import Any

import numpy as np

from lalora_kernels.data import (
    EXTRA,
    BadInput,
    Data,
    Names,
    _images,
    labelled,
    need,
    no_such_file,
    refuse_training_records,
)

TRAIN, TESTS = "train", ("test", "val", "valid", "validation")  # the first of these that there is
SIDE = 224  # pixels, where the run does not say: what most models of images take


def load_folder(path: Path, test: Path | None, image_size: int | None) -> Data:
    """``load_data`` of FOLDER/CLASS/*.png, or of FOLDER/train/CLASS and FOLDER/test/CLASS.

    Any format that Pillow reads, 8 bits a channel. Each image is turned as its camera noted, cut to the square in its
    middle, and resized to ``image_size`` in three channels: what becomes of it must not depend on the others.

    Raises BadInput, which names the file, for what is no image, has more than 8 bits or holds several; for a class
    without images; for a folder of which it is unclear where its classes are, and test records that train.
    """
    side = SIDE if image_size is None else image_size
    train = path
    if _is_split(path):
        train, tests = path / TRAIN, [path / name for name in TESTS if (path / name).is_dir()]
        test = test or next(iter(tests), None)
    if test is not None:
        if not test.is_dir():
            raise no_such_file(test) if not test.exists() else BadInput(f"{test}: not a folder with one for each class")
        refuse_training_records(train, test)
    return labelled("image", path, _read(train, side), test, None if test is None else _read(test, side))


def _hidden(path: Path) -> bool:
    """Whether it is, or lies in, what a desktop or an editor keeps beside the images."""
    return any(part.startswith(".") for part in path.parts)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_split(path: Path) -> bool:
    """Whether it holds train/ and test/ and not classes, one of which may be called train."""
    train = path / TRAIN
    if not train.is_dir() or not _folders(train) or any(p.is_file() for p in train.iterdir() if p.name[0] != "."):
        return False
    if strange := [p.name for p in _folders(path) if p.name not in (TRAIN, *TESTS)]:
        raise BadInput(
            f"{path}: holds {TRAIN}/ with folders in it and {strange[0]}/ beside it; are its classes in {path / TRAIN} "
            f"or in {path}? Give the folder that holds the classes alone"
        )
    return True


def _read(path: Path, side: int) -> Names:
    files: list[tuple[str, Path]] = []
    for folder in _folders(path):
        found = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
        if not found:
            raise BadInput(f"{folder}: no image in it; take the class out, or put its images there")
        files += [(folder.name, file) for file in found]
    if not files and (table := next(path.glob("*.parquet"), None)):
        raise BadInput(f"{path}: holds {table.name}, no folders of images; Parquet is read as hf:{path}")
    if not files:
        raise BadInput(f"{path}: needs a folder for each class, with its images in it")
    pixels = np.empty((len(files), side, side, 3), np.uint8)
    for i, (_, file) in enumerate(files):
        pixels[i] = _pixels(file, side)
    images = _images(pixels, np.zeros(len(files), np.int64), str(path))
    return images.inputs, [name for name, _ in files]


def _pixels(file: Path, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    image_module: Any = need("PIL.Image", EXTRA)
    ops: Any = need("PIL.ImageOps", EXTRA)
    try:
        with image_module.open(file) as image:
            if image.mode[0] in "IF":
                raise BadInput(f"{file}: more than 8 bits a channel; scale it to 8, as it should be seen")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's, of one scene
                raise BadInput(f"{file}: holds {image.n_frames} images; save each as a file of its own")
            square = ops.fit(ops.exif_transpose(image).convert("RGB"), (side, side), image_module.Resampling.BICUBIC)
            return np.asarray(square)
    except BadInput:
        raise
    except Exception as error:  # Pillow's formats raise many kinds
        raise BadInput(
            f"{file}: not a readable image, corrupt or truncated ({type(error).__name__}: {error}); what is no image "
            f"goes elsewhere"
        ) from error

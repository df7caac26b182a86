"""Data sets of the hub, behind a stand-in for ``datasets``: their splits, pairs and pictures."""

import socket
import sys
import types

import numpy as np
import pytest
from PIL import Image as PIL

from lalora_kernels import data_hub
from lalora_kernels.data import BadInput, load_data, no_hub
from lalora_kernels.reproduce.presets import PRESETS


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Whether its host has an address is another machine's matter."""
    monkeypatch.setattr(data_hub, "no_hub", lambda: None)


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Image:
    """Known by its name, as ``datasets.Image`` is."""


def kind_of(value):
    return Image() if isinstance(value, PIL.Image) else types.SimpleNamespace()


def stand_in(monkeypatch, splits: dict[str, list[dict]], classes: list[str]) -> list:
    """The hub is not reachable in tests: a stand-in for ``datasets`` says what it was asked for."""
    first = next(iter(splits["train"]), {})

    class Split(list):
        column_names = list(first)
        features = {name: ClassLabel(classes) if name == "label" else kind_of(first[name]) for name in first}

        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *args: asked.append(args) or {name: Split(rows) for name, rows in splits.items()}
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_names_are_handed_to_datasets(monkeypatch):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(10)]
    dev = [{"text": f"v{i}", "label": i % 2} for i in range(10)]
    splits = {"train": rows, "test": [{"text": "?", "label": -1}] * 3, "validation": dev}
    asked = stand_in(monkeypatch, splits, ["neg", "pos"])
    data = load_data("hf:glue:sst2")
    assert asked == [("glue", "sst2")] and data.classes == ["neg", "pos"]
    assert data.train.inputs == [f"t{i}" for i in range(10)] and len(data.test) == 10


@pytest.mark.parametrize("labels, classes", [(["no", "yes"], ["no", "yes"]), ([False, True], ["false", "true"])])
def test_labels_that_are_text_or_truths_are_numbered_by_what_trains(monkeypatch, labels, classes):
    rows = [{"text": f"t{i}", "label": labels[i % 2]} for i in range(6)]
    stand_in(monkeypatch, {"train": rows, "test": [{"text": "t", "label": labels[1]}]}, [])
    data = load_data("hf:some/thing")
    assert data.classes == classes and data.train.labels.tolist() == [0, 1] * 3 and data.test.labels.tolist() == [1]


@pytest.mark.parametrize("saved", ["dataset_dict.json", "state.json"])
def test_a_folder_that_save_to_disk_wrote(monkeypatch, tmp_path, saved):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
    asked = stand_in(monkeypatch, {"train": rows}, ["a", "b"])
    splits = sys.modules["datasets"].load_dataset()
    sys.modules["datasets"].load_from_disk = lambda path: splits if saved[0] == "d" else splits["train"]
    (tmp_path / saved).write_text("{}")
    data = load_data(f"hf:{tmp_path}")
    assert len(data.train) + len(data.test) == 40 and asked == [()]


def test_a_folder_that_is_not_there_is_no_name_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_text("")
    for path, message in (
        ("/nonexistent", "hf:/nonexistent: no such folder; hf: takes one that there is, or OWNER/NAME of the hub"),
        ("./none", f"no such folder in {tmp_path}"), ("none/", "no such folder"), ("a/b/c", "no such folder"),
        ("a.parquet", "hf:a.parquet: a file; give the folder that holds this data set alone: hf:.$"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            load_data(f"hf:{path}")
    with pytest.raises(BadInput, match="holds a.parquet, no folders of images; Parquet is read as hf:"):
        load_data(str(tmp_path))


def test_the_hub_s_package_is_in_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="datasets is not installed; pip install datasets$"):
        load_data("hf:imdb")


class TestWithoutANetwork:
    """The hub's client would ask for half a minute."""

    @pytest.fixture(autouse=True)
    def no_address(self, monkeypatch):
        monkeypatch.setattr(data_hub, "no_hub", no_hub)
        monkeypatch.setattr("socket.getaddrinfo", lambda *_: (_ for _ in ()).throw(socket.gaierror(-2, "not known")))
        for name in (*data_hub.OFFLINE, "HF_ENDPOINT", *(f"{kind}_proxy" for kind in ("http", "https", "all"))):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
        self.asked = stand_in(monkeypatch, {"train": rows}, ["a", "b"])

    def test_the_hub_is_not_asked(self):
        with pytest.raises(BadInput, match="some/thing: huggingface.co has no address here .*; HF_HUB_OFFLINE=1"):
            load_data("hf:some/thing")
        assert not self.asked

    @pytest.mark.parametrize("name", [*data_hub.OFFLINE, "HTTPS_PROXY", "all_proxy"])
    def test_but_what_it_stored_is_taken_and_a_proxy_asked(self, monkeypatch, name):
        monkeypatch.setenv(name, "1")
        assert load_data("hf:some/thing").train and self.asked

    def test_a_folder_needs_no_hub(self, tmp_path):
        assert load_data(f"hf:{tmp_path}").train and self.asked

    def test_a_mirror_is_looked_up_by_its_own_name(self, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443/hub")
        with pytest.raises(BadInput, match="mirror.example has no address here"):
            load_data("hf:some/thing")
        monkeypatch.setattr("socket.getaddrinfo", lambda host, port: [host])
        assert load_data("hf:some/thing").train


@pytest.mark.parametrize("task, columns", [  # as nyu-mll/glue has them
    ("qnli", ("question", "sentence")), ("qqp", ("question1", "question2")), ("mnli", ("premise", "hypothesis")),
])  # fmt: skip
def test_pairs_of_the_papers_tasks_come_from_the_hub(monkeypatch, task, columns):
    def rows(name, count, label=None):
        texts = [{column: f"{name} {column} {i}" for column in columns} for i in range(count)]
        return [row | {"label": i % 3 if label is None else label, "idx": i} for i, row in enumerate(texts)]

    kinds = ("_matched", "_mismatched") if task == "mnli" else ("",)
    splits = {"train": rows("train", 9)} | {f"test{kind}": rows("unlabelled", 3, -1) for kind in kinds}
    splits |= {f"validation{kind}": rows(f"validation{kind}", 6) for kind in kinds}
    asked = stand_in(monkeypatch, splits, ["a", "b", "c"])
    data = load_data(PRESETS["paper-language"].tasks[task]["dataset"])
    assert asked == [("nyu-mll/glue", task)] and data.test.labels.tolist() == [0, 1, 2] * 2
    for split, name, count in ((data.train, "train", 9), (data.test, f"validation{kinds[0]}", 6)):
        assert split.inputs == [(f"{name} {columns[0]} {i}", f"{name} {columns[1]} {i}") for i in range(count)]


# ---------------------------------------------------------------- pictures

rng = np.random.default_rng(0)


def picture(mode, size=(6, 5)):
    pixels = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return PIL.fromarray(pixels[..., 0] if mode == "L" else pixels[..., :3] if mode == "RGB" else pixels)


def pictures(*modes, **more):
    return [{"image": picture(mode, **more), "label": i % 2} for i, mode in enumerate(modes)]


def as_rgb(rows):
    return [np.asarray(row["image"].convert("RGB")).transpose(2, 0, 1).tolist() for row in rows]


def test_grey_pictures_among_others_are_like_them_in_every_split(monkeypatch):
    """Tiny-ImageNet's, with its splits: of 100,000 some are grey, and which comes first must not matter."""
    train, valid = pictures("L", "RGB", "RGBA", "RGB"), pictures("L", "L")
    asked = stand_in(monkeypatch, {"train": train, "valid": valid}, ["a", "b"])
    data = load_data(PRESETS["paper-vision"].tasks["base-tiny-imagenet"]["dataset"])
    assert asked == [("zh-plus/tiny-imagenet", None)] and data.kind == "image" and not data.set_aside
    assert data.train.inputs.tolist() == as_rgb(train) and data.test.inputs.tolist() == as_rgb(valid)


def test_a_coloured_picture_changes_no_grey_one_and_moves_none(monkeypatch):
    grey = pictures(*["L"] * 40)
    stand_in(monkeypatch, {"train": grey}, ["a", "b"])
    alone = load_data("hf:some/digits")
    assert alone.set_aside and alone.test.inputs.shape[1:] == (3, 5, 6)
    stand_in(monkeypatch, {"train": [*grey, *pictures("RGB")]}, ["a", "b"])
    more = load_data("hf:some/digits")
    for one, other in ((alone.train, more.train), (alone.test, more.test)):
        assert other.inputs[: len(one)].tolist() == one.inputs.tolist()


@pytest.mark.parametrize("splits, message", [
    ({"train": pictures("L", "L") + pictures("L", size=(7, 5))}, "images come in 2 shapes; resize them to one"),
    ({"train": pictures("L", "RGB"), "test": pictures("RGB", "L", size=(5, 6))},
     r"training and test images differ in shape, \(3, 5, 6\) and \(3, 6, 5\)"),
    ({"train": [], "test": [{"text": "a", "label": 0}]}, "its split 'train' has no rows"),
    ({"train": [{"text": "a", "label": 0}, {"text": None, "label": 1}]}, "hf:some/thing, row 1: no text; every record"),
    ({"train": [{"text": "a", "label": 0}, {"text": "b", "label": None}]}, "hf:some/thing, row 1: no label; every"),
    ({"train": [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]}, "labels are whole numbers from 0"),
])  # fmt: skip
def test_what_does_not_fit(monkeypatch, splits, message):
    stand_in(monkeypatch, splits, ["a", "b"])
    with pytest.raises(BadInput, match=message):
        load_data("hf:some/thing")


@pytest.mark.parametrize("unlabelled", [-1, None, "no rows"])
def test_a_split_without_labels_is_no_test_split(monkeypatch, unlabelled):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(8)]
    empty = [] if unlabelled == "no rows" else [{"text": "?", "label": unlabelled}] * 3
    stand_in(monkeypatch, {"train": rows[4:], "test": empty, "dev": rows[:4]}, ["a", "b"])
    assert load_data("hf:some/thing").test.inputs == ["t0", "t1", "t2", "t3"]


def test_a_test_split_of_training_records_is_refused_by_its_name(monkeypatch):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(8)]
    dev = rows[:3] + [{"text": f"v{i}", "label": 0} for i in range(3)]
    stand_in(monkeypatch, {"train": rows, "dev": dev}, ["a", "b"])
    with pytest.raises(BadInput, match="hf:some/thing: split 'dev': 3 of its 6 records also stand in the training"):
        load_data("hf:some/thing")

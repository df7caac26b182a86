"""Images in a folder with one for each class, against Pillow itself; text in JSON lines, against the same as .csv."""

import csv
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import vit_folder
from test_bad_input import flags
from tolerances import RESIZED_U8
from torch.nn import functional as F

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput, load_data
from lalora_kernels.federated.lifetime import record_hashes

RNG = np.random.default_rng(5)


def picture(path: Path, height: int = 9, width: int = 9, mode: str = "RGB", **options) -> np.ndarray:
    """Writes one of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path, **options)
    return pixels


def classes_of(path: Path, names=("cat", "dog"), count: int = 20) -> Path:
    for name in names:
        for i in range(count):
            picture(path / name / f"{i:02}.png")
    return path


class TestImages:
    def test_pixels_labels_and_names(self, tmp_path):
        folder = tmp_path / "photos"
        pixels = {(s, c, i): picture(folder / s / c / f"{i}.png", 8, 8)
                  for s in ("train", "val") for c in ("2", "10", "b") for i in range(3)}  # fmt: skip
        data = load_data(str(folder), image_size=8)
        assert data.classes == ["2", "10", "b"] and data.kind == "image" and not data.set_aside
        for split, records in (("train", data.train), ("val", data.test)):
            found = {(data.classes[int(y)], x.permute(1, 2, 0).numpy().tobytes()) for x, y in records}
            assert found == {(c, p.tobytes()) for (s, c, _), p in pixels.items() if s == split}

    def test_without_test_records_a_fifth_is_set_aside_each_by_itself(self, tmp_path):
        folder = classes_of(tmp_path / "photos", count=30)
        before = load_data(str(folder))
        assert before.set_aside and 0 < len(before.test) < 30 and before.train.inputs.shape[1:] == (3, 224, 224)
        picture(folder / "ant" / "first.png")
        after = load_data(str(folder))
        for one, more in ((before.train, after.train), (before.test, after.test)):
            old, new = (record_hashes(r, range(len(r))) for r in (one, more))
            assert old <= new and len(new - old) <= 1

    def test_a_square_from_the_middle_resized_as_torch_does(self, tmp_path):
        pixels = picture(tmp_path / "p/a/x.png", 40, 64)
        picture(tmp_path / "p/b/x.png")
        data = load_data(str(tmp_path / "p"), test=str(classes_of(tmp_path / "t", "ab", 1)), image_size=20)
        middle = torch.from_numpy(pixels[:, 12:52]).permute(2, 0, 1)[None].float()
        expected = F.interpolate(middle, (20, 20), mode="bicubic", antialias=True).clamp(0, 255)
        inner = slice(2, -2)  # at the cut Pillow's filter takes in what lies beyond it
        assert (data.train.inputs[0].float() - expected[0])[..., inner].abs().max() <= RESIZED_U8

    def test_every_image_comes_in_three_channels_upright(self, tmp_path):
        grey = picture(tmp_path / "p/a/grey.png", 8, 8, "L").squeeze()
        see_through = picture(tmp_path / "p/a/seen.png", 8, 8, "RGBA")
        turned = Image.Exif()
        turned[0x0112] = 6  # the camera lay on its side
        side = picture(tmp_path / "p/b/x.png", 8, 8, exif=turned)
        picture(tmp_path / "p/b/.hidden.png")
        (tmp_path / "p/.git").mkdir()
        (tmp_path / "p/README.md").write_text("what these are")
        data = load_data(str(tmp_path / "p"), test=str(classes_of(tmp_path / "t", "ab", 1)), image_size=8)
        first, second, third = data.train.inputs.permute(0, 2, 3, 1).numpy()
        assert len(data.train) == 3 and np.array_equal(first, np.stack([grey] * 3, -1))
        assert np.array_equal(second, see_through[..., :3]) and np.array_equal(third, np.rot90(side, -1))

    def test_a_class_may_be_called_train(self, tmp_path):
        folder = classes_of(tmp_path / "p", ("train", "bus"))
        picture(folder / "train/express/1.png")
        data = load_data(str(folder))
        assert data.classes == ["bus", "train"] and data.set_aside and len(data.train) + len(data.test) == 41

    def test_what_a_desktop_leaves_behind_is_no_image(self, tmp_path):
        folder = classes_of(tmp_path / "p/train").parent
        for place in (".", "train", "train/cat"):
            (folder / place / ".DS_Store").write_bytes(b"Bud1")
        picture(folder / "train/cat/.thumbnails/1.png")
        data = load_data(str(folder))
        assert data.classes == ["cat", "dog"] and len(data.train) + len(data.test) == 40

    def test_the_first_picture_of_a_phones_two(self, tmp_path):
        both = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (50, 200)]
        for name in ("p/a/x.jpg", "p/b/x.jpg"):
            (tmp_path / name).parent.mkdir(parents=True)
            both[0].save(tmp_path / name, format="MPO", save_all=True, append_images=both[1:])
        data = load_data(str(tmp_path / "p"), test=str(classes_of(tmp_path / "t", "ab", 1)), image_size=8)
        assert data.train.inputs.unique().tolist() == [50]

    @pytest.mark.parametrize("spoil, why", [
        (lambda p: (p / "cat/07.png").write_bytes((p / "cat/07.png").read_bytes()[:60]), r"cat/07.png: not a readable"),
        (lambda p: (p / "dog/notes.txt").write_text("x"), r"dog/notes.txt: not a readable image.*goes elsewhere"),
        (lambda p: Image.fromarray(np.full((8, 8), 999, np.int32)).save(p / "cat/deep.tiff"), "deep.tiff: more than 8"),
        (lambda p: Image.new("RGB", (8, 8)).save(p / "cat/two.gif", save_all=True,
                                                 append_images=[Image.new("RGB", (8, 8), "red")]), "holds 2 images"),
        (lambda p: (p / "eel").mkdir(), "eel: no image in it; take the class out"),
        (lambda p: picture(p / "train/cat/1.png"), r"holds train/ with folders in it and cat/ beside it"),
        (lambda p: [f.unlink() for f in p.glob("dog/*")] and (p / "dog").rmdir(), "one class only"),
    ])  # fmt: skip
    def test_what_is_refused_by_name(self, tmp_path, spoil, why):
        spoil(folder := classes_of(tmp_path / "photos"))
        with pytest.raises(BadInput, match=why):
            load_data(str(folder))

    def test_test_records_that_are_none(self, tmp_path):
        folder = classes_of(tmp_path / "photos", count=2)
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to(folder)
        for test, why in (
            (folder, "this is the training file"), (tmp_path / "link", "this is the training file"),
            (tmp_path / "none", "none: no such file"), (tmp_path / "empty", "needs a folder for each class"),
            (classes_of(tmp_path / "t", ("cow",), 1), "label 'cow' does not occur"),
            (folder / "cat/00.png", "not a folder with one for each class"),
        ):  # fmt: skip
            with pytest.raises(BadInput, match=why):
                load_data(str(folder), test=str(test))

    def test_a_run(self, tmp_path, capsys):
        folder = classes_of(tmp_path / "photos", count=60)
        args = flags((vit_folder(tmp_path / "vit"), str(folder)), clients=2, rounds=1, image_size=8)
        assert main([*args, "--out", str(tmp_path / "run")]) == 0
        assert re.search(r"photos: \d+ images held by 2 clients, \d+ to test on; 2 classes", capsys.readouterr().out)


ROWS = [{"text": f"text {i}, \"so\"", "label": i % 2, "id": [i]} for i in range(20)]


class TestJsonLines:
    def both(self, tmp_path, rows, **named):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
        with open(tmp_path / "a.csv", "w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *([row.get(k) for k in rows[0]] for row in rows)])
        return [load_data(str(tmp_path / name), **named) for name in ("a.jsonl", "a.csv")]

    def test_the_same_records_as_of_a_csv(self, tmp_path):
        lines, cells = self.both(tmp_path, ROWS)
        assert lines.fingerprint() == cells.fingerprint() and lines.classes == ["0", "1"] and lines.set_aside
        packed = gzip.compress((tmp_path / "a.jsonl").read_bytes())
        (tmp_path / "b.jsonl.gz").write_bytes(packed)
        assert load_data(str(tmp_path / "b.jsonl.gz")).fingerprint() == lines.fingerprint()

    def test_pairs_and_named_columns(self, tmp_path):
        rows = [{"question": f"q {i}", "sentence": f"s {i}", "kind": "ab"[i % 2]} for i in range(20)]
        lines, cells = self.both(tmp_path, rows, label_column="kind")
        assert lines.fingerprint() == cells.fingerprint() and isinstance(lines.train.inputs[0], tuple)

    def test_names_may_come_in_another_order_and_more_of_them(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "x", "label": true}\n\n{"more": 1, "label": false, "text": "y"}\n')
        (tmp_path / "t.jsonl").write_text('{"label": true, "text": "z"}\n')
        data = load_data(str(tmp_path / "a.jsonl"), test=str(tmp_path / "t.jsonl"))
        assert data.classes == ["false", "true"] and data.train.inputs == ["x", "y"]
        assert data.train.labels.tolist() == [1, 0] and data.test.labels.tolist() == [1]

    @pytest.mark.parametrize("content, why", [
        ("", "needs at least one record"),
        ('{"text": "x", "label": 1}\n{"text": "y", "lab', "line 2: not JSON, .*each line is one record, .*, with"),
        ("[" * 100_000, r"line 1: not JSON"),
        ('{"text": "x", "label": 1}\n["y", 0]\n', r"line 2: a list where each line is the object of a record"),
        ('{"text": "x", "label": 1}\n{"text": "y"}\n', r"line 2: no label; every record needs one"),
        ('{"text": "x", "label": 1}\n{"text": "y", "label": " "}\n', r"line 2: no label; every record needs one"),
        ('{"text": "x", "label": 1}\n{"text": null, "label": 0}\n', r"line 2: no text; every record needs one"),
        ('{"text": "x", "label": 1}\n{"text": ["y"], "label": 0}\n', r"line 2: text is a list; give a string"),
        ('{"text": "x", "label": 1.5}\n', r"line 1: label is a float; give a string, or a whole number"),
        ('{"text": "x", "mark": 1, "more": 2}\n', "which column is the label"),
        (b'{"text": "\xff", "label": 1}\n', "not in UTF-8"),
    ])  # fmt: skip
    def test_what_is_refused_by_line(self, tmp_path, content, why):
        (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(BadInput, match=why):
            load_data(str(tmp_path / "a.jsonl"))

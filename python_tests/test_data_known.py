"""Test records that train, too: a copy of the training records, or a part of them, is no public test data."""

import numpy as np
import pytest
from PIL import Image

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput, load_data

TRAIN = 40


def table(folder, own, more):
    """Of another kind, in another order, with other labels: a record is its text."""
    (folder / "a.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(TRAIN)))
    numbers = [*range(TRAIN, TRAIN + more), *range(own)]
    (folder / "t.jsonl").write_text("".join(f'{{"label": {(i + 1) % 2}, "text": "text {i}"}}\n' for i in numbers))
    return {"name": str(folder / "a.csv"), "test": str(folder / "t.jsonl")}


def npz(folder, own, more):
    x, y = np.random.default_rng(0).integers(0, 256, (TRAIN + more, 4, 4), np.uint8), np.arange(TRAIN + more) % 2
    tests = np.r_[:own, TRAIN : TRAIN + more]
    np.savez(folder / "t.npz", x_train=x[:TRAIN], y_train=y[:TRAIN], x_test=x[tests], y_test=y[tests])
    return {"name": str(folder / "t.npz")}


def images(folder, own, more):
    for i in range(TRAIN + more):
        for side in ["p"] * (i < TRAIN) + ["t"] * (i < own or i >= TRAIN):
            file = folder / side / "ab"[i % 2] / f"{side}{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), i, np.uint8)).save(file)
    return {"name": str(folder / "p"), "test": str(folder / "t"), "image_size": 4}


KINDS = pytest.mark.parametrize("kind", [table, npz, images])


@KINDS
@pytest.mark.parametrize("own, more", [(TRAIN, 0), (4, 0), (4, 4)])
def test_a_copy_a_part_or_half_of_them_is_refused_by_their_number(tmp_path, kind, own, more):
    told = f"{tmp_path}/t[^:]*(: x_test)?: {own} of its {own + more} records also stand in the training data, whose"
    with pytest.raises(BadInput, match=f"{told} accuracy is private; take them out, give other .* is set aside"):
        load_data(**kind(tmp_path, own, more))


@KINDS
def test_a_few_as_public_data_sets_have_them_are_test_records_like_others(tmp_path, kind):
    data = load_data(**kind(tmp_path, 4, 5))
    assert len(data.test) == 9 and not data.set_aside


def test_the_command_refuses_a_copy_before_it_spends(tmp_path, capsys):
    names = table(tmp_path, TRAIN, 0)
    flags = ["--dataset", names["name"], "--test-dataset", names["test"], "--model", "hf:none", "--clients", "1"]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert f"t.jsonl: {TRAIN} of its {TRAIN} records also stand in the training data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Data files that do not fit are refused, each by its name and its cure."""

import gzip
import zipfile

import numpy as np
import pytest

from lalora_kernels.data import BadInput, load_data


def npz(path, **arrays) -> str:
    good = {"x_train": np.zeros((20, 8, 8), np.uint8), "y_train": np.arange(20) % 2}
    np.savez(path, **{k: v for k, v in (good | arrays).items() if v is not None})
    return str(path)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"y_train": np.arange(19) % 2}, r"20 records but labels of shape \(19,\)"),
        ({"y_train": np.zeros((20, 2), int)}, r"20 records but labels of shape \(20, 2\)"),
        ({"y_train": np.arange(20) % 2 - 1}, "labels count from 0, found -1"),
        ({"y_train": np.arange(20) / 7}, "labels are whole numbers from 0, got float64"),
        ({"y_train": np.where(np.arange(20) % 2, np.inf, 0.0)}, "labels are whole numbers from 0, got float64"),
        ({"y_train": np.arange(20) % 2 * 20260101}, "labels number the classes from 0 without gaps; found 20260101"),
        ({"y_train": np.arange(20, dtype=np.uint64) * 2**60}, "labels number the classes from 0"),
        ({"y_train": np.zeros(20, int)}, "one class only"),
        ({"y_train": None}, "y_train missing"),
        ({"x_train": np.zeros((20, 64), np.uint8)}, r"got shape \(20, 64\)"),
        ({"x_train": np.zeros((20, 2, 8, 8), np.uint8)}, r"got shape \(20, 2, 8, 8\)"),
        ({"x_train": np.zeros((20, 8, 8), np.int64)}, "got int64"),
        ({"x_train": np.full((20, 8, 8), 7.0)}, r"lie in \[0, 1\], found 7 to 7"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "no images"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8)}, "go together"),
        ({"x_test": np.zeros((4, 9, 9), np.uint8), "y_test": np.arange(4) % 2}, r"differ in shape, \(1, 8, 8\) and"),
        ({"classes": np.array(["b", "a", "a"])}, "two classes are named 'a'"),
        ({"classes": np.array(["only one"])}, "a label is 1, but there are only 1 classes"),
        ({"x_train": np.array([[None]], dtype=object)}, "not a readable .npz"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, message):
    with pytest.raises(BadInput, match=message):
        load_data(npz(tmp_path / "a.npz", **arrays))


def test_npz_with_an_array_twice(tmp_path):
    path = npz(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x_train.npy", archive.read("x_train.npy"))
    with pytest.raises(BadInput, match="a.npz: not a readable .npz.*it holds x_train twice"):
        load_data(path)


@pytest.mark.parametrize("keep", [0, 10, 200, -40])
def test_npz_cut_short(tmp_path, keep):
    path = tmp_path / "a.npz"
    npz(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match="a.npz: not a readable .npz"):
        load_data(str(path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", "", "needs a header line"),
        ("a.tsv", "label\ttext\n", "at least one record"),
        ("a.tsv", "a\tb\tc\n1\t2\t3\n", "which column is the label"),
        ("a.tsv", "label\tb\tc\n1\t2\t3\n", "which column is the text"),
        ("a.csv", "text;label\nx;1\n", "there are text;label. The first line names the columns, .* commas in a .csv"),
        ("a.tsv", "label\ttext\n1\tx\n2\n", "line 3: 1 columns where the header has 2"),
        ("a.csv", 'label,text\n1,"never closed\n', "a.csv, line 2: not a readable .csv.*parted by commas, and a quote"),
        ("a.csv", "label,text\n" + "".join(f"0.{i},t\n" for i in range(200)), "200 different labels of 200 records"),
        ("a.CSV", "label,text\n0,x\n1,y\n", "a kind of file that is not read; write the end of its name in small"),
        ("a.json", "[]", "a kind of file that is not read; write one object a line and name it .jsonl"),
        ("a.parquet", "PAR1", "not read; pip install datasets, and give the folder .* alone: hf:/"),
        ("a.xlsx", "PK", "not read; save texts as .csv, .tsv or .jsonl, images as .npz"),
        ("a.tsv", b"label\ttext\n1\t\xff\xfe\n", "a.tsv: not in UTF-8 .*save it as such"),
        ("a.tsv", "label\ttext\n1\tx\n\ty\n", "a.tsv, line 3: no label; every record needs one"),
        ("a.csv", 'text,class\n"two\nlines",1\nx, \n', "a.csv, line 4: no class; every record needs one"),
        ("a.tsv", "label\ttext\n" + "1\tx\n" * 20, "one class only"),
        ("a.tsv", "label\ttext\n1\tx\n0\tx\n", "too few records to set a fifth"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        load_data(str(tmp_path / name))


def test_a_gz_cut_short(tmp_path):
    packed = gzip.compress(("label\ttext\n" + "1\tx\n0\ty\n" * 500).encode())
    (tmp_path / "a.tsv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(BadInput, match="corrupt or truncated"):
        load_data(str(tmp_path / "a.tsv.gz"))


def test_a_label_of_the_test_file_that_training_never_shows(tmp_path):
    (tmp_path / "a.tsv").write_text("label\ttext\n0\tx\n1\ty\n")
    (tmp_path / "t.tsv").write_text("label\ttext\n2\tz\n")
    with pytest.raises(BadInput, match="label '2' does not occur"):
        load_data(str(tmp_path / "a.tsv"), test=str(tmp_path / "t.tsv"))


def test_named_columns_that_are_not_there(tmp_path):
    (tmp_path / "a.tsv").write_text("label\ttext\n0\tx\n1\ty\n")
    with pytest.raises(BadInput, match="no column 'body'; the columns are label, text"):
        load_data(str(tmp_path / "a.tsv"), text_column="body")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,body", "no column 'body'; the columns are a, b, label"),
        ("a,", "no column ''"),
        ("a,b,label", "names one column, or the two different ones of a pair; got 'a,b,label'"),
        ("a,a", "two different ones of a pair; got 'a,a'"),
        ("a,label", "column 'label' is the label, and cannot be the text as well"),
        ("label", "column 'label' is the label"),
        (None, "which column is the text"),
    ],
)
def test_pairs_that_are_none(tmp_path, text, message):
    (tmp_path / "a.tsv").write_text("a\tb\tlabel\nx\ty\t0\ny\tz\t1\n")
    with pytest.raises(BadInput, match=message):
        load_data(str(tmp_path / "a.tsv"), text_column=text)

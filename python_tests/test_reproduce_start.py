"""Where the small presets start: public records leave the data set, the head is scikit-learn's logistic regression."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from small import SENTENCES, bert_folder, shared, text_tsv

from lalora_kernels.data import BadInput, Data, Records, load_data
from lalora_kernels.models import load_model, torchvision_beside_cpu_torch
from lalora_kernels.reproduce import start
from lalora_kernels.reproduce.start import SUPERCLASSES, by_superclass, prepare_start


def accuracy(settings, data):
    loaded = load_model(
        settings["model"], len(data.classes), kind=data.kind, weights=settings.get("weights"),
        image_size=settings.get("image_size"),
    )  # fmt: skip
    assert not loaded.new_modules
    inputs, labels = loaded.collate([data.test[i] for i in range(len(data.test))])
    with torch.no_grad():
        return (loaded.logits(inputs, loaded.model.eval()).argmax(1) == labels).double().mean().item()


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "PUBLIC", 30)
    settings = {"dataset": text_tsv(tmp_path / "t.tsv", 15), "model": bert_folder(tmp_path / "bert"), "rank": 3}
    (tmp_path / "dev.tsv").write_text("label\tsentence\n" + "".join(f"{int('fine' in s)}\t{s} !\n" for s in SENTENCES))
    return settings | {"test_dataset": str(tmp_path / "dev.tsv")}


def test_text(text, tmp_path):
    made = prepare_start(text, tmp_path / "start")
    assert made.pop("rank") == 3
    data = load_data(made["dataset"], test=made["test_dataset"])
    assert len(data.train) == 6 * 15 - 30 and sorted(data.test.inputs) == sorted(f"{s} !" for s in SENTENCES)
    for split in (data.train, data.test):
        assert all(int("fine" in split[i][0]) == split[i][1] for i in range(len(split)))
    # folded into the layer, the pipeline's scaler and regression score what scikit-learn says they do
    told = json.loads((tmp_path / "start" / "start.json").read_text())
    assert accuracy(made, data) == told["test_accuracy_of_the_fitted_head"] > 0.5
    assert told["public_records"] == 30
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "start").rglob("*") if p.is_file()}
    assert prepare_start(text, tmp_path / "start") == made | {"rank": 3}
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "start").rglob("*") if p.is_file()}


def test_training_sees_what_the_head_was_fitted_on(text, tmp_path):
    """In training mode too: the head stays as it is, so dropout would only teach the adapters to mend its noise."""
    made = prepare_start(text, tmp_path / "start")
    first, loaded = (load_model(name, 2, kind="text") for name in (text["model"], made["model"]))
    inputs, _ = loaded.collate([(s, 0) for s in SENTENCES])
    with torch.no_grad():
        assert not torch.equal(first.logits(inputs, first.model.train()), first.logits(inputs, first.model.eval()))
        assert torch.equal(loaded.logits(inputs, loaded.model.train()), loaded.logits(inputs, loaded.model.eval()))


def test_a_feature_that_hardly_varies_gets_no_weight(text, tmp_path):
    """Standardized it would count as much as any other, at a weight of 1e30 on the real MiniLM."""
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(text["model"])
    last = model.bert.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        last.weight[3] = 1e-20
    model.save_pretrained(text["model"])
    made = prepare_start(text, tmp_path / "start")
    weight = load_model(made["model"], 2, kind="text").model.classifier.weight
    assert weight[:, 3].tolist() == [0.0, 0.0]
    assert (weight != 0).sum() == 2 * 15
    data = load_data(made["dataset"], test=made["test_dataset"])
    told = json.loads((tmp_path / "start" / "start.json").read_text())
    assert accuracy(made, data) == told["test_accuracy_of_the_fitted_head"]


def test_images(tmp_path, monkeypatch):
    torchvision_beside_cpu_torch()
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=6).state_dict(), tmp_path / "w.safetensors")
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = np.clip(rng.normal(60 + 60 * y[:, None, None, None], 20, (90, 8, 8, 3)), 0, 255).astype(np.uint8)
    x[:, 0, 0, 0] = np.arange(90)  # tells records apart
    np.savez(tmp_path / "d.npz", x_train=x[:72], y_train=y[:72], x_test=x[72:], y_test=y[72:], classes=list("abc"))
    monkeypatch.setattr(start, "PUBLIC", 30)
    settings = {"dataset": str(tmp_path / "d.npz"), "model": "timm:test_vit", "image_size": 32}
    made = prepare_start(settings | {"weights": str(tmp_path / "w.safetensors")}, tmp_path / "start")
    assert made["image_size"] == 32 and made["model"] == "timm:test_vit"
    data = load_data(made["dataset"])
    left = data.train.inputs[:, 0, 0, 0].tolist()
    assert len(left) == len(set(left)) == 42 and data.classes == list("abc")
    np.testing.assert_array_equal(data.train.inputs.permute(0, 2, 3, 1).numpy(), x[left])
    np.testing.assert_array_equal(data.train.labels.numpy(), y[left])
    told = json.loads((tmp_path / "start" / "start.json").read_text())
    assert accuracy(made, data) == told["test_accuracy_of_the_fitted_head"] > 0.5


@pytest.mark.parametrize("shown", [True, False])
def test_no_bar_of_transformers_and_the_user_s_setting_stays(text, tmp_path, capfd, shown):
    from transformers.utils import logging

    own = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        capfd.readouterr()
        prepare_start(text, tmp_path / "start")
        assert "Writing" not in capfd.readouterr().err and logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if own else logging.disable_progress_bar)()


def test_too_few_records(text, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "PUBLIC", 45)
    with pytest.raises(BadInput, match="90 training records; 45 of them are to be public"):
        prepare_start(text, tmp_path / "start")
    assert not (tmp_path / "start" / "start.json").exists()


def test_superclasses():
    fine = [name for names in SUPERCLASSES.values() for name in names.split()]
    assert len(fine) == len(set(fine)) == 100 and len(SUPERCLASSES) == 20
    records = Records(torch.zeros(100, 1, 2, 2), torch.arange(100))
    made = by_superclass(Data("x", "image", records, records, sorted(fine)))
    assert Counter(made.train.labels.tolist()) == dict.fromkeys(range(20), 5)
    assert made.classes[made.train.labels[sorted(fine).index("maple_tree")]] == "trees"
    with pytest.raises(BadInput, match="not named as CIFAR-100's"):
        by_superclass(Data("x", "image", records, records, [f"c{i}" for i in range(100)]))


def test_the_real_classes_have_superclasses():
    data = by_superclass(load_data(str(shared("cifar100_10k_2k.npz"))))
    assert Counter(data.test.labels.tolist()) == dict.fromkeys(range(20), 100)

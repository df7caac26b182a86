"""Where the small presets start from: a head fitted on public records of the server's, kept as it is afterwards.

A new head of many classes would take most of the clipped gradient and most of the budget of so few steps, and the arms
would differ by little else. So ``PUBLIC`` training records are public: the head is a logistic regression on what the
pre-trained model makes of them, no client holds them, and the adapters train on all others.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lalora_kernels.data import BadInput, Data, Records, load_data, need
from lalora_kernels.files import write_atomic
from lalora_kernels.models import Classifier, load_model, quiet
from lalora_kernels.reproduce.stored import read_object

PUBLIC, SEED, BATCH = 2000, 0, 100
DEAD = 1e-6  # of the median deviation: below it a feature gets no weight. MiniLM's last LayerNorm scales three by 1e-9
START = "start.json"
# the 20 superclasses of CIFAR-100 (Krizhevsky 2009), with the five classes of each
SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


def prepare_start(settings: dict, folder: Path) -> dict:
    """``settings`` with the data set and the model replaced by files in ``folder``, made there if they are not.

    ``settings`` are those of a run; its data set loses ``PUBLIC`` random training records, its model gets a head fitted
    on them. CIFAR-100 becomes its 20 superclasses. Raises BadInput as loading does, and for too few records.
    """
    done = folder / START
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(done, json.dumps(_prepare(settings, folder), indent=2) + "\n")
    made = read_object(done, "remove it, and it is made again", "settings")["settings"]
    kept = {key: value for key, value in settings.items() if key not in ("dataset", "test_dataset", "model", "weights")}
    return kept | {key: value if value.startswith("timm:") else str(folder / value) for key, value in made.items()}


def _prepare(settings: dict, folder: Path) -> dict:
    data = load_data(settings["dataset"], test=settings.get("test_dataset"), image_size=settings.get("image_size"))
    if len(data.classes) == 100:
        data = by_superclass(data)
    if len(data.train) <= 2 * PUBLIC:
        raise BadInput(f"{data.name}: {len(data.train)} training records; {PUBLIC} of them are to be public")
    order = np.random.default_rng(SEED).permutation(len(data.train))
    public, private = order[:PUBLIC], np.sort(order[PUBLIC:])
    classifier = load_model(
        settings["model"], len(data.classes), kind=data.kind, weights=settings.get("weights"),
        image_size=settings.get("image_size"), max_length=settings.get("max_length", 128), seed=SEED,
    )  # fmt: skip
    pooler = getattr(getattr(classifier.model, "bert", None), "pooler", None)
    if pooler is not None:  # an encoder of sentences has no use for BERT's; a quarter keeps its tanh near linear
        nn.init.eye_(pooler.dense.weight).data.div_(4)
        nn.init.zeros_(pooler.dense.bias)
    _without_dropout(classifier.model)
    test = [data.test[i] for i in range(len(data.test))]
    accuracy = fit_head(classifier, [data.train[i] for i in public.tolist()], test)
    save = _save_images if data.kind == "image" else _save_text
    return {"settings": save(settings, data, private, classifier, folder), "public_records": PUBLIC,
            "test_accuracy_of_the_fitted_head": accuracy}  # fmt: skip


def _without_dropout(model: nn.Module) -> None:
    """Turn it off for good, in a transformers model's settings. The head stays what it was fitted as, on features that
    saw no dropout; under MiniLM's its loss was three times as high, and that is what the adapters would mend."""
    config = getattr(model, "config", None)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)


def by_superclass(data: Data) -> Data:
    """CIFAR-100 with its 20 superclasses as labels. Raises BadInput where the classes are not CIFAR-100's."""
    of = {fine: coarse for coarse, fines in SUPERCLASSES.items() for fine in fines.split()}
    if set(data.classes) != set(of):
        raise BadInput(f"{data.name}: its 100 classes are not named as CIFAR-100's are")
    names = list(SUPERCLASSES)
    to = torch.tensor([names.index(of[fine]) for fine in data.classes])
    train, test = (Records(split.inputs, to[split.labels]) for split in (data.train, data.test))
    return Data(data.name, data.kind, train, test, names)


def fit_head(classifier: Classifier, public: Sequence, test: Sequence) -> float:
    """Set the classifier's last layer, in place, to a logistic regression on ``public``; its accuracy on ``test``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = classifier.model.get_submodule(classifier.head[-1])
    assert isinstance(head, nn.Linear)
    x, y = _features(classifier, head, public)
    spread = x.std(axis=0)
    alive = spread > DEAD * np.median(spread)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(x[:, alive], y)
    scaler, regression = fitted[0], fitted[1]
    weight = np.zeros((len(regression.coef_), len(alive)))
    weight[:, alive] = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight[:, alive] @ scaler.mean_
    if len(weight) == 1:  # scikit-learn's one row for two classes is the difference of two logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    seen, truth = _features(classifier, head, test)
    return float(fitted.score(seen[:, alive], truth))


def _features(classifier: Classifier, head: nn.Module, records: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """What the last layer is given, (records, features) in float64, and the labels."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    labels = []
    classifier.model.eval()
    try:
        with torch.no_grad():
            for i in range(0, len(records), BATCH):
                inputs, y = classifier.collate(records[i : i + BATCH])
                classifier.logits(inputs)
                labels.append(y)
    finally:
        handle.remove()
    return torch.cat(seen).numpy(), torch.cat(labels).numpy()


def _save_images(settings: dict, data: Data, private: np.ndarray, classifier: Classifier, folder: Path) -> dict:
    from safetensors.torch import save_file

    arrays: dict[str, Any] = {"classes": np.array(data.classes)}
    for split, records in (("train", _take(data.train, private)), ("test", data.test)):
        assert isinstance(records.inputs, Tensor)
        arrays[f"x_{split}"] = records.inputs.permute(0, 2, 3, 1).contiguous().numpy()
        arrays[f"y_{split}"] = records.labels.numpy()
    np.savez_compressed(folder / "data.npz", **arrays)
    save_file({k: v.contiguous() for k, v in classifier.model.state_dict().items()}, folder / "model.safetensors")
    return {"dataset": "data.npz", "model": settings["model"], "weights": "model.safetensors"}


def _save_text(settings: dict, data: Data, private: np.ndarray, classifier: Classifier, folder: Path) -> dict:
    for split, records in (("train", _take(data.train, private)), ("test", data.test)):
        lines = ["label\tsentence"]
        lines += [f"{data.classes[y]}\t{text}" for text, y in zip(records.inputs, records.labels.tolist())]
        write_atomic(folder / f"{split}.tsv.gz", gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    with quiet(need("transformers")):  # its bar would stand among the runs' lines
        classifier.model.save_pretrained(folder / "model")  # type: ignore[operator]
    classifier.collate.tokenizer.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    return {"dataset": "train.tsv.gz", "test_dataset": "test.tsv.gz", "model": "model"}


def _take(records: Records, index: np.ndarray) -> Records:
    if isinstance(records.inputs, Tensor):
        return Records(records.inputs[index], records.labels[index])
    return Records([records.inputs[i] for i in index.tolist()], records.labels[index])

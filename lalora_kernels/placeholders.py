"""Models without their weights and records without content, in the right shapes: a dry run needs no more.

Nothing is downloaded, except the config.json of a model that is named by the Hugging Face hub's name alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.data import BadInput, need, refuse_no_hub_name
from lalora_kernels.embedded import SIZE, architecture
from lalora_kernels.models import (
    Classifier,
    ImageBatch,
    first_line,
    load_model,
    longest_text,
    torchvision_beside_cpu_torch,
)

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class TokenBatch:
    """Collate function: records -> (a dict of (N, length) tokens, (N,) labels), every text as long as texts may be."""

    vocabulary: int
    length: int

    def __call__(self, records: Sequence[tuple[None, int]]) -> tuple[dict[str, Tensor], Tensor]:
        shape = (len(records), self.length)
        tokens = torch.randint(min(5, self.vocabulary - 1), self.vocabulary, shape)  # the first ones pad and part
        return (
            {"input_ids": tokens, "attention_mask": torch.ones(shape, dtype=torch.int64)},
            torch.tensor([label for _, label in records]),
        )


def placeholder_model(
    name: str,
    num_classes: int,
    *,
    kind: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    max_length: int = 128,
) -> Classifier:
    """As ``models.load_model``, with random weights; ``kind`` None: what the model classifies.

    A weights file or folder that is here is read, so that its head counts as new exactly where it would. Without one,
    ``new_modules`` are what the configuration says: a head of another size, or of another task. Raises BadInput.
    """
    torchvision_beside_cpu_torch()  # transformers and timm import torchvision where it is installed
    local = Path(name).is_dir() and any(file for pattern in WEIGHTS for file in Path(name).glob(pattern))
    if weights is not None or local:
        options: dict[str, Any] = {"weights": weights, "image_size": image_size, "max_length": max_length}
        loaded = load_model(name, num_classes, kind=kind or (_hf_kind(name) if local else "image"), **options)
    elif name == "embedded":
        loaded = _embedded(num_classes, image_size)
    elif name.startswith("timm:"):
        loaded = _timm(name.removeprefix("timm:"), num_classes, image_size)
    elif name.startswith("hf:") or Path(name).is_dir():
        loaded = _transformers(name.removeprefix("hf:"), num_classes, kind, image_size, max_length)
    else:
        raise BadInput(f"unknown model {name!r}; give embedded, timm:NAME, hf:NAME or a transformers folder")
    if kind not in (None, loaded.kind):
        raise BadInput(f"{name} classifies {loaded.kind}s, but the data are {kind}s; give another --model or --dataset")
    if loaded.kind == "text":
        return replace(loaded, collate=_tokens(loaded.model, max_length))
    return loaded


def placeholder_records(classifier: Classifier, count: int, num_classes: int) -> list[tuple]:
    """``count`` records that the classifier's ``collate`` takes: random images, or nothing where tokens are made up."""
    generator = torch.Generator().manual_seed(0)
    if classifier.kind == "text":
        return [(None, i % num_classes) for i in range(count)]
    assert isinstance(classifier.collate, ImageBatch)
    shape = (classifier.collate.channels, classifier.collate.size, classifier.collate.size)
    return [(torch.rand(shape, generator=generator), i % num_classes) for i in range(count)]


def _embedded(num_classes: int, image_size: int | None) -> Classifier:
    if image_size not in (None, SIZE):
        raise BadInput(f"the embedded model takes images of {SIZE} x {SIZE}; leave the image size out")
    need("transformers")
    model: Any = architecture()  # transformers' ViT
    new = [] if num_classes == model.config.num_labels else ["classifier"]
    if new:
        model.classifier = nn.Linear(model.classifier.in_features, num_classes)
    return Classifier(model, "image", ImageBatch(SIZE, 1, (0.5,), (0.5,)), ["classifier"], new)


def _timm(name: str, num_classes: int, image_size: int | None) -> Classifier:
    timm = need("timm")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise BadInput(f"timm knows no model {name!r}" + (f"; some that it knows: {', '.join(close)}" if close else ""))
    try:
        model = timm.create_model(name, **({} if image_size is None else {"img_size": image_size}))
    except TypeError:
        model = timm.create_model(name)  # a convolutional network: any size will do
    new = model.num_classes != num_classes
    if new:
        model.reset_classifier(num_classes)
    head = [n for n, module in model.named_modules() if module is model.get_classifier()]
    settings = timm.data.resolve_data_config({}, model=model)
    channels, size = settings["input_size"][0], image_size or settings["input_size"][-1]
    collate = ImageBatch(size, channels, tuple(settings["mean"]), tuple(settings["std"]))
    return Classifier(model, "image", collate, head, head if new else [])


def _transformers(name: str, num_classes: int, kind: str | None, image_size: int | None, max_length: int) -> Classifier:
    transformers = need("transformers")
    config = _hf_config(name)
    kind = kind or _hf_kind(name)
    if kind == "text" and getattr(config.get_text_config(), "pad_token_id", None) is None:
        config.get_text_config().pad_token_id = 0  # as load_model finds one; no placeholder holds it
    auto = {
        "image": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
    }[kind]
    trained, labels = (config.architectures or [""])[0], config.num_labels
    config.num_labels = num_classes
    if image_size is not None:
        config.image_size = image_size
    try:
        model = auto.from_config(config)
    except Exception as error:  # a configuration of another kind, or one that does not fit together
        raise BadInput(f"{name}: no {kind} classifier can be made of it: {first_line(error)}") from error
    base = model.base_model_prefix + "."
    outside = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(base)}
    new = list(outside)
    if trained == type(model).__name__:
        new = [n for n, m in outside.items() if labels != num_classes == m.out_features]
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or 224
    collate: Callable = _tokens(model, max_length)
    if kind == "image":
        collate = ImageBatch(size if isinstance(size, int) else size[0], channels, (0.5,) * channels, (0.5,) * channels)
    return Classifier(model, kind, collate, list(outside), new)


def _hf_config(name: str) -> Any:
    refuse_no_hub_name(name)
    try:
        return need("transformers").AutoConfig.from_pretrained(name)
    except BadInput:
        raise
    except Exception as error:  # no network, no such name, a corrupt file: each its own kind
        raise BadInput(
            f"{name}: its config.json could not be read: {first_line(error)} (where there is no network, name a folder "
            f"that holds it)"
        ) from error


def _hf_kind(name: str) -> str:
    transformers, config = need("transformers"), _hf_config(name.removeprefix("hf:"))
    if type(config) in transformers.AutoModelForImageClassification._model_mapping:
        return "image"
    if type(config) in transformers.AutoModelForSequenceClassification._model_mapping:
        return "text"
    raise BadInput(f"{name} is a {config.model_type} model, which classifies neither images nor text")


def _tokens(model: Any, max_length: int) -> TokenBatch:
    return TokenBatch(getattr(model.config, "vocab_size", 2), longest_text(model, max_length))

"""Classifiers by name: the embedded default, timm, transformers; and how their inputs are made from records."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_kernels.data import BadInput, Text, need, no_hub, no_such_file, refuse_no_hub_name
from lalora_kernels.embedded import SIZE, embedded_model

_torchvision_schemas: list[torch.library.Library] = []  # a Library's definitions live as long as it does


def torchvision_beside_cpu_torch() -> bool:
    """Make ``import torchvision`` work beside a CPU build of torch; True where schemas stand in for compiled operators.

    PyPI's torchvision is built for CUDA torch. Beside a CPU one its compiled operators cannot be loaded and its import
    dies with "operator torchvision::nms does not exist", taking timm and parts of transformers with it. Declaring the
    two schemas that the import asks for is enough; the operators themselves stay unavailable (classifiers do not call
    them). Does nothing where torch has CUDA, torchvision is missing, or its operators load. Call it before importing
    torchvision, timm or transformers; a second call does nothing. Never imports torchvision.
    """
    if _torchvision_schemas:
        return True
    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for compiled in sorted([*Path(spec.origin).parent.glob("_C*.so"), *Path(spec.origin).parent.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            continue
        return False  # a torchvision built for this torch: its own operators are there
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)
    return True


@dataclass
class Classifier:
    """A loaded model. ``collate`` turns records into (inputs, labels); ``new_modules`` have no trained weights yet."""

    model: nn.Module
    kind: str  # "image" or "text"
    collate: Callable[[Sequence], tuple]
    head: list[str]  # names of the modules that make the logits
    new_modules: list[str]

    def loss(self, batch: tuple, model: nn.Module | None = None) -> Tensor:
        """Cross entropy of a batch that ``collate`` made, summed; of ``model``, a copy of this one, where it is given.

        No mean: its 1/N rounds each record's gradient by how many others there are, and a state that a server chose
        can make that as large as one likes.
        """
        return F.cross_entropy(self.logits(batch[0], model), batch[1], reduction="sum")

    def logits(self, inputs: Tensor | dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """(N, classes) scores of the inputs of a batch that ``collate`` made."""
        model = self.model if model is None else model
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return getattr(out, "logits", out)

    def to_device(self, batch: tuple) -> tuple:
        """A batch that ``collate`` made, where the model is."""
        device = next(self.model.parameters()).device
        inputs, labels = batch
        moved = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
        return moved, labels.to(device)


def load_model(
    name: str = "embedded",
    num_classes: int = 10,
    *,
    kind: str = "image",
    weights: str | None = None,
    image_size: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Load a classifier of images or text by name.

    ``name`` is "embedded" (a small vision transformer, pre-trained on the spot on scikit-learn's digits), "timm:NAME",
    "hf:NAME" from the Hugging Face hub, or a local folder that transformers' ``save_pretrained`` wrote. ``weights`` is
    a file (.safetensors, .pth) for a timm model instead of timm's download. ``kind`` is what the data are.
    ``image_size`` overrides the model's own input size in pixels; ``max_length`` cuts texts, in tokens. A head of
    another size than ``num_classes`` is replaced by a new one, drawn from ``seed``; torch's global generator is left as
    it was. ``progress`` is called with (done, steps) while the embedded model is pre-trained.

    Raises BadInput, with the cure, for names that mean nothing, weights that do not fit, and models of another kind.
    """
    if kind != "image" and (name == "embedded" or name.startswith("timm:")):  # before it is pre-trained or downloaded
        raise BadInput(f"{name} classifies images, but the data are {kind}s; give another --model or --dataset")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            loaded = _timm(name.removeprefix("timm:"), num_classes, weights, image_size)
        elif weights is not None:
            raise BadInput(f"a weights file goes with a timm model (--model timm:NAME), not with {name!r}")
        elif name == "embedded":
            loaded = _embedded(num_classes, image_size, progress)
        elif name.startswith("hf:") or Path(name).is_dir():
            loaded = _transformers(name.removeprefix("hf:"), num_classes, kind, image_size, max_length)
        else:
            raise BadInput(
                f"unknown model {name!r}; give embedded, timm:NAME, hf:NAME or a transformers folder (there is none at "
                f"{Path(name).absolute()})"
            )
    if loaded.kind != kind:
        raise BadInput(f"{name} classifies {loaded.kind}s, but the data are {kind}s; give another --model or --dataset")
    return loaded


def _embedded(num_classes: int, image_size: int | None, progress: Callable[[int, int], None] | None) -> Classifier:
    if image_size not in (None, SIZE):
        raise BadInput(f"the embedded model takes images of {SIZE} x {SIZE}; leave the image size out")
    torchvision_beside_cpu_torch()  # transformers imports torchvision where it is installed
    need("transformers"), need("sklearn", "scikit-learn")
    model: Any = embedded_model(progress)  # transformers' ViT
    new = []
    if num_classes != model.config.num_labels:
        model.classifier = nn.Linear(model.classifier.in_features, num_classes)
        model.num_labels = model.config.num_labels = num_classes
        new = ["classifier"]
    return Classifier(model, "image", ImageBatch(SIZE, 1, (0.5,), (0.5,)), ["classifier"], new)


def _timm(name: str, num_classes: int, weights: str | None, image_size: int | None) -> Classifier:
    torchvision_beside_cpu_torch()
    timm = need("timm")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise BadInput(f"timm knows no model {name!r}" + (f"; some that it knows: {', '.join(close)}" if close else ""))
    options: dict = {"pretrained": True}
    if weights is not None:
        head = timm.get_pretrained_cfg(name).classifier
        outputs = _head_size(Path(weights), head)
        # every key must fit: timm checks strictly only while the head has the size that its settings declare
        options |= {"num_classes": outputs, "pretrained_cfg_overlay": {"file": weights, "num_classes": outputs}}
    if image_size is not None:
        options["img_size"] = image_size
    try:
        try:
            model = timm.create_model(name, **options)
        except TypeError:
            if options.pop("img_size", None) is None:
                raise
            model = timm.create_model(name, **options)  # a convolutional network: any size will do
    except Exception as error:  # timm and the hub raise many kinds: no network, keys or shapes that do not fit
        source = weights or "timm's download (where there is no network, give a weights file)"
        raise BadInput(f"timm:{name}: weights from {source} could not be loaded: {first_line(error)}") from error
    new = []
    names = {id(module): n for n, module in model.named_modules()}
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
        names = {id(module): n for n, module in model.named_modules()}
        new = [names[id(model.get_classifier())]]
    settings = timm.data.resolve_data_config({}, model=model)
    size = image_size or settings["input_size"][-1]
    collate = ImageBatch(size, settings["input_size"][0], tuple(settings["mean"]), tuple(settings["std"]))
    return Classifier(model, "image", collate, [names[id(model.get_classifier())]], new)


def _head_size(path: Path, head: str) -> int:
    """Outputs of the classifier in a weights file, whose layer timm calls ``head``."""
    if not path.is_file():
        raise no_such_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return file.get_slice(f"{head}.weight").get_shape()[0]
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state.get("state_dict", state.get("model", state))[f"{head}.weight"].shape[0]
    except Exception as error:  # safetensors, zipfile and pickle each raise their own
        why = first_line(error)
        raise BadInput(f"weights file {path}: corrupt, truncated or without {head}.weight ({why})") from error


def _transformers(name: str, num_classes: int, kind: str, image_size: int | None, max_length: int) -> Classifier:
    refuse_no_hub_name(name)
    torchvision_beside_cpu_torch()
    transformers = need("transformers")
    if kind == "text" and image_size is not None:
        raise BadInput(f"--image-size {image_size} is for images, and the data are texts; leave it out")
    auto = {
        "image": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
    }
    options: dict = {"num_labels": num_classes}
    if not Path(name).is_dir() and (host := no_hub()):
        name = _stored(name, host)
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            able = [k for k, cls in auto.items() if type(config) in cls._model_mapping]
            if kind not in able:
                raise BadInput(
                    f"{name} is a {config.model_type} model, which classifies {' and '.join(able) or 'neither'}; "
                    f"the data are {kind}s"
                )
            if image_size is not None:
                options["image_size"] = image_size
            model, info = auto[kind].from_pretrained(
                name, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
            if kind == "image":
                collate: ImageBatch | TextBatch = _image_collate(name, model.config, image_size)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(name)
                collate = TextBatch(tokenizer, min(longest_text(model, max_length), tokenizer.model_max_length))
                collate.refuse_no_words(name)
                _pad(name, model, tokenizer)
                collate.refuse_no_room(1)
        except BadInput:
            raise
        except Exception as error:  # no network, no such name, corrupt file, no tokenizer: each its own kind
            raise BadInput(f"{name}: could not be loaded with transformers: {first_line(error)}") from error
    untrained = {key.rpartition(".")[0] for key in info["missing_keys"]}
    untrained |= {key[0].rpartition(".")[0] for key in info["mismatched_keys"]}
    share = sum(p.numel() for n in untrained for p in model.get_submodule(n).parameters())
    if 2 * share > sum(p.numel() for p in model.parameters()):
        raise BadInput(f"{name}: the weights do not fit its configuration; most of the model would be untrained")
    base = model.base_model_prefix + "."
    head = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(base)]
    return Classifier(model, kind, collate, head, sorted(untrained))


def _stored(name: str, host: str) -> str:
    """The folder in which an earlier run stored the hub's model. Raises BadInput where none did."""
    try:
        return need("huggingface_hub").snapshot_download(name, local_files_only=True)
    except Exception as error:  # the hub's client raises many kinds
        raise BadInput(
            f"hf:{name}: {host} has no address here (is there a network?), and no earlier run has stored this model; "
            f"give a folder that transformers wrote"
        ) from error


def _pad(name: str, model: Any, tokenizer: Any) -> None:
    """A padding token for a model that was trained without one, as GPT-2 and Llama: the one that ends a text, which the
    attention's mask leaves out and the classifier takes for what comes after the last word."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadInput(
                f"{name}: its tokenizer has no padding token and none that ends a text; give it one, "
                f"tokenizer.pad_token = ..., and tokenizer.save_pretrained({name!r})"
            )
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def longest_text(model: nn.Module, max_length: int) -> int:
    """``max_length``, or as many tokens as the model has positions for, if these are fewer."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or max_length
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's own, so of 514 positions 512 are for tokens
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, config.max_position_embeddings - module.padding_idx - 1)
    return min(max_length, positions)


def _image_collate(name: str, config: Any, image_size: int | None) -> "ImageBatch":
    """Size, mean and deviation from the model's preprocessor_config.json, read without importing torchvision."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError as error:
        if not Path(name).is_dir():
            raise
        raise BadInput(
            f"{name}: no preprocessor_config.json, which says how the model wants its pixels; copy that of the model "
            f"it was made from, or write {{\"image_mean\": [...], \"image_std\": [...]}} of its training there"
        ) from error
    channels = getattr(config, "num_channels", 3)
    mean, std = settings.get("image_mean", [0.5] * channels), settings.get("image_std", [0.5] * channels)
    size = settings.get("size", {})
    size = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    size = image_size or getattr(config, "image_size", None) or size
    return ImageBatch(size, channels, tuple(mean), tuple(std))


def first_line(error: Exception) -> str:
    """What an error says, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the report of new layers and the bars of weights: what is new is in ``Classifier.new_modules``."""
    log, bar = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(log)
        if bar:
            transformers.utils.logging.enable_progress_bar()


@dataclass(frozen=True)
class ImageBatch:
    """Collate function: records -> ((N, channels, size, size) float32 normalised images, (N,) labels)."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, records: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([image for image, _ in records])
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if x.shape[1] != self.channels:
            x = _channels(x, self.channels)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std, torch.tensor([label for _, label in records])


def _channels(x: Tensor, channels: int) -> Tensor:
    x = x[:, :3] if x.shape[1] == 4 else x  # an alpha channel says nothing about the class
    if channels == 1:
        return x.mean(1, keepdim=True)
    return x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x


@dataclass(frozen=True)
class TextBatch:
    """Collate function: records -> (a dict of (N, T) token tensors, (N,) labels), T the longest of the batch.

    A pair of texts is joined as the tokenizer does it; what is too long is cut from the longer of the two.
    """

    tokenizer: Any  # transformers'
    max_length: int

    def refuse_no_words(self, name: str) -> None:
        """Raises BadInput for what transformers makes up, without a word, where a folder has no tokenizer's files."""
        special = set(self.tokenizer.all_special_ids)
        words = sum(i not in special for i in self.tokenizer.get_vocab().values())
        if words < 3:  # SentencePiece's kinds keep their mark of a space
            raise BadInput(
                f"{name}: its tokenizer knows no words, so that all texts would be alike; save the model's own beside "
                f"the weights: tokenizer.save_pretrained({name!r})"
            )

    def refuse_no_room(self, texts: int) -> None:
        """Raises BadInput where no token of each of a record's ``texts`` would fit: tokenizers then cut nothing."""
        own = self.tokenizer.num_special_tokens_to_add(pair=texts == 2)
        if self.max_length < own + texts:
            raise BadInput(
                f"--max-length {self.max_length}: {own} tokens of a record are the model's own; give {own + texts} or "
                f"more"
            )

    def __call__(self, records: Sequence[tuple[Text, int]]) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*records)
        sides = [texts] if isinstance(texts[0], str) else list(zip(*texts))
        self.refuse_no_room(len(sides))
        encoded = self.tokenizer(
            *map(list, sides), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return dict(encoded), torch.tensor(labels)

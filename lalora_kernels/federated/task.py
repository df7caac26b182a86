"""What a federation works on: data, an adapted model, who holds which records; and what a display is told meanwhile."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lalora_kernels.adapt import adapt
from lalora_kernels.data import BadInput, Data, load_data
from lalora_kernels.federated.client import Client, get_state, trainable_tensors
from lalora_kernels.federated.config import Config
from lalora_kernels.federated.methods import Update, get_method
from lalora_kernels.federated.plan import deal, partition_digest
from lalora_kernels.files import tensor_digest
from lalora_kernels.models import Classifier, load_model
from lalora_kernels.privacy.first_batch import check_inputs
from lalora_kernels.privacy.padding import MASK, refuse_padding

PADDED_ALIKE = 32  # test records that are padded together to see what padding does


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """What a display is told: pre-training (done, steps), one private step, one complete round's record.

    ``on_updates`` is told of a round's (number, updates, weights) before they become one state, in-process runs only.
    """

    on_pretraining: Callable[[int, int], None] = _nothing
    on_step: Callable[[], None] = _nothing
    on_round: Callable[[dict[str, Any]], None] = _nothing
    on_updates: Callable[[int, Mapping[int, Update], Mapping[int, float]], None] = _nothing


QUIET = Watch()


@dataclass
class Task:
    """Everything loaded and checked, before the first step."""

    config: Config
    data: Data
    classifier: Classifier
    parts: list  # record numbers of each client; none where they were not dealt
    fingerprints: dict[str, str]
    start: str  # digest of what is trained, as it was prepared

    def refuse_trained(self) -> None:
        """Raise BadInput where the model is no longer what was prepared: a new run's ε would begin at 0 for weights
        that private records have trained."""
        model = self.classifier.model
        same = tensor_digest(get_state(model)) == self.start
        if same and get_method(self.config.method).folds:
            same = _base_digest(model) == self.fingerprints["base model"]
        if not same:
            raise BadInput(
                "this task's model has been trained since it was prepared; prepare(config) once more for another run, "
                "and give public weights as --weights"
            )


def prepare(config: Config, watch: Watch = QUIET, dealt: bool = True) -> Task:
    """Load data and model, adapt it, deal the records, unless ``dealt`` says that clients hold others.

    Raises BadInput or ValueError, with the cure, for what does not fit.
    """
    if config.private and (config.model, config.dataset) == ("embedded", "digits"):
        raise BadInput(
            "the embedded model is pre-trained on these very digits, without noise, so no ε of them would be true; "
            "give --dataset mnist, another --model, or --epsilon inf"
        )
    data = load_data(
        config.dataset,
        test=config.test_dataset,
        text_column=config.text_column,
        label_column=config.label_column,
        image_size=config.image_size,
    )
    classifier = load_model(
        config.model,
        len(data.classes),
        kind=data.kind,
        weights=config.weights,
        image_size=config.image_size,
        max_length=config.max_length,
        seed=config.seed,
        progress=watch.on_pretraining,
    )
    adapt_classifier(config, classifier)
    classifier.model.to(device_of(config.device))
    parts = deal(config, data.train.labels.numpy()) if dealt else []
    fingerprints = {"data": data.fingerprint(), "base model": _base_digest(classifier.model)}
    if dealt:
        fingerprints["partition"] = partition_digest(parts)
    return Task(config, data, classifier, parts, fingerprints, tensor_digest(get_state(classifier.model)))


def adapt_classifier(config: Config, classifier: Classifier) -> None:
    """Put the adapters that the settings name into the classifier's model, in place. Raises as ``prepare`` does."""
    if config.train_head == "no" and classifier.new_modules:
        raise BadInput(
            f"{', '.join(classifier.new_modules)} of {config.model} is new for these classes and has no trained "
            f"weights; it cannot stay frozen (--train-head auto or yes)"
        )
    heads = classifier.new_modules + (classifier.head if config.train_head == "yes" else [])
    targets: str | list[str] = config.targets
    if targets not in ("qv", "all-linear") and not set(targets) & set("*+?\\|()[]^$"):
        targets = [name.strip() for name in config.targets.split(",")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the shared start of every A is public
        adapt(
            classifier.model, r=config.rank, lora_alpha=config.lora_alpha, target_modules=targets,
            modules_to_save=sorted(set(heads)) or None, verbose=False,
        )  # fmt: skip


def device_of(name: str) -> torch.device:
    """The torch device that ``--device`` means. Raises BadInput for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise BadInput("--device meta: its tensors have no values, so nothing trains there; take cpu or cuda")
    return device


def _base_digest(model: nn.Module) -> str:
    moving = {id(p) for p in trainable_tensors(model).values()}
    return tensor_digest({name: p for name, p in model.named_parameters() if id(p) not in moving})


def refuse_unfit(task: Task, client: Client) -> None:
    """Fail before the first step, not in it: a model that no rule covers, or whose layers mix the records of a batch.

    The checks of ``make_private``'s first step, on two test records, which are public. Raises ValueError as it does and
    for layers that have positions before records, which the clients' steps would not know of; BadInput for test records
    that cannot show what mixes them.
    """
    classifier, config = task.classifier, task.config
    optimizer, _ = client.private_step(classifier, get_method(config.method), config, 1)
    optimizer.detach()
    inputs, _ = classifier.to_device(classifier.collate(_two_records(task)))
    args, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    found = check_inputs(classifier.model, args, named, 2)
    if found is not None and found.sequence_first:
        raise ValueError(
            f"{', '.join(sorted(found.sequence_first))}: positions come before records there, which make_private in a "
            f"loop of your own takes, and lalora train does not; name other layers in targets"
        )
    if MASK in named:
        some = [task.data.test[i] for i in range(min(len(task.data.test), PADDED_ALIKE))]
        refuse_padding(classifier.model, (), classifier.to_device(classifier.collate(some))[0])


def _two_records(task: Task) -> list:
    """The first test records whose inputs are finite and differ: equal ones would not show what mixes them."""
    found: list = []
    first: dict[str, torch.Tensor] = {}
    for i in range(len(task.data.test)):
        inputs, _ = task.classifier.collate([task.data.test[i]])
        tensors = inputs if isinstance(inputs, dict) else {"": inputs}
        if not all(t.isfinite().all() for t in tensors.values()):
            continue
        if found and any(not torch.equal(t, first[name]) for name, t in tensors.items()):
            return [*found, task.data.test[i]]
        if not found:
            found, first = [task.data.test[i]], tensors
    raise BadInput(
        f"{task.config.test_dataset or task.config.dataset}: no two test records are finite and differ, so nothing "
        f"would show a model that mixes the records of a batch; give a test set with two"
    )

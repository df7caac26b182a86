"""transformers' Trainer as a private one. Imports transformers and accelerate: not part of ``import lalora_kernels``.

One batch of the Trainer's loop is one logical Poisson batch. ``training_step`` walks through its physical parts, so the
loop's own accumulation, which counts batches, is not used; the Trainer's ``optimizer.step()`` releases.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging

from lalora_kernels.nn import lora_layers, set_active
from lalora_kernels.peft_io import save_adapter
from lalora_kernels.privacy.accountant import get_noise_multiplier
from lalora_kernels.privacy.accounts import refuse_second_account
from lalora_kernels.privacy.distributed import quiet_ddp
from lalora_kernels.privacy.ledger import Ledger, LedgerError
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.optimizer import PrivateOptimizer
from lalora_kernels.privacy.sampling import PrivateLoader, count_records
from lalora_kernels.privacy.trained import refuse_frozen
from lalora_kernels.trainer_batches import LogicalBatch, PrivateBatches
from lalora_kernels.trainer_loss import find_shift, is_own, logits_of, record_losses
from lalora_kernels.trainer_refusals import (
    refuse_arguments,
    refuse_batch_size,
    refuse_loss_objects,
    refuse_other_batches,
    refuse_settings,
)

if TYPE_CHECKING:  # what it stands before
    from transformers import Trainer as _Mixed
else:
    _Mixed = object
if not hasattr(Trainer, "_prepare_for_training"):
    raise ImportError("lalora_kernels.trainer needs transformers 5 or later")
logger = logging.get_logger(__name__)
LEDGER, ADAPTER = "ledger.json", "adapter"


class PrivateTrainerMixin(_Mixed):
    """Before ``Trainer`` (or ``Seq2SeqTrainer``) among a class's bases: training is private, all else is the Trainer's.

    Args beside the Trainer's:
        privacy: settings of ``make_private``: target_epsilon and target_delta (or noise_multiplier and target_delta),
            method, smoothing, clipping, ... ``args.max_grad_norm`` is C; the number of steps is the Trainer's;
            b = ``per_device_train_batch_size * gradient_accumulation_steps`` records are expected in a logical batch,
            times the number of processes, each of which computes ``per_device_train_batch_size`` at a time.

    A record's loss is the cross-entropy of its own positions (trainer_loss.py), the model's own for regression and
    multi-label targets, or ``compute_loss_func(outputs, labels, num_items_in_batch=None)``, a mean over records.
    Every log holds ``epsilon``, spent so far at target_delta. Losses of the training records are logged as
    ``loss_not_private``: the guarantee does not cover them. ``output_dir/ledger.json`` is written before every release,
    and a copy with every checkpoint; a resumed run continues it under a fresh key. Beside a model of ``adapt``'s,
    wherever it is saved, the folder ``adapter`` holds what ``save_adapter`` writes. Several processes of
    torch.distributed make the step of one: each takes a part of the batch, the first adds the noise, has the ledger.

    Raises ValueError for what would make ε false or go unseen: fp16, several devices a process, samplers or loaders
    of your own or by length, DeepSpeed, FSDP, Liger kernels, auto_find_batch_size, optimizers that step in backward,
    hyper-parameter search, a ledger of another run in ``output_dir``.
    """

    args: Any  # the Trainer's
    optimizer: Any

    def __init__(self, *args: Any, privacy: Mapping[str, Any], **kwargs: Any) -> None:
        refuse_settings(privacy)
        refuse_loss_objects(self)
        self._private: PrivateOptimizer | None = None
        self._batches: PrivateBatches | None = None
        self._resuming = self._said = self._loss_checked = self._shift = self._sums = False
        self._epsilon: tuple[int, float | None] | None = None
        super().__init__(*args, **kwargs)
        refuse_arguments(self)
        self.privacy = dict(privacy)
        self.max_grad_norm = float(self.args.max_grad_norm)
        b = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.expected_batch_size = self.privacy.pop("expected_batch_size", b)
        # The loop sees one batch a step and clips nothing; Poisson draws have no order in which to skip.
        self.args = copy.copy(self.args)
        self.args.gradient_accumulation_steps, self.args.max_grad_norm, self.args.ignore_data_skip = 1, 0.0, True

    # ---------------------------------------------------------------- data

    def get_train_dataloader(self) -> PrivateBatches:
        """The private loader in the Trainer's terms; accelerate does not prepare it."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        if self._batches is None:
            dataset, collate = self.train_dataset, self.data_collator
            refuse_batch_size(self.expected_batch_size, count_records(dataset))
            if hasattr(dataset, "remove_columns"):
                dataset = self._remove_unused_columns(dataset, description="Training")
            else:
                collate = self._get_collator_with_removed_columns(collate, description="Training")
            a = self.args
            data = DataLoader(
                dataset,
                batch_size=a.per_device_train_batch_size,
                collate_fn=collate,
                num_workers=a.dataloader_num_workers,
                pin_memory=a.dataloader_pin_memory and torch.cuda.is_available(),
                persistent_workers=a.dataloader_persistent_workers,
                prefetch_factor=a.dataloader_prefetch_factor,
            )
            self._batches = PrivateBatches(data, self.expected_batch_size)
        return self._batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[LogicalBatch], num_batches: int, device: torch.device
    ) -> tuple[list[LogicalBatch], None]:
        """One logical batch, and no count of its tokens, which would make records depend on each other."""
        return [batch for _, batch in zip(range(num_batches), epoch_iterator)], None

    # ---------------------------------------------------------------- the private optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        refuse_other_batches(self, train_dataloader)
        self._resuming = resume_from_checkpoint is not None
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        quiet_ddp(model)  # accelerate's wrapper: the engine adds the ranks' sums up itself
        return model, loader

    @property
    def ledger(self) -> Ledger:
        """What this run has spent. Raises RuntimeError before ``train``."""
        if self._private is None:
            raise RuntimeError("there is no ledger before train()")
        return self._private.ledger

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, or yours, made private."""
        if self._private is not None:
            return self.optimizer
        if self._batches is None:  # called by hand: the Trainer asks for its batches first
            refuse_other_batches(self, self.get_train_dataloader())
        assert self._batches is not None
        refuse_frozen(self.model)
        set_active(self.model, "AB")
        plain = super().create_optimizer(model)
        ledger = self._open_ledger()
        sigma = self._noise_multiplier(ledger)
        # In half precision the gradient of a mean is rounded by how many records it has. A loss of one's own stays the
        # mean that it is said to be, which the first backwards check.
        self._sums = self.compute_loss_func is None and type(self).compute_loss is PrivateTrainerMixin.compute_loss
        rest = {k: v for k, v in self.privacy.items() if k not in ("noise_multiplier", "target_epsilon")}
        self._private, loader = make_private(
            self.model,
            plain,
            self._batches.data,
            noise_multiplier=sigma,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
            physical_batch_size=self.args.per_device_train_batch_size,
            loss_reduction="sum" if self._sums else "mean",
            ledger=ledger,
            **rest,
        )
        if ledger.entries:
            last = ledger.entries[-1]
            self._private.engine.noise.load_state_dict({"next_release": last.first_release + last.count})
        assert isinstance(loader, PrivateLoader)
        self._batches.bind(loader)
        if self.is_world_process_zero():  # which adds the noise
            ledger.path = Path(self.args.output_dir, LEDGER)
        self.optimizer = self._private
        return self.optimizer

    def _open_ledger(self) -> Ledger:
        """The first process's, in every process: they are one data holder and make one release a step."""
        if self.args.world_size == 1:
            return self._own_ledger()
        found: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                found = [self._own_ledger().state_dict()]
            except (ValueError, OSError) as error:
                found = [error]
        dist.broadcast_object_list(found, 0)
        if isinstance(found[0], Exception):
            raise found[0]
        ledger = Ledger()
        ledger.load_state_dict(found[0])
        return ledger

    def _own_ledger(self) -> Ledger:
        path, budget = Path(self.args.output_dir, LEDGER), self.privacy.get("target_epsilon")
        if not self._resuming:
            if path.exists():
                raise ValueError(
                    f"{path} is the ledger of another run, which this one would replace; resume that run with "
                    f"train(resume_from_checkpoint=True), or give another output_dir"
                )
            refuse_second_account(
                self.model.parameters(),
                "Resume the former run, train(resume_from_checkpoint=True) in its output_dir; where the records are "
                "others, all of them, train copy.deepcopy(model)",
            )
            return Ledger(target_epsilon=budget, target_delta=self.privacy["target_delta"])
        if not path.exists():
            raise LedgerError(
                f"{path}: there is no ledger, so what this run has spent is unknown; resume with the output_dir that "
                f"it was begun with, or restore the ledger from a copy"
            )
        ledger = Ledger.load(path)
        stored, asked = (ledger.target_epsilon, ledger.target_delta), (budget, self.privacy["target_delta"])
        if stored != asked:
            raise ValueError(f"{path} has the budget {stored} and privacy says {asked}; resume with the stored one")
        return ledger

    def _noise_multiplier(self, ledger: Ledger) -> float:
        """σ for all steps; after a resume that lost steps, or with another number of steps, for what is left."""
        given, target = self.privacy.get("noise_multiplier"), self.privacy.get("target_epsilon")
        if given is not None:
            return given
        assert self._batches is not None
        q = self.expected_batch_size / count_records(self._batches.dataset)
        question = {"target_epsilon": target, "target_delta": self.privacy["target_delta"], "sample_rate": q}
        steps, done = self.state.max_steps, self.state.global_step
        sigma = get_noise_multiplier(steps=steps, **question)
        if ledger.entries and ledger.releases != ((sigma, q, done),):
            sigma = get_noise_multiplier(steps=max(steps - done, 1), history=ledger.releases, **question)
        return sigma

    # ---------------------------------------------------------------- a step

    def training_step(
        self, model: nn.Module, inputs: LogicalBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of every physical part; the last part's clipping is left to ``optimizer.step``."""
        assert self._private is not None
        model.train()
        if hasattr(self._private, "train"):  # a schedule-free optimizer, which evaluation has put into its other mode
            self._private.train()
        total = torch.zeros((), device=self.args.device)
        records = 0
        for batch, info in inputs:
            batch = self._prepare_inputs(batch)
            if info.valid and not self._loss_checked:
                self._check_loss(model, batch)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
            self.accelerator.backward(loss * info.rows if self._sums else loss)
            if info.valid:
                total += loss.detach() * info.valid
                records += info.valid
            if not info.last:
                self._private.step()
        return total / max(records, 1)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """In training the mean over records of each one's own loss; in evaluation the Trainer's."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if not model.training or self._private is None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if labels is None:
            raise ValueError(
                "the batch has no 'labels', and what else a loss is made of may tie records together; pass "
                "compute_loss_func=..., the mean over records of each record's own loss. Where the model's own "
                "is that (answers, forecasts): lambda outputs, labels, num_items_in_batch=None: outputs['loss']"
            )
        given = inputs if self._keeps_labels(labels) else {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**given)
        if is_own(labels, logits_of(outputs)):
            loss = outputs["loss"]
        else:
            loss = record_losses(
                logits_of(outputs),
                labels,
                shift=self._shift,
                label_smoothing=self.args.label_smoothing_factor,
            ).mean()
        return (loss, outputs) if return_outputs else loss

    def _keeps_labels(self, labels: Tensor) -> bool:
        config = getattr(self.model, "config", None)
        encoder_decoder = getattr(config, "is_encoder_decoder", False)  # makes the decoder's inputs of them
        return encoder_decoder or labels.is_floating_point() or getattr(config, "num_labels", None) == 1

    def _check_loss(self, model: nn.Module, batch: Any) -> None:
        """See by single records which loss the model's own is; asked again of the next batch where they do not tell."""
        if getattr(getattr(self.model, "config", None), "output_router_logits", False):
            raise ValueError("output_router_logits adds a loss that ties a batch's tokens together; set it to False")
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if self.compute_loss_func is not None or labels is None:
            self._loss_checked = True
            return
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            shift = find_shift(model, batch)
        model.train()
        if shift is not None:
            self._shift, self._loss_checked = shift, True

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None  # the engine clips, each record's; a norm of the batch's gradient would not be private

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the number of a batch's tokens is private."""
        return 0

    # ---------------------------------------------------------------- logs and checkpoints

    def get_epsilon(self) -> float | None:
        """ε spent so far at target_delta; None where none can be claimed (a fixed noise key)."""
        ledger = self.ledger
        if self._epsilon is None or self._epsilon[0] != ledger.steps:
            try:
                self._epsilon = ledger.steps, ledger.epsilon()
            except LedgerError as error:
                logger.warning_once(str(error))
                self._epsilon = ledger.steps, None
        return self._epsilon[1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with ``epsilon`` beside what training logs, and its losses named for what they are."""
        if self._private is not None and ("loss" in logs or "train_loss" in logs):
            for name in ("loss", "train_loss"):
                if name in logs:
                    logs[f"{name}_not_private"] = logs.pop(name)
            epsilon = self.get_epsilon()
            if epsilon is not None:
                logs["epsilon"] = epsilon
            if not self._said:
                self._said = True
                logger.warning(
                    "loss_not_private is computed from the private records without noise: the guarantee does not "
                    "cover it, so do not publish it."
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The ledger first: weights are never there without what they cost.
        self._write_ledger(os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, with the ledger beside the weights, and ``adapt``'s adapter in the folder ``adapter``."""
        folder = self.args.output_dir if output_dir is None else output_dir
        self._write_ledger(folder)
        self._write_adapter(Path(folder, ADAPTER))
        super().save_model(output_dir, _internal_call)

    def _write_ledger(self, folder: str) -> None:
        if self._private is not None and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            self.ledger.save(Path(folder, LEDGER))

    def _write_adapter(self, folder: Path) -> None:
        """from_pretrained does not know the factors among a saved model's weights."""
        if self.args.should_save and any(True for _ in lora_layers(self.model)):
            try:
                save_adapter(self.model, folder)
            except ValueError as error:  # the model's weights hold everything
                logger.warning(f"{folder} was not written: {error}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            if not Path(checkpoint, "optimizer.pt").is_file():
                raise ValueError(
                    f"{checkpoint} holds no optimizer.pt, so where its training stood is unknown; resume from a "
                    f"checkpoint saved without save_only_model"
                )
            self.ledger.load_state_dict(Ledger.load(Path(checkpoint, LEDGER)).state_dict())
        super()._load_optimizer_and_scheduler(checkpoint)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: every trial would spend a budget of its own on the same records."""
        raise ValueError("every trial of a search spends ε on the same records; search on public data with Trainer")


class PrivateTrainer(PrivateTrainerMixin, Trainer):
    """``transformers.Trainer`` that trains privately; see ``PrivateTrainerMixin``."""

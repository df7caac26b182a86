"""What PrivateTrainer refuses before the first step: settings, arguments and models that would make ε false."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from transformers import Trainer

from lalora_kernels.privacy.optimizer import PrivateOptimizer
from lalora_kernels.privacy.sampling import rates
from lalora_kernels.trainer_batches import PrivateBatches

# What ``privacy`` may say to make_private; the rest follows from TrainingArguments.
SETTINGS = set(
    "method smoothing clipping noise_multiplier target_epsilon target_delta expected_batch_size lengths noise backend "
    "check target_unclipped_quantile clipbound_learning_rate min_clipbound max_clipbound unclipped_num_std".split()
)


def refuse_settings(privacy: Mapping[str, Any]) -> None:
    """Raise ValueError for what ``privacy`` lacks, does not know, or says twice."""
    if unknown := sorted(set(privacy) - SETTINGS):
        raise ValueError(
            f"privacy holds {', '.join(unknown)}, which it does not know or which follow from TrainingArguments; "
            f"known: {', '.join(sorted(SETTINGS))}"
        )
    if privacy.get("target_delta") is None:
        raise ValueError("privacy needs target_delta, at which ε is logged")
    if (privacy.get("target_epsilon") is None) == (privacy.get("noise_multiplier") is None):
        raise ValueError("privacy holds either target_epsilon or noise_multiplier")


def refuse_loss_objects(trainer: Trainer) -> None:
    """Raise ValueError for sentence-transformers' trainers, whose loss is an object that calls the model by itself."""
    if any(c.__module__.partition(".")[0] == "sentence_transformers" for c in type(trainer).__mro__):
        raise ValueError(
            "a trainer of sentence-transformers takes its loss from an object that calls the model itself, by default "
            "one that has a record's pairs among the other records. Train in a loop with make_private and a loss of "
            "each pair alone (CosineSimilarityLoss; ask check_per_sample), or give a CrossEncoder's model to "
            "PrivateTrainer"
        )


def refuse_arguments(trainer: Trainer) -> None:
    """Raise ValueError, naming all of it, for what would make ε false or go unseen."""
    a = trainer.args
    optim = str(getattr(a.optim, "value", a.optim))
    reasons = {
        "fp16 scales the loss by what overflowed before; use bf16=True": a.fp16,
        "nn.DataParallel splits batches over devices; make one device visible": a.n_gpu > 1,
        "several processes are those of torch.distributed (torchrun, accelerate launch)": a.world_size > 1
        and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() == a.world_size),
        "torch_compile is not tested in several processes": a.world_size > 1 and a.torch_compile,
        "deepspeed shards what per-sample gradients need whole": a.deepspeed or trainer.is_deepspeed_enabled,
        "fsdp shards what per-sample gradients need whole": a.fsdp or trainer.is_fsdp_enabled,
        "a model sharded at load time has no per-sample gradients": trainer.is_distributed_loading_by_transformers,
        "parallelism_config shards what per-sample gradients need whole": a.parallelism_config is not None,
        f"train_sampling_strategy={a.train_sampling_strategy!r} picks records by another rule than Poisson sampling; "
        f"leave it at 'random' (within a batch privacy['lengths'] puts records of like length "
        f"together)": a.train_sampling_strategy != "random",
        "use_liger_kernel replaces forwards and takes a mean over a batch's tokens": a.use_liger_kernel,
        "auto_find_batch_size starts over after a step was charged; set per_device_train_batch_size lower, and "
        "gradient_accumulation_steps higher": a.auto_find_batch_size,
        "include_num_input_tokens_seen counts the tokens of private batches": a.include_num_input_tokens_seen != "no",
        f"optim={optim!r} steps within backward, before anything is clipped": any(
            word in optim for word in ("lomo", "layerwise")
        ),
        "model_init starts over while the ledger goes on; pass model": trainer.model_init is not None,
        "the optimizer is private already; pass the plain one": isinstance(trainer.optimizer, PrivateOptimizer),
        f"max_grad_norm is C, and above 0; got {a.max_grad_norm}": a.max_grad_norm is None or not a.max_grad_norm > 0,
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError("PrivateTrainer: " + "; ".join(found))


def refuse_other_batches(trainer: Trainer, batches: object) -> None:
    """Raise ValueError where a subclass gives the Trainer a loader of its own."""
    if not isinstance(batches, PrivateBatches):
        raise ValueError(
            f"{type(trainer).__name__}.get_train_dataloader returns a {type(batches).__name__}, whose batches are no "
            f"Poisson draws; leave that method to PrivateTrainer, and give train_dataset and data_collator instead"
        )


def refuse_batch_size(expected_batch_size: float, records: int) -> None:
    """Raise ValueError, as make_private does, where no q in (0, 1] draws so many of the records on average."""
    try:
        rates(records, None, expected_batch_size, None)
    except ValueError as error:
        raise ValueError(
            f"{error}. It is per_device_train_batch_size * gradient_accumulation_steps * processes where "
            f"privacy['expected_batch_size'] is not given"
        ) from None

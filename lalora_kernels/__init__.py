"""Differentially private LoRA for federated learning, with its own kernels."""

from lalora_kernels.adapt import adapt, merge, merge_and_unload, trainable_summary, unadapt, unmerge
from lalora_kernels.dispatch import use_backend
from lalora_kernels.nn import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALinear, lora_layers, set_active
from lalora_kernels.peft_io import load_adapter, save_adapter
from lalora_kernels.peft_patch import patch_peft, unpatch_peft
from lalora_kernels.privacy.accountant import compute_epsilon, get_noise_multiplier
from lalora_kernels.privacy.checks import check_per_sample
from lalora_kernels.privacy.ledger import BudgetExceeded, Ledger, LedgerError
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.schedule import Schedule, get_schedule
from lalora_kernels.trainer_loss import record_losses

__version__ = "0.1.0"

__all__ = [
    "BudgetExceeded",
    "Ledger",
    "LedgerError",
    "LoRAConv1D",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "NoiseSource",
    "Schedule",
    "adapt",
    "check_per_sample",
    "compute_epsilon",
    "get_noise_multiplier",
    "get_schedule",
    "load_adapter",
    "lora_layers",
    "make_private",
    "merge",
    "merge_and_unload",
    "patch_peft",
    "record_losses",
    "save_adapter",
    "set_active",
    "trainable_summary",
    "unadapt",
    "unmerge",
    "unpatch_peft",
    "use_backend",
]

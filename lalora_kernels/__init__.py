"""Differentially private LoRA for federated learning, with its own kernels."""

__version__ = "0.1.0"

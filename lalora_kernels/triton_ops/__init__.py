"""Triton kernels, one file an operation. Signatures and meaning are the reference's."""

from lalora_kernels.triton_ops.chacha20_normal import chacha20_normal, chacha20_words
from lalora_kernels.triton_ops.clip_reduce import clip_reduce
from lalora_kernels.triton_ops.privatize import privatize, smooth
from lalora_kernels.triton_ops.sample_grad import sample_grad
from lalora_kernels.triton_ops.sample_grad_clip import sample_grad_clip

__all__ = [
    "chacha20_normal",
    "chacha20_words",
    "clip_reduce",
    "privatize",
    "sample_grad",
    "sample_grad_clip",
    "smooth",
]

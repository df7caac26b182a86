"""The oracle: every operation in plain PyTorch, float64-capable, importing nothing but torch.

Whatever another backend computes is compared with what stands here.
"""

from lalora_kernels.reference.chacha20_normal import chacha20_normal, chacha20_words
from lalora_kernels.reference.clip_reduce import clip_reduce
from lalora_kernels.reference.privatize import privatize, smooth
from lalora_kernels.reference.sample_grad import sample_grad
from lalora_kernels.reference.sample_grad_clip import sample_grad_clip

__all__ = [
    "chacha20_normal",
    "chacha20_words",
    "clip_reduce",
    "privatize",
    "sample_grad",
    "sample_grad_clip",
    "smooth",
]

"""The embedded default model: a small vision transformer, pre-trained publicly on scikit-learn's handwritten digits.

Pre-training takes well under a minute on two cores, once; the weights are then kept in the user's cache folder.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lalora_kernels.files import tensor_digest, write_atomic

SIZE = 28
ARCHITECTURE = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": SIZE, "patch_size": 7, "num_channels": 1, "num_labels": 10,
}  # fmt: skip
RECIPE: dict[str, Any] = {"steps": 800, "batch": 128, "lr": 2e-3, "weight_decay": 0.05, "seed": 0, "version": 1}


def embedded_model(progress: Callable[[int, int], None] | None = None) -> nn.Module:
    """transformers' ViTForImageClassification: grey images (N,1,28,28) in [-1, 1] -> (N,10) logits, in eval mode.

    The weights come from the cache (``$XDG_CACHE_HOME``, else ``~/.cache``) or are trained and put there. A corrupt
    cache is trained anew; one that cannot be written is warned of. ``progress(done, steps)`` is called while training.
    """
    path = cache_file()
    model = architecture()
    state = _read(path)
    if state is None:
        train_on_digits(model, RECIPE["steps"], progress)
        tensors = {k: v.detach().contiguous() for k, v in sorted(model.state_dict().items())}
        try:
            write_atomic(path, save(tensors, metadata={"sha256": tensor_digest(tensors)}))
        except OSError as error:  # of no consequence for this process, which has what it needs
            warnings.warn(
                f"the pre-trained embedded model could not be kept in {path.parent} ({error.strerror}), so every run "
                f"trains it again; set XDG_CACHE_HOME to a folder that can be written",
                stacklevel=2,
            )
    else:
        model.load_state_dict(state)
    return model.eval()


def cache_file() -> Path:
    """Where the weights of this architecture and recipe are kept."""
    recipe = json.dumps([ARCHITECTURE, RECIPE], sort_keys=True)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "lalora_kernels" / f"embedded-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"


def architecture() -> nn.Module:
    """The model with fresh weights, always the same ones."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE["seed"])
        return ViTForImageClassification(ViTConfig(**ARCHITECTURE))


def _read(path: Path) -> dict[str, Tensor] | None:
    """The cached weights, or None where there are none or they are not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            digest = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return state if digest == tensor_digest(state) else None


def train_on_digits(model: nn.Module, steps: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Public pre-training, in place: AdamW, one cycle, on augmented digits. Deterministic on one machine."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["lr"], total_steps=steps)
    model.train()
    for step in range(steps):
        batch = torch.randint(0, len(images), (RECIPE["batch"],), generator=generator)
        loss = F.cross_entropy(model(augment(images[batch], generator)).logits, labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """8 x 8 digits (N,1,8,8) in [0, 1] -> (N,1,28,28) in [-1, 1]: enlarged, turned, scaled, sheared, moved."""
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, scale, shear = uniform(-0.25, 0.25), uniform(0.9, 1.5), uniform(-0.3, 0.3)
    wide = scale * uniform(0.9, 1.2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    top = torch.stack([cos * wide, (shear - sin) * wide, uniform(-0.15, 0.15)], 1)
    bottom = torch.stack([sin * scale, cos * scale, uniform(-0.15, 0.15)], 1)
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return (F.grid_sample(x, grid, align_corners=False) - 0.5) * 2

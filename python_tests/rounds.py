"""Two rounds of two clients by hand, in plain torch: what a run of a method is compared with."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import digits_npz, vit_folder

from lalora_kernels.federated.client import get_state, learning_rate
from lalora_kernels.federated.config import make_config

LR, K, C = 0.5, 3, 3.86  # C cuts some records and not others


@pytest.fixture(scope="module", name="world")
def two_clients(tmp_path_factory):
    """A folder with a small ViT and 24 digits; two clients of 12 records, drawn whole at every step (q = 1)."""
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 24, 20)


def settings(world, **changes):
    model, data = world
    values = {
        "model": model, "dataset": data, "clients": 2, "fraction": 1.0, "rounds": 2, "local_steps": K, "rank": 2,
        "batch_size": 12, "min_records": 12, "partition": "iid", "epsilon": math.inf, "lr": LR, "max_grad_norm": C,
        "train_head": "yes", "lr_schedule": "cosine", "device": "cpu",
    }  # fmt: skip
    return make_config(values | changes)


def smooth(t: torch.Tensor, key: str, on: bool) -> torch.Tensor:
    """[1,4,6,4,1]/16 along the feature axis with NumPy's symmetric padding, by NumPy."""
    if not on or "lora_" not in key:
        return t
    axis = 1 if key.endswith("lora_A") else 0
    along = lambda v: np.convolve(np.pad(v, 2, mode="symmetric"), np.array([1, 4, 6, 4, 1]) / 16, "valid")  # noqa: E731
    return torch.from_numpy(np.apply_along_axis(along, axis, t.double().numpy())).to(t.dtype)


def train_by_hand(task, active, smoothing, keeps="") -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Clip each record's gradient to C, sum, filter, divide by b, SGD; average the two clients; all in plain torch.

    The factor ``keeps`` is not averaged: (the server's state, what of each client stays with it)."""
    model, collate = task.classifier.model.eval(), task.classifier.collate
    tensors = {n: p for n, p in model.named_parameters() if "lora_" in n or n.startswith("classifier.")}
    state, own, clipped = get_state(model), [{} for _ in task.parts], []
    for number in (1, 2):
        results = []
        for mine, part in zip(own, task.parts):
            for name, p in tensors.items():
                p.data.copy_(mine.get(name, state[name]))
            for step in range(1, K + 1):
                trains = [n for n in tensors if "lora_" not in n or n[-1] in active(number, step)]
                for name, p in tensors.items():
                    p.requires_grad_(name in trains)
                total = {n: torch.zeros_like(tensors[n]) for n in trains}
                for i in part:
                    x, y = collate([task.data.train[int(i)]])
                    grads = torch.autograd.grad(F.cross_entropy(model(x).logits, y), [tensors[n] for n in trains])
                    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
                    clipped.append(norm > C)
                    for n, g in zip(trains, grads):
                        total[n] += min(1.0, C / norm) * g
                for n in trains:
                    tensors[n].data -= learning_rate(task.config, number) * smooth(total[n], n, smoothing) / len(part)
            results.append(get_state(model))
        sent = {n for n in state if any("lora_" not in n or n[-1] in active(number, s) for s in range(1, K + 1))}
        stays = {n for n in state if keeps and n.endswith(f"lora_{keeps}")}
        own = [{n: r[n] for n in stays} for r in results]
        for n in sent - stays:
            state[n] = sum(r[n] for r in results) / 2
    assert 0.1 < np.mean(clipped) < 0.9
    return state, own


ACTIVE = {
    "dp-lora": lambda round, step: "AB",
    "ffa-lora": lambda round, step: "B",
    "rolora": lambda round, step: {1: "B", 2: "A"}[round],
    "la-lora": lambda round, step: {1: "B", 2: "A", 3: "B"}[step],
}

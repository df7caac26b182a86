"""A script of a user who runs ``mypy --strict``: test_lint.py has it checked, nobody runs it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lalora_kernels as lk
from lalora_kernels import functional


def train(model: nn.Sequential, records: Dataset[tuple[torch.Tensor, torch.Tensor]]) -> float:
    adapted: nn.Sequential = lk.adapt(model, r=4, target_modules=["query"], verbose=False)
    optimizer, loader = lk.make_private(
        adapted,
        torch.optim.SGD(adapted.parameters(), lr=0.1),
        DataLoader(records, batch_size=8),
        method=lk.Schedule("b", lambda round, step: "B"),
        noise_multiplier=1.0,
    )
    spent: float = optimizer.get_epsilon(1e-5) + lk.compute_epsilon([(1.0, 0.1, 10)], 1e-5)
    smoothed: torch.Tensor = functional.smooth(torch.ones(2, 8), 1)
    lk.save_adapter(adapted, "adapter")
    if len(loader) > 3 and smoothed.numel():
        with lk.use_backend("reference"):
            plain: nn.Sequential = lk.merge_and_unload(lk.unmerge(lk.merge(adapted)))
            lk.unadapt(lk.load_adapter(plain, "adapter", fused="qkv")).append(nn.Tanh())
    return spent


# What mypy must refuse: an ignore that is not needed is an error, so these lines fail where the types are not seen.
lk.adapt("model")  # type: ignore[type-var]
lk.adapt(nn.Linear(2, 2), fused="kv")  # type: ignore[arg-type]
EPSILON: str = lk.compute_epsilon([(1.0, 0.1, 10)], 1e-5)  # type: ignore[assignment]
lk.get_noise_multiplier(target_epsilon=3.0)  # type: ignore[call-arg]
lk.load_adapter(nn.Linear(2, 2), 3)  # type: ignore[arg-type]

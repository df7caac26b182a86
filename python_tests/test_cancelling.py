"""A record whose terms cancel over hundreds of tokens: what enters the sum is what its norm was taken of."""

import pytest
import torch
from test_private_step import private
from tolerances import SENSITIVITY_F32
from torch import nn
from torch.utils.data import TensorDataset


class Head(nn.Module):
    def __init__(self, n: int, m: int, tied: bool):
        super().__init__()
        self.head, self.again = nn.Linear(n, m, bias=False), nn.Linear(n, m, bias=False)
        if tied:
            self.again.weight = self.head.weight
        else:
            self.again.requires_grad_(False)

    def forward(self, x):
        return self.head(x), self.again(x)


def cancelling(T: int, n: int, m: int, step: float):
    """x, u (1,T,.) with sum_t u_t x_t^T = 0, whose float32 partial sums are each half a unit in the last place off."""
    x, u = torch.ones(1, T, n), torch.zeros(1, T, m)
    k, large = (T - 2) // 3 * 3, 2e7
    u[0, 0], u[0, 1 + k] = large, -large
    u[0, 1 : 1 + k] = (torch.tensor([step, step, -2 * step]) * large * 2.0**-23).repeat(k // 3)[:, None]
    return x, u


def clipped_sum(x, u, n, m, *, tied=False, autocast=None):
    model = Head(n, m, tied)
    opt, loader = private(
        model, TensorDataset(x, u), max_grad_norm=1.0, sample_rate=1.0, smoothing=None, method="dp-lora",
        loss_reduction="sum", batch_size=1, check=False,
    )  # fmt: skip
    for a, b in loader.steps(1):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            first, second = model(a)
        (first * b + (second * b if tied else 0.0)).sum().backward()
        opt.step()
    found = opt.expected_batch_size * torch.cat([s.released.double().flatten() for s in opt.engine.active])
    opt.detach()
    return found


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("T, n, m", [(64, 8, 8), (512, 32, 32), (1024, 64, 64), (16, 512, 512), (1024, 3, 8)])
def test_a_record_that_cancels_over_many_tokens_keeps_the_bound(T, n, m, tied, autocast):
    """By a float32 product of all tokens it moved the sum by up to 16 C."""
    for step in (0.45, 0.6, 0.9):
        x, u = cancelling(T, n, m, step)
        assert clipped_sum(x, u, n, m, tied=tied, autocast=autocast).norm() <= 1 + SENSITIVITY_F32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_record_that_cancels_does_not_move_what_others_add(first, tied):
    """Their terms would be rounded off against its partial sums, before it as behind it."""
    generator = torch.Generator().manual_seed(0)
    T, n, m = 512, 32, 32
    others = torch.randn(7, T, n, generator=generator), torch.randn(7, T, m, generator=generator)
    record = cancelling(T, n, m, 0.45)
    both = [torch.cat(pair if first else pair[::-1]) for pair in zip(record, others)]
    moved = clipped_sum(*both, n, m, tied=tied) - clipped_sum(*others, n, m, tied=tied)
    assert moved.norm() <= 1 + SENSITIVITY_F32


def test_records_whose_terms_do_not_cancel_are_clipped_as_before():
    generator = torch.Generator().manual_seed(0)
    T, n, m = 512, 32, 32
    x, u = torch.randn(4, T, n, generator=generator), torch.randn(4, T, m, generator=generator)
    G = torch.einsum("nta,ntb->nab", u.double(), x.double())
    want = (G / G.flatten(1).norm(dim=1).clamp(min=1.0).view(-1, 1, 1)).sum(0).flatten()
    assert (clipped_sum(x, u, n, m) - want).norm() <= 1e-4 * want.norm()

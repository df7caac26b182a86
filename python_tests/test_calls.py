"""Each kind of call is checked: a model may do in its second one what it did not in the first."""

import pytest
import torch
from test_first_batch import chain, private
from torch import nn

from lalora_kernels.privacy import model_check

F = nn.functional


class Several(nn.Module):
    """``pair`` has each record beside the batch's mean."""

    def __init__(self):
        super().__init__()
        self.net = chain(nn.Tanh())

    def forward(self, x, pair=False, task="plain", mask=None, scale=1.0):
        z = self.net(x)
        z = z * scale if mask is None else z * mask
        return z @ z.mean(0) if pair or task == "pair" else z


def run(loss, steps=2):
    torch.manual_seed(0)
    optimizer, loader = private(Several())
    for x, y in loader.steps(steps):
        loss(optimizer.engine.model, x, y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("switch", [{"pair": True}, {"task": "pair"}])
def test_a_second_call_that_mixes_is_refused(switch):
    """Unseen, one record moved the sum by 1.7 C."""
    with pytest.raises(ValueError, match="the model: the output for one record depends on the other records"):
        run(lambda m, x, y: F.cross_entropy(m(x), y) + m(x, **switch).mean())


def test_each_form_of_a_call_is_asked_once(monkeypatch):
    """Numbers that change from step to step make no other form, and arguments in another order do not."""
    asked = []
    check = model_check.check_inputs
    monkeypatch.setattr(model_check, "check_inputs", lambda *a: asked.append(a[2].keys()) or check(*a))
    scales = iter(range(100))

    def loss(m, x, y):
        mask = torch.ones(len(x), 1)
        calls = (m(x), m(x, task="other"), m(x, mask=mask, pair=False), m(x, pair=False, mask=mask))
        return sum(F.cross_entropy(z, y) for z in (*calls, m(x, scale=float(next(scales)))))

    assert run(loss, steps=3).ledger.steps == 3
    assert asked == [set(), {"task"}, {"mask", "pair"}, {"scale"}]

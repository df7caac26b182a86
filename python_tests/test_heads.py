"""What trains beside the factors: saved and read again, called by keyword, or computing something else."""

import io

import pytest
import torch
from test_unseen import F, make, step
from torch import nn

from lalora_kernels.nn import LoRALinear


class TestAHead:
    def private_head(self):
        model = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 8), r=2), nn.LayerNorm(8), nn.Linear(8, 3))
        return model, *make(model)

    def test_a_saved_private_model_is_read_again_as_an_ordinary_one(self):
        model, optimizer, loader = self.private_head()
        step(model, optimizer, loader)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again, x = torch.load(file, weights_only=False), torch.randn(4, 6)
        assert torch.equal(again(x), model(x))
        again(x).sum().backward()
        assert all(p.grad is not None for p in again[2].parameters())

    def test_whose_forward_was_replaced_is_refused(self):
        model = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 8), r=2), nn.Linear(8, 3))
        plain = model[1].forward
        model[1].forward = lambda x: 10 * plain(x)
        with pytest.raises(ValueError, match="^1 trains, but its forward was replaced.*freeze it"):
            make(model)

    def test_inputs_by_keyword(self):
        model, optimizer, loader = self.private_head()
        x = torch.randn(4, 6)
        assert torch.equal(model[2](input=model[1](input=model[0](input=x))), model(x))


def test_a_layer_norm_whose_output_is_wider_than_its_input(monkeypatch):
    """CUDA's autocast normalizes half precision in float32; the backward then has one of each."""
    plain = torch.native_layer_norm
    monkeypatch.setattr(torch, "native_layer_norm", lambda x, shape, w, b, eps: plain(x.float(), shape, w, b, eps))
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 8).bfloat16(), r=2), nn.LayerNorm(8))
    optimizer, loader = make(model, check=False)
    step(model, optimizer, loader, lambda m, b: F.cross_entropy(m(b[0].bfloat16()), b[1]))
    assert model[1].weight.grad is None and optimizer.ledger.steps == 1

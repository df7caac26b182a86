"""A small model, an adapter of it as after training, and the names of the two files that PEFT keeps one in."""

import torch
from torch import nn

from lalora_kernels.adapt import adapt

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Body(nn.Module):
    """Two blocks, so that names repeat, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(6, 5), "fc2": nn.Linear(5, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["fc2"](torch.tanh(block["fc1"](x)))
        return self.head(x)


def body():
    torch.manual_seed(0)
    return Body().eval()


X = torch.linspace(-1, 1, 24).view(4, 6)


def trained(model, **settings):
    """An adapted model after "training": no parameter that trains is where it started."""
    adapt(model, verbose=False, **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()

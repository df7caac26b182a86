"""What the code blocks of README.md and docs/*.md find in their namespace: tiny models and data instead of real ones.

``NAMESPACES`` maps a page to a function of (monkeypatch) that returns the names; a page that is not listed is complete.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SENTENCES = [("a fine film", 1), ("dull to the end", 0), ("fine acting , fine story", 1), ("a dull story", 0)] * 60


class Attentive(nn.Module):
    """A one-layer network whose projections are called as BERT's are."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.classifier = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier((self.query(x).softmax(-1) * self.value(x)).tanh())


def _records(count: int = 400) -> TensorDataset:
    x = torch.randn(count, 8)
    return TensorDataset(x, (x[:, 0] > 0).long())


def _tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def readme(monkeypatch) -> dict:
    return {"model": Attentive(), "loader": DataLoader(_records(), batch_size=20)}


def quickstart(monkeypatch) -> dict:
    """The hub's names give a tiny BERT and a tokenizer of bytes, which needs no vocabulary."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, ByT5Tokenizer

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda name, num_labels: _tiny_bert())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: ByT5Tokenizer(model_max_length=32))
    return {"records": SENTENCES}


def from_opacus(monkeypatch) -> dict:
    def network() -> nn.Module:
        return nn.Sequential(OrderedDict(body=nn.Linear(8, 16), act=nn.ReLU(), head=nn.Linear(16, 2)))

    return {"plain_model": network(), "model": network(), "loader": DataLoader(_records(), batch_size=40)}


def from_peft(monkeypatch) -> dict:
    ids = torch.randint(3, 384, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"model": _tiny_bert(), "fresh_model": _tiny_bert, "batch": batch}


def extending(monkeypatch) -> dict:
    from lalora_kernels import adapt

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    adapt(model, r=2, target_modules=["0"], verbose=False)
    return {"model": model, "loader": DataLoader(_records(), batch_size=40)}


def interfaces(monkeypatch) -> dict:
    ids = torch.randint(3, 384, (40, 9))
    records = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": torch.tensor(n % 2)} for n, i in enumerate(ids)
    ]
    _tiny_bert().save_pretrained("base")
    images = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
    return {
        "model": _tiny_bert(), "fresh_model": lambda: _adapted_bert(), "folder": "base",
        "loader": DataLoader(records, batch_size=16), "records": records,
        "images": DataLoader(images, batch_size=16),
        "image_records": [{"pixel_values": x, "labels": y} for x, y in images],
    }  # fmt: skip


def _adapted_bert() -> nn.Module:
    from lalora_kernels import adapt

    return adapt(_tiny_bert(), r=4, target_modules="qv", modules_to_save=["classifier"], verbose=False)


def gpu(monkeypatch) -> dict:
    import lalora_kernels as lk

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    lk.adapt(model, r=2, target_modules=["0"], verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(_records(), batch_size=40)
    return {"lk": lk, "model": model, "optimizer": optimizer, "loader": loader, "criterion": nn.CrossEntropyLoss()}


NAMESPACES = {
    "docs/interfaces.md": interfaces,
    "README.md": readme,
    "docs/quickstart.md": quickstart,
    "docs/from-opacus.md": from_opacus,
    "docs/from-peft.md": from_peft,
    "docs/extending.md": extending,
    "docs/gpu.md": gpu,
}
NEEDS_CUDA = ("docs/gpu.md",)

"""Small models of the families users adapt, from configs, with a batch and a loss: (model, batch, loss)."""

import torch
from torch import nn


def _images(n: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size)


def _classify(model, batch):
    x, y = batch
    out = model(x)
    return nn.functional.cross_entropy(getattr(out, "logits", out), y)


def _classify_text(model, batch):
    return nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )


def _text(n: int, length: int, vocabulary: int, classes: int) -> dict:
    lengths = torch.randint(1, length + 1, (n, 1))
    return {
        "input_ids": torch.randint(0, vocabulary, (n, length)),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "labels": torch.randint(0, classes, (n,)),
    }


def bert(n: int = 3):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config), _text(n, 7, 37, 3), _classify_text


def vit(n: int = 3):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return ViTForImageClassification(config), (_images(n, 8), torch.randint(0, 5, (n,))), _classify


def swin(n: int = 3):
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=4,
        num_labels=5,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config), (_images(n, 16), torch.randint(0, 5, (n,))), _classify


def timm_swin(n: int = 3):
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 3),
        num_classes=5,
        drop_path_rate=0.0,
    )
    return model, (_images(n, 32), torch.randint(0, 5, (n,))), _classify


def timm_vit(n: int = 3):
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    return model, (_images(n, 16), torch.randint(0, 5, (n,))), _classify


def gpt2(n: int = 3):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=3)
    model = nn.Sequential()
    model.body, model.head = GPT2Model(config), nn.Linear(24, 4)

    def loss(model, batch):
        states = model.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return nn.functional.cross_entropy(model.head(states).mean(1), batch["labels"])

    return model, _text(n, 7, 31, 4), loss


def mlp(n: int = 3):
    """T = 1 throughout, and feature axes shorter than the filter."""
    model = nn.Sequential()
    model.fc1, model.act, model.fc2, model.head = nn.Linear(7, 3), nn.GELU(), nn.Linear(3, 5), nn.Linear(5, 2)
    return model, (torch.randn(n, 7), torch.randint(0, 2, (n,))), _classify


class _Pixels(nn.Module):
    """Embedded words laid out as an image, convolved: adapters on all but Linear layers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=3)
        self.conv1 = nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(1, 0))
        self.conv2 = nn.Conv2d(5, 4, 2, padding="same", bias=False)
        self.head = nn.Linear(4 * 2 * 3, 3)

    def forward(self, ids):
        x = self.words(ids).transpose(1, 2).reshape(len(ids), -1, 3, 4)
        return self.head(self.conv2(self.conv1(x).tanh()).flatten(1))


def pixels(n: int = 3):
    return _Pixels(), (torch.randint(0, 11, (n, 12)), torch.randint(0, 3, (n,))), _classify


FAMILIES = {
    "pixels": (pixels, ["words", "conv1", "conv2"], ["head"]),
    "bert": (bert, ["query", "value", "dense"], ["classifier"]),
    "vit": (vit, "all", ["classifier"]),
    "swin": (swin, "all", ["classifier"]),
    "timm_swin": (timm_swin, ["qkv", "proj", "fc1", "fc2"], ["head.fc"]),
    "timm_vit": (timm_vit, ["qkv", "proj", "fc1", "fc2"], ["head"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], ["head"]),
    "mlp": (mlp, ["fc1", "fc2"], ["head"]),
}


def adapted(family: str, n: int = 3, dtype: torch.dtype = torch.float64, r: int = 4, norms: bool = True):
    """(model, batch, loss) of a family with adapters on its linear layers (factors not zero), its head, LayerNorms."""
    from lalora_kernels.nn import lora_layers
    from lalora_kernels.targets import lora_class

    build, targets, heads = FAMILIES[family]
    model, batch, loss = build(n)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        kind = lora_class(module)
        linear = type(module) is nn.Linear
        if kind is None:
            continue
        if any(name == h or name.endswith("." + h) for h in heads):
            module.requires_grad_(True)
        elif linear and targets == "all" or name.rsplit(".", 1)[-1] in targets:
            parent = model.get_submodule(name.rsplit(".", 1)[0]) if "." in name else model
            layer = kind.from_linear(module, r=r, lora_alpha=2 * r)
            setattr(parent, name.rsplit(".", 1)[-1], layer)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.2)
    if norms:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = model.to(dtype).train()
    if hasattr(model, "config"):
        for key in ("attention_probs_dropout_prob", "attn_pdrop"):
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)

    def cast(t):
        return t.to(dtype) if t.is_floating_point() else t

    batch = {k: cast(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(cast(t) for t in batch)
    return model, batch, loss

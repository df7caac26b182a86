"""The models of the step benchmarks: random weights from a configuration, the same data for every contender."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels.models import torchvision_beside_cpu_torch

torchvision_beside_cpu_torch()  # before transformers, which imports torchvision

CLASSES = 10
HEAD = ["classifier"]
IMAGE = 224
# Short name -> (what it is, transformers' classes, configuration, tokens or None for images).
MODELS = {
    "bert": (
        "BERT, MiniLM size (6 layers, 384 wide, T = 128)",
        ("BertConfig", "BertForSequenceClassification"),
        dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        128,
    ),
    "vit": (
        "ViT-Tiny (12 layers, 192 wide, T = 197)",
        ("ViTConfig", "ViTForImageClassification"),
        dict(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=IMAGE),
        None,
    ),
    "swin": (
        "Swin-T (224 x 224)",
        ("SwinConfig", "SwinForImageClassification"),
        dict(image_size=IMAGE, drop_path_rate=0.0),
        None,
    ),
    "roberta": (
        "RoBERTa-base (12 layers, 768 wide, T = 64)",
        ("RobertaConfig", "RobertaForSequenceClassification"),
        dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        64,
    ),
    # for cards
    "roberta-128": (
        "RoBERTa-base (12 layers, 768 wide, T = 128)",
        ("RobertaConfig", "RobertaForSequenceClassification"),
        dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        128,
    ),
    "vit-b": ("ViT-B/16 (12 layers, 768 wide, T = 197)", ("ViTConfig", "ViTForImageClassification"), {}, None),
    "swin-b": (
        "Swin-B (224 x 224, 100 classes)",
        ("SwinConfig", "SwinForImageClassification"),
        dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], image_size=IMAGE, drop_path_rate=0.0,
             num_labels=100),
        None,
    ),
    "llama-1b": (
        "a 1B-parameter Llama (16 layers, 2048 wide, T = 1024)",
        ("LlamaConfig", "LlamaForSequenceClassification"),
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=32000, pad_token_id=0, use_cache=False),
        1024,
    ),
    # for dry runs, and for the check of every contender
    "tiny-vit": (
        "a ViT of two layers",
        ("ViTConfig", "ViTForImageClassification"),
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32),
        None,
    ),
    "tiny-swin": (
        "a Swin of two stages",
        ("SwinConfig", "SwinForImageClassification"),
        dict(image_size=32, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0),
        None,
    ),
    "tiny-llama": (
        "a Llama of two layers",
        ("LlamaConfig", "LlamaForSequenceClassification"),
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             vocab_size=32000, pad_token_id=0, use_cache=False),
        16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One case: a model of ``MODELS``, which layers are adapted, the rank and the records of a batch."""

    model: str
    targets: str  # "qv" or "all-linear"
    r: int
    batch: int = 16
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of the base model

    @property
    def head(self) -> list[str]:
        return ["score"] if "llama" in self.model else HEAD

    def __str__(self) -> str:
        return f"{self.model} {self.targets} r{self.r}"


def base_model(spec: Spec) -> nn.Module:
    """The model without adapters, in train mode; the same weights every time."""
    import transformers

    _, (config, kind), settings, _ = MODELS[spec.model]
    torch.manual_seed(0)
    with torch.device(spec.device):
        model = getattr(transformers, kind)(getattr(transformers, config)(**{"num_labels": CLASSES, **settings}))
    return model.to(spec.dtype).train()


def dataset(spec: Spec) -> TensorDataset:
    """As many records as a batch has."""
    _, _, settings, tokens = MODELS[spec.model]
    generator = torch.Generator().manual_seed(1)
    if tokens is None:
        size = settings.get("image_size", IMAGE)
        inputs = torch.randn(spec.batch, 3, size, size, generator=generator).to(spec.dtype)
    else:
        inputs = torch.randint(5, 30000, (spec.batch, tokens), generator=generator)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (spec.batch,), generator=generator))


def loader(spec: Spec) -> DataLoader:
    """Batches of all records. On a card they are there already: a step is compared, not its loading."""
    if spec.device == "cpu":
        return DataLoader(dataset(spec), batch_size=spec.batch)
    tensors = [t.to(spec.device) for t in dataset(spec).tensors]
    return DataLoader(
        range(spec.batch), batch_size=spec.batch, collate_fn=lambda records: [t[: len(records)] for t in tensors]
    )


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels)


class BaseProducts:
    """The products of the frozen linear layers alone, forward and input gradient: no method can do without them."""

    def __init__(self, spec: Spec, model: nn.Module):
        """``model`` is adapted: whether a layer's input needs a gradient is seen in its forward."""
        self.products: list[tuple[int, int, int, bool]] = []
        handles = [m.register_forward_hook(self._note) for m in model.modules() if isinstance(m, nn.Linear)]
        model(dataset(spec).tensors[0])
        for handle in handles:
            handle.remove()
        widest = max(max(n, m) for _, n, m, _ in self.products)
        rows = max(rows * max(n, m) for rows, n, m, _ in self.products)
        self._weight = torch.randn(widest * widest)
        self._input, self._output = torch.randn(rows), torch.empty(rows)
        self.flops = sum(2 * rows * n * m * (2 if back else 1) for rows, n, m, back in self.products)

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        n, m = module.in_features, module.out_features
        self.products.append((inputs[0].numel() // n, n, m, inputs[0].requires_grad))

    def __call__(self) -> None:
        for rows, n, m, back in self.products:
            w = self._weight[: n * m].view(m, n)
            torch.mm(self._input[: rows * n].view(rows, n), w.t(), out=self._output[: rows * m].view(rows, m))
            if back:
                torch.mm(self._input[: rows * m].view(rows, m), w, out=self._output[: rows * n].view(rows, n))

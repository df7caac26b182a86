"""Tensors of a model that are views of one memory: one that trains has its memory for itself."""

import peft
import pytest
import torch
from test_unseen import make, step
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lalora_kernels as lk


class Two(nn.Module):
    """Two layers over ``memory``, of which ``cut`` gives each its weight."""

    def __init__(self, cut, memory=72):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.a.weight, self.b.weight = (nn.Parameter(w) for w in cut(torch.randn(memory) / 3))

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()))


OVERLAPS = {
    "alike": lambda m: (m[:36].view(6, 6), m[:36].view(6, 6)),
    "transposed": lambda m: (m[:36].view(6, 6), m[:36].view(6, 6).t()),
    "one element": lambda m: (m[:36].view(6, 6), m[35:71].view(6, 6)),
    "one column": lambda m: (m[:66].view(6, 11)[:, :6], m[:66].view(6, 11)[:, 5:]),
}
APART = {
    "flattened": lambda m: (m[:36].view(6, 6), m[36:].view(6, 6)),
    "columns": lambda m: (m.view(6, 12)[:, :6], m.view(6, 12)[:, 6:]),
}


@pytest.mark.parametrize("cut", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("frozen", [(), ("a",), ("b",)])
def test_two_tensors_over_one_memory_are_refused_by_both_names(cut, frozen):
    model = Two(cut)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    first, second = ("b", "a") if "a" in frozen else ("a", "b")
    message = f"{first}.weight, which trains, and {second}.weight are two tensors over one memory.*share one nn.Param"
    with pytest.raises(ValueError, match=message):
        make(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "nothing is left on the model"
    model.a.requires_grad_(False), model.b.requires_grad_(False)
    make(model)


def test_a_buffer_that_is_a_view_of_a_trained_tensor_is_refused():
    model = Two(APART["flattened"])
    model.register_buffer("shadow", model.b.weight.detach()[2:], persistent=False)
    with pytest.raises(ValueError, match="b.weight, which trains, and shadow are two tensors over one memory"):
        make(model)


@pytest.mark.parametrize("cut", APART.values(), ids=APART)
def test_one_storage_without_a_common_element_trains(cut):
    model = Two(cut)
    assert model.a.weight.untyped_storage().data_ptr() == model.b.weight.untyped_storage().data_ptr()
    optimizer, loader = make(model)
    step(model, optimizer, loader, steps=2)
    assert optimizer.per_sample_checked and optimizer.ledger.steps == 2


def test_one_parameter_in_two_modules_and_empty_ones_are_no_views():
    model = Two(APART["flattened"])
    model.b.weight = model.a.weight
    model.register_buffer("none", torch.empty(0)), model.register_buffer("meta", torch.empty(3, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    make(model, check=False)


def test_pefts_adapters_on_tied_layers_are_refused_with_the_cure():
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip

    def adapted(tied):
        targets = ["embed_tokens", "lm_head"]
        lora = peft.LoraConfig(r=2, target_modules=targets, ensure_weight_tying=tied, task_type="CAUSAL_LM")
        return peft.get_peft_model(LlamaForCausalLM(config), lora)

    with pytest.raises(ValueError, match="embed_tokens.*lm_head.*over one memory.*ensure_weight_tying=False"):
        make(lk.patch_peft(adapted(True)))
    make(lk.patch_peft(adapted(False)))

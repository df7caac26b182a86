"""Models for adapt(), and one model adapted both here and by PEFT."""

import copy

import peft
import torch
from models import FAMILIES
from torch import nn

from lalora_kernels.adapt import adapt
from lalora_kernels.nn import lora_layers


def llama(n=3):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    ids = torch.randint(0, 31, (n, 7))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, lambda model, batch: model(**batch).loss


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc1, model.act, model.fc2, model.head = nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.Linear(4, 2)
    return model


FAMILY_TARGETS = {
    "bert": (FAMILIES["bert"][0], "qv", ["query", "value"], ["classifier"]),
    "bert dense": (FAMILIES["bert"][0], ["dense"], ["dense"], ["classifier"]),
    "vit": (FAMILIES["vit"][0], "qv", ["q_proj", "v_proj"], ["classifier"]),
    "swin": (FAMILIES["swin"][0], "all-linear", "all-linear", ["classifier"]),
    "timm_swin": (FAMILIES["timm_swin"][0], "qv", ["qkv"], ["head.fc"]),
    "timm_vit": (FAMILIES["timm_vit"][0], r".*\.(qkv|fc1)", r".*\.(qkv|fc1)", ["head"]),
    "gpt2": (FAMILIES["gpt2"][0], "all-linear", "all-linear", ["head"]),
    "gpt2 qv": (FAMILIES["gpt2"][0], "qv", ["c_attn"], ["head"]),
    "llama": (llama, "all-linear", "all-linear", None),
}
PEFT_FACTOR = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}


def twins(family, dtype, **settings):
    """(ours, PEFT's, batch, loss): one model adapted by both, the same factors, dropout off, train mode."""
    torch.manual_seed(1)
    build, targets, peft_targets, heads = FAMILY_TARGETS[family]
    model, batch, loss = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in ("attention_probs_dropout_prob", "attn_pdrop"):
        if hasattr(getattr(model, "config", getattr(getattr(model, "body", None), "config", None)), key):
            setattr(getattr(model, "config", None) or model.body.config, key, 0.0)
    model = model.to(dtype).train()
    config = peft.LoraConfig(target_modules=peft_targets, modules_to_save=heads, r=4, lora_alpha=6, **settings)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).to(dtype).train()
    ours = adapt(model, r=4, lora_alpha=6, target_modules=targets, modules_to_save=heads, verbose=False, **settings)
    parameters = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            nn.init.normal_(layer.lora_B, std=0.2)
            for factor, suffix in PEFT_FACTOR.items():
                parameters[f"{name}.{suffix}"].copy_(getattr(layer, factor))

    def cast(t):
        return t.to(dtype) if t.is_floating_point() else t

    batch = {k: cast(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(cast(t) for t in batch)
    return ours, theirs, batch, loss

"""Between PEFT's files and ours: modules_to_save that share tensors or stand in lists, adapted heads and embeddings."""

import copy

import peft
import pytest
import torch
from peft_files import WEIGHTS, trained
from safetensors.torch import load_file
from tolerances import MODEL_F32
from torch import nn

import lalora_kernels as lk
from lalora_kernels.adapt import saved_modules

IDS = torch.arange(3, 27).view(4, 6)


def llama(tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=40, tie_word_embeddings=tied)).eval()


def bert():
    """The head holds the embedding's weight, and a bias under two names."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=40)).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


def logits(model):
    ids = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **ids).logits


@pytest.mark.parametrize(
    "build, targets, saved",
    [
        (llama, ["q_proj"], ["embed_tokens"]),
        (llama, ["q_proj"], ["lm_head"]),
        (bert, ["query"], ["word_embeddings"]),
        (bert, ["query"], ["decoder"]),
        (bert, ["query"], ["cls"]),
        (t5, ["q"], ["shared"]),
    ],
    ids=lambda v: v.__name__ if callable(v) else v[0],
)
def test_one_tensor_of_several_modules(build, targets, saved, tmp_path):
    """PEFT trains copies: it must be told of every module that holds the tensor, or it keeps the old one there."""
    ours = trained(build(), target_modules=targets, modules_to_save=saved)
    lk.save_adapter(ours, tmp_path)
    expected = logits(ours)
    assert (logits(build()) - expected).abs().max() > 0.1
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), expected, **MODEL_F32)
    torch.testing.assert_close(logits(lk.load_adapter(build(), tmp_path).eval()), expected, **MODEL_F32)
    torch.testing.assert_close(logits(lk.load_adapter(ours, tmp_path).eval()), expected, **MODEL_F32)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_what_peft_trained_apart_does_not_go_into_one_tensor(saved, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one tensor in this model.*; untie them"
    ):
        lk.load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # the cure
    torch.testing.assert_close(logits(lk.load_adapter(model, tmp_path).eval()), logits(theirs), **MODEL_F32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets, options",
    [(["q_proj", "lm_head"], {}), (["embed_tokens"], {}), (["q_proj"], {"save_embedding_layers": True})],
    ids=["head", "embedding", "asked"],
)
def test_frozen_weights_that_peft_stores(targets, options, tied, tmp_path):
    """PEFT puts the weights of the embeddings and the head beside an adapter of one of them, though none trained."""
    theirs = peft.get_peft_model(llama(tied), peft.LoraConfig(r=3, target_modules=targets)).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path, **options)
    assert any("lora_" not in key for key in load_file(tmp_path / WEIGHTS))
    torch.testing.assert_close(logits(lk.load_adapter(llama(tied), tmp_path).eval()), logits(theirs), **MODEL_F32)
    other = llama(tied)
    nn.init.normal_(other.lm_head.weight)
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(
        ValueError, match=r"also holds a weight for (lm_head|model\.embed_tokens) that is not the model"
    ):
        lk.load_adapter(other, tmp_path)


class Ensemble(nn.Module):
    """A head of each size in a list, as timm's CrossViT has them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.ModuleList([nn.Linear(5, 3), nn.ReLU(), nn.Linear(5, 3)])

    def forward(self, x):
        x = self.body(x)
        return self.head[0](x) + self.head[2](self.head[1](x))


def test_heads_in_a_list(tmp_path):
    """PEFT's modules_to_save can be no ModuleList; what is in it can."""
    torch.manual_seed(0)
    base = Ensemble().eval()
    ours = trained(copy.deepcopy(base), target_modules=["body"], modules_to_save=["head"])
    lk.save_adapter(ours, tmp_path)
    assert saved_modules(ours) == ["head.0", "head.2"]
    x = torch.randn(4, 6)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    again = lk.load_adapter(base, tmp_path).eval()
    for model in (theirs, again):
        torch.testing.assert_close(model(x), ours(x), **MODEL_F32)


def test_models_of_pefts(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has layers of PEFT's; load with its own load_adapter, or into the plain"):
        lk.load_adapter(theirs, tmp_path)
    with pytest.raises(ValueError, match="a PEFT model is saved by its own save_pretrained"):
        lk.save_adapter(lk.patch_peft(theirs), tmp_path)

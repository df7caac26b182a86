"""Models that read an image and a text: each record's gradients are those of PEFT's model of that record alone."""

import copy
import re

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from tolerances import PER_SAMPLE_F32
from torch import nn
from torch.utils.data import DataLoader

import lalora_kernels as lk
from lalora_kernels.privacy.checks import per_sample_gradients

IMAGE, START, END = 100, 101, 102  # tokens
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {"num_key_value_heads": 2, "vocab_size": 110, "max_position_embeddings": 64}
LLAMA = {"model_type": "llama", **TEXT}
PATCHES = {"image_size": 8, "patch_size": 4}
QWEN_PIXELS = 3 * 2 * 4 * 4


class Flattened(nn.Module):
    """A model that takes the patches of all images one after the other, and of each image as many."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, **inputs):  # (N, patches, pixels)
        return self.model(pixel_values=pixel_values.flatten(0, 1), **inputs)


def llava():
    vision = {"model_type": "clip_vision_model", **SIZES, **PATCHES}
    config = transformers.LlavaConfig(
        text_config=LLAMA, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config), (3, 8, 8), {}


def gemma3():
    vision = {"model_type": "siglip_vision_model", **SIZES, **PATCHES, "vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision, mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config), (3, 8, 8), {"token_type_ids": lambda ids: ids == IMAGE}


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        },
        image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    more = {
        "mm_token_type_ids": lambda ids: ids == IMAGE,
        "image_grid_thw": lambda ids: torch.tensor([1, 4, 4]).expand(len(ids), 3),
    }
    return Flattened(transformers.Qwen2VLForConditionalGeneration(config)), (16, QWEN_PIXELS), more


def smolvlm():
    """Returns the images' features in a list, one tensor for each record."""
    vision = {"model_type": "smolvlm_vision", **SIZES, "image_size": 16, "patch_size": 4}
    config = transformers.SmolVLMConfig(
        text_config=LLAMA, vision_config=vision, image_token_id=IMAGE, scale_factor=4, use_cache=False
    )
    return transformers.SmolVLMForConditionalGeneration(config), (4, 3, 16, 16), {}


FAMILIES = {f.__name__: f for f in (llava, gemma3, qwen2_vl, smolvlm)}


def made(family):
    torch.manual_seed(0)
    model, shape, more = FAMILIES[family]()
    ids = torch.cat([torch.tensor([5, START] + [IMAGE] * 4 + [END]).expand(12, -1), torch.randint(3, 99, (12, 5))], 1)
    data = [{"input_ids": row, "pixel_values": torch.randn(shape)} for row in ids]

    def collate(records):
        batch = {key: torch.stack([r[key] for r in records]) for key in records[0]}
        ids = batch["input_ids"]
        return batch | {"attention_mask": torch.ones_like(ids)} | {key: f(ids).long() for key, f in more.items()}

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    assert any(re.search("vision|visual", n) for n in names) and len(names) > 16
    return model.eval(), data, collate, names


def record_loss(model, batch):
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= IMAGE, -100)
    return lk.record_losses(model(**batch).logits, labels, shift=True).mean()


@pytest.mark.parametrize("how", ["adapt", "patch_peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_record_are_those_of_pefts_model_of_it_alone(family, how):
    model, data, collate, names = made(family)
    model.double()  # but for norms and rotations, which are float32's whatever a model is
    data = [{**r, "pixel_values": r["pixel_values"].double()} for r in data[:3]]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=2, target_modules=names)).eval()
    if how == "adapt":
        lk.adapt(model, target_modules=names, modules_to_save=[], r=2, verbose=False)
    else:
        model = lk.patch_peft(copy.deepcopy(theirs))
    pairs = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                module, _, factor = name.rpartition(".")
                same = name if how == "patch_peft" else f"base_model.model.{module}.{factor}.default.weight"
                pairs[name] = theirs.get_parameter(same)
                p.copy_(torch.randn_like(p) / 4)
                pairs[name].copy_(p)
    lk.set_active(model, "AB")
    found = per_sample_gradients(model, collate(data), record_loss)
    assert found.keys() == pairs.keys() and len(pairs) == 2 * len(names)
    for i, record in enumerate(data):
        ids = record["input_ids"]
        logits = theirs(**collate([record])).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[1:].masked_fill(ids[1:] >= IMAGE, -100))
        expected = torch.autograd.grad(loss, list(pairs.values()))
        error = torch.cat([(found[n][i] - g).flatten() for n, g in zip(pairs, expected)]).norm()
        assert error <= PER_SAMPLE_F32 * torch.cat([g.flatten() for g in expected]).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_with_all_checks_and_through_empty_batches(family):
    """(11/12)^12: a third of the batches are empty."""
    model, data, collate, names = made(family)
    lk.adapt(model, target_modules=names, modules_to_save=[], r=2, verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    noise = lk.NoiseSource.fixed(bytes(range(32)))
    how = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "noise": noise}
    optimizer, loader = lk.make_private(model, optimizer, DataLoader(data, batch_size=1, collate_fn=collate), **how)
    valid = []
    for batch in loader.steps(8):
        valid.append(optimizer.engine.batch.valid)
        record_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in valid and max(valid) >= 2  # two records: what the checks of the first batch wait for


def test_patches_one_after_the_other_are_refused_with_the_cure():
    model, data, collate, names = made("qwen2_vl")
    lk.adapt(model, target_modules=names, modules_to_save=[], r=2, verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def packed(records):
        batch = collate(records)
        return batch | {"pixel_values": batch["pixel_values"].flatten(0, 1)}

    loader = DataLoader(data, batch_size=4, collate_fn=packed)
    _, loader = lk.make_private(model, optimizer, loader, noise_multiplier=1.0)
    cure = r"patches.*one after the other \(Qwen2-VL\), flatten it in a module"
    with pytest.raises(ValueError, match=rf"^pixel_values of the batch has shape .*{cure}"):
        next(iter(loader))


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.10 has no notes")
def test_patches_that_the_loop_flattens_are_named_where_the_check_fails():
    model, data, collate, names = made("qwen2_vl")
    model = lk.adapt(model.model, target_modules=[n.removeprefix("model.") for n in names[:1]], r=2, verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(data, batch_size=12, collate_fn=collate)
    _, loader = lk.make_private(model, optimizer, loader, sample_rate=1.0, noise_multiplier=1.0)
    batch = next(iter(loader))
    with pytest.raises(RuntimeError) as refused:
        model(**batch | {"pixel_values": batch["pixel_values"].flatten(0, 1)})
    assert "pixel_values went there whole" in refused.value.__notes__[0]

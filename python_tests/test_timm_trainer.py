"""timm's models under PrivateTrainer: in a module that takes and gives what the Trainer does, or transformers' own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_private_step import written_out
from test_timm import FAMILIES, build, randomize
from tolerances import LAYER_F64, MODEL_F32, PRIVATE_STEP_F64
from torch import nn
from trainer_models import RECORDS, WHOLE, images, rows, trainer_of

import lalora_kernels as lk
from lalora_kernels.nn import set_active

SIZES = {"vit": 16, "deit": 16}  # others: 32


class ForTrainer(nn.Module):
    """As docs/interfaces.md has it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def alone(model, record):
    return model(**record)["loss"]


def one_step(model, data, folder, count):
    """The Trainer's step, in three physical batches, is that of single-record backwards of the model's own loss."""
    twin = copy.deepcopy(model)
    set_active(twin, "B")
    grads = written_out(twin, data, alone, clipping="flat", C=0.3, smoothing=None, divisor=RECORDS)
    trainer = trainer_of(model, data, folder, privacy=WHOLE, eval_data=rows(data), gradient_accumulation_steps=3)
    trainer.train()
    moved = 0
    for (name, p), (_, was) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        expected = was - 0.5 * grads[name] if name in grads else was
        torch.testing.assert_close(p, expected, **PRIVATE_STEP_F64, msg=name)
        moved += not torch.equal(p, was)
    assert moved == len(grads) >= count and trainer.ledger.steps == 1
    whole = model.eval()(**data)["loss"].item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=MODEL_F32["rtol"])


@pytest.mark.parametrize("patched", [False, True], ids=["adapt", "patch_peft"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "convnext_conv"])
def test_one_step_of_a_family(family, patched, tmp_path):
    model, targets = build(family)
    head = ["head_dist", "head"] if family == "deit" else ["head.fc"] if family in ("swin", "convnext") else ["head"]
    if patched:
        model = lk.patch_peft(get_peft_model(model, LoraConfig(r=3, target_modules=targets, modules_to_save=head)))
    else:
        model = lk.adapt(model, r=3, target_modules=targets, modules_to_save=head, verbose=False)
    randomize(model)
    data = images(size=SIZES.get(family, 32))
    one_step(ForTrainer(model.double()), data, tmp_path, 4)


def test_transformers_wrapper_of_timm_and_a_fused_projection(tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=size, num_labels=3)
    model = TimmWrapperForImageClassification(config)
    lk.adapt(model, r=3, target_modules=["qkv"], fused="qv", modules_to_save=["head"], verbose=False)
    randomize(model)
    with torch.no_grad():
        for _, layer in lk.lora_layers(model):
            layer.lora_B.mul_(layer.trained_rows)
    one_step(model.double(), images(), tmp_path, 4)
    lk.save_adapter(model, tmp_path / "adapter")
    data = images()
    torch.manual_seed(0)
    again = TimmWrapperForImageClassification(config).double()
    lk.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(**data).logits, model(**data).logits, **LAYER_F64)

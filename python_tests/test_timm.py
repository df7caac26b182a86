"""timm's families under timm's names, and fused projections adapted in their query and value outputs alone."""

import copy

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_private_step import KEY, train, written_out
from tolerances import LAYER_F64, MERGED_F32, PRIVATE_STEP_F64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.nn import factor_parameters
from lalora_kernels.reference.privatize import smooth

SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", ["qkv", "proj", "fc1"], {
        "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3),
        "drop_path_rate": 0.0,
    }),
    "vit": ("vit_tiny_patch16_224", ["qkv", "proj", "fc1"], SMALL_VIT),
    "deit": ("deit_tiny_distilled_patch16_224", ["qkv", "fc2"], SMALL_VIT),
    "convnext": ("convnext_atto", ["fc1", "fc2"], {"depths": (1, 1, 1, 1), "dims": (6, 8, 8, 12)}),
    "convnext_conv": ("convnext_atto", ["conv_dw", "stem.0", "fc1"], {
        "depths": (1, 1, 1, 1), "dims": (6, 8, 8, 12), "conv_mlp": True,
    }),
}  # fmt: skip


def build(family: str):
    name, targets, config = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **config)
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(p)  # ConvNeXt's scales start at 1e-6, which hides what lies behind them
    return model, targets


def records(family: str, n: int = 4, dtype=torch.float64):
    torch.manual_seed(1)
    size = FAMILIES[family][2].get("img_size", 32)
    return TensorDataset(torch.randn(n, 3, size, size, dtype=dtype), torch.arange(n) % 3)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0.0, 0.2, generator=generator)


def private(model, data, **kwargs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    settings = {"noise_multiplier": 0.0, "noise": lk.NoiseSource.fixed(KEY), "sample_rate": 1.0, **kwargs}
    return lk.make_private(model, optimizer, DataLoader(data, batch_size=4), **settings)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "convnext_conv"])
def test_one_step_of_a_family(family):
    """Logits are PEFT's, and two steps those of single-record backwards; PEFT's model takes them too, patched."""
    model, targets = build(family)
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=5, target_modules=targets)).double()
    ours = lk.adapt(model, r=3, lora_alpha=5, target_modules=targets, verbose=False).double()
    randomize(ours), randomize(theirs)
    data = records(family)
    torch.testing.assert_close(ours(data.tensors[0]), theirs(data.tensors[0]), **LAYER_F64)
    twin = copy.deepcopy(ours)
    for m in (ours, lk.patch_peft(theirs)):
        opt, loader = private(m, data, smoothing=None, max_grad_norm=0.3)
        train(m, loss_of, opt, loader, 2)
    check_steps(ours, twin, data, smoothing=False)
    for (_, p), (_, q) in zip(factor_parameters(ours), factor_parameters(theirs), strict=True):
        torch.testing.assert_close(q, p, **PRIVATE_STEP_F64)


def check_steps(ours, twin, data, smoothing, rows=None):
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for phase in "BA":
        lk.set_active(twin, phase)
        grads = written_out(twin, data.tensors, loss_of, clipping="flat", C=0.3, smoothing=None, divisor=4)
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in grads:
                    g = smooth(grads[n], 1 if phase == "A" else 0) if smoothing else grads[n]
                    p -= 0.5 * (g * rows[n] if rows and phase == "B" else g)
    moved = 0
    for (n, p), q in zip(ours.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, **PRIVATE_STEP_F64, msg=n)
        moved += not torch.equal(p, before[n])
    assert moved >= 4


def test_the_head_of_a_mobilenet():
    """timm's own Linear: trained in full, adapted here, and adapted by PEFT."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    x, y = records("convnext", n=2, dtype=torch.float32).tensors
    assert type(model.classifier) is timm.layers.Linear
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=5, target_modules=["classifier"]))
    ours = lk.adapt(copy.deepcopy(model), r=3, lora_alpha=5, target_modules=["classifier"], verbose=False)
    randomize(ours), randomize(theirs)
    torch.testing.assert_close(ours(x), theirs.eval()(x), **MERGED_F32)
    model.requires_grad_(False).classifier.requires_grad_(True)
    for m in (model, ours, lk.patch_peft(theirs)):
        lk.check_per_sample(m, (x, y), loss_of)


def test_convnext_with_convolutions():
    """timm's 1x1 convolutions are covered; its depthwise ones are refused by name."""
    model, _ = build("convnext_conv")
    with pytest.raises(ValueError, match="stages.0.blocks.0.conv_dw cannot be adapted: it has groups=6"):
        lk.adapt(model, r=3, target_modules=["conv_dw"], verbose=False)
    ours = lk.adapt(model, r=3, target_modules=["stem.0", "fc1"], verbose=False).double()
    randomize(ours)
    twin, data = copy.deepcopy(ours), records("convnext_conv")
    opt, loader = private(ours, data, smoothing=None, max_grad_norm=0.3)
    train(ours, loss_of, opt, loader, 2)
    check_steps(ours, twin, data, smoothing=False)


class TestQueryAndValueOnly:
    def make(self, dtype=torch.float64, r=3):
        model, _ = build("vit")
        model = lk.adapt(model, r=r, lora_alpha=5, target_modules=["qkv"], fused="qv", verbose=False).to(dtype)
        randomize(model)
        with torch.no_grad():
            for _, layer in lk.lora_layers(model):
                layer.lora_B.mul_(layer.trained_rows)
        return model

    def keys(self, model):
        return [layer.lora_B[24:48] for _, layer in lk.lora_layers(model)]

    def test_two_steps_equal_the_formula_and_keys_stand_still(self):
        """The filter still runs over all outputs; what it carries into the keys' rows is dropped."""
        ours = self.make()
        twin, data = copy.deepcopy(ours), records("vit")
        opt, loader = private(ours, data, max_grad_norm=0.3, smoothing="binomial5")
        train(ours, loss_of, opt, loader, 2)
        rows = {f"{name}.lora_B": layer.trained_rows for name, layer in lk.lora_layers(twin)}
        check_steps(ours, twin, data, smoothing=True, rows=rows)
        assert len(self.keys(ours)) == 2 and not any(k.any() for k in self.keys(ours))

    @pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
    def test_noise_and_decay_leave_the_keys_alone(self, clipping):
        model = self.make(torch.float32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        data = records("vit", 8, torch.float32)
        opt, loader = lk.make_private(
            model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=1.0, clipping=clipping, method="dp-lora"
        )
        train(model, loss_of, opt, loader, 3)
        assert not any(k.any() for k in self.keys(model))
        assert all(layer.lora_B[:24].all() and layer.lora_B[48:].all() for _, layer in lk.lora_layers(model))

    def test_only_queries_and_values_change(self):
        model = self.make()
        layer = model.blocks[0].attn.qkv
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        change = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
        expected = layer.scaling * (x @ layer.lora_A.t()) @ layer.lora_B.t()
        torch.testing.assert_close(change, expected, **LAYER_F64)
        assert change[..., :24].all() and change[..., 48:].all() and not change[..., 24:48].any()

    def test_files_go_to_peft_and_back(self, tmp_path):
        model = self.make(torch.float32).eval()
        x = records("vit", 2, torch.float32).tensors[0]
        lk.save_adapter(model, tmp_path)
        theirs = PeftModel.from_pretrained(build("vit")[0], tmp_path).eval()
        torch.testing.assert_close(theirs(x), model(x), **MERGED_F32)
        again = lk.adapt(build("vit")[0], r=3, lora_alpha=5, target_modules=["qkv"], fused="qv", verbose=False)
        torch.testing.assert_close(lk.load_adapter(again, tmp_path).eval()(x), model(x), **MERGED_F32)
        merged = lk.merge_and_unload(copy.deepcopy(model))
        torch.testing.assert_close(merged(x), model(x), **MERGED_F32)

    def test_gpt2(self):
        from transformers import GPT2Config, GPT2Model

        model = GPT2Model(GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=3))
        lk.adapt(model, r=2, target_modules="qv", fused="qv", verbose=False)
        rows = model.h[0].attn.c_attn.trained_rows.flatten()
        assert rows.tolist() == [1.0] * 24 + [0.0] * 24 + [1.0] * 24

    def test_refusals(self, tmp_path):
        model, _ = build("vit")
        for fused, targets in (("kv", ["qkv"]), ("qv", ["fc1"])):
            with pytest.raises(ValueError, match=f"fused='{fused}': it is 'qkv', or 'qv' with a target named qkv"):
                lk.adapt(model, target_modules=targets, fused=fused, verbose=False)
        odd = nn.Sequential()
        odd.qkv = nn.Linear(8, 16)
        with pytest.raises(ValueError, match="outputs of qkv are not queries, keys and values in three equal parts"):
            lk.adapt(odd, target_modules=["qkv"], fused="qv", verbose=False)
        assert not any(True for _ in lk.lora_layers(model))
        whole = lk.adapt(model, r=3, lora_alpha=5, target_modules=["qkv"], verbose=False)
        randomize(whole)
        lk.save_adapter(whole, tmp_path)
        with pytest.raises(ValueError, match="blocks.0.attn.qkv: the file adapts outputs that fused='qv' leaves out"):
            lk.load_adapter(self.make(torch.float32), tmp_path)

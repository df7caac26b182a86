"""What patch_peft, and make_private of a patched model, refuse."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_peft_patch import Net, batch, loss_of, pair, private
from test_private_step import train
from torch import nn

import lalora_kernels as lk
from lalora_kernels.nn import LoRALinear
from lalora_kernels.peft_layers import Patched


class TestRefusals:
    def test_peft_unpatched(self):
        model, _ = pair()
        with pytest.raises(
            ValueError, match=r"model\.emb is PEFT's own .*layer\.Embedding.*call lalora_kernels\.patch_peft"
        ):
            private(model)

    def test_dora(self):
        torch.manual_seed(0)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc1", "fc2"], use_dora=True))
        with pytest.raises(
            ValueError, match=r"model\.fc1 cannot be patched: its adapter 'default' is a DoraLinear.*DoRA"
        ):
            lk.patch_peft(model)
        assert not any(isinstance(m, Patched) for m in model.modules())

    def test_dora_added_later(self):
        _, patched = pair(targets=["fc1"], modules_to_save=None)
        patched.add_adapter("dora", LoraConfig(r=2, target_modules=["fc1"], use_dora=True))
        patched.set_adapter("dora")
        with pytest.raises(ValueError, match=r"model\.fc1: its adapter 'dora' is a DoraLinear"):
            private(patched)

    def test_other_tuners(self):
        from peft import IA3Config, LoHaConfig

        for config in (LoHaConfig(target_modules=["fc1"]), IA3Config(target_modules=["fc1"], feedforward_modules=[])):
            with pytest.raises(ValueError, match=r"model\.fc1 cannot be patched: it is peft\.tuners\.\w+\.layer\.\w+;"):
                lk.patch_peft(get_peft_model(Net(), config))

    def test_quantized_bases(self):
        """bitsandbytes' layers are subclasses of nn.Linear with a forward of their own; so is this one."""

        class Linear4bit(nn.Linear):
            def forward(self, x):
                return super().forward(x)

        net = Net()
        net.fc1 = Linear4bit(6, 5)
        model = get_peft_model(net, LoraConfig(target_modules=["fc1"]))
        with pytest.raises(ValueError, match=r"model\.fc1 cannot be patched: its base layer is a .*Linear4bit, whose"):
            lk.patch_peft(model)

    def test_grouped_convolutions(self):
        net = Net()
        net.conv = nn.Conv2d(1, 3, 3, dilation=2, padding=2)
        model = get_peft_model(net, LoraConfig(r=3, target_modules=["conv"]))
        with pytest.raises(ValueError, match=r"model\.conv cannot be patched: it has dilation=\(2, 2\)"):
            lk.patch_peft(model)

    def test_a_model_without_peft(self):
        with pytest.raises(ValueError, match="no layer of PEFT's; call peft.get_peft_model first"):
            lk.patch_peft(Net())
        ours = lk.adapt(Net(), r=2, target_modules=["fc1"], verbose=False)
        assert isinstance(ours.fc1, LoRALinear)
        with pytest.raises(ValueError, match="no layer of PEFT's"):
            lk.patch_peft(ours)

    def test_hooks_on_the_base(self):
        model, _ = pair()
        model.base_model.model.fc1.base_layer.register_forward_hook(lambda *a: None)
        with pytest.raises(ValueError, match=r"model\.fc1 cannot be patched: its base layer has hooks"):
            lk.patch_peft(model)

    def test_merged_in_mid_training(self):
        """The head would train on, and noise alone would move the adapter."""
        _, patched = pair()
        opt, loader, _ = private(patched)
        patched.merge_adapter()
        with pytest.raises(RuntimeError, match=r"cannot train privately: it is merged; call unmerge_adapter\(\) first"):
            patched(next(loader.steps(1))[0])
        with torch.no_grad():
            patched(batch()[0])

    def test_another_adapter_after_make_private(self):
        _, patched = pair(adapters=2, dtype=torch.float32)
        opt, loader, _ = private(patched)
        train(patched, loss_of, opt, loader, 1)
        patched.set_adapter("other1", inference_mode=True)
        with pytest.raises(RuntimeError, match=r"model\.emb uses another adapter than when make_private was called"):
            train(patched, loss_of, opt, loader, 1)

    def test_mixed_batches_in_a_private_step(self):
        _, patched = pair(adapters=2, targets=["fc1", "fc2"], modules_to_save=None, dtype=torch.float32)
        opt, loader, _ = private(patched, check=False)
        with pytest.raises(RuntimeError, match=r"fc1 cannot train privately: it was called with adapter_names"):
            for ids, _ in loader.steps(1):
                patched.base_model.model.fc1(torch.randn(len(ids), 6), adapter_names=["default"] * len(ids))

    def test_unpatching_while_private(self):
        _, patched = pair(dtype=torch.float32)
        private(patched)
        with pytest.raises(RuntimeError, match="belongs to a private optimizer"):
            lk.unpatch_peft(patched)

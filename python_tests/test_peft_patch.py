"""A patched PEFT model does what PEFT's own does, and trains privately by the formula."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as lora
from test_per_sample import largest_relative_error
from test_private_step import KEY, train, written_out
from tolerances import LAYER_F64, MERGED_F32, PER_SAMPLE_F64, PRIVATE_STEP_F64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

import lalora_kernels as lk
from lalora_kernels.nn import factor_parameters
from lalora_kernels.peft_layers import Patched
from lalora_kernels.privacy.checks import per_sample_gradients, single_sample_gradients
from lalora_kernels.reference.privatize import smooth

F = nn.functional
TARGETS = {"linear": ["fc1", "fc2"], "conv1d": ["c"], "conv2d": ["conv"], "embedding": ["emb"]}


class Net(nn.Module):
    """One layer of each kind that PEFT's LoRA serves, and a head."""

    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(11, 6, padding_idx=0), nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.fc1, self.c, self.fc2 = nn.Linear(6, 5), Conv1D(7, 5), nn.Linear(7, 4, bias=False)
        self.head = nn.Linear(4 + 9, 3)

    def forward(self, ids):
        x = self.emb(ids)
        images = self.conv(x[:, None]).tanh().mean(3).flatten(1)
        x = self.fc2(F.gelu(self.c(F.gelu(self.fc1(x)))))
        return self.head(torch.cat([x.mean(1), images], 1))


def pair(seed: int = 0, targets=("fc1", "c", "fc2", "conv", "emb"), dtype=torch.float64, adapters=1, **config):
    """(PEFT's model, the same patched): both with factors that are not zero."""
    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 5, "target_modules": list(targets), "modules_to_save": ["head"], **config}
    model = get_peft_model(Net(), LoraConfig(**config)).to(dtype)
    for k in range(1, adapters):
        model.add_adapter(f"other{k}", LoraConfig(**{**config, "r": 3 + k}))
    model.to(dtype)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model, lk.patch_peft(copy.deepcopy(model))


def batch(n: int = 4):
    torch.manual_seed(1)
    return torch.randint(0, 11, (n, 6)), torch.randint(0, 3, (n,))


def loss_of(model, data):
    return F.cross_entropy(model(data[0]), data[1])


def same(model, patched, data=None):
    """Logits and every gradient are equal; returns the names of the gradients."""
    data = batch() if data is None else data
    results = []
    for m in (model, patched):
        m.zero_grad()
        torch.manual_seed(5)
        y = m(data[0])
        F.cross_entropy(y, data[1]).backward()
        results.append((y, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    (y, grads), (z, found) = results
    torch.testing.assert_close(z, y, **LAYER_F64)
    assert grads.keys() == found.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, **LAYER_F64, msg=name)
    return set(grads)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.4, "targets": ["fc1", "c", "fc2", "conv"]},
        {"lora_bias": True, "targets": ["fc1", "c", "conv"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"fc2": 5}, "alpha_pattern": {"conv": 2}},
    ],
    ids=lambda c: next(iter(c), "plain"),
)
def test_logits_and_gradients(config):
    model, patched = pair(**config)
    kinds = [type(m) for m in patched.modules() if isinstance(m, Patched)]
    assert len(kinds) == len(config.get("targets", range(5)))
    names = same(model, patched)
    assert any("lora" in n for n in names) and any("modules_to_save" in n for n in names)
    assert ("lora_bias" in config) == any(n.endswith("lora_B.default.bias") for n in names)
    assert ("bias" in config) == any("base_layer.bias" in n for n in names)


def test_our_forward_runs(monkeypatch):
    """Were PEFT's forward called, nothing above would show it."""
    _, patched = pair()
    for kind in (lora.Linear, lora.Conv2d, lora.Embedding):
        monkeypatch.setattr(kind, "forward", lambda *a, **k: pytest.fail("PEFT's forward ran"))
    patched(batch()[0])
    with pytest.raises(pytest.fail.Exception), patched.disable_adapter():
        patched(batch()[0])


def test_names_and_state_dict(tmp_path):
    model, patched = pair()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in patched.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in patched.named_parameters()]
    for (n, a), (k, b) in zip(model.state_dict().items(), patched.state_dict().items(), strict=True):
        assert n == k and torch.equal(a, b)
    assert all(isinstance(m, lora.LoraLayer) for m in patched.modules() if isinstance(m, Patched))
    assert lk.unpatch_peft(patched) is patched
    assert [type(m) for m in patched.modules()] == [type(m) for m in model.modules()]


def test_save_and_load(tmp_path):
    model, patched = pair(dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    patched.save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "theirs").iterdir():
        ours, theirs = (tmp_path / "ours" / file.name).read_bytes(), file.read_bytes()
        if file.suffix == ".json":  # target_modules is a set, which PEFT writes in any order
            ours, theirs = ({**c, "target_modules": set(c["target_modules"])} for c in map(json.loads, (ours, theirs)))
        assert ours == theirs, file.name
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "ours", is_trainable=True).double()
    again = lk.patch_peft(copy.deepcopy(loaded))
    same(loaded, again)
    model.double()
    torch.testing.assert_close(again(batch()[0]), model(batch()[0]), **LAYER_F64)
    again.load_adapter(tmp_path / "theirs", "second")
    again.set_adapter("second")
    torch.testing.assert_close(again.double()(batch()[0]), model(batch()[0]), **LAYER_F64)


def test_merging():
    model, patched = pair()
    x = batch()[0]
    before = patched(x)
    patched.merge_adapter()
    assert all(m.merged for m in patched.modules() if isinstance(m, Patched))
    torch.testing.assert_close(patched(x), before, **LAYER_F64)
    patched.unmerge_adapter()
    torch.testing.assert_close(patched(x), before, **LAYER_F64)
    plain = patched.merge_and_unload()
    assert not any(isinstance(m, (Patched, lora.LoraLayer)) for m in plain.modules())
    torch.testing.assert_close(plain(x), before, **LAYER_F64)
    torch.testing.assert_close(plain(x), model.merge_and_unload()(x), **LAYER_F64)


def test_disabling():
    model, patched = pair()
    x = batch()[0]
    with patched.disable_adapter(), model.disable_adapter():
        off = patched(x)
        torch.testing.assert_close(off, model(x), **LAYER_F64)
    assert (patched(x) - off).abs().max() > 1e-3
    same(model, patched)


def test_several_adapters():
    model, patched = pair(adapters=2)
    first = same(model, patched)
    for m in (model, patched):
        m.set_adapter("other1")
    assert not first & same(model, patched)
    for m in (model, patched):
        m.delete_adapter("default")
    assert not first & same(model, patched)


def test_an_adapter_that_is_not_in_every_layer():
    """The layers of another one, which is inactive and frozen, are not in the way."""
    _, patched = pair(targets=["fc1"], modules_to_save=None)
    patched.add_adapter("other", LoraConfig(r=2, target_modules=["fc2"]))
    patched.set_adapter("other")
    lk.patch_peft(patched.double())
    nn.init.normal_(patched.base_model.model.fc2.lora_B["other"].weight)
    lk.set_active(patched, "AB")
    expected = single_sample_gradients(patched, batch(), loss_of)
    assert len(expected) == 2
    opt, loader, _ = private(patched, method="dp-lora", max_grad_norm=1e3)
    before = copy.deepcopy(patched.state_dict())
    train(patched, loss_of, opt, loader, 1)
    moved = {n for n, p in patched.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == set(expected)


def test_two_active_adapters_are_pefts_and_not_private():
    model, patched = pair(adapters=2, modules_to_save=None)
    for m in (model, patched):
        m.base_model.set_adapter(["default", "other1"])
    same(model, patched)
    with pytest.raises(ValueError, match=r"model\.emb: the adapters default, other1 are active at once; set_adapter"):
        per_sample_gradients(patched, batch(), loss_of)


def test_batches_of_mixed_adapters():
    model, patched = pair(adapters=2, targets=["fc1", "fc2"], modules_to_save=None)
    names = ["default", "other1", "__base__", "default"]
    model.eval(), patched.eval()
    x = batch()[0]
    torch.testing.assert_close(patched(x, adapter_names=names), model(x, adapter_names=names), **LAYER_F64)


@pytest.mark.parametrize("phase", ["A", "B", "AB"])
@pytest.mark.parametrize(
    "config",
    [{}, {"lora_bias": True, "targets": ["fc1", "c", "conv"]}, {"bias": "lora_only"}],
    ids=["plain", "lora_bias", "bias"],
)
def test_per_sample_gradients(config, phase):
    _, patched = pair(**config)
    lk.set_active(patched, phase)
    expected = single_sample_gradients(patched, batch(), loss_of)
    found = per_sample_gradients(patched, batch(), loss_of)
    assert found.keys() == expected.keys() and all(g.any() for g in expected.values())
    assert largest_relative_error(found, expected) < PER_SAMPLE_F64


def private(model, **kwargs):
    data = TensorDataset(*batch(12))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    settings = {"noise_multiplier": 0.0, "noise": lk.NoiseSource.fixed(KEY), "sample_rate": 1.0, **kwargs}
    return *lk.make_private(model, optimizer, DataLoader(data, batch_size=4), **settings), data


@pytest.mark.parametrize("smoothing", ["binomial5", None])
def test_two_private_steps_equal_the_formula(smoothing):
    _, patched = pair()
    twin = copy.deepcopy(patched)
    opt, loader, data = private(patched, smoothing=smoothing, max_grad_norm=0.3)
    train(patched, loss_of, opt, loader, 2)
    opt.detach()
    for phase in "BA":
        lk.set_active(twin, phase)
        grads = written_out(twin, data.tensors, loss_of, clipping="flat", C=0.3, smoothing=None, divisor=12)
        assert len(grads) == 7
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in grads:
                    g = grads[n]
                    if smoothing and "lora_" in n:
                        g = smooth(g, 0 if "_B." in n else 1)
                    p -= 0.5 * g
    for (n, p), q in zip(patched.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, **PRIVATE_STEP_F64, msg=n)


def test_a_patched_model_takes_the_step_of_an_adapted_one():
    """Same factors, same draws, same noise: PEFT's model and ours end at the same weights."""
    torch.manual_seed(0)
    base = Net()
    ours = lk.adapt(copy.deepcopy(base), r=3, lora_alpha=5, target_modules=["fc1", "c", "fc2"], verbose=False)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["fc1", "c", "fc2"]))
    lk.patch_peft(theirs)
    for (_, p), (_, q) in zip(factor_parameters(ours), factor_parameters(theirs), strict=True):
        q.data.copy_(p)
    for model in (ours, theirs):
        opt, loader, _ = private(model, noise_multiplier=0.8, sample_rate=0.4)
        train(model, loss_of, opt, loader, 4)
    moved = 0
    for (_, p), (_, q) in zip(factor_parameters(ours), factor_parameters(theirs), strict=True):
        torch.testing.assert_close(q, p, **MERGED_F32)
        moved += float(p.abs().sum())
    assert moved > 1


def test_the_reference_model_within_a_step():
    """KL to the model without its adapter, as PEFT's users write it: the factor that trains stays the schedule's."""
    _, patched = pair()
    opt, loader, _ = private(patched, noise_multiplier=0.5)
    trained = [n for n, p in patched.named_parameters() if p.requires_grad]
    for x, _ in loader.steps(2):
        with torch.no_grad(), patched.disable_adapter():
            reference = patched(x).softmax(-1)
        F.kl_div(patched(x).log_softmax(-1), reference, reduction="batchmean").backward()
        opt.step()
        opt.zero_grad()
    opt.detach()
    assert trained and opt.ledger.steps == 2
    with patched.disable_adapter():  # PEFT's own again
        assert not any(p.requires_grad for n, p in patched.named_parameters() if "lora_" in n)


def test_epsilon_and_saving(tmp_path):
    _, patched = pair(dtype=torch.float32)
    opt, loader, _ = private(
        patched, noise_multiplier=None, noise=None, target_epsilon=2.0, target_delta=1e-5, steps=3, sample_rate=0.5
    )
    train(patched, loss_of, opt, loader, 3)
    assert 1.9 < opt.get_epsilon() <= 2.0
    patched.save_pretrained(tmp_path)
    assert not any(math.isnan(float(p.sum())) for p in patched.parameters())
    assert PeftModel.from_pretrained(Net(), tmp_path)

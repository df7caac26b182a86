"""LoRA on convolutions and embeddings: against PEFT, Opacus, single-sample backwards and the step written out."""

import copy

import peft
import pytest
import torch
from models import adapted, pixels
from safetensors.torch import load_file, save_file
from test_per_sample import largest_relative_error
from test_private_step import private, train, written_out
from tolerances import COMPILED_F32, LAYER_F64, MERGED_F32, MODEL_F32, PER_SAMPLE_F64, PRIVATE_STEP_F64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.adapt import adapt, merge, merge_and_unload, unadapt, unmerge
from lalora_kernels.nn import LoRAConv2d, LoRAEmbedding, LoRALinear, lora_layers, set_active
from lalora_kernels.peft_io import WEIGHTS, load_adapter, save_adapter
from lalora_kernels.privacy.checks import check_per_sample, per_sample_gradients, single_sample_gradients
from lalora_kernels.privacy.noise import NoiseSource

TARGETS = ["words", "conv1", "conv2"]
KERNELS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same"},
    "uneven": {"kernel_size": (2, 4), "padding": "same", "bias": False},
    "uneven in one": {"kernel_size": (3, 2), "padding": "same"},
    "patches": {"kernel_size": 2, "stride": 2},
    "pointwise": {"kernel_size": 1},
}


def moved(model, scale=0.3):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(scale * torch.randn_like(p))
    return model


def in_peft(model, targets, folder, **settings):
    """The same model with the same adapter in PEFT, through the file that we write."""
    save_adapter(model, folder)
    return peft.PeftModel.from_pretrained(unadapt(copy.deepcopy(model)), folder, is_trainable=True)


@pytest.mark.parametrize("phase", ["A", "B", "AB"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_convolution_and_its_gradients_are_pefts(kernel, phase, tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 5, **KERNELS[kernel])).double()
    ours = moved(adapt(plain, r=2, lora_alpha=3, target_modules=["0"], verbose=False))
    theirs = in_peft(ours, ["0"], tmp_path)
    set_active(ours, phase)
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        inputs = x.clone().requires_grad_(True)
        y = model(inputs)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
        named = {n.replace(".default.weight", "").split("model.")[-1]: p.grad for n, p in model.named_parameters()}
        results.append((y, inputs.grad, *(named[f"0.lora_{f}"] for f in phase)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, **LAYER_F64)
    assert ours[0].lora_A.shape == (2, 3, *ours[0].kernel_size) and ours[0].lora_B.shape == (5, 2, 1, 1)


@pytest.mark.parametrize("phase", ["A", "B", "AB"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_an_embedding_and_its_gradients_are_pefts(padding_idx, phase, tmp_path):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Embedding(7, 5, padding_idx=padding_idx)).double()
    ours = moved(adapt(plain, r=2, lora_alpha=3, target_modules=["0"], verbose=False))
    theirs = in_peft(ours, ["0"], tmp_path)
    set_active(ours, phase)
    ids, u = torch.randint(0, 7, (4, 9)), torch.randn(4, 9, 5, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        y = model(ids)
        (y * u).sum().backward()
        named = {n.replace(".default", "").split("model.")[-1]: p.grad for n, p in model.named_parameters()}
        results.append((y, *(named[f"0.lora_embedding_{f}"] for f in phase)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, **LAYER_F64)
    if padding_idx is not None and "A" in phase:
        assert not ours[0].lora_A.grad[:, padding_idx].any()


def test_a_fresh_adapter_changes_nothing_and_a_frozen_A_can_be_trained_with():
    torch.manual_seed(2)
    base, (ids, _), _ = pixels()
    expected = base(ids)
    model = adapt(copy.deepcopy(base), r=3, target_modules=TARGETS, verbose=False)
    assert torch.equal(model(ids), expected)
    assert model.words.lora_A.any() and not model.words.lora_A[:, 3].any() and not model.words.lora_B.any()


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)])
def test_dropout_of_a_convolution_acts_on_the_adapter_only_and_of_an_embedding_not_at_all(module):
    torch.manual_seed(3)
    layer = lk.targets.lora_class(module).from_linear(module, r=2, lora_dropout=0.999999)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 5, 5) if isinstance(module, nn.Conv2d) else torch.randint(0, 5, (2, 6))
    dropped, plain = layer.train()(x), module(x)
    assert torch.allclose(dropped, plain, **MODEL_F32) == isinstance(module, nn.Conv2d)
    assert not torch.allclose(layer.eval()(x), plain, **MODEL_F32)


def test_dropout_and_half_precision_train():
    torch.manual_seed(4)
    model = adapt(pixels()[0].to(torch.bfloat16), r=2, lora_dropout=0.3, target_modules=TARGETS, verbose=False)
    moved(model, 0.1)
    model(torch.randint(0, 11, (3, 12))).float().sum().backward()
    for _, layer in lora_layers(model):
        assert layer.lora_A.dtype == torch.float32 and layer.lora_A.grad.any() and layer.lora_B.grad.any()


@pytest.mark.parametrize("factor", ["A", "B"])
def test_per_sample_gradients_equal_opacus(factor):
    """The factors as plain children, which Opacus has its own rules for."""
    from opacus import GradSampleModule

    class Conv(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.a = nn.Conv2d(layer.in_channels, layer.r, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.b = nn.Conv2d(layer.r, layer.out_channels, 1, bias=False)
            self.a.weight.data, self.b.weight.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
            self.base = copy.deepcopy(layer._plain[0]).requires_grad_(False).double()
            self.scaling = layer.scaling

        def forward(self, x):
            x = x.contiguous()  # Opacus 1.6 strides over what lies in another order as if it did not
            return self.base(x) + self.scaling * self.b(self.a(x))

    class Table(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.a = nn.Embedding(layer.num_embeddings, layer.r, padding_idx=layer.padding_idx)
            self.b = nn.Linear(layer.r, layer.embedding_dim, bias=False)
            self.a.weight.data, self.b.weight.data = layer.lora_A.data.t().clone(), layer.lora_B.data.clone()
            self.base = copy.deepcopy(layer._plain[0]).requires_grad_(False).double()
            self.scaling = layer.scaling

        def forward(self, ids):
            return self.base(ids) + self.scaling * self.b(self.a(ids))

    torch.manual_seed(5)
    base, batch, loss = pixels(4)
    model = moved(adapt(base.double(), r=3, lora_alpha=4, target_modules=TARGETS, verbose=False))
    set_active(model, factor)
    found = per_sample_gradients(model, batch, loss)
    for name, layer in list(lora_layers(model)):
        setattr(model, name, Table(layer) if isinstance(layer, LoRAEmbedding) else Conv(layer))
    model.requires_grad_(False)
    for part in (model.words, model.conv1, model.conv2):
        getattr(part, factor.lower()).requires_grad_(True)
    wrapped = GradSampleModule(model, loss_reduction="mean")
    loss(wrapped, batch).backward()
    expected = {}
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            layer, G = name.removeprefix("_module.").split(".")[0], p.grad_sample
            if (layer, factor) == ("words", "A"):
                G[:, model.words.a.padding_idx] = 0.0  # which Opacus does not know, unlike torch
                G = G.transpose(1, 2)
            expected[f"{layer}.lora_{'embedding_' * (layer == 'words')}{factor}"] = G
    assert largest_relative_error(found, expected) < PER_SAMPLE_F64


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("method, phases", [("la-lora", ["B", "A"]), ("dp-lora", ["AB"])])
@pytest.mark.parametrize("physical", [None, 5])
def test_private_steps_equal_the_formula(method, phases, clipping, physical):
    """Also along which axis the filter runs: the input channels of a convolution's A, the vocabulary of a table's."""
    torch.manual_seed(6)
    model, _, loss = adapted("pixels", n=1)
    data = TensorDataset(torch.randint(0, 11, (12, 12)), torch.randint(0, 3, (12,)))
    twin = copy.deepcopy(model)
    opt, loader = private(
        model, data, method=method, smoothing="binomial5", clipping=clipping, max_grad_norm=0.3, sample_rate=1.0,
        physical_batch_size=physical,
    )  # fmt: skip
    for batch in loader.steps(len(phases)):
        loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    assert opt.per_sample_checked
    for phase in phases:
        set_active(twin, phase)
        grads = written_out(twin, data.tensors, loss, clipping=clipping, C=0.3, smoothing=True, divisor=12)
        assert sum("lora" in n for n in grads) == 3 * len(phase)
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in grads:
                    p -= 0.5 * grads[n]
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, **PRIVATE_STEP_F64, msg=n)


def test_a_tables_A_is_never_made_in_full_for_each_record():
    """16 records of a vocabulary of 50,000: G would be 16 r V; only the sum, the release and A itself have r V."""
    torch.manual_seed(7)
    model = nn.Sequential(LoRAEmbedding(50_000, 4, r=2), nn.Flatten(), nn.Linear(4 * 3, 2))
    nn.init.normal_(model[0].lora_B)
    data = TensorDataset(torch.randint(0, 50_000, (16, 3)), torch.randint(0, 2, (16,)))
    opt, loader = private(model, data, sample_rate=1.0, method="dp-lora", check=False)
    train(model, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]), opt, loader, 1)
    held = sum(b.numel() for b in opt.engine._buffers.values())
    assert held < 16 * 2 * 50_000 / 4


@pytest.mark.parametrize("family", ["pixels"])
def test_merged_weights_equal_evaluation_and_pefts(family, tmp_path):
    torch.manual_seed(8)
    base, (ids, _), _ = pixels()
    model = moved(adapt(copy.deepcopy(base), r=3, lora_alpha=5, target_modules=TARGETS, verbose=False)).eval()
    theirs = in_peft(model, TARGETS, tmp_path).merge_and_unload()
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = model(ids)
    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected, **MERGED_F32)
    with pytest.raises(RuntimeError, match="merged and cannot train"):
        model(ids)
    for name in TARGETS:
        merged, peft_merged = model.get_submodule(name).weight, theirs.get_submodule(name).weight
        torch.testing.assert_close(merged, peft_merged, **MERGED_F32)
    unmerge(model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    plain = merge_and_unload(model)
    assert [type(plain.get_submodule(n)) for n in TARGETS] == [nn.Embedding, nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(plain(ids), expected, **MERGED_F32)


def test_what_peft_saves_computes_the_same_here_and_back(tmp_path):
    torch.manual_seed(9)
    base, (ids, _), _ = pixels()
    settings = {"target_modules": TARGETS, "modules_to_save": ["head"], "use_rslora": True}
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, **settings))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(ids), theirs(ids), **MODEL_F32)
    assert not torch.allclose(ours(ids), base(ids), **MODEL_F32)
    save_adapter(ours, tmp_path / "ours")
    first, second = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(second[k], v) for k, v in first.items())
    assert any(key.endswith("words.lora_embedding_A") for key in second)


class Named(nn.Module):
    """A table under the name by which PEFT knows embeddings, whose weights it then stores too."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None

    def forward(self, ids):
        return self.head(self.embed_tokens(ids))


def test_a_table_that_peft_stores_with_its_weight(tmp_path):
    torch.manual_seed(10)
    base = Named()
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["embed_tokens"])))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    key = "base_model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    assert key in tensors
    ids = torch.randint(0, 6, (3, 5))
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(ids), theirs(ids), **MODEL_F32)
    tensors[key][2, 1] += 1e-3
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="weight for embed_tokens that is not the model's.*save_embedding_layers=False"
    ):
        load_adapter(base, tmp_path)


def test_factors_of_the_wrong_kind_are_refused(tmp_path):
    base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    model = adapt(copy.deepcopy(base), r=2, target_modules=["0", "1"], verbose=False)
    save_adapter(model, tmp_path)
    tensors = {k.replace("lora_embedding_", "lora_").replace("0.lora_A", "0.lora_A.weight") if "0." in k else k: v
               for k, v in load_file(tmp_path / WEIGHTS).items()}  # fmt: skip
    tensors = {k if k.endswith("weight") else f"{k}.weight": v for k, v in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"an embedding in the file or in the model, but not in both:\n  0$"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRAConv2d(4, 4, 3, r=2, groups=2), "groups=2"),
        (lambda: LoRAConv2d(4, 4, 3, r=2, dilation=2), "dilation"),
        (lambda: LoRAConv2d(4, 4, 3, r=2, padding=1, padding_mode="circular"), "padding_mode"),
        (lambda: LoRAConv2d(4, 4, 3, r=2)(torch.zeros(4, 5, 5)), "add the batch axis"),
        (lambda: LoRAConv2d(4, 4, 3, r=0), "r is a positive integer"),
        (lambda: LoRAEmbedding(4, 4, r=True), "r is a positive integer"),
        (lambda: LoRALinear(4, 4, r=True), "r is a positive integer, got True"),
        (lambda: LoRAEmbedding(4, 4, r=1, max_norm=2.0), "max_norm"),
        (lambda: LoRAEmbedding(4, 4, r=1, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_table_that_a_batch_rewrites_is_refused_in_a_private_step(frozen):
    """max_norm changes even a frozen table by what the records look up."""
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0).requires_grad_(not frozen), nn.Flatten(), nn.Linear(8, 2))
    data = TensorDataset(torch.randint(0, 5, (6, 2)), torch.randint(0, 2, (6,)))
    with pytest.raises(ValueError, match=r"^0 \(Embedding\) cannot be part of a private step.*max_norm"):
        private(model, data)


def test_check_per_sample_names_what_mixes_before_a_convolution():
    class BatchMean(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    torch.manual_seed(11)
    layers = LoRAConv2d(2, 3, 3, r=2), BatchMean(), nn.Flatten(), LoRALinear(3 * 9, 2, r=2)
    batch = torch.randn(3, 2, 5, 5), torch.randint(0, 2, (3,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match="^1: .*depends on the other records"):
        check_per_sample(nn.Sequential(*layers), batch, loss)
    check_per_sample(nn.Sequential(layers[0], *layers[2:]), batch, loss)


def test_compiled_steps_equal_eager_ones():
    def steps(backend):
        torch.manual_seed(12)
        model, _, loss = adapted("pixels", n=1, dtype=torch.float32)
        data = TensorDataset(torch.randint(0, 11, (30, 12)), torch.randint(0, 3, (30,)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        optimizer, loader = lk.make_private(
            model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0, noise=NoiseSource.fixed(bytes(32))
        )
        forward = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
        for batch in loader.steps(3):
            loss(forward, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.compiler.reset()
    eager, compiled = steps(None), steps("aot_eager")
    assert float((eager - compiled).norm() / eager.norm()) < COMPILED_F32


def test_a_module_called_several_times_adds_up_before_its_norm():
    torch.manual_seed(13)
    model, batch, _ = adapted("pixels")

    def twice(model, batch):
        ids, y = batch
        return nn.functional.cross_entropy(model(ids) + model(ids.flip(1)), y)

    for phase in ("A", "B", "AB"):
        set_active(model, phase)
        expected = single_sample_gradients(model, batch, twice)
        assert largest_relative_error(per_sample_gradients(model, batch, twice), expected) < PER_SAMPLE_F64

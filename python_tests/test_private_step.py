"""The private step against the same step written out from single-sample gradients."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from models import adapted
from tolerances import PRIVATE_STEP_F64, SPLIT_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels.adapt import adapt
from lalora_kernels.federated.config import make_config
from lalora_kernels.nn import set_active
from lalora_kernels.privacy.checks import single_sample_gradients
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.reference import chacha20_normal

KEY = bytes(range(32))


def toy(n: int = 12, dtype=torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    model, _, loss = adapted("mlp", dtype=dtype)
    data = TensorDataset(torch.randn(n, 7, dtype=dtype), torch.randint(0, 2, (n,)))
    return model, data, loss


def private(model, data, lr=0.5, optimizer=torch.optim.SGD, batch_size=4, **kwargs):
    kwargs.setdefault("noise_multiplier", 0.0)
    opt = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    return make_private(model, opt, DataLoader(data, batch_size=batch_size), noise=NoiseSource.fixed(KEY), **kwargs)


def train(model, loss, opt, loader, steps):
    for batch in loader.steps(steps):
        loss(model, batch).backward()
        opt.step()
        opt.zero_grad()


def written_out(model, records, loss, *, clipping, C, smoothing, divisor):
    """{name: the noiseless released gradient} from single-sample gradients, with NumPy's padding and convolution."""
    grads = single_sample_gradients(model, records, loss)
    L = len(grads)
    norms = {n: g.flatten(1).norm(dim=1) for n, g in grads.items()}
    total = torch.stack(list(norms.values())).norm(dim=0)
    out = {}
    for n, g in grads.items():
        if clipping == "flat":
            c = (C / total).clamp(max=1)
        elif clipping == "per_layer":
            c = (C / math.sqrt(L) / norms[n]).clamp(max=1)
        else:
            c = C / (total + 0.01)
        s = (c.view(-1, *[1] * (g.dim() - 1)) * g).sum(0).numpy()
        axis = {"A": 1, "B": 0}.get(n.rpartition("_")[2]) if ".lora_" in n else None
        if smoothing and axis is not None:
            widths = [(2, 2) if a == axis else (0, 0) for a in range(s.ndim)]
            padded = np.pad(s, widths, mode="symmetric")
            s = np.apply_along_axis(lambda v: np.convolve(v, np.array([1, 4, 6, 4, 1]) / 16, "valid"), axis, padded)
        out[n] = torch.from_numpy(s) / divisor
    return out


@pytest.mark.parametrize("smoothing", ["binomial5", None])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize(
    "method, phases", [("la-lora", ["B", "A"]), ("dp-lora", ["AB", "AB"]), ("ffa-lora", ["B", "B"])]
)
def test_two_steps_equal_the_formula(method, phases, clipping, smoothing):
    model, data, loss = toy()
    twin = copy.deepcopy(model)
    opt, loader = private(
        model, data, method=method, clipping=clipping, smoothing=smoothing, max_grad_norm=0.3, sample_rate=1.0
    )
    train(model, loss, opt, loader, 2)
    for phase in phases:
        set_active(twin, phase)
        grads = written_out(twin, data.tensors, loss, clipping=clipping, C=0.3, smoothing=smoothing, divisor=12)
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in grads:
                    p -= 0.5 * grads[n]
    moved = 0
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, **PRIVATE_STEP_F64, msg=n)
        moved += 1
    assert moved


@pytest.mark.parametrize(
    "method, filtered",
    [(None, False), ("la-lora", True), ("la-lora-2-1", True), ("dp-lora", False), ("rolora", False)],
)
def test_unasked_a_method_filters_as_its_paper_does(method, filtered):
    """One step against the formula; the default is LA-LoRA's schedule without the filter."""
    model, data, loss = toy()
    twin = copy.deepcopy(model)
    asked = {"method": method} if method else {}
    opt, loader = private(model, data, max_grad_norm=0.3, sample_rate=1.0, **asked)
    train(model, loss, opt, loader, 1)
    set_active(twin, "AB" if method == "dp-lora" else "B")
    grads = written_out(twin, data.tensors, loss, clipping="flat", C=0.3, smoothing=filtered, divisor=12)
    moved = {n: p - 0.5 * grads[n] for n, p in twin.named_parameters() if n in grads}
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, moved.get(n, dict(twin.named_parameters())[n]), **PRIVATE_STEP_F64, msg=n)
    assert make_config(asked).filter == ("binomial5" if filtered else None)


def test_loss_reduction_sum_releases_the_same_gradient():
    results = []
    for reduction in ("mean", "sum"):
        model, data, _ = toy()
        opt, loader = private(model, data, max_grad_norm=0.3, loss_reduction=reduction)
        batch = next(iter(loader.steps(1)))
        nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction).backward()
        opt.step()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) >= 3
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **PRIVATE_STEP_F64)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_physical_batches_equal_the_unsplit_batch(clipping):
    """Same key, so the same draws and the same noise; only the order of summation differs."""
    results = []
    for physical, by_length in ((None, False), (3, False), (1, False), (3, True)):
        model, data, loss = toy(dtype=torch.float32)
        opt, loader = private(
            model, data, noise_multiplier=0.7, sample_rate=0.6, clipping=clipping, physical_batch_size=physical,
            lengths=list(range(len(data))) if by_length else None,
        )  # fmt: skip
        train(model, loss, opt, loader, 4)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(results[0], torch.zeros_like(results[0]))
    for other in results[1:]:
        assert float((other - results[0]).norm() / results[0].norm()) < SPLIT_F32


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("scale", [1.0, float("nan")])
def test_an_empty_batch_is_noise_alone(clipping, scale):
    model, data, loss = toy(dtype=torch.float32)
    how = {"noise_multiplier": 2.0, "max_grad_norm": 0.3, "smoothing": None, "clipping": clipping}
    opt, loader = private(model, data, sample_rate=1e-9, **how)
    batch = next(iter(loader.steps(1)))
    (scale * loss(model, batch)).backward()  # the placeholder's, a record's as it is
    opt.step()
    sites = opt.engine.active
    assert len(sites) >= 3
    for s in sites:
        xi = chacha20_normal(s.param.numel(), key=KEY, release=0, tensor_index=s.index).view(s.param.shape)
        expected = 2.0 * 0.3 * xi / opt.expected_batch_size
        torch.testing.assert_close(s.released, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert sum(e.count for e in opt.ledger.entries) == 1


def test_adamw_leaves_the_inactive_factor_and_its_moments_alone():
    model, data, loss = toy()
    optimizer = partial(torch.optim.AdamW, weight_decay=0.1)
    opt, loader = private(model, data, optimizer=optimizer, lr=0.1, method="la-lora")
    layer = model.fc1
    for step, batch in enumerate(loader.steps(4), 1):
        active, idle = (layer.lora_B, layer.lora_A) if step % 2 else (layer.lora_A, layer.lora_B)
        before = {p: p.detach().clone() for p in (active, idle)}
        moments = {k: v.clone() for k, v in opt.state.get(idle, {}).items()}
        loss(model, batch).backward()
        opt.step()
        assert torch.equal(idle, before[idle]) and not torch.equal(active, before[active])
        assert idle.grad is None and active.grad is not None
        assert all(torch.equal(opt.state[idle][k], v) for k, v in moments.items())
        opt.zero_grad()


def test_learning_rate_schedulers_drive_the_wrapped_optimizer():
    model, data, loss = toy()
    opt, loader = private(model, data, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for batch in loader.steps(3):
        loss(model, batch).backward()
        opt.step()
        scheduler.step()
    assert opt.original_optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_record_that_is_not_finite_contributes_nothing(bad, clipping):
    model, data, loss = toy()
    data.tensors[0][5, 2] = bad
    twin = copy.deepcopy(model)
    opt, loader = private(model, data, sample_rate=1.0, max_grad_norm=0.3, clipping=clipping, smoothing=None)
    batch = next(iter(loader.steps(1)))
    loss(model, batch).backward()
    with pytest.warns(UserWarning, match="1 record"):
        opt.step()
    assert opt.nonfinite_samples == 1
    set_active(twin, "B")
    rest = tuple(torch.cat([t[:5], t[6:]]) for t in data.tensors)
    expected = written_out(twin, rest, loss, clipping=clipping, C=0.3, smoothing=None, divisor=12)
    assert expected.keys() == {s.name for s in opt.engine.active}
    for s in opt.engine.active:
        torch.testing.assert_close(s.released, expected[s.name], **PRIVATE_STEP_F64)


def test_a_copy_of_a_private_model_is_an_ordinary_model():
    model, data, loss = toy()
    private(model, data)
    twin = copy.deepcopy(model)
    loss(twin, data.tensors).backward()
    assert twin.fc1.lora_B.grad is not None and twin.head.weight.grad is not None


def test_state_dict_resumes_with_ledger_schedule_and_a_fresh_key():
    model, data, loss = toy()
    opt, loader = private(model, data, noise_multiplier=1.0, optimizer=partial(torch.optim.SGD, momentum=0.9))
    train(model, loss, opt, loader, 3)
    saved = copy.deepcopy(opt.state_dict())
    assert KEY not in str(saved).encode() and KEY.hex() not in str(saved)
    model2, data, _ = toy()
    fresh = torch.optim.SGD([p for p in model2.parameters() if p.requires_grad], 0.5, momentum=0.9)
    opt2, _ = make_private(model2, fresh, DataLoader(data, batch_size=4), noise_multiplier=1.0)
    opt2.load_state_dict(saved)
    assert (opt2.round, opt2.local_step) == (1, 4) and not model2.fc1.lora_B.requires_grad
    assert sum(e.count for e in opt2.ledger.entries) == 3
    assert opt2.engine.noise.next_release >= 3
    with pytest.raises(ValueError, match="no privacy ledger"):
        opt2.load_state_dict(opt.original_optimizer.state_dict())


class TestRefusals:
    def test_stepping_twice(self):
        model, data, loss = toy()
        opt, loader = private(model, data)
        loss(model, next(iter(loader.steps(1)))).backward()
        opt.step()
        with pytest.raises(RuntimeError, match="twice on one batch"):
            opt.step()

    def test_stepping_without_backward(self):
        model, data, loss = toy()
        opt, loader = private(model, data, sample_rate=1.0)
        next(iter(loader.steps(1)))
        with pytest.raises(RuntimeError, match="before loss.backward"):
            opt.step()

    def test_a_layer_that_is_never_called(self):
        """WavLM gives its projections' weights to a function."""

        class Takes(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.head = nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False)

            def forward(self, x):
                return self.head(nn.functional.linear(x.requires_grad_(), self.q.weight))

        model = adapt(Takes(), r=2, target_modules=["q"], verbose=False)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        data = TensorDataset(torch.randn(8, 4))
        opt, loader = make_private(model, sgd, DataLoader(data, batch_size=4), noise_multiplier=1.0)
        loader.batch_sampler.draw = lambda: [0, 1, 2]
        (x,) = next(loader.steps(1))
        model(x).sum().backward()
        with pytest.raises(RuntimeError, match="reached nothing that trains"):
            opt.step()

    def test_backward_without_step(self):
        model, data, loss = toy()
        opt, loader = private(model, data)
        with pytest.raises(RuntimeError, match="not stepped"):
            for batch in loader.steps(2):
                loss(model, batch).backward()

    def test_backward_outside_the_loader(self):
        model, data, loss = toy()
        private(model, data)
        with pytest.raises(RuntimeError, match="outside a batch of the private loader"):
            loss(model, data.tensors).backward()

    def test_a_batch_of_another_size(self):
        model, data, loss = toy()
        _, loader = private(model, data, sample_rate=1.0)
        x, y = next(iter(loader.steps(1)))
        with pytest.raises(ValueError, match="11 rows.*12 records"):
            loss(model, (x[1:], y[1:]))

    def test_a_gradient_that_is_not_ours(self):
        model, data, loss = toy()
        opt, loader = private(model, data)
        loss(model, next(iter(loader.steps(1)))).backward()
        model.fc1.lora_B.grad = torch.zeros_like(model.fc1.lora_B)
        with pytest.raises(RuntimeError, match="fc1.lora_B received a gradient that is not the engine's"):
            opt.step()

    def test_a_penalty_on_an_adapter_that_was_frozen_at_first(self):
        """lora_A is frozen when the hooks are set, and trains in the second step."""
        model, data, loss = toy()
        opt, loader = private(model, data)
        with pytest.raises(RuntimeError, match="fc1.lora_A received a gradient"):
            for step, batch in enumerate(loader.steps(2)):
                penalty = model.fc1.lora_A.square().sum() if step else 0.0
                (loss(model, batch) + penalty).backward()
                opt.step()
                opt.zero_grad()

    def test_unfreezing_within_a_step(self):
        model, data, loss = toy()
        opt, loader = private(model, data)
        batch = next(iter(loader.steps(1)))
        model.fc1.lora_A.requires_grad_(True)
        with pytest.raises(RuntimeError, match="fc1.lora_A became trainable within a batch"):
            loss(model, batch).backward()

    def test_making_a_model_private_twice(self):
        model, data, _ = toy()
        opt, _ = private(model, data)
        with pytest.raises(RuntimeError, match="already belongs to a private optimizer"):
            private(model, data)
        opt.detach()
        private(model, data)

    def test_a_trainable_parameter_that_the_optimizer_lacks(self):
        model, data, _ = toy()
        few = torch.optim.SGD([model.fc1.lora_A, model.fc1.lora_B], 0.1)
        with pytest.raises(ValueError, match="fc2.lora_A trains but is not in the optimizer"):
            make_private(model, few, DataLoader(data, batch_size=4), noise_multiplier=1.0)

    def test_a_stranger_in_the_optimizer(self):
        model, data, _ = toy()
        params = [p for p in model.parameters() if p.requires_grad] + [nn.Parameter(torch.zeros(9))]
        with pytest.raises(ValueError, match=r"shape \(9,\) that is not the model's"):
            make_private(model, torch.optim.SGD(params, 0.1), DataLoader(data, batch_size=4), noise_multiplier=1.0)

    def test_per_layer_clipping_with_two_backwards_of_one_batch(self):
        model, data, loss = toy()
        _, loader = private(model, data, clipping="per_layer")
        batch = next(iter(loader.steps(1)))
        loss(model, batch).backward()
        with pytest.raises(RuntimeError, match="backpropagated twice"):
            loss(model, batch).backward()

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"method": "sgd"}, "unknown method 'sgd'; known: dp-lora"),
            ({"smoothing": "gaussian"}, "smoothing is one of"),
            ({"clipping": "ghost"}, "clipping is one of"),
            ({"loss_reduction": "none"}, "loss_reduction is one of"),
            ({"max_grad_norm": 0.0}, "max_grad_norm is a finite number > 0"),
            ({"max_grad_norm": math.nan}, "max_grad_norm is a finite number > 0"),
            ({"noise_multiplier": -1.0}, "noise_multiplier is a finite number >= 0"),
            ({"sample_rate": 1.5}, "sample_rate"),
            ({"expected_batch_size": 13}, "12 records, fewer than the expected batch size 13"),
            ({"expected_batch_size": 2, "sample_rate": 0.9}, "give one of the two"),
            ({"target_epsilon": 1.0}, "either noise_multiplier, or target_epsilon"),
            ({"noise_multiplier": None, "target_epsilon": 1.0}, "needs target_delta and steps"),
        ],
    )
    def test_arguments_out_of_range(self, kwargs, message):
        model, data, _ = toy()
        with pytest.raises(ValueError, match=message):
            private(model, data, **kwargs)


def test_epsilon_is_reported_only_where_it_is_true():
    model, data, loss = toy()
    opt, loader = private(model, data, noise_multiplier=1.0)
    train(model, loss, opt, loader, 2)
    with pytest.raises(Exception, match="key is fixed"):
        opt.get_epsilon(1e-5)
    opt.detach()
    fresh = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    opt, loader = make_private(model, fresh, DataLoader(data, batch_size=4), noise_multiplier=0.0, ledger=Ledger())
    train(model, loss, opt, loader, 1)
    assert opt.get_epsilon(1e-5) == math.inf

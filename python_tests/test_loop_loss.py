"""Losses of the loop's own that tie records together, or train something themselves, against autograd's gradients."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.privacy import loop_loss
from lalora_kernels.privacy.noise import NoiseSource

N, D, C = 48, 6, 4
PLAIN = torch.autograd.backward


def contrast(z, y):
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.t() / 0.1, torch.arange(len(z)))


def survival(z, y):
    """Cox' partial likelihood: each record against all that are at risk."""
    return (torch.logcumsumexp(z[:, 0], 0) - z[:, 0]).mean()


def correlation(z, y):
    a, b = z[:, 0] - z[:, 0].mean(), y.to(z) - 1.5
    return -(a * b).sum() / (a.norm() * b.norm())


def dice(z, y):
    p, t = z.softmax(1)[:, 0], (y == 0).to(z)
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def ranking(z, y):
    s = z[:, 0]
    return (F.softplus(s[None] - s[:, None]) * (y[:, None] > y[None])).mean()


def triplets(z, y):
    d, i = torch.cdist(z, z), torch.arange(len(z))
    return F.relu(d[i, i - 1] - d[i, i - 2] + 1.0).mean()


def neighbours(z, y):
    """In twos, as a loader that yields two views of an image after one another has them."""
    n = len(z) // 2
    return (1 - F.cosine_similarity(z[:n], z[n : 2 * n])).mean()


def centred(z, y):
    return (F.cross_entropy(z - z.mean(0), y, reduction="none")).mean()


def focal(z, y):
    each = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-each)).square() * each).mean()


TIED = {
    "contrast": contrast,
    "contrast beside a cross-entropy": lambda z, y: F.cross_entropy(z, y) + 1e-3 * contrast(z, y),
    "Cox": survival,
    "correlation": correlation,
    "Dice": dice,
    "ranking": ranking,
    "triplets": triplets,
    "distances of all": lambda z, y: F.pdist(z).mean(),
    "neighbours": neighbours,
    "centred": centred,
    "root of a mean": lambda z, y: F.mse_loss(z[:, 0], y.to(z)).sqrt(),
    "logarithm of a mean": lambda z, y: z.square().mean().log(),
}
ALONE = {
    "cross-entropy": F.cross_entropy,
    "focal": focal,
    "squares": lambda z, y: F.mse_loss(z[:, 0], y.to(z)),
    "Huber": lambda z, y: F.huber_loss(z[:, 0], y.to(z)),
    "absolute": lambda z, y: (z[:, 0] - y).abs().mean(),
    "cosine to a fixed vector": lambda z, y: (1 - F.cosine_similarity(z, torch.ones(1, C))).mean(),
    "margins": F.multi_margin_loss,
    "divergence": lambda z, y: F.kl_div(z.log_softmax(1), torch.full_like(z, 1 / C), reduction="batchmean"),
    "distances to centres": lambda z, y: torch.cdist(z, torch.eye(C).to(z)).gather(1, y[:, None]).mean(),
    "distances within a record": lambda z, y: torch.cdist(z[:, :, None], z[:, :, None]).mean(),
    "each record's root": lambda z, y: (z.square().mean(1) + 1e-3).sqrt().mean(),
    "each record's pairs": lambda z, y: F.softplus(z[:, 0] * z[:, 1] - z[:, 2] * z[:, 3]).mean(),
}


def gradient_moves(loss):
    """Whether the gradient at record 0 depends on what the others are: autograd's, in float64."""
    torch.manual_seed(5)
    z, y, found = torch.randn(8, C, dtype=torch.float64), torch.arange(8) % C, []
    for others in (z[1:], z[1:].flip(1) * 1.5):
        t = torch.cat([z[:1], others]).requires_grad_()
        (g,) = torch.autograd.grad(loss(t, y), t)
        found.append(g[0])
    return not torch.allclose(*found, rtol=1e-6, atol=1e-12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, 8), nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def run(loss, steps=2, wrap=lambda model: model, net=Net, reduction="mean", sample_rate=0.5, **kwargs):
    torch.manual_seed(0)
    model = lk.adapt(net(), target_modules="all-linear", r=2, verbose=False)
    data = TensorDataset(torch.randn(N, D), torch.arange(N) % C)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, sgd, DataLoader(data, batch_size=8), noise_multiplier=1.0, sample_rate=sample_rate,
        loss_reduction=reduction, noise=NoiseSource.fixed(bytes(32)), **kwargs,
    )  # fmt: skip
    optimizer.released = []
    called = wrap(model)
    for x, y in loader.steps(steps):
        loss(called(x), y).backward()
        optimizer.step()
        optimizer.released.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("check", [True, "loss"])
@pytest.mark.parametrize("name", TIED)
def test_a_loss_that_ties_records_is_refused(name, check):
    assert gradient_moves(TIED[name])
    with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
        run(TIED[name], check=check)


@pytest.mark.parametrize("name", ALONE)
def test_a_loss_of_each_record_alone_passes(name):
    assert not gradient_moves(ALONE[name])
    assert run(ALONE[name], steps=6).ledger.steps == 6


@pytest.mark.parametrize("name", ["contrast", "Dice", "cross-entropy", "squares"])
def test_of_a_compiled_model(name):
    def compiled(model):
        return torch.compile(model, backend="aot_eager")

    if name in ALONE:
        assert run(ALONE[name], wrap=compiled).ledger.steps == 2
    else:
        with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
            run(TIED[name], wrap=compiled)


def test_in_bfloat16_and_with_a_vector_of_losses():
    def half(model):
        return torch.autocast("cpu", torch.bfloat16)(model)

    def vector(z, y):
        each = torch.logcumsumexp(z[:, 0].float(), 0)
        return type("Losses", (), {"backward": lambda _: each.backward(torch.ones(len(z)))})()

    for loss in (contrast, vector):
        with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
            run(loss, wrap=half)
    assert run(F.cross_entropy, wrap=half, steps=4).ledger.steps == 4


class Two(Net):
    """Its hidden state is what its logits are computed from."""

    def forward(self, x):
        h = self.body(x).tanh()
        return {"hidden": h, "logits": self.head(h)}


def test_of_one_of_several_outputs():
    for loss in (
        lambda o, y: contrast(o["hidden"], y),
        lambda o, y: F.cross_entropy(o["logits"], y) + contrast(o["logits"], y),
        lambda o, y: F.cross_entropy(o["logits"], y) + 0.1 * contrast(o["logits"], y) + o["hidden"].square().mean(),
    ):
        with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
            run(loss, net=Two)
    assert run(lambda o, y: F.cross_entropy(o["logits"], y) + o["hidden"].square().mean(), net=Two).ledger.steps == 2


@pytest.mark.parametrize("net, loss", [
    (Net, F.cross_entropy),
    (Two, lambda o, y: F.cross_entropy(o["logits"], y) + o["hidden"].square().mean()),
])  # fmt: skip
def test_what_is_released_is_what_it_is_unasked(net, loss, monkeypatch):
    """Nothing of a layer ran once more: the gradients that it recorded are the same, bit for bit."""
    asked = run(loss, net=net, steps=3)
    monkeypatch.setattr(loop_loss.LoopLoss, "ask", lambda *args: None)
    for one, other in zip(asked.released, run(loss, net=net, steps=3).released, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, d):
        return -d


def test_behind_a_function_of_the_loops_own():
    with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
        run(lambda z, y: contrast(Reversed.apply(z), y))
    assert run(lambda z, y: F.cross_entropy(Reversed.apply(z), y) + z.square().mean()).ledger.steps == 2


def test_a_loss_that_begins_to_tie_them_later():
    batches = iter(range(1, 100))

    def later(z, y):
        return contrast(z, y) if next(batches) > 6 else F.cross_entropy(z, y)

    with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
        run(later, steps=20)
    assert next(batches) == 9


def test_a_model_that_is_called_twice_in_a_batch_is_asked_in_as_many():
    """Two towers that are one: their calls are counted as one batch, and both are outputs."""
    batches = iter(range(1, 100))

    def twice(model):
        return lambda x: (model(x), model(x.flip(1)))

    def loss(z, y):
        late = next(batches) > 6
        return F.cross_entropy(z[0] @ z[1].t(), torch.arange(len(y))) if late else (z[0] * z[1]).sum(1).tanh().mean()

    with pytest.raises(ValueError, match="the loss ties the records of the batch together"):
        run(loss, steps=20, wrap=twice)
    assert next(batches) == 9


def test_a_loop_that_goes_on_after_a_refusal_is_refused_again():
    refused = []

    class Stubborn:
        def __init__(self, loss):
            self.loss = loss

        def backward(self):
            with pytest.raises(ValueError, match="the loss ties"):
                self.loss.backward()
            with pytest.raises(ValueError, match="the loss ties"):
                self.loss.backward()
            refused.append(1)

    with pytest.raises(RuntimeError):
        run(lambda z, y: Stubborn(contrast(z, y)))
    assert refused


@pytest.fixture
def nobody(monkeypatch):
    """No engine waits that another test left in the midst of a batch: a compiled model's lives on in torch's cache."""
    monkeypatch.setattr(loop_loss, "_waiting", weakref.WeakSet())
    loop_loss._put_back()


def test_torch_s_backward_is_put_back(nobody):
    run(F.cross_entropy, steps=5)
    assert torch.autograd.backward is PLAIN
    with pytest.raises(ValueError, match="the loss ties"):
        run(contrast)
    gc.collect()  # who holds the error holds the engine, but its graph does not
    assert not loop_loss._waiting
    (torch.ones(2, requires_grad=True) * 2).sum().backward()
    assert torch.autograd.backward is PLAIN


def test_somebody_elses_function_over_ours(nobody, monkeypatch):
    """It stays where it is, and no round of calls comes of it."""
    calls, ours = [], []

    def theirs(*args, **kwargs):
        calls.append(0)
        ours[0](*args, **kwargs)

    def loss(z, y):
        if not ours:
            ours.append(torch.autograd.backward)
            monkeypatch.setattr(torch.autograd, "backward", theirs)
        return F.cross_entropy(z, y) if len(calls) < 5 else contrast(z, y)

    with pytest.raises(ValueError, match="the loss ties"):
        run(loss, steps=20)
    assert len(calls) == 8 and torch.autograd.backward is theirs


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        return 2 * d * ctx.saved_tensors[0]


@pytest.mark.parametrize("loss", [
    lambda z, y: Once.apply(z) / len(z),
    lambda z, y: F.ctc_loss(z[:, None].expand(-1, 6, -1).transpose(0, 1).log_softmax(2), y[:, None] % 3 + 1,
                            torch.full_like(y, 6), torch.ones_like(y), reduction="sum") / len(z),
])  # fmt: skip
def test_what_cannot_be_differentiated_twice_is_not_judged(loss):
    assert run(loss).ledger.steps == 2


# ----------------------------------------------------------------------------------------- what trains beside the model


class Arc(nn.Module):
    """Centres of the classes, as losses of metric learning have them."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(C, C))

    def forward(self, z, y):
        return F.cross_entropy(z @ self.centres, y)


def temperature(z, y):
    return F.cross_entropy(z * TEMPERATURE, y)


TEMPERATURE = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("loss", [Arc(), temperature])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_trains_beside_the_model_is_refused(loss, compiled):
    def wrap(model):
        return torch.compile(model, backend="aot_eager") if compiled else model

    with pytest.raises(ValueError, match=r"the loss takes a tensor of shape \(.*Make it a part of that model"):
        run(loss, wrap=wrap)


def test_what_is_frozen_or_detached_beside_it_passes():
    head = nn.Linear(C, C).requires_grad_(False)
    assert run(lambda z, y: F.cross_entropy(head(z), y) + TEMPERATURE.detach() * z.square().mean()).ledger.steps == 2


def test_large_outputs_are_asked_seldom_and_larger_ones_not_at_all(monkeypatch):
    """A few times as much memory as they is taken, of a step that has little to spare."""
    asked = []
    across = loop_loss.LoopLoss._across
    monkeypatch.setattr(loop_loss.LoopLoss, "_across", lambda one, *args: asked.append(0) or across(one, *args))
    for large, largest, times in ((1 << 20, 1 << 24, 5), (0, 1 << 24, 4), (0, 0, 0)):
        asked.clear()
        monkeypatch.setattr(loop_loss, "LARGE", large)
        monkeypatch.setattr(loop_loss, "LARGEST", largest)
        run(F.cross_entropy, steps=9)
        assert len(asked) == times  # of batches 1, 2, 3, 4, 8


@pytest.mark.parametrize("compiled", [False, True])
def test_another_model_in_the_midst_of_a_batch_is_not_asked(compiled):
    """Two in one process, of which one is not to be checked."""

    def begun(loss, check):
        model = lk.adapt(Net(), target_modules="all-linear", r=2, verbose=False)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        data = TensorDataset(torch.randn(N, D), torch.arange(N) % C)
        optimizer, loader = lk.make_private(
            model, sgd, DataLoader(data, batch_size=8), noise_multiplier=1.0, sample_rate=1.0, check=check
        )
        net = torch.compile(model, backend="aot_eager") if compiled else model
        x, y = next(batches := loader.steps(2))
        return loss(net(x), y), optimizer, batches

    one, other = begun(F.cross_entropy, True), begun(contrast, False)
    for loss, optimizer, _ in (other, one):
        loss.backward()
        optimizer.step()
        assert optimizer.ledger.steps == 1
        optimizer.detach()

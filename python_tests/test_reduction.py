"""The loop's own loss, told by its gradient: a mean over records, a sum, or one that couples them."""

import pytest
import torch
from test_private_step import KEY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy import reduction as checking
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.shares import reductions_of

F = nn.functional
N, T, V = 6, 5, 7


def logits_and_gradient(loss, *shape, dtype=torch.float32, scale=3.0, seed=0):
    torch.manual_seed(seed)
    z = (scale * torch.randn(*shape, dtype=dtype)).requires_grad_(True)
    (dz,) = torch.autograd.grad(loss(z), z)
    return z.detach(), dz


def labels(*shape, classes=V):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1))


def ragged(equal: bool = False):
    y = labels(N, T)
    for i, length in enumerate([3] * N if equal else [5, 1, 3, 4, 2, 5]):
        y[i, length:] = -100
    return y


CASES = {
    "classes, mean": (lambda z: F.cross_entropy(z, labels(N)), (N, V), "mean"),
    "classes, sum": (lambda z: F.cross_entropy(z, labels(N), reduction="sum"), (N, V), "sum"),
    "classes, mean by hand": (lambda z: F.cross_entropy(z, labels(N), reduction="none").sum() / N, (N, V), "mean"),
    "two classes, mean": (lambda z: F.cross_entropy(z, labels(N, classes=2)), (N, 2), "mean"),
    "two classes, sum": (lambda z: F.cross_entropy(z, labels(N, classes=2), reduction="sum"), (N, 2), "sum"),
    "pixels, mean": (lambda z: F.cross_entropy(z, labels(N, 2, 3)), (N, V, 2, 3), "mean"),
    "pixels, sum": (lambda z: F.cross_entropy(z, labels(N, 2, 3), reduction="sum"), (N, V, 2, 3), "sum"),
    "tokens, equal lengths": (lambda z: F.cross_entropy(z.flatten(0, 1), ragged(True).flatten()), (N, T, V), "mean"),
    "tokens, mean over all": (lambda z: F.cross_entropy(z.flatten(0, 1), ragged().flatten()), (N, T, V), "shares"),
    "tokens, sum": (lambda z: F.cross_entropy(z.flatten(0, 1), ragged().flatten(), reduction="sum"), (N, T, V), "sum"),
    "tokens, sum by N": (
        lambda z: F.cross_entropy(z.flatten(0, 1), ragged().flatten(), reduction="sum") / N, (N, T, V), "mean"),
    "tokens, own means": (
        lambda z: sum(F.cross_entropy(a, b) for a, b in zip(z, ragged())) / N, (N, T, V), "mean"),
    "weighted classes, mean": (
        lambda z: F.cross_entropy(z, labels(N), torch.linspace(1, 9, V).to(z)), (N, V), "shares"),
    "ignored records": (
        lambda z: F.cross_entropy(z, torch.where(torch.arange(N) == 2, -100, labels(N))), (N, V), "shares"),
    "smoothed, mean": (lambda z: F.cross_entropy(z, labels(N), label_smoothing=0.1), (N, V), "mean"),
    "smoothed, sum": (lambda z: F.cross_entropy(z, labels(N), label_smoothing=0.3, reduction="sum"), (N, V), "sum"),
    "smoothed tokens, mean over all": (
        lambda z: F.cross_entropy(z.flatten(0, 1), ragged().flatten(), label_smoothing=0.1), (N, T, V), "shares"),
    "smoothed pixels, mean": (
        lambda z: F.cross_entropy(z, labels(N, 2, 3), label_smoothing=0.1), (N, V, 2, 3), "mean"),
    "logistic, mean": (lambda z: F.binary_cross_entropy_with_logits(z, labels(N, classes=2).float()), (N,), "mean"),
    "logistic, sum": (
        lambda z: F.binary_cross_entropy_with_logits(z, labels(N, 3, classes=2).float(), reduction="sum"), (N, 3),
        "sum"),
    "logistic, several, mean": (
        lambda z: F.binary_cross_entropy_with_logits(z, labels(N, 3, classes=2).float()), (N, 3), "mean"),
    "logistic, labels missing, sum": (
        lambda z: F.binary_cross_entropy_with_logits(
            z, labels(N, 3, classes=2).float(), (labels(N, 3, classes=3) > 0).to(z), reduction="sum"), (N, 3), "sum"),
    "squares": (lambda z: F.mse_loss(z, torch.ones(N, V)), (N, V), None),
    "scaled": (lambda z: 0.25 * F.cross_entropy(z, labels(N)), (N, V), None),
    "contrastive": (lambda z: F.cross_entropy(z @ z.t(), torch.arange(N)), (N, V), None),
    "nothing": (lambda z: 0.0 * z.sum(), (N, V), None),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_what_a_gradient_tells(case, dtype):
    loss, shape, expected = CASES[case]
    z, dz = logits_and_gradient(loss, *shape, dtype=dtype)
    assert reductions_of(z, dz) == ([] if expected is None else [expected])


@pytest.mark.parametrize("seed", range(5))
def test_saturated_and_flat_logits(seed):
    for scale in (1e-3, 20.0):
        for reduction in ("mean", "sum"):
            z, dz = logits_and_gradient(
                lambda z, r=reduction: F.cross_entropy(z, labels(N), reduction=r), N, V, scale=scale, seed=seed
            )
            assert reductions_of(z, dz) == [reduction]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = LoRALinear(4, 4, r=2)
        self.head = nn.Linear(4, V)

    def forward(self, x):
        return {"hidden": (h := self.body(x).tanh()), "logits": self.head(h)}


def loop(loss, reduction="mean", check=True, steps=2, sample_rate=1.0, split_after=None, **kwargs):
    torch.manual_seed(0)
    model = Tagger()
    data = TensorDataset(torch.randn(N, T, 4), ragged())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    optimizer, loader = make_private(
        model, optimizer, DataLoader(data, batch_size=N), noise_multiplier=1.0, sample_rate=sample_rate, check=check,
        loss_reduction=reduction, noise=NoiseSource.fixed(KEY), **kwargs,
    )  # fmt: skip
    for i, (x, y) in enumerate(loader.steps(steps)):
        if i == split_after:
            loader.batch_sampler.physical_batch_size = 4
        loss(model(x)["logits"], y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def token_mean(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def token_sum(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")


def own_mean(z, y):
    each = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
    return (each.sum(1) / (y != -100).sum(1)).mean()


class TestTheLoop:
    def test_a_mean_over_all_tokens_of_the_batch_couples_records(self):
        """What transformers' models do with labels. No layer mixes records, so only the loss can show it."""
        with pytest.raises(ValueError, match="divides by a count over the whole batch.*each record's own positions"):
            loop(token_mean)

    @pytest.mark.parametrize("loss, claimed, cure", [(token_sum, "mean", "sum"), (own_mean, "sum", "mean")])
    def test_another_reduction_than_claimed(self, loss, claimed, cure):
        with pytest.raises(ValueError, match=f"loss_reduction='{claimed}'; pass loss_reduction='{cure}'"):
            loop(loss, claimed)

    def test_it_is_refused_before_anything_is_released(self, monkeypatch):
        charged = []
        monkeypatch.setattr("lalora_kernels.privacy.ledger.Ledger.charge", lambda *a, **k: charged.append(a))
        with pytest.raises(ValueError, match="count over the whole batch"):
            loop(token_mean)
        assert not charged

    @pytest.mark.parametrize("loss, claimed", [(token_sum, "sum"), (own_mean, "mean")])
    def test_a_right_claim_passes_and_says_so(self, loss, claimed):
        assert loop(loss, claimed).loss_reduction_checked

    def test_a_loss_that_shows_nothing_passes_and_says_so(self):
        assert not loop(lambda z, y: z.square().mean()).loss_reduction_checked

    @pytest.mark.parametrize(
        "loss, claimed, cure",
        [
            (lambda z, y: token_sum(z, y) / 64, "mean", "sum"),
            (lambda z, y: own_mean(z, y) / 3, "sum", "mean"),
        ],
        ids=["sum", "mean"],
    )
    def test_a_loss_times_a_number_is_told_by_batches_of_other_sizes(self, loss, claimed, cure):
        with pytest.raises(ValueError, match=f"loss_reduction='{claimed}'; pass loss_reduction='{cure}'"):
            loop(loss, claimed, steps=6, sample_rate=0.5)
        assert loop(loss, cure, steps=6, sample_rate=0.5).loss_reduction_checked

    def test_shares_times_a_number_are_told_by_batches_of_other_counts(self):
        with pytest.raises(ValueError, match="divides by a count over the whole batch"):
            loop(lambda z, y: token_mean(z, y) / 3, steps=6, sample_rate=0.5)

    def test_other_counts_in_as_many_records_tell_no_sum_from_a_mean(self):
        """A third of the mean over records of their sums: with the same N, k is the same whatever the lengths."""
        check = checking.ReductionCheck()
        for lengths in ([5, 1, 3, 4, 2, 5], [1, 1, 2, 2, 3, 3]):
            y = labels(N, T)
            for i, length in enumerate(lengths):
                y[i, length:] = -100
            assert not check._by_other_sizes(*logits_and_gradient(lambda z, y=y: token_sum(z, y) / N / 3, N, T, V))

    @pytest.mark.parametrize("claimed", ["sum", "mean"])
    @pytest.mark.parametrize("pick", ["largest", "two largest", "mean of two"])
    def test_losses_that_pick_records(self, pick, claimed):
        """Whether a record counts depends on the others; passed as a sum, one record changed 1.7 C."""

        def picked(z, y):
            each = F.cross_entropy(z[:, 0], y[:, 0], reduction="none")
            if pick == "largest":
                return each.max()
            hard = each.topk(min(2, len(each))).values
            return hard.mean() if pick == "mean of two" else hard.sum()

        with pytest.raises(ValueError, match="A loss that picks records of the batch.*is refused|count over the whole"):
            loop(picked, claimed, steps=80, sample_rate=0.5)

    @pytest.mark.parametrize("classes", [3, 5000])  # of 5,000 that are alike the largest has 0.0002
    def test_records_whose_cross_entropy_would_have_a_gradient(self, classes):
        """Not the one that is certain of its class: rounding leaves it none."""
        z, y = torch.zeros(4, 2, classes), torch.tensor([[-100] * 2, [0, 0], [0, 0], [-100] * 2])
        z[1, :, 0] = 200.0
        z.requires_grad_(True)
        (dz,) = torch.autograd.grad(F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"), z)
        assert not dz[1].any() and checking.without_gradient(z.detach(), dz).tolist() == [True, False, False, True]

    def test_records_whose_logistic_loss_would_have_a_gradient(self):
        z = torch.tensor([[0.0, 3.0], [200.0, -200.0], [0.0, 0.0]], requires_grad=True)
        each = F.binary_cross_entropy_with_logits(z, torch.tensor([[1.0, 0.0]] * 3), reduction="none")
        (dz,) = torch.autograd.grad(each[1:].sum(), z)
        assert checking.without_gradient(z.detach(), dz).tolist() == [True, False, False]

    def test_a_number_or_a_share_that_stays(self):
        sizes = torch.arange(16) % 7 + 20
        some = torch.bernoulli(torch.full((16, 30), 0.5), generator=torch.Generator().manual_seed(0))
        assert checking.chosen([(int(n), 3) for n in sizes])
        assert checking.chosen([(int(n), int(n) // 4) for n in sizes])
        assert not checking.chosen([(int(n), int(row[:n].sum())) for n, row in zip(sizes, some)])
        assert not checking.chosen([(20, 3)] * 16)  # equal batches tell nothing
        assert not checking.chosen([(int(n), 3) for n in sizes[:15]])

    def test_records_without_a_label_are_none_that_were_picked(self):
        """A head whose labels are missing for some records: how many are differs from batch to batch."""

        def some(z, y):
            return F.cross_entropy(z[:, 0], y[:, 0].where(y[:, 0] % 3 > 0, -100), reduction="none").sum()

        assert loop(some, "sum", steps=60, sample_rate=0.5).loss_reduction_checked

    def test_sizes_that_are_equal_for_long_do_not_hide_it(self):
        calls = []

        def scaled(z, y):
            calls.append(1)
            return token_sum(z, y) / 64

        with pytest.raises(ValueError, match="pass loss_reduction='sum'"):
            loop(scaled, steps=20, split_after=10)
        assert len(calls) == 12

    def test_the_loss_alone(self):
        """check="loss" copies no model, and refuses what the logits show."""
        with pytest.raises(ValueError, match="count over the whole batch"):
            loop(token_mean, check="loss")
        optimizer = loop(own_mean, check="loss")
        assert optimizer.loss_reduction_checked and not optimizer.per_sample_checked

    def test_without_checks_nothing_is_looked_at(self):
        assert not loop(token_mean, check=False).loss_reduction_checked

    def test_lengths_that_are_equal_at_first_do_not_hide_a_mean_over_tokens(self):
        calls = []

        def late(z, y):
            calls.append(1)
            return token_mean(z, y if len(calls) == 4 else torch.zeros_like(y))

        with pytest.raises(ValueError, match="count over the whole batch"):
            loop(late, steps=4)
        assert len(calls) == 4

    @pytest.mark.parametrize("late", [30, None])
    def test_lengths_that_are_equal_for_long_do_not_either(self, late):
        """And while they are, there is nothing to see: no more than the lengths are looked at."""
        calls, looks = [], []

        def after(z, y):
            calls.append(1)
            return token_mean(z, y if len(calls) == late else torch.zeros_like(y))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checking, "SMALL", 0)
            patch.setattr(checking, "reductions_of", lambda *a: looks.append(1) or reductions_of(*a))
            if late is None:
                assert loop(after, steps=30).loss_reduction_checked
            else:
                with pytest.raises(ValueError, match="count over the whole batch"):
                    loop(after, steps=40)
        assert len(calls) == 30
        assert len(looks) == 2 * checking.TRIES + (late is not None)  # hidden and logits

    def test_a_scaled_loss_is_seen_unscaled(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.manual_seed(0)
        done = loop(lambda z, y: scaler.scale(token_sum(z, y)), "sum", grad_scaler=scaler, steps=1)
        assert done.loss_reduction_checked
        with pytest.raises(ValueError, match="pass loss_reduction='mean'"):
            loop(lambda z, y: scaler.scale(own_mean(z, y)), "sum", grad_scaler=scaler, steps=1)

    def test_a_refusal_does_not_use_up_the_looks(self):
        """A cell of a notebook that is run again and again."""
        check = checking.ReductionCheck(Told("mean"))
        for _ in range(3 * checking.TRIES):
            with pytest.raises(ValueError, match="count over the whole batch"):
                look(check, lambda z: token_mean(z, ragged()), N, T, V)


class Told:
    """An engine, as far as the check asks it."""

    def __init__(self, loss_reduction):
        self.loss_reduction, self.batch = loss_reduction, object()

    def _loss_scale(self):
        return None


def look(check, loss, *shape, seed=0, scale=1.0, dtype=torch.float32):
    if not check.looks:  # as the forward hook asks
        return
    check._call += 1
    check._look(check._call, *logits_and_gradient(loss, *shape, seed=seed, scale=scale, dtype=dtype))


class TestRareClasses:
    """Equal weights in the first batches hide what a weighted mean divides by."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("classes", [2, 3])
    def test_a_weight_that_comes_late(self, classes, dtype):
        check = checking.ReductionCheck(Told("mean"))
        weight = torch.tensor([1.0, 99.0, 1.0])[:classes].to(dtype)
        for i in range(100):
            look(check, lambda z: F.cross_entropy(z, torch.zeros(N, dtype=torch.long), weight), N, classes, seed=i,
                 dtype=dtype)  # fmt: skip
        rare = (torch.arange(N) == 2).long()
        with pytest.raises(ValueError, match="class weights"):
            for i in range(1 if classes > 2 else 2 if dtype == torch.float32 else 4):
                look(check, lambda z: F.cross_entropy(z, rare, weight), N, classes, seed=i, dtype=dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("classes, loss_reduction", [(2, "mean"), (3, "sum")])
    @pytest.mark.parametrize("factor", [0.3, 4.0])
    def test_a_weighted_mean_times_a_number(self, factor, classes, loss_reduction, dtype):
        """Its shares add up to that number in every batch; in the first one alone they may do so by chance."""
        check = checking.ReductionCheck(Told(loss_reduction))
        weight = torch.tensor([1.0, 5.0, 2.0])[:classes]
        with pytest.raises(ValueError, match="class weights"):
            for i in range(12):
                n, generator = 4 + i % 3, torch.Generator().manual_seed(i)
                y = torch.randint(0, classes, (n,), generator=generator)
                look(check, lambda z: factor * F.cross_entropy(z.float(), y, weight), n, classes, seed=i,  # noqa: B023
                     dtype=dtype)  # fmt: skip
        assert i >= 2

    def test_labels_that_are_missing_late(self):
        check = checking.ReductionCheck(Told("mean"))
        for i in range(50):
            look(check, lambda z: F.cross_entropy(z, labels(N)), N, V, seed=i)
        with pytest.raises(ValueError, match="tokens that are not ignored"):
            look(check, lambda z: F.cross_entropy(z, torch.where(torch.arange(N) == 2, -100, labels(N))), N, V)

    @pytest.mark.parametrize("classes", [2, 3, V])
    @pytest.mark.parametrize("loss", ["plain", "sum", "smoothed", "soft", "focal", "weighted by N", "logistic",
                                      "weighted, times a number", "weighted sum"])  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_losses_of_each_record_alone_pass(self, loss, classes, dtype):
        check = checking.ReductionCheck(Told("sum" if loss == "sum" else "mean"))
        for i in range(60):
            generator = torch.Generator().manual_seed(i)
            n = int(torch.randint(2, 40, (), generator=generator))
            y = torch.randint(0, classes, (n,), generator=generator)
            q = torch.rand(n, classes, generator=generator)

            def own(z, y=y, q=q):
                z, each = z.float(), F.cross_entropy(z.float(), y, reduction="none")
                return {
                    "plain": lambda: each.mean(),
                    "sum": lambda: each.sum(),
                    "smoothed": lambda: F.cross_entropy(z, y, label_smoothing=0.1),
                    "soft": lambda: F.cross_entropy(z, q / q.sum(1, keepdim=True)),
                    "focal": lambda: ((1 - (-each).exp()) ** 2 * each).mean(),
                    "weighted by N": lambda: (torch.linspace(1.0, 3.0, classes)[y] * each).mean(),
                    "weighted, times a number": lambda: 0.37 * (torch.linspace(1.0, 3.0, classes)[y] * each).mean(),
                    "weighted sum": lambda: 0.37 * (torch.linspace(1.0, 3.0, classes)[y] * each).sum(),
                    "logistic": lambda: F.binary_cross_entropy_with_logits(z, F.one_hot(y, classes).float()),
                }[loss]()

            look(check, own, n, classes, seed=i, scale=10.0 ** (i % 4 - 1), dtype=dtype)

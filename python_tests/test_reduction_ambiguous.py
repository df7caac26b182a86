"""Batches whose gradient fits two reductions: neither claim is refused there, and neither is taken for shown."""

import pytest
import torch
from test_reduction import T, Told, V, labels, logits_and_gradient, look
from torch.nn import functional as F

from lalora_kernels.privacy import reduction as checking
from lalora_kernels.privacy.shares import reductions_of, shares_of


def bce(z):
    return F.binary_cross_entropy_with_logits(z, labels(*z.shape, classes=2).float(), reduction="none")


def ce(z):
    return F.cross_entropy(z.transpose(1, 2), labels(*z.shape[:2]), reduction="none")


class TestAsManyPositionsAsRecords:
    """A sum of records' means and a mean of their sums are one loss then, and either may be claimed."""

    @pytest.mark.parametrize("claimed", ["sum", "mean"])
    @pytest.mark.parametrize("each, shape", [(bce, ()), (ce, (V,))], ids=["labels", "tokens"])
    def test_either_claim_passes_and_the_other_is_refused_at_the_next_batch(self, each, shape, claimed):
        losses = {"sum": lambda z: each(z).mean(1).sum(), "mean": lambda z: each(z).sum(1).mean()}
        check = checking.ReductionCheck(Told(claimed))
        for i in range(3 * checking.TRIES):  # which does not use up the looks
            for loss in losses.values():
                assert reductions_of(*logits_and_gradient(loss, 4, 4, *shape, seed=i)) == ["mean", "sum"]
                look(check, loss, 4, 4, *shape, seed=i)
        assert check.seen is None
        other = "mean" if claimed == "sum" else "sum"
        with pytest.raises(ValueError, match=f"loss_reduction='{claimed}'; pass loss_reduction='{other}'"):
            look(check, losses[other], 5, 4, *shape)
        look(check, losses[claimed], 5, 4, *shape)
        assert check.seen == claimed

    @pytest.mark.parametrize("claimed", ["sum", "mean"])
    @pytest.mark.parametrize("loss", ["sum", "mean"])
    def test_a_loss_times_a_number(self, loss, claimed):
        """Twice as many records of twice as many positions."""
        scaled = {"sum": lambda z: ce(z).mean(1).sum() / 7, "mean": lambda z: ce(z).sum(1).mean() / 7}[loss]
        check = checking.ReductionCheck(Told(claimed))
        for i in range(2 * checking.TRIES):
            look(check, scaled, 3 << i % 2, 6 << i % 2, V, seed=i)
        assert check.seen is None
        if loss == claimed:
            look(check, scaled, 5, 12, V)
            assert check.seen == claimed
        else:
            with pytest.raises(ValueError, match=f"loss_reduction='{claimed}'; pass loss_reduction='{loss}'"):
                look(check, scaled, 5, 12, V)

    def test_a_mean_times_a_number_of_equal_lengths_that_change(self):
        """Each batch's lengths are equal, so a mean over tokens is as likely: no refusal, and nothing is told."""
        check = checking.ReductionCheck(Told("mean"))
        for length in (3, 5, 8, 13):
            look(check, lambda z: ce(z).mean() / 7, length + 1, length, V)
        assert check.seen is None and check.looks


class TestTotalsThatHardlyDiffer:
    @pytest.mark.parametrize("shape", [(V,), (T, V)], ids=["classes", "tokens"])
    def test_own_weights_that_add_up_to_nearly_one_number_pass(self, shape):
        """As those of preferences (DPO) do near the training's start, which hardly differ."""
        for seed in range(12):
            check = checking.ReductionCheck(Told("mean"))
            for i in range(4):
                generator = torch.Generator().manual_seed(100 * seed + i)
                weight = 0.05 * (1 + 0.003 * torch.randn(32, generator=generator))
                y = torch.randint(0, V, (32, *shape[:-1]), generator=generator)

                def own(z, y=y, weight=weight):
                    each = F.cross_entropy(z.movedim(-1, 1), y, reduction="none")
                    return (weight * each.view(len(z), -1).mean(1)).mean()

                look(check, own, 32, *shape, seed=i)

    @pytest.mark.parametrize("spread", [0.01, 0.1])
    def test_shares_that_hardly_differ_are_told(self, spread):
        check, weight = checking.ReductionCheck(Told("mean")), 1 + spread * torch.linspace(0, 1, V)
        with pytest.raises(ValueError, match="class weights"):
            for i in range(8):
                y = torch.randint(0, V, (32,), generator=torch.Generator().manual_seed(i))
                look(check, lambda z: 0.05 * F.cross_entropy(z, y, weight), 32, V, seed=i)  # noqa: B023


class TestWhatRoundingLost:
    """A record that is certain of its class has no gradient in float32, and its share is missing from their sum."""

    def batch(self, i, kind, lost):
        """(z, dz) of a weighted mean times 0.3, or of a logistic one over the records that have a label."""
        generator = torch.Generator().manual_seed(i)
        n = 4 + i % 3
        z, y = 3 * torch.randn(n, 3, generator=generator), torch.randint(0, 3, (n,), generator=generator)
        if kind == "logistic":
            z, w, y = z[:, 0], (torch.arange(n) != 2).float(), (y > 0).float()
            loss = lambda z: F.binary_cross_entropy_with_logits(z, y, w, reduction="sum") / w.sum()  # noqa: E731
            z[0] = 200.0 * (2 * y[0] - 1) if lost else z[0]
        else:
            loss = lambda z: 0.3 * F.cross_entropy(z, y, torch.tensor([1.0, 5.0, 2.0]))  # noqa: E731
            z[0, y[0]] += 200.0 * lost
        z.requires_grad_(True)
        (dz,) = torch.autograd.grad(loss(z), z)
        assert bool((dz[0] == 0).all()) == lost
        return z.detach(), dz

    @pytest.mark.parametrize("kind, at", [("classes", 1), ("logistic", 0)])
    def test_hides_no_shares_in_the_batches_after_it(self, kind, at):
        check = checking.ReductionCheck(Told("mean"))
        with pytest.raises(ValueError, match="count over the whole batch.*class weights"):
            for i in range(12):
                check._call += 1
                check._look(check._call, *self.batch(i, kind, lost=i == at))
        assert i > at

    def test_is_not_what_an_ignored_record_of_large_logits_lacks(self):
        """Logits are what they are up to a number for each record."""
        y = labels(6).where(torch.arange(6) != 2, -100)
        z, dz = logits_and_gradient(lambda z: F.cross_entropy(z + 100.0, y), 6, V)
        found = shares_of(z + 100.0, dz, 1e-3)
        assert found is not None and found.total == pytest.approx(1.0, rel=1e-3)


def test_own_weights_of_two_classes_that_add_up_to_one_once_pass():
    """Any loss of two logits' difference has some k; what one batch's add up to is no count over it."""
    check = checking.ReductionCheck(Told("sum"))
    for i, last in enumerate((0.4, 0.5, 0.7)):
        w = torch.tensor([0.1, 0.2, 0.3, last])
        look(check, lambda z, w=w: (w * F.cross_entropy(z, labels(4, classes=2), reduction="none")).sum(), 4, 2, seed=i)


class TestALossOfWhichNothingElseIsKnown:
    """As many records of every batch are a pick; those that a margin leaves out, or a mask, are other numbers."""

    EACH = {
        "squares": lambda z: (z - 1).square().flatten(),
        "margins": lambda z: F.relu(1 - z).flatten(),
        "logistic": lambda z: F.softplus(z).flatten(),
    }

    def asked(self, loss, sizes, claimed="mean"):
        check = checking.ReductionCheck(Told(claimed))
        for i, n in enumerate(sizes):
            look(check, lambda z, i=i: loss(z, i), n, 1, seed=i)

    @pytest.mark.parametrize("claimed", ["mean", "sum"])
    @pytest.mark.parametrize("each", EACH)
    def test_the_largest_of_a_batch_is_refused(self, each, claimed):
        sizes = [3 + i % 5 for i in range(checking.PICKS)]
        with pytest.raises(ValueError, match="^[2-6] of [3-7] records have no gradient. A loss that picks records"):
            self.asked(lambda z, i: self.EACH[each](z).max(), sizes, claimed)
        self.asked(lambda z, i: self.EACH[each](z).max(), sizes[1:], claimed)  # too few to tell

    def test_the_larger_half_is_refused(self):
        def half(z, i):
            return z.square().flatten().topk(len(z) // 2).values.mean()

        with pytest.raises(ValueError, match="A loss that picks records"):
            self.asked(half, [8 + i % 5 for i in range(20)])

    @pytest.mark.parametrize("each", ["squares", "margins"])
    def test_records_without_a_label_are_no_pick(self, each):
        def labelled(z, i):
            return (self.EACH[each](z) * (torch.arange(len(z)) % 7 < 1 + i % 3)).mean()

        self.asked(labelled, [3 + i % 5 for i in range(40)])

    @pytest.mark.parametrize("weight", [0.0, 1.0])
    def test_a_batch_of_which_none_or_all_count_ends_the_row(self, weight):
        """Where labels are rare most batches have one or none."""

        def once(z, i):
            each = z.square().flatten()
            return weight * each.sum() if i == 10 else each.max()

        self.asked(once, [3 + i % 5 for i in range(25)])

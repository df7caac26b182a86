"""Adaptive clipping: the rule, the count's sensitivity, its noise, what both cost, Opacus beside it."""

import contextlib
import copy
import itertools
import math
import warnings
from unittest import mock

import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy import stats
from small import digits_npz, vit_folder
from tolerances import EPSILON_GRID, KS_ACCEPT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels import dispatch, functional
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, Watch, prepare
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.adaptive import AdaptiveClipping
from lalora_kernels.privacy.checks import single_sample_gradients
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.sampling import BatchInfo

KEY = bytes(range(3, 35))


def head(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3)).to(dtype)


def records(n: int = 24, dtype=torch.float64) -> TensorDataset:
    """Norms of the gradients spread over two decades."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    x *= 10 ** torch.linspace(-1, 1, n, dtype=dtype).view(-1, 1)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def private(model, data, lr=0.1, key=KEY, **kwargs):
    kwargs = {"noise_multiplier": 0.0, "sample_rate": 1.0, "target_unclipped_quantile": 0.5, **kwargs}
    noise = None if key is None else NoiseSource.fixed(key)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    return make_private(model, optimizer, DataLoader(data, batch_size=4), noise=noise, **kwargs)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, opt, loader, steps):
    """The bound before each step, and after the last."""
    bounds = [opt.max_grad_norm]
    for x, y in loader.steps(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        if opt.ledger.steps == len(bounds):  # the last physical batch of a logical one
            bounds.append(opt.max_grad_norm)
        opt.zero_grad()
    return bounds


def test_without_noise_it_is_opacus_adaclip():
    """The same bounds and the same weights over ten steps; q = 1, where the batch size is no secret."""
    from opacus import GradSampleModule
    from opacus.optimizers import AdaClipDPOptimizer

    model, data, eta = head(), records(), 0.7
    twin = GradSampleModule(copy.deepcopy(model))
    theirs = AdaClipDPOptimizer(
        torch.optim.SGD(twin.parameters(), 0.1), noise_multiplier=0.0, target_unclipped_quantile=0.3,
        clipbound_learning_rate=eta, max_clipbound=1e3, min_clipbound=1e-3, unclipped_num_std=1e-12, max_grad_norm=2.0,
        expected_batch_size=24,
    )  # fmt: skip
    expected = [2.0]
    for _ in range(10):
        x, y = data.tensors
        nn.functional.cross_entropy(twin(x), y).backward()
        theirs.step()
        theirs.zero_grad()
        expected.append(float(theirs.max_grad_norm))
    opt, loader = private(
        model, data, target_unclipped_quantile=0.3, clipbound_learning_rate=eta, max_grad_norm=2.0, min_clipbound=1e-3,
        max_clipbound=1e3,
    )  # fmt: skip
    bounds = train(model, opt, loader, 10)
    assert max(bounds) / min(bounds) > 1.5
    assert bounds == pytest.approx(expected, rel=1e-6)
    for ours, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)  # Opacus adds 1e-6 to each norm


def test_the_bound_finds_the_quantile():
    data = records(40)
    for gamma in (0.25, 0.5, 0.8):
        model = head()
        opt, loader = private(
            model, data, lr=1e-9, target_unclipped_quantile=gamma, max_grad_norm=50.0, clipbound_learning_rate=0.3
        )
        train(model, opt, loader, 60)
        opt.detach()
        grads = single_sample_gradients(model, data.tensors, loss)
        norms = torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)
        share = float((norms <= opt.max_grad_norm).double().mean())
        assert abs(share - gamma) <= 0.05


def test_the_formula_on_empty_batches():
    """C_{t+1} = C_t exp(-eta (1/2 + sigma_b xi / b - gamma)), xi from the sum's release under an index of its own."""
    model, eta, gamma, std = head(torch.float32), 0.4, 0.7, 3.0
    opt, loader = private(
        model, records(dtype=torch.float32), sample_rate=1e-9, noise_multiplier=1.1, max_grad_norm=0.8,
        target_unclipped_quantile=gamma, clipbound_learning_rate=eta, unclipped_num_std=std, min_clipbound=1e-300,
        max_clipbound=1e300,
    )  # fmt: skip
    opt.engine.adaptive.expected_batch_size = 6.0  # q |D| would make the noise all there is
    bounds = train(model, opt, loader, 5)
    expected = [0.8]
    for release in range(5):
        xi = float(functional.chacha20_normal(1, key=KEY, release=release, tensor_index=2))
        expected.append(expected[-1] * math.exp(-eta * (0.5 + std * xi / 6.0 - gamma)))
    assert len(opt.engine.sites) == 2 and bounds == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("asked", ["argument", "context", "environment"])
@pytest.mark.parametrize("name", ["triton", "cuda", "reference", "cpp"])
def test_the_counts_noise_is_drawn_on_the_host_whatever_backend_is_asked_for(name, asked, monkeypatch):
    """The ledger is charged by then: an exception would waste the release."""
    rule = AdaptiveClipping(
        target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, min_clipbound=1e-3, max_clipbound=10.0,
        unclipped_num_std=None, noise_multiplier=1.0, expected_batch_size=8.0,
    )  # fmt: skip
    engine = mock.Mock(noise_std=1.0, noise=NoiseSource.fixed(KEY), sites=[None, None], max_grad_norm=1.0, backend=None)
    xi = float(functional.chacha20_normal(1, key=KEY, release=3, tensor_index=2, backend="reference"))
    load, served = dispatch._load, []
    monkeypatch.setattr(dispatch, "_load", lambda op, name, *on: served.append(name) or load(op, name, *on))
    if asked == "environment":
        monkeypatch.setenv("LALORA_BACKEND", name)
    engine.backend = name if asked == "argument" else None
    with dispatch.use_backend(name) if asked == "context" else contextlib.nullcontext():
        rule.release(engine, 3)
    assert engine.max_grad_norm == pytest.approx(math.exp(-0.2 * rule.std * xi / 8.0), rel=1e-6)
    assert served == ["reference" if name == "reference" else "cpp"]


def test_the_counts_noise_is_normal_and_independent_of_the_sums():
    model, std = head(torch.float32), 2.5
    opt, loader = private(
        model, records(dtype=torch.float32), lr=1e-9, sample_rate=1e-9, noise_multiplier=1.0, unclipped_num_std=std,
        min_clipbound=1e-300, max_clipbound=1e300, clipbound_learning_rate=1.0,
    )  # fmt: skip
    opt.engine.adaptive.expected_batch_size = 50.0
    bounds, sums = [1.0], []
    for x, y in loader.steps(400):
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        bounds.append(opt.max_grad_norm)
        sums.append(float(opt.engine.sites[0].released[0, 0]) / bounds[-2])
        opt.zero_grad()
    xi = [-50.0 * math.log(b / a) / std for a, b in itertools.pairwise(bounds)]
    assert stats.kstest(xi, "norm").pvalue > KS_ACCEPT
    assert stats.kstest([1.5 * v for v in xi], "norm").pvalue < 1e-3
    assert stats.pearsonr(xi, sums).pvalue > KS_ACCEPT


@pytest.mark.parametrize("physical", [None, 1, 5])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_one_record_changes_the_count_by_a_half(bad, physical):
    """Added or removed, clipped or not, finite or not; split into physical batches or not."""
    x, y = records(12).tensors
    if bad is not None:
        x[4, 2] = bad
    counts = []
    original = AdaptiveClipping.release

    def release(self, engine, number):
        counts.append(float(self.counted))
        original(self, engine, number)

    with mock.patch.object(AdaptiveClipping, "release", release), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for gone in (None, *range(12)):
            keep = [i for i in range(12) if i != gone]
            model = head()
            opt, loader = private(
                model, TensorDataset(x[keep], y[keep]), check=False, physical_batch_size=physical, max_grad_norm=3.0
            )
            train(model, opt, loader, 1)
    whole, *without = counts
    assert {abs(whole - other) for other in without} == {0.5} and len(set(without)) == 2  # some clipped, some not


def test_a_batch_that_was_left_counts_no_more():
    sq = torch.tensor([[0.1, 0.1, 9.0]]).double()
    rule = AdaptiveClipping(
        target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, min_clipbound=1e-3, max_clipbound=10.0,
        unclipped_num_std=None, noise_multiplier=1.0, expected_batch_size=8.0,
    )  # fmt: skip
    for first, expected in ((True, 0.5), (False, 1.0), (True, 0.5)):
        rule.count(sq, 1.0, BatchInfo(3, 3, first, False), 1.0)
        assert float(rule.counted) == expected


def test_sum_and_count_together_cost_what_the_ledger_is_charged():
    """Two Gaussian mechanisms, of multipliers sigma and 2 sigma_b, composed by Google's accountant."""
    z, std = 1.3, 0.9
    model, data = head(torch.float32), records(dtype=torch.float32)
    opt, loader = private(model, data, key=None, noise_multiplier=z, unclipped_num_std=std, max_grad_norm=0.6)
    spent = []
    with mock.patch.object(functional, "privatize", wraps=functional.privatize) as spy:
        bounds = train(model, opt, loader, 3)
        spent = [call.kwargs["noise_std"] for call in spy.call_args_list]
    sigmas = {round(noise / bound, 9) for noise, bound in zip(spent, bounds)}
    assert len(sigmas) == 1 and len(set(bounds)) == 4
    (sigma,) = sigmas
    assert sigma == pytest.approx((z**-2 - (2 * std) ** -2) ** -0.5, rel=1e-8) and sigma > 1.2 * z
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(sigma), 3)  # q = 1: no sampling
    accountant.compose(GaussianDpEvent(2 * std), 3)
    assert opt.get_epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=EPSILON_GRID)
    (entry,) = opt.ledger.entries
    assert (entry.noise_multiplier, entry.count, entry.clipping, entry.max_grad_norm) == (z, 3, "flat, adaptive", None)


def test_calibration_holds_both():
    model, data = head(torch.float32), records(dtype=torch.float32)
    opt, loader = private(
        model, data, key=None, noise_multiplier=None, target_epsilon=4.0, target_delta=1e-5, steps=5, sample_rate=0.5
    )
    train(model, opt, loader, 5)
    assert 4.0 - 1e-2 < opt.get_epsilon() <= 4.0
    assert opt.engine.adaptive.sum_multiplier > opt.noise_multiplier


def test_adapters_and_resume_go_on_with_the_bound():
    def build():
        torch.manual_seed(1)
        return nn.Sequential(LoRALinear.from_linear(nn.Linear(5, 3), r=2))

    data = records(dtype=torch.float32)
    model = build()
    opt, loader = private(model, data, noise_multiplier=1.0)
    bounds = train(model, opt, loader, 3)
    fresh = build()
    again, loader = private(fresh, data, noise_multiplier=1.0)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.max_grad_norm == bounds[-1] != 1.0
    assert again.engine.noise_std == again.engine.adaptive.sum_multiplier * bounds[-1]
    train(fresh, again, loader, 1)
    assert again.max_grad_norm != bounds[-1]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target_unclipped_quantile": 1.5}, "target_unclipped_quantile is a number in"),
        ({"target_unclipped_quantile": math.nan}, "target_unclipped_quantile is a number in"),
        ({"clipbound_learning_rate": 0.0}, "clipbound_learning_rate is a finite number > 0"),
        ({"min_clipbound": 2.0, "max_clipbound": 1.0}, "min_clipbound < max_clipbound"),
        ({"unclipped_num_std": 0.0}, "unclipped_num_std is a finite number > 0"),
        ({"noise_multiplier": 3.0, "unclipped_num_std": 1.5}, "too small.*must be above 1.5"),
        ({"clipping": "per_layer"}, "needs clipping='flat'"),
        ({"clipping": "automatic"}, "needs clipping='flat'"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        private(head(), records(), **kwargs)


def test_the_bound_stays_within_its_ends():
    for gamma, end in ((0.0, 0.5), (1.0, 2.0)):
        model = head()
        opt, loader = private(
            model, records(), target_unclipped_quantile=gamma, clipbound_learning_rate=1e9, min_clipbound=0.5,
            max_clipbound=2.0,
        )  # fmt: skip
        assert train(model, opt, loader, 2)[-1] == end


class Stopped(KeyboardInterrupt):
    pass


def test_a_federated_run_adapts_C_pays_for_it_and_goes_on_with_it(tmp_path):
    """A client's C follows its norms from round to round and over a resume; the ledger holds sum and count."""
    config = make_config({
        "model": vit_folder(tmp_path / "vit"), "dataset": digits_npz(tmp_path / "d.npz", 60, 30), "clients": 1,
        "fraction": 1.0, "rounds": 2, "local_steps": 2, "rank": 2, "batch_size": 8, "partition": "iid", "epsilon": 8.0,
        "delta": 1e-4, "lr": 0.1, "device": "cpu", "clipping": "adaptive", "max_grad_norm": 30.0,
        "target_unclipped_quantile": 0.2,
    })  # fmt: skip
    run = Run.start(prepare(config), tmp_path / "run")
    sigma = run.plan.clients[0].noise_multiplier
    both = (sigma**-2 - (2 * max(8 / 20, 2 * sigma)) ** -2) ** -0.5  # with a count of that deviation it costs sigma
    steps, bounds, original = [0], [30.0], AdaptiveClipping.release

    def count():
        steps[0] += 1
        if steps[0] == 3:  # in the second round
            raise Stopped

    def release(self, engine, number):
        assert engine.max_grad_norm == bounds[-1]
        assert engine.noise_std == pytest.approx(both * bounds[-1], rel=1e-9) and both > 1.01 * sigma
        original(self, engine, number)
        bounds.append(engine.max_grad_norm)

    with mock.patch.object(AdaptiveClipping, "release", release):
        with pytest.raises(Stopped):
            run.train(Watch(on_step=count))
        del bounds[3:]  # the second round is made again, from where the first one ended
        run = Run.resume(tmp_path / "run")
        run.train()
    assert len(set(bounds)) == 5 and run.clients[0].max_grad_norm == bounds[-1]
    (entry,) = run.clients[0].ledger.entries
    assert (entry.clipping, entry.max_grad_norm, entry.noise_multiplier) == ("flat, adaptive", None, sigma)
    assert entry.count == 4 and run.clients[0].ledger.epsilon(1e-4) <= 8.0

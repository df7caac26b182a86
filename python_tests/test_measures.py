"""Question 5's measures and question 3's filters, against hand-computed numbers and dense matrices."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import vit_folder

from lalora_kernels import adapt, make_private
from lalora_kernels.models import load_model
from lalora_kernels.nn import lora_layers
from lalora_kernels.privacy.postprocess import EXPERIMENTAL, KEPT, Temporal, laplacian, permuted, projected
from lalora_kernels.reproduce.measures import (
    aggregation_error,
    cosine,
    curvature,
    filter_gain,
    noise_terms,
    plain_loss,
    top_eigenvalue,
)

STATE = {"l.lora_A": torch.tensor([[1.0, 2.0]]), "l.lora_B": torch.tensor([[1.0], [0.0]])}


def t(values):
    return {key: torch.tensor(value) for key, value in values.items()}


def test_aggregation_error_by_hand():
    one = t({"l.lora_A": [[2.0, 0.0]], "l.lora_B": [[1.0], [1.0]]})
    two = t({"l.lora_A": [[0.0, 4.0]], "l.lora_B": [[3.0], [-1.0]]})
    # mean of BA: ([[2,0],[2,0]] + [[0,12],[0,-4]]) / 2 = [[1,6],[1,-2]]; mean B = (2,0), mean A = (1,2): [[2,4],[0,0]]
    found = aggregation_error([one, two], STATE, [1.0, 1.0])
    assert found["error"] == pytest.approx(math.sqrt(1 + 4 + 1 + 4))
    assert found["product"] == pytest.approx(math.sqrt(1 + 36 + 1 + 4))
    # one factor shared: exact
    only_b = [{"l.lora_B": u["l.lora_B"]} for u in (one, two)]
    assert aggregation_error(only_b, STATE, [3.0, 1.0])["error"] == 0.0


def test_cosine_by_hand():
    moved = [{"l.lora_B": torch.tensor(v)} for v in ([[2.0], [0.0]], [[1.0], [5.0]], [[2.0], [1.0]])]
    # changes (1,0), (0,5), (1,1): pairs 0, 1/sqrt2, 1/sqrt2
    assert cosine(moved, STATE) == pytest.approx(2 / math.sqrt(2) / 3)
    assert cosine(moved[:1], STATE) is None
    assert cosine([moved[0], {"l.lora_B": STATE["l.lora_B"]}], STATE) is None  # one did not move


@pytest.mark.parametrize("smoothing", [False, True])
def test_noise_terms_are_those_of_the_dense_product(smoothing):
    g = torch.Generator().manual_seed(0)
    state = {"l.lora_A": torch.randn(3, 40, generator=g), "l.lora_B": torch.randn(30, 3, generator=g)}
    found = [noise_terms(state, 0.1, "AB", smoothing, torch.Generator().manual_seed(i)) for i in range(300)]
    # rows of A and columns of B are filtered; edges keep a little more (diagnostics.noise_variance)
    keep = [(70 * n + 128) / 256 / n if smoothing else 1.0 for n in (40, 30)]
    quadratic = math.sqrt(np.mean([f["quadratic"] ** 2 for f in found]))
    assert quadratic == pytest.approx(0.01 * math.sqrt(3 * 40 * 30 * keep[0] * keep[1]), rel=0.02)
    linear = np.mean([f["linear"] ** 2 for f in found])
    b, a = float(state["l.lora_B"].square().sum()), float(state["l.lora_A"].square().sum())
    assert linear == pytest.approx(0.01 * (b * 40 * keep[0] + a * 30 * keep[1]), rel=0.03)
    alone = noise_terms(state, 0.1, "B", smoothing)
    assert alone["quadratic"] == 0.0 < alone["linear"]


@pytest.mark.parametrize("negative", [False, True])
def test_top_eigenvalue_is_that_of_the_dense_hessian(negative):
    g = torch.Generator().manual_seed(1)
    M = torch.randn(7, 7, generator=g, dtype=torch.float64)
    H = torch.diag(torch.arange(-9.0, -2.0, dtype=torch.float64)) + 1.5 * M @ M.T / 7 if negative else M @ M.T
    assert (torch.linalg.eigvalsh(H)[0].abs() > torch.linalg.eigvalsh(H)[-1].abs()) == negative
    loss = lambda at: 0.5 * torch.cat([p.flatten() for p in at]) @ H @ torch.cat([p.flatten() for p in at])  # noqa: E731
    found = top_eigenvalue(loss, [torch.ones(3, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)], 2000)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-6)


def test_curvature_of_a_model_is_that_of_its_dense_hessian(tmp_path):
    classifier = load_model(vit_folder(tmp_path / "vit"), 10)
    adapt(classifier.model, r=1, target_modules=["q_proj"], verbose=False)
    for _, layer in lora_layers(classifier.model):
        torch.nn.init.normal_(layer.lora_B, std=2.0, generator=torch.Generator().manual_seed(3))
    batch = classifier.collate([(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(4)), i) for i in range(4)])
    found = curvature(classifier, batch, 300)
    # by central differences of the gradient that the kernels give, in float64
    model = copy.deepcopy(classifier.model).double().eval()
    params = [p for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B)]
    for p in params:
        p.requires_grad_(True)

    def gradient():
        loss = F.cross_entropy(model(batch[0].double()).logits, batch[1])
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)])

    columns = []
    for p in params:
        flat = p.data.view(-1)
        for i in range(len(flat)):
            flat[i] += 1e-5
            up = gradient()
            flat[i] -= 2e-5
            columns.append((up - gradient()) / 2e-5)
            flat[i] += 1e-5
    H = torch.stack(columns)
    values = torch.linalg.eigvalsh((H + H.T) / 2)
    assert found == pytest.approx(float(values[-1]), rel=1e-2)


def test_gradients_of_the_plain_copy_are_those_of_the_kernels(tmp_path):
    classifier = load_model(vit_folder(tmp_path / "vit"), 10)
    adapt(classifier.model, r=2, target_modules=["q_proj", "fc1"], verbose=False)
    for _, layer in lora_layers(classifier.model):
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(3))
    batch = classifier.collate([(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(4)), i) for i in range(4)])
    loss, factors = plain_loss(classifier, batch)
    at = [value.requires_grad_() for value in factors.values()]
    found = dict(zip(factors, torch.autograd.grad(loss(at), at)))
    named = {name: p for name, p in classifier.model.named_parameters() if name in factors}
    assert set(named) == set(factors)
    for p in named.values():
        p.requires_grad_(True)
    expected = torch.autograd.grad(classifier.loss(batch, classifier.model.eval()) / 4, list(named.values()))
    torch.testing.assert_close([found[name] for name in named], list(expected), rtol=1e-4, atol=1e-6)


def test_filter_gain_against_the_dense_filter():
    """1.91 where neighbours are equal, 0.72 where they are uncorrelated, 0 where they alternate; in between as the
    matrix that NumPy's padding and convolution make says."""
    F5 = np.stack([
        np.convolve(np.pad(row, 2, mode="symmetric"), np.array([1, 4, 6, 4, 1]) / 16, "valid") for row in np.eye(2000)
    ]).T  # fmt: skip
    smoothly = np.sin(np.arange(2000) / 3.0)
    a = np.stack([smoothly, np.random.default_rng(0).standard_normal(2000)])
    b = a[1:].T
    found = filter_gain({"x.lora_A": torch.tensor(a), "y.lora_B": torch.tensor(b)})
    gain = lambda g: np.sum(g * (g @ F5.T)) / np.sum(g * g) / math.sqrt(70 / 256)  # noqa: E731
    assert found["A"] == pytest.approx(gain(a), rel=1e-9) and found["B"] == pytest.approx(gain(b.T), rel=1e-9)
    assert found["B"] == pytest.approx(0.375 / math.sqrt(70 / 256), abs=0.03)
    ones, alternating = torch.ones(1, 64), torch.tensor([[1.0, -1.0] * 500])
    assert filter_gain({"x.lora_A": ones})["A"] == pytest.approx(1 / math.sqrt(70 / 256))
    assert filter_gain({"x.lora_A": alternating})["A"] == pytest.approx(0.0, abs=2e-3)
    assert filter_gain({"x.lora_A": ones}, permuted)["A"] == pytest.approx(1 / math.sqrt(70 / 256))
    assert math.isnan(filter_gain({"x.lora_A": ones})["B"])


# ---------------------------------------------------------------- filters


def matrix(what, n):
    return what(torch.eye(n, dtype=torch.float64), 0)


@pytest.mark.parametrize("what", [permuted, laplacian])
def test_filters_along_the_axis_keep_the_same_variance_and_what_is_constant(what):
    M = matrix(what, 64)
    torch.testing.assert_close(M.sum(1), torch.ones(64, dtype=torch.float64))  # DC gain 1
    variance = float(M.square().sum(1).median())
    assert variance == pytest.approx(KEPT, rel=1e-3)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(what(x, 1), x @ M.T)


def test_laplacian_is_the_inverse_of_the_dense_operator_and_permuted_that_of_shuffled_features():
    n, lam = 9, 0.7
    L = torch.roll(torch.eye(n), 1, 0) + torch.roll(torch.eye(n), -1, 0) - 2 * torch.eye(n)
    inverse = torch.linalg.inv((torch.eye(n) - lam * L).double())
    torch.testing.assert_close(laplacian(torch.eye(n, dtype=torch.float64), 0, lam), inverse)
    M = matrix(permuted, 64)
    spread = [(M[i].nonzero().flatten() - i).abs().max() for i in range(64)]
    assert max(spread) > 20 and all(len(M[i].nonzero()) <= 5 for i in range(64))


def test_temporal_filter_against_the_recursion_written_out():
    a, b = 1 - 2 * KEPT, KEPT
    g = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    doppler, m, c, before = Temporal(), torch.zeros(3, dtype=torch.float64), 0.0, None
    for step in g:
        m = a * m + b * (step + (0 if before is None else before))
        c = a * c + b * (2 if before is not None else 1)
        torch.testing.assert_close(doppler("x", step), m / c)
        before = step
    impulse = torch.zeros(400, 1, dtype=torch.float64)
    impulse[100] = 1.0  # settled: the variance that it leaves of white noise is the energy of its answer
    doppler = Temporal()
    answer = torch.stack([doppler("x", step) for step in impulse])
    assert float(answer.square().sum()) == pytest.approx(KEPT, rel=1e-6)
    constant = Temporal()
    assert all(torch.equal(constant("y", torch.ones(1)).round(decimals=5), torch.ones(1)) for _ in range(5))


def test_projected_gradient_is_the_closed_form():
    g = torch.Generator().manual_seed(5)
    A, B = torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g)
    G_A, G_B = torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g)
    eye = 0.1 * torch.eye(2)
    torch.testing.assert_close(projected(G_B, A, "lora_B", 2.0), G_B @ torch.linalg.inv(A @ A.T + eye) / 4)
    torch.testing.assert_close(projected(G_A, B, "lora_A", 2.0), torch.linalg.inv(B.T @ B + eye) @ G_A / 4)


def filtered(smoothing, lr, steps):
    """(the model, its optimizer, the gradients that each step released) under one key."""
    from lalora_kernels.privacy.noise import NoiseSource

    torch.manual_seed(0)
    model = adapt(torch.nn.Sequential(torch.nn.Linear(12, 16)), r=2, target_modules=["0"], verbose=False)
    data = torch.utils.data.DataLoader([(torch.randn(12), torch.randn(16)) for _ in range(8)], batch_size=8)
    optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=lr), data, smoothing=smoothing, noise_multiplier=1.0,
        noise=NoiseSource.fixed(bytes(32)), check=False,
    )  # fmt: skip
    grads = []
    for x, y in loader.steps(steps):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
    return model, optimizer, grads


@pytest.mark.parametrize("smoothing", EXPERIMENTAL)
def test_an_experimental_filter_changes_the_release_after_the_noise(smoothing):
    """p.grad is what the filter makes of the kernels' release under the same key; the ledger is the same."""
    inside, _ = EXPERIMENTAL[smoothing]
    (_, plain, (raw,)), (model, optimizer, (found,)) = (filtered(name, 0.1, steps=1) for name in (inside, smoothing))
    A = model[0].lora_A.detach()
    expected = {
        "permuted": lambda: permuted(raw, 0), "laplacian": lambda: laplacian(raw, 0), "temporal": lambda: raw,
        "projected": lambda: projected(raw, A, "lora_B", 1.0),
    }[smoothing]()  # fmt: skip
    torch.testing.assert_close(found, expected)
    spent = [[(e.noise_multiplier, e.sample_rate) for e in o.ledger.entries] for o in (plain, optimizer)]
    assert spent[0] == spent[1] and spent[0]


def test_the_temporal_filter_remembers_each_factor_s_own_releases():
    """At a learning rate of 0 the raw releases stay the same; B is active in steps 1 and 3, A in 2 and 4."""
    raw, grads = (filtered(name, 0.0, steps=4)[2] for name in (None, "temporal"))
    a, b = 1 - 2 * 70 / 256, 70 / 256
    for i in (0, 1):
        (first, second), (found, then) = raw[i::2], grads[i::2]
        torch.testing.assert_close(found, first)
        constant = a * b + 2 * b  # the same filter's answer to 1, 1
        torch.testing.assert_close(then, (a * b * first + b * (second + first)) / constant)


def test_the_projected_gradient_refuses_a_step_that_trains_both_factors():
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), r=1, target_modules=["0"], verbose=False)
    data = torch.utils.data.DataLoader([(torch.randn(4), torch.randn(4)) for _ in range(4)], batch_size=4)
    optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, method="dp-lora", smoothing="projected",
        noise_multiplier=1.0, check=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="one factor at a step"):
        for x, y in loader.steps(1):
            F.mse_loss(model(x), y).backward()
            optimizer.step()

"""Losses as people write them, in a private loop: each takes the step of single-record backwards, or is refused."""

import copy

import pytest
import torch
from test_private_step import KEY, train, written_out
from tolerances import PRIVATE_STEP_F64
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from trainer_models import adapted as adapted_hf

import lalora_kernels as lk
from lalora_kernels.privacy.checks import check_per_sample
from lalora_kernels.trainer_loss import find_shift, logits_of, record_losses

N, T, K = 5, 4, 6


class Net(nn.Module):
    def __init__(self, outputs: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


def model_of(outputs: int):
    torch.manual_seed(0)
    model = lk.adapt(Net(outputs), r=2, target_modules=["fc1", "fc2"], verbose=False).double()
    for _, layer in lk.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def tokens():
    y = torch.randint(0, K, (N, T), generator=torch.Generator().manual_seed(1))
    for i, length in enumerate((4, 1, 3, 2, 4)):
        y[i, length:] = -100
    return y


class Own(nn.Module):
    """A mean over each record's own tokens, then over records."""

    def __init__(self, **kwargs):
        super().__init__()
        self.each = nn.CrossEntropyLoss(reduction="none", **kwargs)

    def forward(self, z, y):
        return (self.each(z.transpose(1, 2), y).sum(1) / (y != -100).sum(1)).mean()


CLASSES, FLOATS = torch.arange(N) % K, torch.linspace(-1, 1, N * 2, dtype=torch.float64).view(N, 2)
LOSSES = {  # name: (criterion, outputs, targets, whether inputs have T positions)
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), K, CLASSES, False),
    "CrossEntropyLoss, label_smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), K, CLASSES, False),
    "CrossEntropyLoss, own means of tokens": (Own(), K, tokens(), True),
    "CrossEntropyLoss, own means, smoothed": (Own(label_smoothing=0.1), K, tokens(), True),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), 2, (FLOATS > 0).double(), False),
    "BCELoss": (lambda z, y: nn.BCELoss()(z.sigmoid(), y), 2, (FLOATS > 0).double(), False),
    "MSELoss": (nn.MSELoss(), 2, FLOATS, False),
    "L1Loss": (nn.L1Loss(), 2, FLOATS, False),
}


def batches(targets, positions, **kwargs):
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(N, *([T] if positions else []), 3, dtype=torch.float64), targets)
    return data, DataLoader(data, batch_size=N)


def private(model, loader, **kwargs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    return lk.make_private(
        model, optimizer, loader, noise_multiplier=0.0, noise=lk.NoiseSource.fixed(KEY), sample_rate=1.0,
        max_grad_norm=0.05, smoothing=None, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_takes_the_step_of_single_records(name):
    criterion, outputs, targets, positions = LOSSES[name]
    model = model_of(outputs)
    twin = copy.deepcopy(model)
    lk.set_active(twin, "B")
    data, loader = batches(targets, positions)

    def loss(m, batch):
        return criterion(m(batch[0]), batch[1])

    grads = written_out(twin, data.tensors, loss, clipping="flat", C=0.05, smoothing=None, divisor=N)
    optimizer, loader = private(model, loader)
    train(model, loss, optimizer, loader, 1)
    for key, p in twin.named_parameters():
        expected = p - 0.5 * grads[key] if key in grads else p
        torch.testing.assert_close(model.get_parameter(key), expected, **PRIVATE_STEP_F64, msg=key)
    assert len(grads) == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignore_index_with_a_mean_over_the_batchs_tokens(smoothing):
    model = model_of(K)
    _, loader = batches(tokens(), True)
    optimizer, loader = private(model, loader)
    criterion = nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="divides by a count over the whole batch.*each record's own positions first"):
        train(model, lambda m, b: criterion(m(b[0]).flatten(0, 1), b[1].flatten()), optimizer, loader, 1)
    assert optimizer.ledger.steps == 0


def test_what_logits_do_not_show_is_asked_of_check_per_sample():
    """A squared error over positions that count: of its gradient alone nothing is known."""

    def loss(m, batch):
        z, counts = m(batch[0]).squeeze(-1), batch[1] != -100
        return (z - 1)[counts].square().mean()

    model = model_of(1)
    data, _ = batches(tokens(), True)
    with pytest.raises(ValueError, match="the loss couples records"):
        check_per_sample(model, data.tensors, loss)


class Rows(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data["labels"])

    def __getitem__(self, i):
        return {k: v[i] for k, v in self.data.items()}


class TestOutputsLoss:
    """transformers' ``model(**batch).loss``."""

    def test_of_a_classifier(self):
        _, model, data = adapted_hf("bert")
        twin = copy.deepcopy(model)
        lk.set_active(twin, "B")
        grads = written_out(twin, data, lambda m, b: m(**b).loss, clipping="flat", C=0.05, smoothing=None, divisor=N)
        optimizer, loader = private(model, DataLoader(Rows(data), batch_size=N))
        train(model, lambda m, b: m(**b).loss, optimizer, loader, 1)
        for key, p in twin.named_parameters():
            expected = p - 0.5 * grads[key] if key in grads else p
            torch.testing.assert_close(model.get_parameter(key), expected, **PRIVATE_STEP_F64, msg=key)

    def test_of_a_language_model_is_a_mean_over_all_tokens(self):
        _, model, data = adapted_hf("gpt2")
        optimizer, loader = private(model, DataLoader(Rows(data), batch_size=N))
        with pytest.raises(ValueError, match="divides by a count over the whole batch"):
            train(model, lambda m, b: m(**b).loss, optimizer, loader, 1)

    def test_of_a_language_model_record_by_record(self):
        _, model, data = adapted_hf("gpt2")
        optimizer, loader = private(model, DataLoader(Rows(data), batch_size=N))

        def loss(m, batch):
            logits = m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return record_losses(logits, batch["labels"], shift=True).mean()

        train(model, loss, optimizer, loader, 2)
        assert optimizer.ledger.steps == 2 and optimizer.per_sample_checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_s_own_loss_that_is_half_a_percent_off_is_another_but_for_half_precision_s_rounding(dtype):
    class Off(nn.Module):
        def forward(self, x, labels):
            logits = x.to(dtype)
            return {"logits": logits, "loss": 1.005 * nn.functional.cross_entropy(logits, labels)}

    batch = {"x": torch.linspace(-1, 1, 12).view(4, 3), "labels": torch.tensor([0, 1, 2, 1])}
    if dtype == torch.bfloat16:
        assert find_shift(Off(), batch) is not None
    else:
        with pytest.raises(ValueError, match="own loss of one record is .* so it computes something else"):
            find_shift(Off(), batch)


@pytest.mark.parametrize("outputs", [{"loss": torch.ones(())}, {"logits": None}, (torch.ones(2, 3),)])
def test_outputs_without_logits_are_told_what_to_pass(outputs):
    with pytest.raises(ValueError, match="no 'logits'.*pass compute_loss_func="):
        logits_of(outputs)

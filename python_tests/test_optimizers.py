"""torch's optimizers, timm's, and Meta's schedule-free ones, which are evaluated with other weights than they train."""

import copy

import peft
import pytest
import schedulefree
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft.optimizers import create_lorafa_optimizer
from test_private_step import KEY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_models import adapted, rows, trainer_of

import lalora_kernels as lk
from lalora_kernels.privacy.make_private import UNFIT

F = nn.functional
STEPS = 6
FREE = [schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree]
CLASSES = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
TORCHS = [kind for kind in set(CLASSES) - {torch.optim.Optimizer, *UNFIT} if issubclass(kind, torch.optim.Optimizer)]
TORCHS.sort(key=lambda kind: kind.__name__)
TIMMS = [timm.optim.Adafactor, timm.optim.Adan, timm.optim.Adopt, timm.optim.Lamb, timm.optim.LaProp, timm.optim.Lars,
         timm.optim.Lion, timm.optim.MADGRAD, timm.optim.RMSpropTF]  # fmt: skip


@pytest.mark.parametrize("kind", TORCHS + TIMMS + FREE, ids=lambda kind: kind.__name__)
def test_a_private_one_is_the_plain_one_on_the_released_gradients(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    head = [] if kind.__name__ == "Muon" else ["2"]  # it takes matrices alone, and a head has a bias
    lk.adapt(model, r=2, target_modules=["0"], modules_to_save=head, verbose=False)
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    plain = kind([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    data = TensorDataset(torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,)))
    optimizer, loader = lk.make_private(
        model, kind([p for p in model.parameters() if p.requires_grad], lr=0.1), DataLoader(data, batch_size=8),
        noise_multiplier=1.0, physical_batch_size=3, noise=lk.NoiseSource.fixed(KEY),
    )  # fmt: skip

    def hand_over(*_):
        for mine, theirs in zip(model.parameters(), twin.parameters()):
            theirs.grad = None if mine.grad is None else mine.grad.clone()

    optimizer.register_step_pre_hook(hand_over)  # AdamW's step divides p.grad in place
    if kind in FREE:
        optimizer.train(), plain.train()
    for x, y in loader.steps(STEPS):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if optimizer.stepped:
            plain.step()
        optimizer.zero_grad()
    trained = copy.deepcopy(model)
    if kind in FREE:
        optimizer.eval(), plain.eval()
        assert not torch.equal(model[2].weight, trained[2].weight), "other weights than those that train"
    for name, p in model.named_parameters():
        assert torch.equal(p, twin.get_parameter(name)), name
        assert p.requires_grad <= (not torch.equal(p, start[name])), name
    assert optimizer.ledger.steps == STEPS


def test_without_its_train_mode_a_step_is_refused_by_the_optimizer_and_charged():
    model = lk.adapt(nn.Sequential(nn.Linear(6, 3)), r=2, target_modules=["0"], verbose=False)
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    optimizer, loader = lk.make_private(
        model, schedulefree.SGDScheduleFree([p for p in model.parameters() if p.requires_grad], lr=0.1),
        DataLoader(data, batch_size=8), noise_multiplier=1.0,
    )  # fmt: skip
    x, y = next(loader.steps(1))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(Exception, match="Optimizer was not in train mode"):
        optimizer.step()
    assert optimizer.ledger.steps == 1


def test_other_optimizers_have_no_modes():
    model = lk.adapt(nn.Sequential(nn.Linear(6, 3)), r=2, target_modules=["0"], verbose=False)
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, _ = lk.make_private(model, plain, DataLoader(data, batch_size=8), noise_multiplier=1.0)
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "no_such_thing")


def peft_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return lk.patch_peft(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"])))


@pytest.fixture(autouse=True)
def accelerators_forget():
    """What one Accelerator was given holds for all of the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("method", ["la-lora", "la-lora-unfiltered", "dp-lora", "rolora", "ffa-lora"])
def test_pefts_lora_fa_trains_b_alone(method, accelerated):
    model = peft_model()
    plain = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1)
    plain = Accelerator(cpu=True).prepare(plain) if accelerated else plain
    loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,))), batch_size=8)
    if method != "ffa-lora":
        with pytest.raises(ValueError, match='LoraFAOptimizer cannot take.* factor A .*give method="ffa-lora"'):
            lk.make_private(model, plain, loader, method=method, noise_multiplier=1.0)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "nothing is left on the model"
        return
    optimizer, loader = lk.make_private(model, plain, loader, method=method, noise_multiplier=1.0)
    start = copy.deepcopy(model.state_dict())
    for x, y in loader.steps(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])} == {
        f"base_model.model.{layer}.lora_B.default.weight" for layer in "02"
    }


@pytest.mark.parametrize("steps", [1, 2])
def test_accelerates_accumulation_is_refused_before_a_charge(steps):
    """Its optimizer, prepared before make_private, leaves out the steps within."""
    model, accelerator = peft_model(), Accelerator(cpu=True, gradient_accumulation_steps=steps)
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    model, plain, loader = accelerator.prepare(model, plain, DataLoader(data, batch_size=8))
    optimizer, loader = lk.make_private(model, plain, loader, noise_multiplier=1.0)

    def train():
        for x, y in loader.steps(2):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    if steps == 1:
        train()
    else:
        with pytest.raises(RuntimeError, match="AcceleratedOptimizer .*gradient accumulation.*physical_batch_size"):
            train()
    assert optimizer.ledger.steps == (2 if steps == 1 else 0)


def test_the_trainer_puts_it_into_the_mode_that_it_needs(tmp_path):
    """Evaluation after each step leaves it in the other one."""
    _, patched, data = adapted("bert")
    trainer = trainer_of(
        patched, data, tmp_path, eval_data=rows(data), optim="schedule_free_sgd", max_steps=3, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    modes, plain = [], trainer.create_optimizer().original_optimizer
    for mode in ("train", "eval"):
        call = getattr(plain, mode)
        setattr(plain, mode, lambda call=call, mode=mode: (modes.append(mode), call()))
    trainer.train()
    assert trainer.ledger.steps == 3 and modes[:6] == ["train", "eval"] * 3

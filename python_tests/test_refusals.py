"""What would make ε or the training silently false after make_private is refused, with culprit and cure."""

import copy
import math

import pytest
import torch
from test_checks import BatchMean, chain, classify
from test_private_step import private, toy, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.adapted import submodules
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.make_private import make_private


def one_step(model, loss, opt, loader):
    train(model, loss, opt, loader, 1)


@pytest.mark.parametrize("steps", [0, 2], ids=["before-a-step", "between-steps"])
class TestTheModelAfterMakePrivate:
    """Between steps a model is compared with what it was; before the first one there is nothing to compare with."""

    def made(self, steps, before=lambda model: None):
        model, data, loss = toy()
        before(model)
        opt, loader = private(model, data)
        train(model, loss, opt, loader, steps)
        return model, lambda: one_step(model, loss, opt, loader)

    def test_a_parameter_that_was_unfrozen(self, steps):
        model, step = self.made(steps, lambda model: model.fc1.weight.requires_grad_(False))
        model.fc1.weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"fc1.weight was added or unfrozen.*freeze it, or detach\(\)"):
            step()

    @pytest.mark.parametrize("add", ["module", "tensor", "tensor of the last module", "to a dictionary", "inside"])
    def test_a_parameter_that_was_added(self, steps, add):
        model, step = self.made(steps, lambda model: model.fc1.add_module("nothing", nn.Sequential()))
        prompt = nn.Linear(2, 2).double()
        if add == "module":
            model.prompt = prompt
        elif add == "tensor":
            model.register_parameter("prompt", prompt.weight)
        elif add == "tensor of the last module":
            submodules(model)[-1].register_parameter("prompt", prompt.weight)
        elif add == "to a dictionary":
            model._modules["prompt"] = prompt
        else:
            model.fc1.nothing.append(prompt)
        with pytest.raises(RuntimeError, match=r"(prompt|nothing)\S* was added or unfrozen"):
            step()

    def test_a_frozen_module_may_be_added_but_not_unfrozen(self, steps):
        model, step = self.made(steps)
        model.prompt = nn.Linear(2, 2).double().requires_grad_(False)
        step()
        step()
        model.prompt.bias.requires_grad_(True)
        with pytest.raises(RuntimeError, match="prompt.bias was added or unfrozen"):
            step()

    def test_a_parameter_that_was_replaced(self, steps):
        model, step = self.made(steps)
        model.fc1.lora_B = nn.Parameter(model.fc1.lora_B.detach().clone())
        with pytest.raises(RuntimeError, match="fc1.lora_B was replaced or tied"):
            step()

    def test_a_layer_whose_attributes_were_another_s(self, steps):
        """vars(layer).update(...): how some libraries turn a module into one of another class."""
        model, step = self.made(steps)
        other = copy.deepcopy(model.fc1)
        vars(model.fc1).update({key: vars(other)[key] for key in ("_parameters", "_modules")})
        with pytest.raises(RuntimeError, match="fc1.lora_A was replaced or tied"):
            step()

    def test_a_layer_that_was_taken_out(self, steps):
        model, step = self.made(steps)
        del model.fc1
        model.fc1 = nn.Linear(6, 5).double().requires_grad_(False)
        with pytest.raises(RuntimeError, match="fc1 was taken out of the model"):
            step()

    @pytest.mark.parametrize("mixer, check, message", [
        (lambda n: BatchMean(), True, "fc2.0: the output for one record depends on the other records"),
        (lambda n: nn.BatchNorm1d(n, affine=False).double(), "loss", r"fc2.0 \(BatchNorm1d\) mixes the records"),
    ], ids=["mean", "norm"])  # fmt: skip
    def test_a_layer_that_mixes_records_was_put_between(self, steps, mixer, check, message):
        """Nothing of it trains, so that only its place in the model tells."""
        model, data, loss = toy()
        opt, loader = private(model, data, check=check)
        train(model, loss, opt, loader, steps)
        model.fc2 = nn.Sequential(mixer(model.fc2.in_features), model.fc2)
        charged = opt.ledger.steps
        with pytest.raises(ValueError, match=message):
            one_step(model, loss, opt, loader)
        assert opt.ledger.steps == charged

    @pytest.mark.parametrize(
        "to, message",
        [
            (torch.float32, "was moved from cpu torch.float64 to cpu torch.float32"),
            ("meta", "was replaced .* call make_private again"),  # torch makes new parameters where it cannot keep them
        ],
    )
    def test_another_dtype_or_device(self, steps, to, message):
        model, step = self.made(steps)
        model.to(to)
        with pytest.raises(RuntimeError, match=message):
            step()


class TestTheModelOfATraining:
    def test_unchanged_models_train_on(self):
        model, data, loss = toy()
        opt, loader = private(model, data)
        train(model, loss, opt, loader, 3)
        model.eval()
        with torch.inference_mode():
            model(data.tensors[0])
        model.train()
        train(model, loss, opt, loader, 2)
        assert opt.local_step == 6


class TestTheCheckOfTheFirstBatch:
    def make(self, middle, **kwargs):
        torch.manual_seed(0)
        model = chain(middle)
        data = TensorDataset(torch.randn(8, 6), torch.randint(0, 3, (8,)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        loader = DataLoader(data, batch_size=8)
        return model, *make_private(model, optimizer, loader, noise_multiplier=1.0, sample_rate=1.0, **kwargs)

    def test_names_the_layer_that_mixes(self):
        model, opt, loader = self.make(BatchMean())
        with pytest.raises(ValueError, match="^middle: .*depends on the other records"):
            one_step(model, classify, opt, loader)
        assert opt.ledger.steps == 0

    def test_can_be_turned_off_and_says_so(self):
        model, opt, loader = self.make(BatchMean(), check=False)
        one_step(model, classify, opt, loader)
        assert not opt.per_sample_checked

    def test_passes_once_and_leaves_the_model_alone(self):
        model, opt, loader = self.make(nn.ReLU())
        assert not opt.per_sample_checked
        one_step(model, classify, opt, loader)
        assert opt.per_sample_checked and opt.ledger.steps == 1

    def test_a_record_that_is_not_finite_is_passed_over(self):
        model, opt, loader = self.make(nn.ReLU())
        loader.dataset.tensors[0][0, 2] = math.nan
        with pytest.warns(UserWarning, match="1 record"):
            one_step(model, classify, opt, loader)
        assert opt.per_sample_checked

    def test_warns_of_an_adapter_that_nothing_reaches(self):
        class Bypass(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = LoRALinear.from_linear(nn.Linear(8, 8), r=2)

            def forward(self, x):
                return x @ self.inner.weight.t()

        model, opt, loader = self.make(Bypass())
        with pytest.warns(UserWarning, match="no gradient reaches middle.inner.lora_A, middle.inner.lora_B"):
            one_step(model, classify, opt, loader)


class TestShuffledLoaders:
    def test_no_epsilon_is_reported(self):
        model, data, loss = toy()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        loader = DataLoader(data, batch_size=5, shuffle=True)
        opt, loader = make_private(model, optimizer, loader, noise_multiplier=1.0, poisson_sampling=False)
        sizes = []
        for batch in loader:
            sizes.append(len(batch[0]))
            loss(model, batch).backward()
            opt.step()
            opt.zero_grad()
        assert sizes == [5, 5, 2] and len(loader) == 3 and opt.ledger.steps == 3
        with pytest.raises(ValueError, match="no epsilon can be reported.*'shuffled' sampling"):
            opt.get_epsilon(1e-5)

    def test_a_budget_is_refused(self):
        model, data, loss = toy()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        with pytest.raises(ValueError, match="target_epsilon needs Poisson sampling"):
            make_private(
                model, optimizer, DataLoader(data, batch_size=4), target_epsilon=1.0, target_delta=1e-5, steps=3,
                poisson_sampling=False,
            )  # fmt: skip

    def test_a_shuffled_batch_is_bounded_all_the_same(self):
        model, data, loss = toy()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        opt, loader = make_private(
            model, optimizer, DataLoader(data, batch_size=12), noise_multiplier=0.0, max_grad_norm=1e-3,
            smoothing=None, poisson_sampling=False,
        )  # fmt: skip
        for batch in loader.steps(1):
            loss(model, batch).backward()
            opt.step()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        assert 0 < norm <= 1e-3 * (1 + 1e-5)


class TestAGradientBeforeTheStep:
    """Between backward and step there is none; a loop that clips it would believe in a bound that is not there."""

    def at_the_step(self, **kwargs):
        model, data, loss = toy(dtype=torch.float32)
        opt, loader = private(model, data, sample_rate=1.0, **kwargs)
        loss(model, next(iter(loader.steps(1)))).backward()
        return model, opt

    @pytest.mark.parametrize("physical", [None, 5])
    @pytest.mark.parametrize("foreach", [None, False, True])
    @pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
    def test_clipping_it_is_refused_with_the_cure(self, clip, foreach, physical):
        model, opt = self.at_the_step(physical_batch_size=physical)
        with pytest.raises(RuntimeError, match="does not exist yet.*max_grad_norm.*Leave clip_grad_norm_"):
            clip(model.parameters(), 1.0, foreach=foreach)
        with pytest.raises(RuntimeError, match="does not exist yet"):
            clip(next(p for p in model.parameters() if p.requires_grad), 1.0, foreach=foreach)
        opt.step()

    def test_accelerates_clipping_as_in_transformers_trainer_is_refused(self):
        from accelerate import Accelerator

        model, _ = self.at_the_step()
        with pytest.raises(RuntimeError, match="Trainer: max_grad_norm=0"):
            Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 1.0)

    def test_reading_or_changing_it_is_refused(self):
        model, _ = self.at_the_step()
        p = model.fc1.lora_B
        for use in (lambda: p.grad.norm(), lambda: p.grad.mul_(2), lambda: float(p.grad[0, 0]), lambda: p.grad.numpy()):
            with pytest.raises(RuntimeError, match="read p.grad after the step"):
                use()
        assert "no gradient before" in repr(p.grad) and p.grad.shape == p.shape and p.grad.dtype == p.dtype

    def test_after_the_step_it_is_the_released_one(self):
        model, opt = self.at_the_step()
        opt.step()
        assert type(model.fc1.lora_B.grad) is torch.Tensor
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # post-processing
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert float(torch.stack(norms).norm()) <= 1e-3 * (1 + 1e-5)
        assert model.fc1.lora_A.grad is None

    @pytest.mark.parametrize("zero", ["optimizer", "model"])
    def test_dropping_it_changes_nothing(self, zero):
        model, opt = self.at_the_step()
        (opt if zero == "optimizer" else model).zero_grad()
        opt.step()
        assert model.fc1.lora_B.grad.any()

    def test_a_gradient_of_another_kind_in_a_second_backward_is_refused(self):
        model, _ = self.at_the_step()
        with pytest.raises(RuntimeError, match="fc1.lora_B received a gradient that is not the engine's"):
            model.fc1.lora_B.square().sum().backward()

    def test_nothing_is_left_behind(self):
        model, opt = self.at_the_step()
        opt.detach()
        assert all(p.grad is None for p in model.parameters())

    def test_unscaling_and_then_clipping_as_with_a_grad_scaler_is_refused(self):
        model, data, loss = toy(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        opt, loader = private(model, data, sample_rate=1.0, grad_scaler=scaler, loss_reduction="sum")
        for batch in loader.steps(1):
            scaler.scale(len(batch[0]) * loss(model, batch)).backward()
            scaler.unscale_(opt)
            with pytest.raises(RuntimeError, match="does not exist yet"):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
        assert opt.local_step == 2


class TestASchedulerWithinALogicalBatch:
    """The number of physical batches is that of the records drawn, which a rate that follows it would tell."""

    def run(self, released_only, lr=0.5, physical_batch_size=5):
        model, data, loss = toy(12)
        opt, loader = private(model, data, lr=lr, sample_rate=1.0, physical_batch_size=physical_batch_size)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
        rates = []
        for batch in loader.steps(3):
            loss(model, batch).backward()
            opt.step()
            if opt.stepped or not released_only:
                rates.append(float(opt.param_groups[0]["lr"]))
                scheduler.step()
        return rates

    @pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
    def test_is_refused(self, lr):
        with pytest.raises(RuntimeError, match="between two parts of one logical batch.*if optimizer.stepped"):
            self.run(released_only=False, lr=lr)

    @pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
    def test_by_releases_it_is_as_without_parts(self, lr):
        rates = self.run(released_only=True, lr=lr)
        assert rates == [0.5, 0.25, 0.125] == self.run(released_only=False, physical_batch_size=None)


class TestArguments:
    def test_in_another_order(self):
        model, data, _ = toy()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TypeError, match="a model, its torch optimizer and a data loader, in this order; not SGD"):
            make_private(plain, model, DataLoader(data, batch_size=4), noise_multiplier=1.0)
        with pytest.raises(TypeError, match="in this order; not .* and NoneType"):
            make_private(model, None, DataLoader(data, batch_size=4), noise_multiplier=1.0)

    def test_lengths_that_would_sort_nothing(self):
        model, data, _ = toy()
        with pytest.raises(ValueError, match="lengths sort .* give physical_batch_size too"):
            private(model, data, lengths=[1] * len(data))

    def test_a_delta_that_promises_nothing(self):
        """To publish one record at random, whole, is (0, 1/n)-differentially private."""
        model, data, _ = toy()
        with pytest.raises(ValueError, match=f"promises nothing to {len(data)} records: .*well below"):
            private(model, data, target_delta=1 / len(data))
        with pytest.raises(ValueError, match=f"promises nothing to {len(data)} records"):
            private(model, data, ledger=lk.Ledger(target_epsilon=0.5, target_delta=0.5))
        private(model, data, target_delta=0.9 / len(data))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torchscript_is_refused_by_name():
    """Also frozen: what kind of layer it was made of does not show, and one that mixes records would be let through."""
    model, data, _ = toy()
    model.norm = torch.jit.script(nn.BatchNorm1d(7).double())
    for p in model.norm.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="^norm is TorchScript, .* use the module that it was made from"):
        private(model, data)


class TestFrozenAdapters:
    """The schedule says which factor trains, so that one which somebody froze would train all the same."""

    def test_one_layers(self):
        model, data, _ = toy()
        model.fc1.requires_grad_(False)
        with pytest.raises(ValueError, match=r"both factors of fc1 are frozen.*unfreeze them.*is_trainable=True"):
            private(model, data)
        assert not any(p.requires_grad for p in model.fc1.parameters())

    def test_all_of_a_peft_model_that_was_loaded_to_be_used(self, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["0", "1"], r=2, modules_to_save=["2"])
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(base, tmp_path)
        data = TensorDataset(torch.randn(20, 4), torch.randint(0, 2, (20,)))
        lk.patch_peft(model)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"both factors of .* are frozen"):
            make_private(model, plain, DataLoader(data, batch_size=4), noise_multiplier=1.0)

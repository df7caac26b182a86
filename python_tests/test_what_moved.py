"""What a step's optimizer moved: what was released, and nothing else."""

import pytest
import torch
from test_private_step import private, toy, train
from test_refusals import one_step


class Lazy(torch.optim.SGD):
    """An optimizer that forgets the tensors whose names are in ``skip``, and drags those in ``drag`` along."""

    skip: tuple = ()
    drag: tuple = ()

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.skip:
            p.grad = None
        super().step()
        for p in self.drag:
            p.add_(1e-3)


class Statistics(torch.optim.SGD):
    """An optimizer that counts its steps."""

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["step"] = self.state[p].get("step", 0) + 1


class TestWhatMoved:
    """opacus#820: a factor that never moves while ε looks normal."""

    def test_an_active_factor_that_stands_still(self):
        model, data, loss = toy()
        opt, loader = private(model, data, optimizer=Lazy)
        opt.original_optimizer.skip = (model.fc2.lora_B,)
        with pytest.raises(RuntimeError, match="fc2.lora_B was released but .* did not move it"):
            one_step(model, loss, opt, loader)

    def test_and_in_a_later_step(self):
        model, data, loss = toy()
        opt, loader = private(model, data, optimizer=Lazy)
        train(model, loss, opt, loader, 2)
        opt.original_optimizer.skip = (model.fc2.lora_B,)
        with pytest.raises(RuntimeError, match="fc2.lora_B was released but"):
            one_step(model, loss, opt, loader)

    def test_and_where_the_optimizer_only_keeps_statistics(self):
        """The first time it may: ADOPT's first step of a tensor does. Never again."""
        model, data, loss = toy()
        opt, loader = private(model, data, optimizer=Statistics)
        one_step(model, loss, opt, loader)
        with pytest.raises(RuntimeError, match="head.weight was released but Statistics did not move it, and each"):
            one_step(model, loss, opt, loader)

    def test_an_inactive_factor_that_moves(self):
        model, data, loss = toy()
        opt, loader = private(model, data, optimizer=Lazy)
        opt.original_optimizer.drag = (model.fc1.lora_A,)
        with pytest.raises(RuntimeError, match="fc1.lora_A is not active in this step, but .* moved it"):
            one_step(model, loss, opt, loader)

    def test_a_learning_rate_of_zero_is_a_warm_up(self):
        model, data, loss = toy()
        opt, loader = private(model, data)
        opt.param_groups[0]["lr"] = 0.0
        train(model, loss, opt, loader, 2)
        assert opt.local_step == 3

    def test_an_optimizer_that_writes_to_data(self):
        class Old(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    if p.grad is not None:
                        p.data.sub_(0.1 * p.grad)

        model, data, loss = toy()
        opt, loader = private(model, data, optimizer=Old)
        train(model, loss, opt, loader, 3)
        assert opt.local_step == 4

"""Layers that a loop calls beside their model: of what it does between them nothing is checked."""

import pytest
import torch
from test_checks import chain, classify
from test_unseen import F, make, step, two_views
from torch import nn
from torch.utils.checkpoint import checkpoint


def in_parts(model, batch):
    return F.cross_entropy(model.last(model.middle(model.first(batch[0]))), batch[1])


class Twice(nn.Module):
    """A layer of its own, which a checkpoint calls in the forward and again in the backward."""

    def __init__(self):
        super().__init__()
        self.norm, self.fail = nn.LayerNorm(8), False

    def forward(self, h):
        if self.fail:
            raise ZeroDivisionError
        return checkpoint(self.norm, h, use_reentrant=False)


class TestAModelCalledByItsParts:
    def test_is_refused_before_anything_is_charged(self):
        model = chain(nn.ReLU())
        optimizer, loader = make(model)
        with pytest.raises(RuntimeError, match="^last was called, but not the model .*check=False"):
            step(model, optimizer, loader, in_parts)
        assert optimizer.ledger.steps == 0

    def test_also_after_a_batch_on_which_it_was_called(self):
        model = chain(nn.ReLU())
        optimizer, loader = make(model)
        step(model, optimizer, loader)
        with pytest.raises(RuntimeError, match="^last was called, but not the model"):
            step(model, optimizer, loader, in_parts)

    def test_also_beside_it(self):
        """Unseen, a mean that the loop takes off between two parts moved the sum by 24 C."""

        def beside(model, batch):
            h = model.first(batch[0])
            return classify(model, batch) + model.last(model.middle(h - h.mean(0))).square().mean()

        optimizer, loader = make(model := chain(nn.ReLU()))
        with pytest.raises(RuntimeError, match="^last was called, but not the model"):
            step(model, optimizer, loader, beside)
        optimizer.detach()
        optimizer, loader = make(model, check=False)
        step(model, optimizer, loader, beside)
        assert optimizer.ledger.steps == 1

    def test_parts_that_are_compiled_are_refused_at_the_step(self):
        torch.compiler.reset()
        optimizer, loader = make(model := chain(nn.ReLU()))
        for name in ("first", "last"):
            getattr(model, name).compile(backend="aot_eager")
        with pytest.raises(RuntimeError, match="^a part of it was called, but not the model"):
            step(model, optimizer, loader, in_parts)
        assert optimizer.ledger.steps == 0

    def test_forwards_that_failed_or_are_done_again_are_the_models_own(self):
        """A checkpoint's is within backward."""
        model = chain(Twice())
        optimizer, loader = make(model)
        for batch in loader.steps(2):
            model.middle.fail = True
            with pytest.raises(ZeroDivisionError):
                model(batch[0])
            model.middle.fail = False
            classify(model, batch).backward()
            optimizer.step()
        assert optimizer.ledger.steps == 2

    def test_trains_where_the_checks_were_declined(self):
        model = chain(nn.ReLU())
        optimizer, loader = make(model, check=False)
        step(model, optimizer, loader, in_parts)
        assert optimizer.ledger.steps == 1


@pytest.mark.parametrize("views, rows", [(1, None), (2, 16)])
def test_a_compiled_model_tells_how_many_rows_it_was_given(views, rows):
    torch.compiler.reset()
    model = chain(nn.ReLU())
    optimizer, loader = make(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if rows is None:
        step(compiled, optimizer, loader, steps=2)
        assert optimizer.ledger.steps == 2
    else:
        with pytest.raises(ValueError, match=f"given {rows} rows"):
            step(compiled, optimizer, loader, two_views)

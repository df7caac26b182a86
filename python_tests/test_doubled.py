"""The check of the first batch runs a copy in float64, where what asks for a precision or sets things up works, too."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_first_batch import Mixup, chain, first_step
from torch import nn

from lalora_kernels.privacy.doubled import Doubled


class Lower(nn.Module):
    def forward(self, h):
        return h.to(torch.float32) + h.float() + h.type(torch.float32)


class OwnState(nn.Module):
    """What most recurrent models do: a state of zeros, in the default precision."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(8, 8, batch_first=True).requires_grad_(False)

    def forward(self, h):
        return self.cell(h[:, None], torch.zeros(1, len(h), 8))[0][:, 0]


class Table(nn.Module):
    """A plain attribute, which ``double()`` does not see; a mask as XGLM makes it; a mean of integers."""

    def __init__(self):
        super().__init__()
        self.mix = torch.randn(8, 8)

    def forward(self, h):
        scores = torch.maximum(h @ self.mix, torch.full((), torch.finfo(h.dtype).min))
        share = (torch.arange(8).expand(len(h), 8) / 8).unsqueeze(2)
        return scores + torch.bmm(scores[:, None] * 0.1, share.expand(-1, -1, 8)).squeeze(1)


class SetUp(nn.Module):
    """Makes its layer at the first forward, as BigBird its attention, and draws after that."""

    def __init__(self):
        super().__init__()
        self.inner = None

    def forward(self, h):
        if self.inner is None:
            self.inner = nn.Dropout(float(torch.rand(()) * 0.1 + 0.2))
        return self.inner.train(self.training)(h)


class Generating(nn.Module):
    """In eval mode it keeps a state for generation and writes over it, as RWKV's."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, h):
        h = h.exp()
        return h.mul_(2.0) if self.config.use_cache and not self.training else h * 2.0


@pytest.mark.parametrize("middle", [Lower, OwnState, Table, SetUp, Generating])
def test_a_model_passes_that_trains_in_its_own_precision(middle):
    torch.manual_seed(0)
    model = chain(middle())
    optimizer = first_step(model)
    assert optimizer.per_sample_checked  # it was checked
    assert middle is not Generating or model.middle.config.use_cache


@pytest.mark.parametrize("middle", [Lower, OwnState, Table, SetUp])
def test_mixing_is_found_behind_it(middle):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"middle\.1: the output for one record depends on the other records"):
        first_step(chain(nn.Sequential(middle(), Mixup())))


class Lazy(nn.Module):
    """A buffer that the first forward makes: a table of its own, as ConViT's, or the mean of its records."""

    def __init__(self, start, follows):
        super().__init__()
        self.register_buffer("made", start)
        self.follows = follows

    def forward(self, h):
        if self.made is None or self.made.shape != h.shape[1:]:
            self.made = h.detach().mean(0) if self.follows else torch.arange(h.shape[1]) / 8
        return h + self.made


@pytest.mark.parametrize("start", [None, torch.zeros(1)])
def test_a_buffer_that_the_first_forward_makes(start):
    optimizer = first_step(chain(Lazy(start, follows=False)))
    assert optimizer.per_sample_checked
    with pytest.raises(ValueError, match=r"the buffer middle\.made follows the records of a batch"):
        first_step(chain(Lazy(start, follows=True)))


class Memory(nn.Module):
    """Follows the records, in tensors that no walk over the model sees."""

    def __init__(self):
        super().__init__()
        self.kept = [torch.zeros(8)]

    def forward(self, h):
        self.kept[0].data.mul_(0.5).add_(h.detach().mean(0).float())
        return h + self.kept[0]


def test_a_state_in_a_list_is_written_to_and_found():
    with pytest.raises(ValueError, match=r"middle: the output for one record depends on the other records"):
        first_step(chain(Memory()))


class Single(nn.Module):
    def forward(self, h):
        if h.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return h


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an exception takes notes since Python 3.11")
def test_what_cannot_compute_in_float64_is_told_what_to_do():
    with pytest.raises(RuntimeError, match="no kernel for Double") as caught:
        first_step(chain(Single()))
    assert "copy of the model in float64" in caught.value.__notes__[0] and "check='loss'" in caught.value.__notes__[0]


def test_every_precision_is_float64_but_bits_and_integers():
    h = torch.randn(4, dtype=torch.float64)
    with Doubled():
        made = [
            h.float(), h.half(), h.bfloat16(), h.to(torch.float16), h.to(dtype=torch.bfloat16), torch.zeros(2),
            torch.zeros(2, dtype=torch.float32), torch.full((2,), 0.5), torch.arange(3) / 2, torch.tensor([1.0]),
            torch.rand(2, dtype=torch.float32), torch.randn(3), nn.functional.one_hot(torch.arange(3)).float(),
        ]  # fmt: skip
        bits = torch.arange(4, dtype=torch.int32).view(torch.float32)
        whole = [torch.full((2,), 1), torch.arange(3), torch.zeros(2, dtype=torch.int32), h > 0]
    assert {t.dtype for t in made} == {torch.float64} and bits.dtype == torch.float32
    assert [t.dtype for t in whole] == [torch.int64, torch.int64, torch.int32, torch.bool]
    assert torch.equal(made[0], h)  # not rounded on the way
    assert torch.zeros(2).dtype == torch.float32  # outside

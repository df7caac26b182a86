"""Models that return a list with a tensor for each record (features of its images), or for each layer."""

import pytest
import torch
from torch import nn

import lalora_kernels as lk
from lalora_kernels.privacy.first_batch import check_inputs

TOKENS, WIDTH = 6, 4  # of which three records' do not show where one ends


class Lists(nn.Module):
    """Logits, and what ``features`` makes of the adapted layer's outputs (N, TOKENS, WIDTH)."""

    def __init__(self, features):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.features = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), features
        lk.adapt(self, target_modules=["fc"], modules_to_save=[], r=2, verbose=False)

    def forward(self, x):
        h = self.fc(x)
        return {"logits": self.head(h.mean(1)), "features": self.features(h)}


X = torch.randn(5, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "features",
    [
        lambda h: list(h),
        lambda h: tuple(t[: 2 + int(t.sum() > 0)] for t in h),
        lambda h: [h, h.relu(), h.tanh()],  # of three layers, where three records are asked
        lambda h: [[t] for t in h],
        lambda h: [],
    ],
    ids=["records", "records of other lengths", "layers", "nested", "empty"],
)
def test_records_that_are_kept_apart_pass(features):
    assert check_inputs(Lists(features), (X,), {}, len(X)) is not None


@pytest.mark.parametrize(
    "features",
    [
        lambda h: list(h - h.mean(0)),
        lambda h: list(h.roll(1, 0)),
        lambda h: [[t] for t in h.flip(0)],
        lambda h: [h, h - h.mean(0), h.tanh()],
    ],
    ids=["mean", "another's", "nested", "layers"],
)
def test_records_that_mix_in_a_list_are_refused(features):
    with pytest.raises(ValueError, match="depends on the other records"):
        check_inputs(Lists(features), (X,), {}, len(X))

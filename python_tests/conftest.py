"""Shared fixtures: uninitialised memory is poisoned, generators are seeded, a test can run on every instruction set."""

import gc
import os
import random

# Read when a kernel is decorated, so before any test imports one: on this suite's machines Triton runs interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import torch

from lalora_kernels import native
from lalora_kernels.models import torchvision_beside_cpu_torch

torchvision_beside_cpu_torch()

# Its defaults fail a test for a busy machine, and draw other cases every time; those are make fuzz's.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

_empty, _empty_like = torch.empty, torch.empty_like


def _poison(t: torch.Tensor) -> torch.Tensor:
    if t.device.type == "meta":
        return t
    if t.is_floating_point():
        return t.fill_(float("nan"))
    return t.fill_(torch.iinfo(t.dtype).max) if not (t.is_complex() or t.dtype == torch.bool or t.is_quantized) else t


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty full of NaN: an output element that no kernel wrote shows."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(_empty_like(*a, **k)))


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_collected():
    """Compilers and measurements of memory collect first, and would look through all that the suite has imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind takes what stays for leaked


@pytest.fixture(autouse=True)
def seeded():
    """A private batch seeds the global generators from its key: what a test draws must not hang on the one before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


ISAS = [name for name, supported in native.require().isas() if supported]


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that is compiled in and that this machine has, one after another."""
    module = native.require()
    before = module.isa()
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)


@pytest.fixture(params=["reference", *(f"cpp-{name}" for name in ISAS)])
def backend(request):
    """The reference, and "cpp" on every instruction set."""
    name, _, chosen = request.param.partition("-")
    module = native.require()
    before = module.isa()
    if chosen:
        module.set_isa(chosen)
    yield name
    module.set_isa(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

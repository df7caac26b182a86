"""Several Python threads at once: kernels release the GIL, and two models that step share nothing that changes."""

import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from models import adapted
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels import dispatch, functional, native, opaque
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource

KEY = bytes(range(32))
STEPS = 8


def run(k: int, model, data, loss) -> torch.Tensor:
    """Private steps of one model; every third one on the reference, every second with per-layer clipping."""
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    optimizer, loader = make_private(
        model, sgd, DataLoader(data, batch_size=4), noise_multiplier=0.7, sample_rate=0.5,
        physical_batch_size=3, clipping="per_layer" if k % 2 else "flat", noise=NoiseSource.fixed(KEY),
    )  # fmt: skip
    with dispatch.use_backend("reference") if k % 3 == 2 else nullcontext():
        for batch in loader.steps(STEPS):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def contestant(k: int):
    torch.manual_seed(k)
    model, batch, loss = adapted("vit" if k % 2 else "mlp", n=10, dtype=torch.float32)
    return model, TensorDataset(*batch), loss


def in_threads(work, count: int) -> list:
    """``work(k)`` for k < count, all begun together; their results."""
    results, gate = [None] * count, threading.Barrier(count)

    def one(k: int) -> None:
        gate.wait()
        try:
            results[k] = work(k)
        except BaseException as error:
            results[k] = error

    workers = [threading.Thread(target=one, args=(k,)) for k in range(count)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    return results


def test_models_stepped_in_threads_are_those_stepped_alone():
    """Bit for bit. Contestants 0 and 3 also differ by their seed alone, as do 1 and 5; 2 runs on another backend."""
    count = 6
    alone = [run(k, *contestant(k)) for k in range(count)]
    contestants = [contestant(k) for k in range(count)]
    together = in_threads(lambda k: run(k, *contestants[k]), count)
    for k in range(count):
        assert isinstance(together[k], torch.Tensor), together[k]
        assert torch.equal(together[k], alone[k]), f"contestant {k}"
    start = torch.cat([p.detach().flatten() for p in contestant(0)[0].parameters()])
    assert not torch.equal(start, alone[0]) and alone[0].isfinite().all()


def test_a_thread_does_not_see_anothers_backend():
    like = torch.zeros(1)

    def work(k: int):
        seen = []
        for _ in range(200):
            with dispatch.use_backend("reference") if k else nullcontext():
                seen.append(dispatch.get("sample_grad", like).__module__)
        return set(seen)

    first, second = in_threads(work, 2)
    assert first == {"lalora_kernels.native"} and second == {"lalora_kernels.reference.sample_grad"}


def test_a_backward_in_another_thread_runs_on_the_forwards_backend(monkeypatch):
    """As autograd's own threads do on a GPU."""
    model, data, loss = contestant(0)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    optimizer, loader = make_private(
        model, sgd, DataLoader(data, batch_size=10), noise_multiplier=0.7, sample_rate=1.0, check=False
    )
    batches = loader.steps(1)
    batch = next(batches)
    monkeypatch.setattr(native, "sample_grad", None)  # whoever falls back to the CPU's default fails
    with dispatch.use_backend("reference"):
        value = loss(model, batch)
        assert in_threads(lambda k: value.backward(), 1) == [None]
        optimizer.step()
    assert optimizer.ledger.steps == 1


def test_recorders_registered_at_once_have_handles_of_their_own(monkeypatch):
    class Recorder:
        pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        made = in_threads(lambda k: [(r, opaque.register(r)) for r in (Recorder() for _ in range(2000))], 4)
    finally:
        sys.setswitchinterval(interval)
    pairs = [pair for part in made for pair in part]
    assert len({handle for _, handle in pairs}) == len(pairs)
    assert all(opaque._find(handle) is recorder for recorder, handle in pairs)


def _sample(op):
    dy, B = torch.randn(8, 256, 1024), torch.randn(1024, 16)
    more = {"max_norm": 1.0} if op is functional.sample_grad_clip else {}
    return op(dy, B, 1.0, h=torch.randn(8, 256, 16), x=dy, **more), dy, B


def _privatize():
    G, out = [torch.randn(16, 1024, 128)], [torch.zeros(1024, 128)]
    functional.privatize(
        G, [None], torch.ones(1, 16), out, noise_std=1.0, key=KEY, release=1, tensor_index=[0], smooth_dim=[0],
        divisor=1.0, backend="cpp",
    )  # fmt: skip
    return G, out


CALLS = {
    "sample_grad": lambda: _sample(functional.sample_grad),
    "sample_grad_clip": lambda: _sample(functional.sample_grad_clip),
    "privatize": _privatize,
    "chacha20_normal": lambda: functional.chacha20_normal(1 << 20, key=KEY, release=1, tensor_index=0),
    "chacha20_words": lambda: native.chacha20_words(KEY, (0, 0, 0), 0, 1 << 16),
}


class Noting:
    """The compiled module; the last call is kept, to be made again without Python around it."""

    def __init__(self, module):
        self.module, self.call = module, None

    def __getattr__(self, name: str):
        function = getattr(self.module, name)

        def noted(*args):
            self.call = lambda: function(*args)
            return function(*args)

        return noted


@pytest.mark.parametrize("op", CALLS)
def test_kernels_release_the_gil(op, monkeypatch):
    """Where Python never takes the GIL away, another thread runs only while a call has given it up."""
    noting = Noting(native.require())
    monkeypatch.setattr(native, "_module", noting)
    kept = CALLS[op]()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        assert any(_ran_meanwhile(noting.call) for _ in range(100))
    finally:
        sys.setswitchinterval(interval)
    del kept


def _ran_meanwhile(call) -> bool:
    gate, ran = threading.Lock(), []
    gate.acquire()

    def work() -> None:
        with gate:
            ran.append(True)

    other = threading.Thread(target=work)
    other.start()
    gate.release()
    call()
    done = bool(ran)
    other.join()
    return done

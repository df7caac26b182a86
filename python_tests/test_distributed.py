"""Two gloo processes make the step of one."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_private_step import KEY
from tolerances import SPLIT_F32
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.models import torchvision_beside_cpu_torch

SETTINGS = {  # clipping, whether in DistributedDataParallel, physical batch, fixed key, whether PEFT's model patched
    "flat": ("flat", True, None, True, False),
    "per_layer": ("per_layer", False, None, True, False),
    "split": ("automatic", False, 2, True, False),
    "secret": ("flat", False, None, False, False),
    "peft": ("flat", True, None, True, True),
}


def train(rank: int, clipping: str, ddp: bool, physical: int | None, fixed: bool, peft: bool) -> torch.Tensor:
    """Parameters after five steps. Ranks begin with other factors, which make_private brings together."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 3))
    settings = {"r": 2, "target_modules": ["0"], "modules_to_save": ["1", "3"]}
    if peft:
        from peft import LoraConfig, get_peft_model

        model = lk.patch_peft(get_peft_model(model, LoraConfig(**settings)))
    else:
        lk.adapt(model, **settings, verbose=False)
    torch.manual_seed(rank)
    for p in model.parameters():
        if p.requires_grad and p.dim() == 2 and p.any():
            nn.init.normal_(p)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    forward = DistributedDataParallel(model) if ddp else model
    optimizer, loader = lk.make_private(
        forward, optimizer, DataLoader(data, batch_size=8), noise_multiplier=0.8, max_grad_norm=0.3, clipping=clipping,
        physical_batch_size=physical, noise=lk.NoiseSource.fixed(KEY) if fixed else None,
    )  # fmt: skip
    for x, y in loader.steps(5):
        nn.functional.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.ledger.steps == 5
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def drawn() -> list[list[float]]:
    """The records that this rank is given of each of 30 batches, under a secret key."""
    model = lk.adapt(nn.Sequential(nn.Linear(1, 2)), r=1, target_modules=["0"], verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = DataLoader(TensorDataset(torch.arange(1.0, 41.0).view(-1, 1)), batch_size=16)
    optimizer, loader = lk.make_private(model, optimizer, data, noise_multiplier=1.0, check=False)
    seen = []
    for (x,) in loader.steps(30):
        seen.append(x.flatten().tolist()[: optimizer.engine.batch.valid])
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def worker(rank: int, folder: str) -> None:
    torchvision_beside_cpu_torch()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: train(rank, *settings) for name, settings in SETTINGS.items()}
    torch.save({**found, "drawn": drawn()}, f"{folder}/{rank}.pt")
    # What a cycle of references holds (DDP's reducer) would keep gloo's threads into the interpreter's end, where they
    # abort: pytorch#179291.
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two processes trained, and drew."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["flat", "per_layer", "split", "peft"])
def test_two_processes_equal_one(ranks, name):
    clipping, _, _, fixed, peft = SETTINGS[name]
    one = train(0, clipping, False, None, fixed, peft)
    assert torch.equal(ranks[0][name], ranks[1][name])
    assert float((ranks[0][name] - one).norm() / one.norm()) < SPLIT_F32


def test_ranks_with_a_secret_key_stay_together(ranks):
    assert torch.equal(ranks[0]["secret"], ranks[1]["secret"])
    assert not torch.equal(ranks[0]["secret"], ranks[0]["flat"])


def test_ranks_with_a_secret_key_share_one_draw(ranks):
    """Draws of their own would give a record two chances of a batch, and ε counts one."""
    for first, second in zip(ranks[0]["drawn"], ranks[1]["drawn"], strict=True):
        assert not set(first) & set(second) and len(first) - len(second) in (0, 1)


def test_a_group_that_is_not_there():
    model = lk.adapt(nn.Sequential(nn.Linear(4, 4)), r=2, target_modules=["0"], verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    loader = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
    with pytest.raises(RuntimeError, match="init_process_group"):
        lk.make_private(model, optimizer, loader, noise_multiplier=1.0, distributed=True)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(how: str) -> nn.Module:
    model = lk.adapt(nn.Sequential(nn.Linear(4, 4)), r=2, target_modules=["0"], verbose=False)
    if how == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    elif how == "FSDP":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif how == "tensor parallel":
        from torch.distributed.tensor import distribute_module

        distribute_module(model, init_device_mesh("cpu", (1,)))
    else:
        model = nn.DataParallel(model)
        model.device_ids = [0, 1]  # as on a machine with two cards
    return model


@pytest.mark.parametrize(
    "how, message",
    [
        ("fully_shard", r"0 \(FSDPLoRALinear\) cannot train privately: its tensors are sharded"),
        ("FSDP", r"the model \(FullyShardedDataParallel\) cannot train privately: its tensors are sharded"),
        ("tensor parallel", r"0 \(LoRALinear\) cannot train privately: its tensors are sharded"),
        ("DataParallel", r"the model \(DataParallel\) cannot train privately: nn.DataParallel cuts the batch"),
    ],
)
def test_sharded_models_are_refused_by_name(alone, how, message):
    model = sharded(how)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    loader = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
    with pytest.raises(ValueError, match=message + ".*Use DistributedDataParallel"):
        lk.make_private(model, optimizer, loader, noise_multiplier=1.0)

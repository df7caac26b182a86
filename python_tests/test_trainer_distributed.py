"""transformers' Trainer in two gloo processes: the private steps of one, with one ledger."""

import gc
import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_private_step import KEY
from tolerances import SPLIT_F32
from torch.nn.parallel import DistributedDataParallel

import lalora_kernels as lk
from lalora_kernels.models import torchvision_beside_cpu_torch

STEPS, RECORDS = 4, 12
# Expected records of a logical batch: 6, a rank's part in physical batches of 2; 1, so that ranks have none.
SIZES = {"split": 6, "seldom": 1}


def trained(folder, steps=STEPS, resume=None, keep=False, **privacy):
    """A trainer after ``steps`` private steps of a float32 BERT with patched PEFT adapters and a full head."""
    from trainer_models import adapted, text, trainer_of  # a spawned process first runs ``worker``

    _, patched, _ = adapted("bert", torch.float32)
    saving = {"save_strategy": "steps", "save_steps": 2} if keep else {}
    data, privacy = text(37, "class", RECORDS), {"noise_multiplier": 0.8, **privacy}
    trainer = trainer_of(patched, data, folder, privacy=privacy, max_steps=steps, **saving)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def fixed(size: int) -> dict:
    return {"noise": lk.NoiseSource.fixed(KEY), "expected_batch_size": size}


def worker(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torchvision_beside_cpu_torch()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: parameters(trained(f"{folder}/{name}", **fixed(size))) for name, size in SIZES.items()}
    first = trained(f"{folder}/run", 2, keep=True)
    second = trained(f"{folder}/run", STEPS, True, keep=True)
    wrapped = second.model_wrapped
    assert isinstance(wrapped, DistributedDataParallel) and not wrapped.require_backward_grad_sync
    found["resumed"] = parameters(second)
    about = {
        "expected": second.expected_batch_size, "ids": [first.ledger.id, second.ledger.id],
        "releases": second.ledger.releases, "epsilon": second.get_epsilon(), "steps": first.ledger.steps,
        "secret": bytes(second._private.engine.noise.key).hex(), "log": second.state.log_history,
    }  # fmt: skip
    try:
        trained(f"{folder}/run", 2)
    except ValueError as error:
        about["refused"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(about, file)
    del first, second, wrapped
    gc.collect()  # as in test_distributed.py
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return folder


def of_ranks(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", SIZES)
def test_two_processes_equal_one(folder, tmp_path, name):
    from trainer_models import adapted

    one, ranks = trained(tmp_path, **fixed(SIZES[name])), of_ranks(folder)
    start = torch.cat([p.detach().flatten() for p in adapted("bert", torch.float32)[1].parameters()])
    assert torch.equal(ranks[0][name], ranks[1][name])
    assert float((ranks[0][name] - parameters(one)).norm() / (parameters(one) - start).norm()) < SPLIT_F32


def test_one_ledger_is_kept_resumed_and_not_replaced(folder):
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    ledger = lk.Ledger.load(folder / "run/ledger.json")
    assert torch.equal(*(rank["resumed"] for rank in of_ranks(folder)))
    for about in ranks:
        assert about["expected"] == 4 and about["steps"] == 2  # two records a process
        assert about["ids"] == [ledger.id, ledger.id]
        assert about["releases"] == [list(release) for release in ledger.releases] == [[0.8, 4 / RECORDS, STEPS]]
        assert about["epsilon"] == ledger.epsilon() == about["log"][-1]["epsilon"]
        assert "ledger of another run" in about["refused"]
    assert ranks[0]["secret"] != ranks[1]["secret"]
    for step in (2, 4):
        assert lk.Ledger.load(folder / f"run/checkpoint-{step}/ledger.json").steps == step

"""Several processes that make one private step: batches split over ranks, one sum, one noise.

Every rank draws the same Poisson batch from one sampling key and takes each ``world``-th record of it; the clipped sums
are added up; rank 0 alone adds noise and sends the released gradient to the others. So a step over ranks is the step of
one process, and its ε is the same. The ranks trust each other: they are one data holder.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lalora_kernels.privacy.noise import KEY_BYTES, Key, NoiseSource, UniformSource


class Group:
    """The ranks of the default process group. Raises RuntimeError where there is none."""

    def __init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("distributed=True needs torch.distributed.init_process_group() first")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def share_parameters(self, tensors: list[Tensor]) -> None:
        """Rank 0's values everywhere: ranks that start apart would stay apart."""
        with torch.no_grad():
            for t in tensors:
                dist.broadcast(t.data, 0)

    def sampling_source(self, noise: NoiseSource, device: torch.device) -> UniformSource:
        """One stream of draws for all ranks: rank 0's fresh secret key, or what a fixed key determines."""
        if not noise.is_secret:
            return noise.uniform_source()
        mine = torch.frombuffer(bytearray(os.urandom(KEY_BYTES)), dtype=torch.uint8).to(device)
        dist.broadcast(mine, 0)
        source = UniformSource.__new__(UniformSource)
        source._start(Key(bytes(mine.cpu().tolist())), is_secret=True)
        return source

    def add_up(self, S: Tensor) -> None:
        """S summed over ranks, in place."""
        dist.all_reduce(S)

    def send_released(self, grad: Tensor) -> None:
        """Rank 0's released gradient to every rank, in place."""
        dist.broadcast(grad, 0)


def find_group(distributed: bool | None) -> Group | None:
    """None: the process group where one of several ranks is initialized; True asks for it; False is refused beside one.

    Ranks that each released a step of their own over the same records would spend ε as often as there are ranks.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if distributed is False and several:
        raise ValueError(
            "distributed=False beside an initialized process group: each rank would release its own step over the same "
            "records, and ε would count one of them. Leave distributed out, or destroy_process_group() first"
        )
    return Group() if distributed or several else None


def refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError where a tensor or the batch is cut in parts in a way that the private step does not know of."""
    for name, m in model.named_modules():
        kind = type(m)
        if isinstance(m, nn.DataParallel) and len(m.device_ids) > 1:
            how = "nn.DataParallel cuts the batch over devices in threads"
        elif kind.__module__.startswith("deepspeed."):
            how = "DeepSpeed keeps gradients and steps of its own"
        elif kind.__module__.startswith("torch.distributed.fsdp.") or any(
            type(p).__name__ == "DTensor" for p in m._parameters.values()
        ):
            how = "its tensors are sharded (FSDP or tensor parallel)"
        else:
            continue
        raise ValueError(
            f"{name or 'the model'} ({kind.__name__}) cannot train privately: {how}, and per-record gradients need "
            f"whole tensors and batches. Use DistributedDataParallel; a model too large for it may fit quantized"
        )


def loud_ddp(model: nn.Module) -> None:
    """Undo ``quiet_ddp``."""
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    model.require_backward_grad_sync = True


def quiet_ddp(model: nn.Module) -> bool:
    """Stop a DistributedDataParallel model from reducing gradients of its own; True where it is one that did."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.require_backward_grad_sync:
        model.require_backward_grad_sync = False
        return True
    return False

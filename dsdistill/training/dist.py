"""Where this process stands among the others, however it was started."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One process of the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read the launcher's variables (deepspeed, torchrun), SLURM's, or none for a single process."""
    local_rank = int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0)
    cuda = torch.cuda.is_available() and environment.get("DS_ACCELERATOR", "cuda") == "cuda"
    # one visible GPU per task (srun --gpus-per-task=1) is always number 0
    index = local_rank if cuda and torch.cuda.device_count() > 1 else 0
    return Place(
        rank=int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0),
        local_rank=local_rank,
        world_size=int(environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS") or 1),
        device=torch.device("cuda", index) if cuda else torch.device("cpu"),
    )


def rendezvous(place: Place) -> dict[str, str]:
    """The five variables that every backend reads; without all of them DeepSpeed looks for MPI."""
    job = os.environ.get("SLURM_JOB_ID")
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None:
        nodes = os.environ.get("SLURM_JOB_NODELIST") if place.world_size > 1 else None
        address = _first_host(nodes) if nodes else "127.0.0.1"
    if port is None:
        port = str(20000 + int(job) % 10000) if job and place.world_size > 1 else free_port()
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _first_host(nodes: str) -> str:
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


def free_port() -> str:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (world * B, ...), with gradient; the tensor itself in one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor))


class Vote:
    """Whether any rank wishes to stop, told to all ranks at the same step.

    The wishes travel over the network while the step goes on, between CPUs, so that nobody waits for a GPU.

    Args:
        place: This process; every process must make its `Vote` at the same moment.
    """

    def __init__(self, place: Place):
        self.group = dist.new_group(backend="gloo") if place.world_size > 1 else None
        self.wish = torch.zeros(1)
        self.sent: dist.Work | None = None

    def cast(self, wish: bool) -> None:
        """Say what this rank wishes; every rank must call this."""
        self.wish.fill_(wish)
        if self.group is not None:
            self.sent = dist.all_reduce(self.wish, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def count(self) -> bool:
        """Whether any rank wished to stop at the last `cast`; every rank must call this."""
        if self.sent is not None:
            self.sent.wait()
            self.sent = None
        return bool(self.wish.item())


def wait_for_all(place: Place) -> None:
    """Wait for all ranks, if there are others."""
    if place.world_size > 1:
        barrier()


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)

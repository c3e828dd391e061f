"""Where this process stands among the others, however it was started."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One process of the job.

    Attributes:
        rank: Its number; those from `world_size` on run only the teacher.
        local_rank: Its number on this host.
        world_size: Processes that train the student.
        device: Where it computes.
        teachers: Processes that run only the teacher, beside those that train.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    teachers: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def is_teacher(self) -> bool:
        """Whether this process runs only the teacher."""
        return self.rank >= self.world_size

    @property
    def num_processes(self) -> int:
        """Processes of the job, teachers included."""
        return self.world_size + self.teachers

    def with_teachers(self, number: int) -> Place:
        """The same process in a job whose last processes run only the teacher; as it is if there are too few."""
        if self.teachers or not number or number >= self.world_size:
            return self
        return replace(self, world_size=self.world_size - number, teachers=number)


def task_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables, made of SLURM's for a task that `srun` started; nothing for other processes.

    A batch script has SLURM's variables too, but only the tasks of a step are processes of one run. The first task
    runs on the first node of the step.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    job, step = (int(environment[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_PORT": str(20000 + (job + 97 * step) % 10000),
    }
    if "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
    return found


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read the launcher's variables (deepspeed, torchrun), those made of SLURM's, or none for a single process."""
    found = {**task_of_slurm(environment), **environment}
    local_rank = int(found.get("LOCAL_RANK") or 0)
    cuda = torch.cuda.is_available() and environment.get("DS_ACCELERATOR", "cuda") == "cuda"
    # one visible GPU per task (srun --gpus-per-task=1) is always number 0
    index = local_rank if cuda and torch.cuda.device_count() > 1 else 0
    return Place(
        rank=int(found.get("RANK") or 0),
        local_rank=local_rank,
        world_size=int(found.get("WORLD_SIZE") or 1),
        device=torch.device("cuda", index) if cuda else torch.device("cpu"),
    )


def rendezvous(place: Place, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The five variables that every backend reads; without all of them DeepSpeed looks for MPI."""
    found = {**(task_of_slurm(environment) if place.num_processes > 1 else {}), **environment}
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": found.get("MASTER_ADDR", "127.0.0.1"),
        # one process alone lets the system choose, which cannot collide
        "MASTER_PORT": found.get("MASTER_PORT") or (free_port() if place.num_processes > 1 else "0"),
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

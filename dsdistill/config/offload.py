"""ZeRO offload: what of the student's state leaves the GPU for the host's memory or NVMe, and what that asks for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""ZeRO stages that can keep this outside of the GPU."""


def offload_problems(zero: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed would ignore, or what would spread the optimizer's state so that no checkpoint could hold it."""
    stage = zero.get("stage", 0)
    for key, stages in OFFLOADS.items():
        device = offload_device(zero, key)
        where = f"zero_optimization.{key}"
        if device != "none" and stage not in stages:
            yield f"{where}: ZeRO {stage} cannot; use stage {' or '.join(map(str, stages))}"
        if device == "nvme" and stage != 3:
            yield f"{where}.device: only ZeRO 3 can use NVMe; use cpu, or stage 3"
        if device == "nvme" and not zero[key].get("nvme_path"):
            yield f"{where}.nvme_path: missing; name a directory on a local NVMe disk"
    if offload_device(zero, "offload_param") == "nvme" and offload_device(zero, "offload_optimizer") == "none":
        yield "zero_optimization.offload_param.device: nvme needs offload_optimizer too; set it to cpu or nvme"
    if isinstance(optimizer := zero.get("offload_optimizer"), dict):
        if optimizer.get("ratio", 1) != 1:
            yield "zero_optimization.offload_optimizer.ratio: not supported here; leave it out, all goes or nothing"
        if optimizer.get("super_offload"):
            yield "zero_optimization.offload_optimizer.super_offload: needs DeepSpeed's own optimizer; leave it out"
    for key in ("zenflow", "mics_shard_size"):
        if zero.get(key) not in (None, -1):
            yield f"zero_optimization.{key}: its optimizer state cannot be saved by parameter; leave it out"


def offload_device(zero: Mapping[str, Any], key: str) -> str:
    """Where `offload_optimizer` or `offload_param` of a JSON puts it: none, cpu or nvme."""
    section = zero.get(key)
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def check_machine(zero: Mapping[str, Any]) -> None:
    """Refuse NVMe offload where it cannot work, before anything is started.

    Args:
        zero: The section `zero_optimization`.

    Raises:
        ValueError: With what is missing on this machine and how to get it.
    """
    if any(offload_device(zero, key) == "nvme" for key in OFFLOADS):
        problem = async_io_problem()
        if problem is not None:
            raise ValueError(f"offload to NVMe: {problem}, or offload to cpu")


def async_io_problem() -> str | None:
    """What DeepSpeed's reading and writing of NVMe lacks on this machine and how to get it, or None."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue] (made at run time)

    if installed_ops.get(AsyncIOBuilder.NAME):  # compiled when DeepSpeed was
        return None
    tools = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if tools:
        return (
            f"DeepSpeed compiles its async_io at first use, but there is no {' and no '.join(tools)}; "
            "install a C++ compiler and ninja-build"
        )
    if not AsyncIOBuilder().is_compatible():
        return (
            "libaio and its headers are not here; install them (libaio-dev on Debian and Ubuntu, "
            "libaio-devel on Fedora and its kin; elsewhere set CFLAGS and LDFLAGS)"
        )
    return None

"""Checkpoints: written beside their final name, sealed by a manifest, renamed; the newest whole one is found by name.

checkpoints/step-00000100/
    deepspeed/            engine, optimizer and loss-scale state, one file per process
    student.safetensors   complete student in float32, from which the export is made
    state.json            step, number of processes, ZeRO stage
    manifest.json         size and SHA-256 of every file, written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import save_file
from torch import nn

from dsdistill.training.dist import barrier
from dsdistill.training.engine import full_weights

MANIFEST = "manifest.json"
STUDENT = "student.safetensors"
STATE = "state.json"
ENGINE = "deepspeed"
CLIENT = "dsdistill"
_ENGINE_STATE_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's own state holds beside tensors and plain values."""


def checkpoint_name(step: int) -> str:
    """Directory name of a checkpoint; names sort like steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    engine: DeepSpeedEngine, student: nn.Module, directory: Path, state: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint; every process must call this.

    A kill at any moment leaves either no checkpoint of this name or a whole one.

    Args:
        engine: Holds model, optimizer and loss scale.
        student: The part of the engine's module that is exported.
        directory: `checkpoints` of the run.
        state: JSON values with at least `step`.
        keep: Newest checkpoints that stay.

    Returns:
        The checkpoint's directory.
    """
    final = directory / checkpoint_name(state["step"])
    partial = directory / f"partial-{final.name}"
    first = engine.global_rank == 0
    if first:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(partial), tag=ENGINE, client_state={CLIENT: state}, save_latest=False)
    weights = full_weights(engine, student)
    barrier()
    if first:
        save_file(weights, partial / STUDENT)
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        seal(partial)
        partial.rename(final)
        _sync(directory)
        for old in whole_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def seal(directory: Path) -> None:
    """Flush every file to disk and write the manifest."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(directory)


def verify(directory: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ValueError: If it is unfinished, or a file is missing, changed, or lies outside; names the file.
    """
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {directory} has no readable {MANIFEST}: it was never finished") from error
    for name, expected in files.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"checkpoint {directory}: {name} leads out of the directory")
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise ValueError(f"checkpoint {directory}: {name} is missing or truncated")
        if _sha256(path) != expected["sha256"]:
            raise ValueError(f"checkpoint {directory}: {name} has changed since it was written")
    extra = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {*files, MANIFEST}
    if extra:
        raise ValueError(f"checkpoint {directory}: {sorted(extra)[0]} is not in its manifest")


def whole_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first, by name and manifest only."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if re.fullmatch(r"step-\d{8}", p.name) and (p / MANIFEST).is_file()]
    return sorted(found)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the run knew: step, number of processes, ZeRO stage, and a fingerprint of the recipe."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Restore model, optimizer and loss scale from a verified checkpoint; every process must call this.

    Raises:
        RuntimeError: If DeepSpeed finds nothing to load.
    """
    with _no_code_from_pickles():
        path, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE)
    if path is None:
        raise RuntimeError(f"DeepSpeed could not load {checkpoint / ENGINE}")


@contextlib.contextmanager
def _no_code_from_pickles() -> Iterator[None]:
    """DeepSpeed unpickles without restriction; torch can be told to accept data and these classes only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(list(_ENGINE_STATE_CLASSES)):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Checkpoints: written beside their final name, sealed by a manifest, renamed; the newest whole one is found by name.

checkpoints/step-00000100/
    student.safetensors   complete student in float32, from which the export is made
    heads.safetensors     the same of projections and memory banks
    optimizer/*           Adam's moments by parameter, one file per process that holds some
    state.json            step, loss scale, number of processes, ZeRO stage
    manifest.json         size and SHA-256 of every file, written last

Nothing in it depends on DeepSpeed's layout, and nothing is a pickle: any number of processes goes on from it at any
ZeRO stage, and reading it cannot run code.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsdistill.corpus.files import read_json, sha256_of, sync
from dsdistill.training.moments import read_moments, write_moments
from dsdistill.training.optimizer_state import flats, full_weights, loss_scaling, persistent_buffers, set_loss_scaling

MANIFEST = "manifest.json"
STUDENT = "student.safetensors"
STATE = "state.json"
HEADS = "heads.safetensors"
OPTIMIZER = "optimizer"


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def checkpoint_name(step: int) -> str:
    """Directory name of a checkpoint; names sort like steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    engine: DeepSpeedEngine, modules: Mapping[str, nn.Module], directory: Path, state: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint; every process must call this.

    A kill at any moment leaves either no checkpoint of this name or a whole one.

    Args:
        engine: Holds model, optimizer and loss scale.
        modules: By the name of their file the parts of the engine's module, which together hold all its parameters.
        directory: `checkpoints` of the run.
        state: JSON values with at least `step`.
        keep: Newest checkpoints that stay.

    Returns:
        The checkpoint's directory.

    Raises:
        SaveError: On all processes alike, if any of them could not write; names the file.
    """
    final = directory / checkpoint_name(state["step"])
    partial = directory / f"partial-{final.name}"
    first = engine.global_rank == 0

    def begin() -> None:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        (partial / OPTIMIZER).mkdir(parents=True)

    def finish() -> None:
        for name, tensors in zip(modules, weights, strict=True):
            save_file(tensors, partial / name)
        (partial / STATE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        seal(partial)
        partial.rename(final)
        sync(directory)
        for old in whole_checkpoints(directory)[:-keep]:
            # a kill in the middle leaves nothing that has a checkpoint's name: `remove_unfinished` finds it
            shutil.rmtree(old.rename(old.with_name(f"partial-{old.name}")))

    problem = _agree(_attempt(begin, partial) if first else None)
    if problem is None:
        file = partial / OPTIMIZER / f"moments-{engine.global_rank:05d}.safetensors"
        problem = _agree(_attempt(lambda: write_moments(engine, file), file))
    if problem is None:
        weights = full_weights(engine, *modules.values())
        told = state | {"skipped_steps": engine.skipped_steps, "loss_scaling": loss_scaling(engine)}
        problem = _agree(_attempt(finish, partial) if first else None)
    if problem is not None:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"step {state['step']} could not be saved: {problem}")
    return final


def _attempt(write: Callable[[], object], path: Path) -> str | None:
    """Write; what went wrong, with the path, the bytes that were written, and those that are free."""
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:
        files = [p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
        written = sum(file.stat().st_size for file in files)
        there = next(p for p in (path, *path.parents) if p.exists())
        return (
            f"{path}: {' '.join(str(error).split())} ({written:,} bytes were written, "
            f"{shutil.disk_usage(there).free:,} are free there)"
        )
    return None


def _agree(problem: str | None) -> str | None:
    """The problem of the first process that has one; every process must call this."""
    problems: list[str | None] = [problem]
    if dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    return next((p for p in problems if p is not None), None)


def seal(directory: Path) -> None:
    """Flush every file to disk and write the manifest."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    sync(directory)


def verify(directory: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ValueError: If it is unfinished, or a file is missing, changed, or lies outside; names the file.
    """
    try:
        files = read_json(directory / MANIFEST)["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {directory} has no readable {MANIFEST}: it was never finished") from error
    for name, (size, checksum) in expected.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"checkpoint {directory}: {name} leads out of the directory")
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"checkpoint {directory}: {name} is missing or truncated")
        if sha256_of(path) != checksum:
            raise ValueError(f"checkpoint {directory}: {name} has changed since it was written")
    extra = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {*files, MANIFEST}
    if extra:
        raise ValueError(f"checkpoint {directory}: {sorted(extra)[0]} is not in its manifest")


def named_checkpoints(directory: Path) -> list[Path]:
    """Directories with the name of a checkpoint, oldest first, whole or not."""
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def whole_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first, by name and manifest only."""
    return [path for path in named_checkpoints(directory) if (path / MANIFEST).is_file()]


def newest_undamaged(directory: Path, *, may_start_again: bool = False) -> Path | None:
    """The newest checkpoint that passes `verify`; newer ones are told and put aside as `damaged-*`.

    Args:
        directory: `checkpoints` of the run, or of a stage.
        may_start_again: Go back to the beginning if all are damaged.

    Raises:
        ValueError: If there are checkpoints, but all are damaged, and starting again was not allowed.
    """
    problems: dict[Path, str] = {}
    whole = None
    for checkpoint in reversed(named_checkpoints(directory)):
        try:
            verify(checkpoint)
        except ValueError as error:
            problems[checkpoint] = str(error)
            continue
        whole = checkpoint
        break
    if problems and whole is None and not may_start_again:
        raise ValueError(
            f"no checkpoint in {directory} is whole:\n"
            + "\n".join(f"  {problem}" for problem in problems.values())
            + "\nput one back from a copy, or start again with --resume never, which moves this run aside"
        )
    back_to = "the beginning: no other is kept" if whole is None else f"{whole.name}, the newest that is whole"
    for damaged, problem in problems.items():
        aside = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        print(f"WARNING    {problem}; put aside as {aside.name}", file=sys.stderr)
        print(f"WARNING    going back to {back_to}", file=sys.stderr, flush=True)
    return whole


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left of a checkpoint it was writing."""
    for partial in directory.glob("partial-step-*"):
        shutil.rmtree(partial)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the run knew: step, loss scale, number of processes, ZeRO stage, and a fingerprint of the recipe.

    Raises:
        ValueError: If that is not in it.
    """
    try:
        state = read_json(checkpoint / STATE)
        types = {"step": int, "world_size": int, "zero_stage": int, "micro_batch": int, "recipe": str}
        types |= {"skipped_steps": int, "loss_scaling": dict | None}
        if all(isinstance(state[key], kind) for key, kind in types.items()):
            return state
    except (ValueError, KeyError):
        pass
    raise ValueError(f"checkpoint {checkpoint}: {STATE} is not what this version writes")


def load_weights(modules: Mapping[str, nn.Module], checkpoint: Path) -> None:
    """Put the weights of a verified checkpoint into the modules, before the engine copies and shards them.

    Args:
        modules: By the name of their file, as they were saved.
        checkpoint: Verified.

    Raises:
        ValueError: If a file does not hold exactly the modules' weights.
    """
    for file, module in modules.items():
        saved = _read(checkpoint / file)
        own: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(persistent_buffers(module))}
        different = sorted(
            {n: t.shape for n, t in saved.items()}.items() ^ {n: t.shape for n, t in own.items()}.items()
        )
        if different:
            raise ValueError(f"checkpoint {checkpoint}: {file} does not fit the model ({different[0][0]})")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def load_optimizer(engine: DeepSpeedEngine, modules: Mapping[str, nn.Module], checkpoint: Path) -> None:
    """Restore what the optimizer knew: float32 weights, moments, loss scale, counts; every process must call this.

    Args:
        engine: Made of the modules after `load_weights`, with any number of processes at any ZeRO stage.
        modules: By the name of their file, as they were saved.
        checkpoint: Verified.

    Raises:
        ValueError: On all processes alike, if the files do not hold every trained parameter's state.
    """
    state = read_state(checkpoint)
    try:
        read_moments(engine, sorted((checkpoint / OPTIMIZER).glob("*.safetensors")))
        _set_float32_weights(engine, modules, checkpoint)
        problem = None
    except (ValueError, SafetensorError) as error:
        problem = f"checkpoint {checkpoint}: {' '.join(str(error).split())}"
    problem = _agree(problem)
    if problem is not None:
        raise ValueError(problem)
    set_loss_scaling(engine, state["loss_scaling"])
    engine.global_steps, engine.skipped_steps = state["step"], state["skipped_steps"]
    engine.micro_steps = state["step"] * engine.gradient_accumulation_steps()
    engine.global_samples = state["step"] * engine.train_batch_size()


def _set_float32_weights(engine: DeepSpeedEngine, modules: Mapping[str, nn.Module], checkpoint: Path) -> None:
    """The engine has made its float32 copies of weights that were in half precision by then."""
    full: dict[int, Tensor] = {}
    for file, module in modules.items():
        saved = _read(checkpoint / file)
        full.update((id(parameter), saved[name].flatten()) for name, parameter in module.named_parameters())
    for flat in flats(engine, writes=True):
        for s in flat.stretches:
            s.of(flat.values.data).copy_(full[id(s.parameter)][s.start : s.start + s.size])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as tensors: {' '.join(str(error).split())}") from error

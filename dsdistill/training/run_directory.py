"""What a run leaves on disk and how the next attempt finds its place in it.

recipe.yaml, ds_config.json, run.json   as resolved, with versions and command
metrics.jsonl, tensorboard/             what telemetry wrote
skeleton/                               student's config and tokenizer
checkpoints/step-*/                     see `checkpoint.py`
model/                                  the exported student
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from dsdistill.config.recipe import RunSettings, read_settings
from dsdistill.corpus.files import read_json
from dsdistill.training.checkpoint import newest_undamaged, read_state, remove_unfinished, verify
from dsdistill.training.dist import Place
from dsdistill.training.engine import zero_stage

CHECKPOINTS = "checkpoints"
SKELETON = "skeleton"
EXPORT = "model"
RECIPE = "recipe.yaml"
CIRCUMSTANCES = "run.json"

FREE_TO_CHANGE = ("name", "source", "output", "evaluation", "logging", "checkpoint", "faults")
"""Recipe keys that do not touch what is learned, so a run may be resumed with others."""


FREE_OF_THE_TEACHER = ("placement", "ranks", "nvme_path")
"""The same for keys of the section `teacher`: it says the same wherever it lives."""


def fingerprint(recipe: RunSettings) -> str:
    """SHA-256 of all that decides what is learned."""
    free = {**dict.fromkeys(FREE_TO_CHANGE, True), "teacher": set(FREE_OF_THE_TEACHER)}
    content = recipe.model_dump(mode="json", exclude=free, serialize_as_any=True)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def state_of(step: int, recipe: RunSettings, config: dict[str, Any], place: Place) -> dict[str, Any]:
    """What a checkpoint remembers beside the engine's own state; data order and masks follow from the step."""
    return {"step": step, "recipe": fingerprint(recipe), **layout(config, place)}


def layout(config: dict[str, Any], place: Place) -> dict[str, int]:
    """How a run is spread over processes: it may go on with another."""
    return {
        "world_size": place.world_size,
        "zero_stage": zero_stage(config),
        "micro_batch": config["train_micro_batch_size_per_gpu"],
    }


def changes(checkpoint: Path, config: dict[str, Any], place: Place) -> list[str]:
    """What is different from when a checkpoint was saved, for people; nothing if nothing is."""
    saved, now = read_state(checkpoint), layout(config, place)
    names = {"world_size": "process(es)", "zero_stage": "as ZeRO stage", "micro_batch": "row(s) at once"}
    told = [f"{saved[key]} {what}, now {now[key]}" for key, what in names.items() if saved[key] != now[key]]
    if not told:
        return []
    lines = [f"it was saved with {'; '.join(told)}: same global batches and optimizer state"]
    if (saved["world_size"], saved["micro_batch"]) != (now["world_size"], now["micro_batch"]):
        lines.append("dropout is drawn anew, per process and micro-batch; sums are rounded in another order")
    return lines


def step_of(checkpoint: Path) -> int:
    """Steps done when a checkpoint was written."""
    return read_state(checkpoint)["step"]


def enter(
    directory: Path,
    recipe: RunSettings,
    config: dict[str, Any],
    place: Place,
    resume: Literal["auto", "never"] | Path,
    *,
    data_sha256: str | None,
    may_start_again: bool = False,
) -> Path | None:
    """Prepare the directory of a run or of a stage, and choose the checkpoint to go on from; every process calls this.

    Args:
        directory: Made if it is not there.
        recipe: What is learned.
        config: DeepSpeed JSON, filled.
        place: This process.
        resume: As the command line has it.
        data_sha256: Checksum of the training data, which must be that of the checkpoint.
        may_start_again: Start from the beginning if all checkpoints are damaged, which is refused otherwise.

    Returns:
        The verified checkpoint, or None to start from the beginning.

    Raises:
        ValueError: On all processes alike, if the checkpoint is damaged or belongs to another recipe or other data.
    """
    outcome: list[Any] = [None]
    if place.is_first:
        try:
            outcome = [_enter(directory, recipe, config, place, resume, data_sha256, may_start_again)]
        except (ValueError, OSError) as error:
            outcome = [ValueError(str(error))]
    if place.world_size > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


def _enter(
    directory: Path,
    recipe: RunSettings,
    config: dict[str, Any],
    place: Place,
    resume: Literal["auto", "never"] | Path,
    data_sha256: str | None,
    may_start_again: bool,
) -> Path | None:
    if resume == "never" and directory.exists() and any(directory.iterdir()):
        aside = directory.with_name(f"{directory.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(aside)
        print(f"note       the earlier run was moved to {aside}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = choose_checkpoint(directory, recipe, config, place, resume, may_start_again)
    if checkpoint is not None:
        _check_data(directory, data_sha256)
    remove_unfinished(directory / CHECKPOINTS)
    (directory / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    (directory / "ds_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    told = circumstances(recipe, place, data_sha256)
    (directory / CIRCUMSTANCES).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return checkpoint


def _check_data(directory: Path, data_sha256: str | None) -> None:
    """Refuse to go on with other data than was recorded; a run that recorded none is not asked."""
    try:
        before = read_json(directory / CIRCUMSTANCES).get("data_sha256")
    except ValueError:
        return
    if before is not None and before != data_sha256:
        raise ValueError(
            f"the training data has changed since {directory} was started (checksum {str(before)[:12]}, now "
            f"{str(data_sha256)[:12]}); put it back, set another `output`, or use --resume never"
        )


def choose_checkpoint(
    directory: Path,
    recipe: RunSettings,
    config: dict[str, Any],
    place: Place,
    resume: Literal["auto", "never"] | Path,
    may_start_again: bool = False,
) -> Path | None:
    """The checkpoint that `resume` means, verified; None if there is none to go on from.

    Raises:
        ValueError: If it cannot be used; says why.
    """
    if resume == "never":
        return None
    if resume == "auto":
        checkpoint = newest_undamaged(directory / CHECKPOINTS, may_start_again=may_start_again)
    else:
        checkpoint = Path(resume)
    if checkpoint is None:
        return None
    if resume != "auto":
        verify(checkpoint)
    saved, now = read_state(checkpoint), state_of(0, recipe, config, place)
    if saved["recipe"] != now["recipe"]:
        raise ValueError(
            f"{checkpoint} belongs to another recipe ({difference(directory, recipe)}); set another `output`, or "
            "use --resume never, which moves the earlier run aside"
        )
    return checkpoint


def difference(directory: Path, recipe: RunSettings) -> str:
    """The first recipe key that differs from the one in the run directory."""
    try:
        before = read_settings(directory)
    except ValueError:
        return "its recipe.yaml cannot be read"
    now = recipe.model_dump(mode="json", by_alias=True, serialize_as_any=True)
    for section, value in now.items():
        was = before.get(section)
        if section in FREE_TO_CHANGE or was == value:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            free = FREE_OF_THE_TEACHER if section == "teacher" else ()
            changed = [key for key in value if key not in free and value[key] != was.get(key)]
            if not changed:
                continue
            return f"{section}.{changed[0]} was {was.get(changed[0])!r}, now {value[changed[0]]!r}"
        return f"{section} has changed"
    return "its fingerprint differs"


def circumstances(recipe: RunSettings, place: Place, data_sha256: str | None) -> dict[str, Any]:
    """Versions, command, data and hardware of an attempt; no host or user names."""
    packages = ("dsdistill", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "git_commit": _git_commit(),
        "seed": recipe.seed,
        "data_sha256": data_sha256,
        "processes": place.world_size,
        "device": _device_name(place),
        "cpu_cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of this source tree, or None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    asked = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def _device_name(place: Place) -> str:
    import torch

    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else platform.machine() + " CPU"

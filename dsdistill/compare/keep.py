"""What stays of a finished run on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

MODEL = "model"
SHAPES = "shapes"
_TO_GO_ON = ("checkpoints", "skeleton")


def tidy(directory: Path, keep: Literal["results", "models", "all"]) -> None:
    """Delete what is not to be kept of a finished run: checkpoints, then the exported model.

    Scores, predictions, metrics, recipe and circumstances always stay.
    """
    if keep == "all":
        return
    for name in (*_TO_GO_ON, *([MODEL] if keep == "results" else [])):
        for found in [*directory.glob(name), *directory.glob(f"*/{name}")]:
            shutil.rmtree(found)


def keep_shape(directory: Path, output: Path, shape: str) -> None:
    """Copy the config of a run's exported model, from which its speed can be measured when the model is gone."""
    config, kept = directory / MODEL / "config.json", shape_config(output, shape)
    if config.is_file() and not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, kept)


def shape_config(output: Path, shape: str) -> Path:
    """Where the config of a shape is kept in a grid's directory."""
    return output / SHAPES / shape.replace(" ", "_") / "config.json"

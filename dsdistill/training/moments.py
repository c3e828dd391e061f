"""Adam's moments on disk: each process writes the stretches it holds, and reads those it needs, however they were cut.

A file is a safetensors file with one tensor per stretch and kind, named `kind:start:parameter`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsdistill.training.optimizer_state import MOMENTS, STEP, Stretch, flats, is_sharded


def write_moments(engine: deepspeed.DeepSpeedEngine, file: Path) -> None:
    """Write what this process holds; nothing if that is nothing, or if the first process holds the same."""
    if engine.global_rank != 0 and not is_sharded(engine):
        return
    names = _names(engine)
    tensors: dict[str, Tensor] = {}
    for flat in flats(engine):
        for s in flat.stretches:
            where = f"{s.start}:{names[id(s.parameter)]}"
            tensors[f"{STEP}:{where}"] = torch.as_tensor(flat.state[STEP]).float().cpu().view(1).clone()
            for kind in MOMENTS:
                tensors[f"{kind}:{where}"] = s.of(flat.state[kind]).to("cpu", copy=True)
    if tensors:
        save_file(tensors, file)


def read_moments(engine: deepspeed.DeepSpeedEngine, files: Sequence[Path]) -> None:
    """Fill this process's optimizer state from all files of a checkpoint.

    Raises:
        ValueError: If a part of a trained parameter's state is not there; names the parameter.
        SafetensorError: If a file is damaged.
    """
    names, saved = _names(engine), _index(files)
    for flat in flats(engine, writes=True):
        for s in flat.stretches:
            name = names[id(s.parameter)]
            flat.state[STEP] = torch.as_tensor(flat.state[STEP])
            flat.state[STEP].fill_(_fill(flat.state, s, saved[name], name))


class _Piece(NamedTuple):
    """A stretch in a file."""

    file: Any
    start: int
    size: int

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements of the whole parameter that lie in it."""
        return self.file.get_slice(f"{kind}:{self.start}:{name}")[start - self.start : stop - self.start]


def _index(files: Sequence[Path]) -> dict[str, list[_Piece]]:
    """What is in the files, by parameter; nothing is read yet."""
    found: dict[str, list[_Piece]] = defaultdict(list)
    for path in files:
        file: Any = safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118 (no dict)
            kind, start, name = key.split(":", 2)
            if kind == MOMENTS[0]:
                found[name].append(_Piece(file, int(start), file.get_slice(key).get_shape()[0]))
    return found


def _fill(state: dict[str, Any], s: Stretch, pieces: Sequence[_Piece], name: str) -> float:
    """Copy a stretch's moments out of the pieces that overlap it; how many steps they have seen."""
    missing, steps = s.size, 0.0
    for piece in pieces:
        start, stop = max(s.start, piece.start), min(s.start + s.size, piece.start + piece.size)
        if start >= stop:
            continue
        for kind in MOMENTS:
            s.of(state[kind])[start - s.start : stop - s.start] = piece.read(kind, name, start, stop)
        steps = max(steps, float(piece.read(STEP, name, piece.start, piece.start + 1)))
        missing -= stop - start
    if missing:
        raise ValueError(f"the optimizer's state of {name} is not whole: {missing} of {s.size} elements are missing")
    return steps


def _names(engine: deepspeed.DeepSpeedEngine) -> dict[int, str]:
    module = cast(nn.Module, engine.module)
    return {id(parameter): name for name, parameter in module.named_parameters()}

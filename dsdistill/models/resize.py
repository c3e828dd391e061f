"""Turns the weights of a teacher-shaped model into those of a narrower one: each axis of each weight gets a basis.

Every weight W becomes B_out^T W B_in, where B (teacher's size, student's size) has orthogonal columns and stands for
one axis: the residual stream (one B for the whole model), each layer's queries and keys, its values, and its neurons.
Axes that keep their size keep their order, so nothing changes there.

`slice` takes the first coordinates, heads and neurons everywhere.

`heads` takes the most important ones: coordinates of the residual stream by their energy behind the layer norms (the
sum of g^2 + b^2 over all norms, which is the second moment of what each norm puts out), heads of each layer by what
they can write (Frobenius norm of W_V W_O), neurons by |w_in| |w_out|. Within a head it takes the first dimensions.

`svd` is `heads` with a truncated singular value decomposition within each head that has to shrink: queries and keys
are projected on the leading left singular vectors of [W_Q W_K], values on those of [W_V W_O^T]. Queries and keys are
also scaled by (D'/D)^(1/4), D and D' being the old and new width per head, so that scores keep their size under
1/sqrt(D').

The residual stream itself is never turned: layer norms act on coordinates and have no exact counterpart in another
basis. Its principal subspace was tried and lost to selection (benchmarks/resize.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

Resize = Literal["slice", "heads", "svd"]

STREAM = "stream"
NORM = re.compile(r"(LayerNorm|layer_norm)\.")
AXES = (
    (NORM, (STREAM,)),
    (re.compile(r"attention\.self\.(query|key)\."), ("match", STREAM)),
    (re.compile(r"attention\.self\.value\."), ("content", STREAM)),
    (re.compile(r"attention\.output\.dense\."), (STREAM, "content")),
    (re.compile(r"intermediate\.dense\."), ("neurons", STREAM)),
    (re.compile(r"\d\.output\.dense\."), (STREAM, "neurons")),
    (re.compile(r"(transform|pooler|lm_head)\.dense\."), (STREAM, STREAM)),
    (re.compile(r"(decoder|_embeddings)\.weight$"), (None, STREAM)),
    (re.compile(r"(predictions|decoder|lm_head)\.bias$"), (None,)),
)
"""What the axes of a weight are, by its name in BERT, RoBERTa and their kin; the first match counts, None stays."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that can shrink."""

    width: int
    num_heads: int
    head_width: int
    neurons: int


def sizes_of(config: Any) -> Sizes:
    """Sizes of a model, from its config.

    Raises:
        ValueError: If the config does not tell them as BERT's does.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    if not hasattr(config, "intermediate_size") or getattr(config, "embedding_size", width) != width:
        raise ValueError(f"student.resize knows models built like BERT, not {config.model_type}; use init: random")
    if width % heads:
        raise ValueError(f"hidden_size={width} cannot be split into {heads} heads; use a multiple")
    return Sizes(width, heads, width // heads, config.intermediate_size)


def resize_weights(weights: Mapping[str, Tensor], old: Sizes, new: Sizes, method: Resize) -> dict[str, Tensor]:
    """Weights of a narrower model.

    Args:
        weights: State dict of a model of `old` sizes, any float dtype.
        old: Its sizes.
        new: Sizes wanted, none larger.
        method: See the top of this file.

    Returns:
        State dict for a model of `new` sizes, of the same dtypes.

    Raises:
        ValueError: If a size would grow, or a weight is none of those in `AXES`.
    """
    for field in fields(Sizes):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if after > before:
            raise ValueError(f"student.resize can only shrink, but {field.name} grows from {before} to {after}")
    axes = {name: _axes(name) for name in weights}
    precise = {name: tensor.double() for name, tensor in weights.items()}
    bases = {STREAM: _stream_basis(precise, old.width, new.width, method)}
    for layer in {_layer_of(name) for name in weights if "attention.self.query" in name}:
        parts = {name.removeprefix(layer): tensor for name, tensor in precise.items() if name.startswith(layer)}
        bases |= {layer + axis: basis for axis, basis in _layer_bases(parts, old, new, method).items()}
    resized = {}
    for name, tensor in precise.items():
        for dim, axis in enumerate(axes[name][: tensor.dim()]):
            if axis is not None:
                basis = bases[axis if axis == STREAM else _layer_of(name) + axis]
                tensor = (tensor.movedim(dim, -1) @ basis).movedim(-1, dim)
        resized[name] = tensor.to(weights[name].dtype)
    return resized


def _axes(name: str) -> tuple[str | None, ...]:
    for pattern, axes in AXES:
        if pattern.search(name):
            return axes
    raise ValueError(f"student.resize knows models built like BERT, which have no {name}; use init: random")


def _layer_of(name: str) -> str:
    """The part of a weight's name that tells its layer, such as `encoder.layer.3.`."""
    head, number, _ = re.split(r"(\.\d+\.)", name, maxsplit=1)
    return head + number


def _stream_basis(weights: Mapping[str, Tensor], old: int, new: int, method: Resize) -> Tensor:
    if method == "slice":
        return _selection(old, range(new))
    energy = torch.stack([tensor for name, tensor in weights.items() if NORM.search(name)]).square().sum(0)
    return _selection(old, _largest(energy, new))


def _layer_bases(weights: Mapping[str, Tensor], old: Sizes, new: Sizes, method: Resize) -> dict[str, Tensor]:
    """Bases of the axes inside one layer; `weights` by their names in the layer."""
    heads, neurons = range(new.num_heads), range(new.neurons)
    split = (old.num_heads, old.head_width)
    query, key, value = (weights[f"attention.self.{x}.weight"].unflatten(0, split) for x in ("query", "key", "value"))
    out = weights["attention.output.dense.weight"].T.unflatten(0, split)  # (H, D, E), as the others
    if method != "slice":
        heads = _largest((value.transpose(1, 2) @ out).flatten(1).norm(dim=1), new.num_heads)
        into, back = weights["intermediate.dense.weight"], weights["output.dense.weight"]
        neurons = _largest(into.norm(dim=1) * back.norm(dim=0), new.neurons)
    scale = (new.head_width / old.head_width) ** 0.25 if method == "svd" else 1.0
    return {
        "match": scale * _head_basis(torch.cat([query, key], 2), heads, new.head_width, method),
        "content": _head_basis(torch.cat([value, out], 2), heads, new.head_width, method),
        "neurons": _selection(old.neurons, neurons),
    }


def _head_basis(parts_HDX: Tensor, heads: Sequence[int], width: int, method: Resize) -> Tensor:
    """Block-diagonal basis (H * D, H' * D') of the chosen heads; `parts_HDX` is what each head has to span."""
    H, D, _ = parts_HDX.shape
    blocks = parts_HDX.new_zeros(H, D, len(heads), width)
    for place, head in enumerate(heads):
        shrinks = method == "svd" and width < D
        vectors = torch.linalg.svd(parts_HDX[head], full_matrices=False).U if shrinks else torch.eye(D).to(blocks)
        blocks[head, :, place] = vectors[:, :width]
    return blocks.reshape(H * D, len(heads) * width)


def _selection(old: int, chosen: Sequence[int]) -> Tensor:
    return torch.eye(old, dtype=torch.float64)[:, list(chosen)]


def _largest(importance: Tensor, count: int) -> list[int]:
    """The most important places, in their old order."""
    return sorted(importance.topk(count).indices.tolist())

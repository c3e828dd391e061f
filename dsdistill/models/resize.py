"""Turns the weights of a teacher-shaped model into those of a narrower one: each axis of each weight keeps some places.

Weights go by BERT's names (`translate.py`).

The axes are the residual stream (chosen once for the whole model), and in each layer the heads with their dimensions,
and the neurons of the feed-forward part.

`slice` keeps the first places everywhere.

`importance` keeps the coordinates of the residual stream with the most energy behind the layer norms (the sum of
g^2 + b^2 over all norms with factors g and offsets b, the second moment of what each norm puts out), the heads of each
layer that can write most (Frobenius norm of W_V W_O; of all layers together where they share a position bias per head,
as MPNet's), and the neurons with the largest |w_in| |w_out|. Within a head it
keeps the first dimensions, because nothing better was found.

Truncated singular value decompositions, of the residual stream and within heads, were tried and lost to this choice:
a layer norm acts on coordinates and has no exact counterpart in another basis (benchmarks/resize.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from dsdistill.models.families import neurons_of

Resize = Literal["slice", "importance"]

STREAM = "stream"
SHARED_HEADS = "shared heads"
NORM = re.compile(r"(LayerNorm|layer_norm)\.")
AXES = (
    (NORM, (STREAM,)),
    (re.compile(r"attention\.self\.(query|key|value)\."), ("heads", STREAM)),
    (re.compile(r"attention\.output\.dense\."), (STREAM, "heads")),
    (re.compile(r"intermediate\.dense\."), ("neurons", STREAM)),
    (re.compile(r"\d\.output\.dense\."), (STREAM, "neurons")),
    (re.compile(r"(transform|pooler|lm_head|classifier)\.dense\."), (STREAM, STREAM)),
    (re.compile(r"(decoder|_embeddings|classifier|out_proj)\.weight$"), (None, STREAM)),
    (re.compile(r"(predictions|decoder|lm_head|classifier|out_proj)\.bias$"), (None,)),
    (re.compile(r"relative_attention_bias\.weight$"), (None, SHARED_HEADS)),
)
"""What the axes of a weight are, by its name in BERT and families called alike; the first match counts, None stays."""


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
    neurons = neurons_of(config)
    if neurons is None or getattr(config, "embedding_size", width) != width:
        raise ValueError(f"student.resize knows models built like BERT, not {config.model_type}; use init: random")
    if width % heads:
        raise ValueError(f"hidden_size={width} cannot be split into {heads} heads; use a multiple")
    return Sizes(width, heads, width // heads, neurons)


def check_shrinks(old: Sizes, new: Sizes) -> None:
    """Refuse sizes that grow.

    Raises:
        ValueError: Names the size.
    """
    for field in fields(Sizes):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if after > before:
            raise ValueError(f"student.resize can only shrink, but {field.name} grows from {before} to {after}")


def resize_weights(weights: Mapping[str, Tensor], old: Sizes, new: Sizes, method: Resize) -> dict[str, Tensor]:
    """Weights of a narrower model.

    Args:
        weights: State dict of a model of `old` sizes.
        old: Its sizes.
        new: Sizes wanted, none larger.
        method: See the top of this file.

    Returns:
        State dict for a model of `new` sizes.

    Raises:
        ValueError: If a size would grow, or a weight is none of those in `AXES`.
    """
    check_shrinks(old, new)
    axes = {name: _axes(name) for name in weights}
    kept = {STREAM: _kept_coordinates(weights, new, method)}
    layers = {_layer_of(name) for name, where in axes.items() if "heads" in where}
    parts = {
        layer: {name.removeprefix(layer): tensor for name, tensor in weights.items() if name.startswith(layer)}
        for layer in layers
    }
    importance = {layer: _importance_of_heads(part, old) for layer, part in parts.items()}
    if any(SHARED_HEADS in where for where in axes.values()):
        together = torch.stack(list(importance.values())).sum(0)
        importance = dict.fromkeys(layers, together)
        kept[SHARED_HEADS] = _kept_heads(together, new, method)
    for layer, part in parts.items():
        heads = _kept_heads(importance[layer], new, method)
        kept[f"{layer}heads"] = (heads[:, None] * old.head_width + torch.arange(new.head_width)).flatten()
        kept[f"{layer}neurons"] = _kept_neurons(part, new, method)
    resized = {}
    for name, tensor in weights.items():
        for dim, axis in enumerate(axes[name][: tensor.dim()]):
            if axis is not None:
                places = kept[axis if axis in (STREAM, SHARED_HEADS) else _layer_of(name) + axis]
                tensor = tensor.index_select(dim, places.to(tensor.device))
        resized[name] = tensor
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


def _kept_coordinates(weights: Mapping[str, Tensor], new: Sizes, method: Resize) -> Tensor:
    if method == "slice":
        return torch.arange(new.width)
    norms = [tensor for name, tensor in weights.items() if NORM.search(name)]
    return _largest(torch.stack(norms).square().sum(0), new.width)


def _importance_of_heads(weights: Mapping[str, Tensor], old: Sizes) -> Tensor:
    """How much each head of a layer can write, (H,)."""
    split = (old.num_heads, old.head_width)
    value = weights["attention.self.value.weight"].unflatten(0, split)
    out = weights["attention.output.dense.weight"].T.unflatten(0, split)
    return (value.transpose(1, 2) @ out).flatten(1).norm(dim=1)


def _kept_heads(importance: Tensor, new: Sizes, method: Resize) -> Tensor:
    return torch.arange(new.num_heads) if method == "slice" else _largest(importance, new.num_heads)


def _kept_neurons(weights: Mapping[str, Tensor], new: Sizes, method: Resize) -> Tensor:
    if method == "slice":
        return torch.arange(new.neurons)
    into, back = weights["intermediate.dense.weight"], weights["output.dense.weight"]
    return _largest(into.norm(dim=1) * back.norm(dim=0), new.neurons)


def _largest(importance: Tensor, count: int) -> Tensor:
    """The most important places, in their old order."""
    return importance.topk(count).indices.sort().values.cpu()

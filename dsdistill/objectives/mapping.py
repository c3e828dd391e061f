"""Which layer of the teacher initialises, and which supervises, each layer of the student.

Layers are numbered 1..N as in the papers; 0 is the embedding output.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsdistill.core import LayerPairs

MAPPINGS = ("last", "first", "uniform", "skip", "lower", "upper", "init", "combine")
INITIALISATIONS = ("lower", "upper", "uniform", "skip", "random")


def layer_pairs(
    layers: str | Sequence[Sequence[int]],
    student_layers: int,
    teacher_layers: int,
    *,
    embeddings: bool = False,
    initial: Sequence[int] | None = None,
) -> LayerPairs:
    """The layer pairs that a recipe's `layers` stands for.

    Args:
        layers: One of
            `last` (last with last), `first` (layer 1 with layer 1),
            `lower` (i with i), `upper` (the last ones of the teacher, in order),
            `uniform` or `skip` (i with ceil(i * T / S), so last with last),
            `init` (i with the teacher layer that it was initialised from),
            `combine` (all of the student together with all of the teacher),
            or a list of [student layer, teacher layer].
        student_layers: S, number of layers of the student.
        teacher_layers: T, number of layers of the teacher.
        embeddings: Compare the embedding outputs (layer 0) too; only hidden states have them.
        initial: For `init`: the teacher layers that initialise the student, from `initial_layers`.

    Raises:
        ValueError: If the name is unknown or a layer does not exist.
    """
    if layers == "combine":
        start = 0 if embeddings else 1
        return LayerPairs(
            tuple(range(start, student_layers + 1)), tuple(range(start, teacher_layers + 1)), combine=True
        )
    pairs = [(0, 0)] if embeddings else []
    if not isinstance(layers, str):
        pairs += [_checked_pair(pair, student_layers, teacher_layers) for pair in layers]
    elif layers == "last":
        pairs.append((student_layers, teacher_layers))
    elif layers == "first":
        pairs.append((1, 1))
    elif layers == "init":
        pairs += _pairs_of_initialisation(initial, student_layers, teacher_layers)
    elif layers in MAPPINGS:
        pairs += enumerate(_placed(layers, student_layers, teacher_layers), start=1)
    else:
        raise ValueError(
            f"layers={layers!r} is unknown; use one of {', '.join(MAPPINGS)} or a list of [student, teacher]"
        )
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"layers={layers!r} names {'no pair' if not pairs else 'a pair twice'}; name each pair once")
    student, teacher = zip(*pairs, strict=True)
    return LayerPairs(student, teacher)


def initial_layers(
    init: str | Sequence[int] | None, student_layers: int, teacher_layers: int
) -> tuple[int, ...] | None:
    """The teacher layer whose weights each student layer starts from, or None if it starts from none of them.

    Args:
        init: `lower` (1..S), `upper` (the last S), `uniform` or `skip` (ceil(i * T / S)), `random`, None, or a list of
            S teacher layers such as [4, 8, 12].
        student_layers: S, number of layers of the student.
        teacher_layers: T, number of layers of the teacher.

    Raises:
        ValueError: If the name is unknown, a layer does not exist, or the list is not S long.
    """
    if init is None or init == "random":
        return None
    if isinstance(init, str):
        if init not in INITIALISATIONS:
            names = ", ".join(INITIALISATIONS)
            raise ValueError(f"init={init!r} is unknown; use one of {names} or a list of teacher layers")
        return _placed(init, student_layers, teacher_layers)
    if len(init) != student_layers:
        raise ValueError(
            f"init={list(init)} names {len(init)} layers for {student_layers}; name one for each student layer"
        )
    for layer in init:
        _check_layer("init: teacher layer", layer, 1, teacher_layers)
    return tuple(init)


def check_attention_layers(pairs: LayerPairs) -> None:
    """Refuse pairs without attention.

    Raises:
        ValueError: If layers are combined, or layer 0 (the embedding output) is among them.
    """
    if any(0 in pair for pair in pairs):
        raise ValueError("layer 0 is the embedding output and has no attention; drop it (embeddings: false)")


def _placed(name: str, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Teacher layers for student layers 1..S."""
    if name in ("uniform", "skip"):
        return tuple(-(-i * teacher_layers // student_layers) for i in range(1, student_layers + 1))
    if student_layers > teacher_layers:
        raise ValueError(
            f"{name!r} needs a teacher at least as deep as the student, got {student_layers} student layers and "
            f"{teacher_layers} teacher layers; use 'uniform' or a list"
        )
    offset = teacher_layers - student_layers if name == "upper" else 0
    return tuple(i + offset for i in range(1, student_layers + 1))


def _pairs_of_initialisation(
    initial: Sequence[int] | None, student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    if initial is None:
        raise ValueError(
            "layers='init' needs a student initialised from teacher layers, but it is random; use 'uniform'"
        )
    checked = initial_layers(initial, student_layers, teacher_layers)
    return list(enumerate(checked or (), start=1))


def _checked_pair(pair: Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, int]:
    if len(pair) != 2:
        raise ValueError(f"layers: {list(pair)} is no pair; write [student layer, teacher layer]")
    _check_layer("layers: student layer", pair[0], 0, student_layers)
    _check_layer("layers: teacher layer", pair[1], 0, teacher_layers)
    return pair[0], pair[1]


def _check_layer(what: str, layer: int, lowest: int, highest: int) -> None:
    if not lowest <= layer <= highest:
        raise ValueError(
            f"{what} {layer} is outside {lowest}..{highest}; layers count from 1, 0 is the embedding output"
        )

"""One row for each objective (and each of its forms) that the property tests run over.

A new objective is one more `Case`: its oracle says what the terms should be in a `World`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsdistill.core import LayerPairs
from tests import oracles
from tests.objectives.worlds import OTHER_HEADS, TEACHER, World


@dataclass(frozen=True, kw_only=True)
class Case:
    """An objective under test.

    Attributes:
        id: Name of the test row.
        name: Name of the objective.
        oracle: What the terms should be, from `tests.oracles`.
        params: As in a recipe.
        world: Arguments of `make_world`, beyond the defaults.
        vanishes: Loss and gradient are zero where the student says what the teacher says.
        splits: The mean over equal parts of a batch is the value of the whole.
        rows: Row-wise logits and labels, as in a task.
    """

    id: str
    name: str
    oracle: Callable[[World], dict[str, float]]
    params: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    vanishes: bool = True
    splits: bool = True

    @property
    def task(self) -> bool:
        return self.world.get("task", False)


def lists(values, signal: str, layer: int) -> list:
    return values.at(signal, layer).detach().tolist()


def over_pairs(world: World, one: Callable[[int, int], float]) -> float:
    return oracles.mean(one(s, t) for s, t in world.pairs)


def attention(function) -> Callable[[World], float]:
    def value(world: World) -> float:
        return over_pairs(
            world,
            lambda s, t: function(
                lists(world.student, "query", s),
                lists(world.student, "key", s),
                lists(world.teacher, "query", t),
                lists(world.teacher, "key", t),
                world.batch.mask.tolist(),
                world.student.scaling[s],
                world.teacher.scaling[t],
            ),
        )

    return value


def relation(left: str, right: str, heads: int) -> Callable[[World], float]:
    def value(world: World) -> float:
        return over_pairs(
            world,
            lambda s, t: oracles.relation_kl(
                lists(world.student, left, s),
                lists(world.teacher, left, t),
                world.batch.mask.tolist(),
                heads,
                lists(world.student, right, s),
                lists(world.teacher, right, t),
            ),
        )

    return value


def term(**values: Callable[[World], float]) -> Callable[[World], dict[str, float]]:
    return lambda world: {name: value(world) for name, value in values.items()}


def projected(world: World, states: list, index: int) -> list:
    """Hidden states [b][i][width] through the head's weight for one pair, if there is a head."""
    if world.head is None:
        return states
    weight = world.head[index].weight.tolist()
    return [[oracles.linear(x, weight) for x in row] for row in states]


def hidden_states(world: World) -> list[tuple[list, list]]:
    """(student, teacher) states [b][i][width] of each pair, the student's projected."""
    if world.pairs.combine:
        sides = []
        for values, layers in ((world.student, world.pairs.student), (world.teacher, world.pairs.teacher)):
            stacked = [lists(values, "hidden", layer) for layer in layers]
            sides.append(
                [[[x for s in stacked for x in s[b][i]] for i in range(len(row))] for b, row in enumerate(stacked[0])]
            )
        return [(projected(world, sides[0], 0), sides[1])]
    return [
        (projected(world, lists(world.student, "hidden", s), index), lists(world.teacher, "hidden", t))
        for index, (s, t) in enumerate(world.pairs)
    ]


def hidden_mse(world: World) -> float:
    return oracles.mean(oracles.hidden_mse(s, t, world.batch.mask.tolist()) for s, t in hidden_states(world))


def mlm(world: World) -> float:
    labels = world.batch.labels.flatten().tolist()
    return oracles.cross_entropy(lists(world.student, "logits", -1), [labels[i] for i in world.batch.targets.tolist()])


SAME_WIDTH = {"student": TEACHER, "teacher": TEACHER}
ALL_LAYERS = LayerPairs((1, 2, 3), (1, 2, 3), combine=True)
WITH_EMBEDDINGS = LayerPairs((0, 1, 3), (0, 2, 3))
OTHERS = {"student": OTHER_HEADS, "teacher": TEACHER}

CASES = [
    Case(id="att_kl", name="att_kl", oracle=term(att_kl=attention(oracles.attention_kl))),
    Case(id="att_mse", name="att_mse", oracle=term(att_mse=attention(oracles.attention_mse))),
    Case(id="val_kl", name="val_kl", oracle=term(val_kl=relation("value", "value", 2))),
    Case(id="val_kl-other-heads", name="val_kl", world=OTHERS, oracle=term(val_kl=relation("value", "value", 2))),
    Case(
        id="minilm",
        name="minilm",
        oracle=term(att_kl=attention(oracles.attention_kl), val_kl=relation("value", "value", 2)),
    ),
    Case(
        id="minilmv2",
        name="minilmv2",
        params={"relation_heads": 2},
        world=OTHERS,
        oracle=term(
            query_query=relation("query", "query", 2),
            key_key=relation("key", "key", 2),
            value_value=relation("value", "value", 2),
        ),
    ),
    Case(
        id="minilmv2-mixed",
        name="minilmv2",
        params={"relation_heads": 1, "relations": (("query", "key"), ("value", "query"))},
        world=OTHERS,
        oracle=term(query_key=relation("query", "key", 1), value_query=relation("value", "query", 1)),
    ),
    Case(id="hid_seq", name="hid_seq", oracle=term(hid_seq=hidden_mse)),
    Case(id="hid_seq-same-width", name="hid_seq", world=SAME_WIDTH, oracle=term(hid_seq=hidden_mse)),
    Case(
        id="hid_seq-always",
        name="hid_seq",
        params={"projection": "always"},
        world=SAME_WIDTH,
        vanishes=False,
        oracle=term(hid_seq=hidden_mse),
    ),
    Case(
        id="hid_seq-embeddings",
        name="hid_seq",
        world={"pairs": WITH_EMBEDDINGS},
        oracle=term(hid_seq=hidden_mse),
    ),
    Case(id="hid_seq-combine", name="hid_seq", world={"pairs": ALL_LAYERS}, oracle=term(hid_seq=hidden_mse)),
    Case(id="mlm", name="mlm", vanishes=False, oracle=term(mlm=mlm)),
]

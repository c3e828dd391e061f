"""One row for each objective (and each of its forms) that the property tests run over.

A new objective is one more `Case`: its oracle says what the terms should be in a `World`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsdistill.core import LayerPairs
from tests import oracles
from tests.objectives.worlds import EXAMPLES, OTHER_HEADS, TEACHER, World


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
                s_bias=biases(world.student, s),
                t_bias=biases(world.teacher, t),
            ),
        )

    return value


def biases(values, layer: int) -> list | None:
    return None if values.bias(layer) is None else lists(values, "bias", layer)


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


def hid_cls(world: World) -> float:
    first = [[True] if row[0] else [False] for row in world.batch.mask.tolist()]
    return oracles.mean(
        oracles.hidden_mse([row[:1] for row in s], [row[:1] for row in t], first) for s, t in hidden_states(world)
    )


def hid_cos(world: World) -> float:
    return oracles.mean(oracles.hidden_cosine(s, t, world.batch.mask.tolist()) for s, t in hidden_states(world))


def feature_map(part: int, factor: float) -> Callable[[World], float]:
    def value(world: World) -> float:
        mask = world.batch.mask.tolist()
        return factor * oracles.mean(oracles.feature_maps(s, t, mask)[part] for s, t in hidden_states(world))

    return value


def logits(world: World) -> tuple[list, list]:
    return lists(world.student, "logits", -1), lists(world.teacher, "logits", -1)


def kd(kind: str, temperature: float = 1.0, beta: float = 0.5) -> Callable[[World], dict[str, float]]:
    return term(kd=lambda world: oracles.kd(*logits(world), kind, temperature, beta))


def task(function) -> Callable[[World], dict[str, float]]:
    return term(task=lambda world: function(lists(world.student, "logits", -1), world.batch.labels.tolist()))


def logit_pearson(part: int, temperature: float, factor: float = 1.0) -> Callable[[World], float]:
    return lambda world: factor * oracles.logit_pearson(*logits(world), temperature)[part]


def attention_pearson(part: int) -> Callable[[World], float]:
    return attention(lambda *args, **biases: oracles.attention_pearson(*args, **biases)[part])


def pooled(function, pooling: str, *args) -> Callable[[World], dict[str, float]]:
    def value(world: World) -> float:
        mask = world.batch.mask.tolist()
        losses = []
        for index, (s, t) in enumerate(world.pairs):
            ours = oracles.pool(lists(world.student, "hidden", s), mask, pooling)
            if world.head is not None:
                ours = [oracles.linear(x, world.head[index].weight.tolist()) for x in ours]
            theirs = oracles.pool(lists(world.teacher, "hidden", t), mask, pooling)
            losses.append(function(ours, theirs, *args))
        return oracles.mean(losses)

    return term(pooled=value)


def contrast(kind: str, pooling: str, temperature: float, *, memory: int = 0, other_labels: bool = False):
    """Negatives are the other rows, or what the head draws from its bank (how it draws is tested elsewhere)."""

    def value(world: World) -> float:
        mask = world.batch.mask.tolist()
        sides = []
        for features, layers, linear in (
            (world.student, world.pairs.student, world.head.student),
            (world.teacher, world.pairs.teacher, world.head.teacher),
        ):
            pooled = [oracles.pool(lists(features, "hidden", layer), mask, pooling) for layer in layers]
            rows = [[x for part in parts for x in part] for parts in zip(*pooled, strict=True)]
            sides.append([oracles.linear(row, linear.weight.tolist(), linear.bias.tolist()) for row in rows])
        kept = [b for b in range(len(mask)) if any(mask[b])]
        if memory:
            drawn = world.head.draw(world.batch.sample_ids[kept], memory).tolist()
            negatives = [[world.head.bank[j].tolist() for j in row] for row in drawn]
        else:
            labels = world.batch.labels.tolist()
            negatives = [
                [
                    sides[1][j]
                    for j in range(len(kept))
                    if j != i and not (other_labels and labels[kept[i]] == labels[kept[j]])
                ]
                for i in range(len(kept))
            ]
        return oracles.contrast(*sides, negatives, temperature, kind, EXAMPLES)

    return term(hid_contrast=value)


BIASED = {"bias": True}
TASK = {"task": True}
SAME_WIDTH = {"student": TEACHER, "teacher": TEACHER}
ALL_LAYERS = LayerPairs((1, 2, 3), (1, 2, 3), combine=True)
WITH_EMBEDDINGS = LayerPairs((0, 1, 3), (0, 2, 3))
OTHERS = {"student": OTHER_HEADS, "teacher": TEACHER}

CASES = [
    Case(id="att_kl", name="att_kl", oracle=term(att_kl=attention(oracles.attention_kl))),
    Case(id="att_kl-bias", name="att_kl", world=BIASED, oracle=term(att_kl=attention(oracles.attention_kl))),
    Case(id="att_mse-bias", name="att_mse", world=BIASED, oracle=term(att_mse=attention(oracles.attention_mse))),
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
    Case(id="hid_cls", name="hid_cls", oracle=term(hid_cls=hid_cls)),
    Case(id="hid_cls-same-width", name="hid_cls", world=SAME_WIDTH, oracle=term(hid_cls=hid_cls)),
    Case(id="hid_cls-combine", name="hid_cls", world={"pairs": ALL_LAYERS}, oracle=term(hid_cls=hid_cls)),
    Case(id="hid_cos", name="hid_cos", oracle=term(hid_cos=hid_cos)),
    Case(id="hid_cos-same-width", name="hid_cos", world=SAME_WIDTH, oracle=term(hid_cos=hid_cos)),
    Case(
        id="mobilebert",
        name="mobilebert",
        oracle=term(normalised=feature_map(0, 100.0), means=feature_map(1, 5000.0), variances=feature_map(2, 5.0)),
    ),
    Case(
        id="mobilebert-factors",
        name="mobilebert",
        params={"normalised": 1.0, "means": 2.0, "variances": 3.0},
        world=SAME_WIDTH,
        oracle=term(normalised=feature_map(0, 1.0), means=feature_map(1, 2.0), variances=feature_map(2, 3.0)),
    ),
    Case(id="mlm", name="mlm", vanishes=False, oracle=term(mlm=mlm)),
    Case(id="kd", name="kd", oracle=kd("forward")),
    Case(id="kd-temperature", name="kd", params={"temperature": 2.5}, oracle=kd("forward", 2.5)),
    Case(id="kd-task", name="kd", params={"temperature": 2.0}, world=TASK, oracle=kd("forward", 2.0)),
    Case(
        id="kd-reverse",
        name="kd",
        params={"divergence": "reverse", "temperature": 2.0},
        oracle=kd("reverse", 2.0),
    ),
    *(
        Case(
            id=f"kd-jsd-{beta}",
            name="kd",
            params={"divergence": "jsd", "temperature": 1.5, "beta": beta},
            oracle=kd("jsd", 1.5, beta),
        )
        for beta in (0.0, 0.1, 0.5, 1.0)
    ),
    Case(id="kd-mse", name="kd", params={"divergence": "mse"}, world=TASK, oracle=kd("mse")),
    Case(id="kd-regression", name="kd", world=TASK | {"outputs": 1, "labels": "real"}, oracle=kd("mse")),
    Case(
        id="kd-multi-label",
        name="kd",
        params={"temperature": 2.0},
        world=TASK | {"labels": "multi"},
        oracle=kd("binary", 2.0),
    ),
    Case(id="task", name="task", world=TASK, vanishes=False, oracle=task(oracles.cross_entropy)),
    Case(
        id="task-regression",
        name="task",
        world=TASK | {"outputs": 1, "labels": "real"},
        vanishes=False,
        oracle=task(oracles.squared_error),
    ),
    Case(
        id="task-multi-label",
        name="task",
        world=TASK | {"labels": "multi"},
        vanishes=False,
        oracle=task(oracles.binary_cross_entropy),
    ),
    Case(
        id="pearson",
        name="pearson",
        world=TASK,
        splits=False,
        oracle=term(inter_class=logit_pearson(0, 1.0), intra_class=logit_pearson(1, 1.0)),
    ),
    Case(
        id="pearson-weights",
        name="pearson",
        params={"temperature": 2.0, "inter": 0.5, "intra": 3.0},
        splits=False,
        oracle=term(inter_class=logit_pearson(0, 2.0, 0.5), intra_class=logit_pearson(1, 2.0, 3.0)),
    ),
    Case(
        id="pearson-attention",
        name="pearson",
        params={"of": "attention"},
        world=BIASED,
        oracle=term(
            along_keys=attention_pearson(0), along_queries=attention_pearson(1), along_heads=attention_pearson(2)
        ),
    ),
    Case(id="pooled", name="pooled", oracle=pooled(oracles.pooled_cosine, "mean")),
    Case(
        id="pooled-first",
        name="pooled",
        params={"pooling": "first", "compare": "mse"},
        world=SAME_WIDTH,
        oracle=pooled(oracles.pooled_mse, "first"),
    ),
    Case(
        id="pooled-mse-of-any-length",
        name="pooled",
        params={"compare": "mse", "normalise": False},
        oracle=pooled(oracles.pooled_mse_of_any_length, "mean"),
    ),
    *(
        Case(
            id=f"pooled-{pooling}",
            name="pooled",
            params={"pooling": pooling, "compare": "mse", "normalise": False},
            oracle=pooled(oracles.pooled_mse_of_any_length, pooling),
        )
        for pooling in ("max", "mean_sqrt_length", "weighted_mean", "last")
    ),
    Case(
        id="pooled-similarity",
        name="pooled",
        params={"compare": "similarity", "temperature": 0.2},
        splits=False,
        oracle=pooled(oracles.pooled_similarity, "mean", 0.2),
    ),
    Case(
        id="pooled-similarity-others",
        name="pooled",
        params={"compare": "similarity", "diagonal": False},
        splits=False,
        oracle=pooled(oracles.pooled_similarity, "mean", 0.05, False),
    ),
    *(
        Case(
            id=f"hid_contrast-{kind}-{pooling}",
            name="hid_contrast",
            params={"contrast": kind, "pooling": pooling, "width": 5, "temperature": 0.3},
            vanishes=False,
            splits=False,
            oracle=contrast(kind, pooling, 0.3),
        )
        for kind, pooling in (("infonce", "first"), ("crd", "mean"))
    ),
    Case(
        id="hid_contrast-labels",
        name="hid_contrast",
        params={"width": 5, "temperature": 0.3, "other_labels": True},
        world=TASK,
        vanishes=False,
        splits=False,
        oracle=contrast("infonce", "first", 0.3, other_labels=True),
    ),
    *(
        Case(
            id=f"hid_contrast-memory-{kind}",
            name="hid_contrast",
            params={"contrast": kind, "negatives": "memory", "num_negatives": 6, "width": 5, "temperature": 0.3},
            world={"pairs": ALL_LAYERS},
            vanishes=False,
            oracle=contrast(kind, "first", 0.3, memory=6),
        )
        for kind in ("infonce", "crd")
    ),
]

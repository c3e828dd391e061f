"""`reduction: study` divides as the published code does (../shared/reference/study.md, 2.1), padding included."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.worlds import TEACHER, make_world, terms


def scores(features, layer, mask):
    """Scores as that code has them: -10000 added at padded keys."""
    query, key = features.at("query", layer), features.at("key", layer)
    return query @ key.transpose(-1, -2) * features.scaling[layer] + torch.where(mask, 0.0, -1e4)[:, None, None]


def kl(student, teacher):
    """Sum over everything, divided by B * H * L."""
    B, H, L, _ = student.shape
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / (B * H * L)


def att_kl(world):
    mask = world.batch.mask
    return sum(kl(scores(world.student, s, mask), scores(world.teacher, t, mask)) for s, t in world.pairs)


def att_mse(world):
    total = 0
    for s, t in world.pairs:
        ours, theirs = (scores(m, i, world.batch.mask) for m, i in ((world.student, s), (world.teacher, t)))
        ours, theirs = (torch.where(x <= -1e2, 0.0, x) for x in (ours, theirs))
        total += F.mse_loss(ours, theirs)
    return total


def relation(signal):
    def value(world):
        total = 0
        for s, t in world.pairs:
            ours, theirs = world.student.at(signal, s), world.teacher.at(signal, t)
            ours, theirs = (x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1]) for x in (ours, theirs))
            total += kl(ours, theirs)
        return total

    return value


def hid_seq(world):
    return sum(F.mse_loss(world.student.at("hidden", s), world.teacher.at("hidden", t)) for s, t in world.pairs)


def hid_cls(world):
    """As the task-specific code: the first position of every row."""
    return sum(
        F.mse_loss(world.student.at("hidden", s)[:, 0], world.teacher.at("hidden", t)[:, 0]) for s, t in world.pairs
    )


EXPECTED = {
    "att_kl": {"att_kl": att_kl},
    "att_mse": {"att_mse": att_mse},
    "val_kl": {"val_kl": relation("value")},
    "minilm": {"att_kl": att_kl, "val_kl": relation("value")},
    "minilmv2": {f"{name}_{name}": relation(name) for name in ("query", "key", "value")},
    "hid_seq": {"hid_seq": hid_seq},
    "hid_cls": {"hid_cls": hid_cls},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_padding_and_layers_count_as_in_the_published_code(name):
    world = make_world(student=TEACHER)
    params = {"relation_heads": TEACHER.num_heads} if name == "minilmv2" else {}
    got = terms(world, name, params | {"reduction": "study"})
    for term, function in EXPECTED[name].items():
        torch.testing.assert_close(got[term], function(world), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EXPECTED)
def test_without_padding_and_with_one_pair_both_reductions_agree(name):
    world = make_world(student=TEACHER, lengths=(5, 5))
    world.pairs = type(world.pairs)((3,), (3,))
    params = {"relation_heads": 4} if name == "minilmv2" else {}
    torch.testing.assert_close(
        terms(world, name, params), terms(world, name, params | {"reduction": "study"}), rtol=1e-12, atol=1e-12
    )

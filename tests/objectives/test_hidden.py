"""Projections, combined layers, and what they refuse."""

import pytest
import torch

from dsdistill.core import LayerPairs
from dsdistill.objectives import find_objective, hidden_mse
from tests.objectives.worlds import PAIRS, STUDENT, TEACHER, make_head, make_world, terms


@pytest.mark.parametrize("name", ["hid_seq", "hid_cls", "hid_cos", "mobilebert", "pooled"])
def test_projections_are_made_where_widths_differ(name):
    entry = find_objective(name)
    head = entry.make_head(STUDENT, TEACHER, PAIRS, {})
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(8, 6), (8, 6)]
    assert entry.make_head(TEACHER, TEACHER, PAIRS, {}) is None
    assert len(entry.make_head(TEACHER, TEACHER, PAIRS, {"projection": "always"})) == 2
    assert entry.make_head(TEACHER, TEACHER, PAIRS, {"projection": "never"}) is None
    with pytest.raises(ValueError, match="widths are 6"):
        entry.make_head(STUDENT, TEACHER, PAIRS, {"projection": "never"})


def test_combined_layers_are_projected_together_on_the_students_side():
    pairs = LayerPairs((1, 2), (1, 2, 3), combine=True)
    head = find_objective("hid_seq").make_head(STUDENT, TEACHER, pairs, {})
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(3 * 8, 2 * 6)]


def test_without_a_projection_other_widths_are_refused():
    with pytest.raises(ValueError, match="use a projection"):
        terms(make_world(), "hid_seq", {})


def test_hidden_mse_refuses_other_shapes():
    with pytest.raises(ValueError, match="differ"):
        hidden_mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def test_cls_gradient_reaches_the_first_position_of_every_row_and_nothing_else():
    """The published task-agnostic code reaches all positions of the first row instead."""
    world = make_world(student=TEACHER)
    hidden = world.student.at("hidden", 2).requires_grad_()
    terms(world, "hid_cls", {})["hid_cls"].backward()
    reached = hidden.grad.abs().sum(-1) > 0
    assert reached[:, 0].all()
    assert not reached[:, 1:].any()


def test_heads_have_no_parameters_that_their_loss_cannot_reach():
    world = make_world()
    for name in ("hid_seq", "hid_cls", "hid_cos", "mobilebert", "pooled", "hid_contrast"):
        world.head = make_head(world, name, {})
        sum(terms(world, name, {}).values()).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in world.head.parameters())


@pytest.mark.parametrize(
    "params",
    [
        {"compare": "similarity", "projection": "always"},
        {"compare": "cosine", "temperature": 0.1},
        {"compare": "mse", "diagonal": False},
        {"compare": "cosine", "normalise": False},
    ],
)
def test_parameters_without_effect_on_pooled_are_refused(params):
    with pytest.raises(ValueError, match="no effect"):
        find_objective("pooled").make_head(TEACHER, TEACHER, PAIRS, params)


def test_parameters_without_effect_on_pearson_are_refused():
    with pytest.raises(ValueError, match="inter has no effect"):
        find_objective("pearson").make_head(TEACHER, TEACHER, PAIRS, {"of": "attention", "inter": 0.0})
    find_objective("pearson").make_head(TEACHER, TEACHER, PAIRS, {"inter": 0.0})

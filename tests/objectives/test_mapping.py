"""Which layers are compared, and which initialise."""

import pytest

from dsdistill.core import LayerPairs
from dsdistill.objectives import initial_layers, layer_pairs
from dsdistill.objectives.mapping import check_attention_layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last", [(3, 12)]),
        ("first", [(1, 1)]),
        ("uniform", [(1, 4), (2, 8), (3, 12)]),
        ("skip", [(1, 4), (2, 8), (3, 12)]),
        ("lower", [(1, 1), (2, 2), (3, 3)]),
        ("upper", [(1, 10), (2, 11), (3, 12)]),
        ([[1, 5], [3, 12]], [(1, 5), (3, 12)]),
        ([[0, 0]], [(0, 0)]),
    ],
)
def test_names_stand_for_pairs(layers, expected):
    assert list(layer_pairs(layers, 3, 12)) == expected


def test_uniform_ends_at_the_last_layer_and_rises():
    for student in range(1, 13):
        for teacher in range(student, 25):
            layers = [t for _, t in layer_pairs("uniform", student, teacher)]
            assert layers[-1] == teacher
            assert layers == sorted(set(layers))


def test_embeddings_come_first():
    assert list(layer_pairs("last", 3, 12, embeddings=True)) == [(0, 0), (3, 12)]


def test_init_supervises_with_the_layers_that_initialise():
    initial = initial_layers([1, 8, 12], 3, 12)
    assert list(layer_pairs("init", 3, 12, initial=initial)) == [(1, 1), (2, 8), (3, 12)]


def test_combine_takes_all_layers_and_has_no_pairs():
    pairs = layer_pairs("combine", 2, 3)
    assert pairs == LayerPairs((1, 2), (1, 2, 3), combine=True)
    assert layer_pairs("combine", 2, 3, embeddings=True).student == (0, 1, 2)
    with pytest.raises(ValueError, match="combine"):
        list(pairs)
    with pytest.raises(ValueError, match="combine"):
        check_attention_layers(pairs)


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("lower", (1, 2, 3)),
        ("upper", (10, 11, 12)),
        ("uniform", (4, 8, 12)),
        ([1, 8, 12], (1, 8, 12)),
        ("random", None),
    ],
)
def test_initial_layers(init, expected):
    assert initial_layers(init, 3, 12) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("middle", "middle.*last"),
        ([[1, 13]], "13 is outside 0..12"),
        ([[4, 1]], "4 is outside 0..3"),
        ([[-1, 1]], "-1 is outside"),
        ([[1, 2, 3]], "no pair"),
        ([[1, 2], [1, 2]], "twice"),
        ([], "no pair"),
        ("init", "random"),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, 3, 12)


@pytest.mark.parametrize(
    ("init", "message"),
    [("middle", "lower"), ([1, 2], "2 layers for 3"), ([0, 1, 2], "0 is outside 1..12"), ([1, 2, 13], "13 is outside")],
)
def test_wrong_initialisations_are_refused(init, message):
    with pytest.raises(ValueError, match=message):
        initial_layers(init, 3, 12)


def test_a_student_deeper_than_the_teacher_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="uniform"):
        initial_layers("lower", 12, 6)
    assert initial_layers("uniform", 4, 2) == (1, 1, 2, 2)


def test_attention_objectives_refuse_the_embedding_output():
    with pytest.raises(ValueError, match="no attention"):
        check_attention_layers(layer_pairs("last", 3, 12, embeddings=True))

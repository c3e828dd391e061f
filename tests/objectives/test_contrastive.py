"""The memory bank: who is drawn, what moves it, and what does not."""

import copy
from dataclasses import replace

import pytest
import torch

from dsdistill.objectives import find_objective
from dsdistill.objectives.contrastive import ContrastHead
from tests.objectives.worlds import EXAMPLES, PAIRS, STUDENT, TEACHER, make_head, make_world, terms

MEMORY = {"negatives": "memory", "num_negatives": 6, "width": 5}


@pytest.fixture
def world():
    world = make_world()
    return replace(world, head=make_head(world, "hid_contrast", MEMORY))


def bank_head(rows=50, seed=3):
    return ContrastHead(4, 4, 5, rows, seed)


def test_drawing_depends_on_seed_step_and_row_only():
    ids = torch.tensor([7, 0, 49])
    drawn = bank_head().draw(ids, 40)
    torch.manual_seed(99)
    assert torch.equal(bank_head().draw(ids, 40), drawn)
    assert torch.equal(bank_head().draw(ids[1:], 40), drawn[1:])
    assert not torch.equal(bank_head(seed=4).draw(ids, 40), drawn)
    later = bank_head()
    later.step += 1
    assert not torch.equal(later.draw(ids, 40), drawn)


def test_drawn_rows_are_others_and_spread_evenly():
    head = bank_head(rows=10)
    ids = torch.arange(10)
    counts = torch.zeros(10, 10)
    for _ in range(50):
        drawn = head.draw(ids, 100)
        assert ((drawn >= 0) & (drawn < 10)).all()
        assert (drawn != ids[:, None]).all()
        counts += torch.nn.functional.one_hot(drawn, 10).sum(1)
        head.step += 1
    shares = counts[~torch.eye(10, dtype=torch.bool)] / (50 * 100)
    assert (shares - 1 / 9).abs().max() < 0.02


def test_evaluation_never_touches_the_bank(world):
    world.head.eval()
    before = copy.deepcopy(world.head.state_dict())
    for _ in range(2):
        terms(world, "hid_contrast", MEMORY)
    torch.testing.assert_close(world.head.state_dict(), before, rtol=0, atol=0)


def test_training_moves_the_rows_of_the_batch_towards_the_teacher(world):
    before = world.head.bank.clone()
    params = MEMORY | {"momentum": 0.25}
    terms(world, "hid_contrast", params)
    ids = world.batch.sample_ids
    others = torch.ones(EXAMPLES, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(world.head.bank[others], before[others])
    states = torch.cat([world.teacher.at("hidden", t)[:, 0] for t in PAIRS.teacher], dim=1)
    embedded = torch.nn.functional.normalize(world.head.teacher(states), dim=1)
    expected = torch.nn.functional.normalize(0.25 * before[ids] + 0.75 * embedded, dim=1)
    torch.testing.assert_close(world.head.bank[ids], expected.detach(), rtol=1e-9, atol=1e-9)
    assert world.head.step == 1


def test_rows_of_padding_do_not_enter_the_bank():
    world = make_world(lengths=(3, 0))
    world.head = make_head(world, "hid_contrast", MEMORY)
    before = world.head.bank.clone()
    terms(world, "hid_contrast", MEMORY)
    moved = (world.head.bank != before).any(1).nonzero().flatten()
    assert moved.tolist() == [world.batch.sample_ids[0]]


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        ([2, 5, 2], {2: 0, 5: 1}),
        ([-1, 5, 0], {5: 1, 0: 2}),
        ([-1, 0, 0], {0: 1}),
        ([4, -1, -1], {4: 0}),
        ([-1, -1, -1], {}),
    ],
)
def test_of_equal_rows_the_first_enters_the_bank_and_padding_never(ids, written):
    head = bank_head()
    head.bank.zero_()
    rows = torch.nn.functional.normalize(torch.randn(3, 5), dim=1)
    head.remember(torch.tensor(ids), rows, torch.tensor([1, 2, 3]), momentum=0.5)
    bank, labels = torch.zeros(50, 5), torch.full((50,), -1)
    for row, source in written.items():
        bank[row], labels[row] = rows[source], source + 1
    torch.testing.assert_close(head.bank, bank)
    assert torch.equal(head.labels, labels)


def test_the_bank_is_saved_and_not_trained(world):
    state = world.head.state_dict()
    assert {"bank", "labels", "step"} <= state.keys()
    assert {name.split(".")[0] for name, _ in world.head.named_parameters()} == {"student", "teacher"}
    terms(world, "hid_contrast", MEMORY)
    fresh = make_head(make_world(), "hid_contrast", MEMORY, seed=9)
    fresh.load_state_dict(world.head.state_dict())
    expected = terms(world, "hid_contrast", MEMORY)
    torch.testing.assert_close(terms(replace(world, head=fresh), "hid_contrast", MEMORY), expected)


def test_rows_of_the_same_label_in_the_bank_do_not_count():
    world = make_world(task=True)
    params = MEMORY | {"other_labels": True}
    world.head = make_head(world, "hid_contrast", params).eval()
    head, labels = world.head, world.batch.labels
    head.labels.fill_(int(labels[0]))
    kept = terms(world, "hid_contrast", params)["hid_contrast"]
    only_others = (labels != labels[0]).nonzero().flatten()
    assert 0 < len(only_others) < len(labels)
    head.labels.fill_(-1)
    rows = world.batch._replace(
        **{n: getattr(world.batch, n)[only_others] for n in ("input_ids", "mask", "labels", "sample_ids")}
    )
    hidden = [
        f._replace(signals={"hidden": {i: h[only_others] for i, h in f.signals["hidden"].items()}})
        for f in (world.student, world.teacher)
    ]
    expected = terms(replace(world, batch=rows, student=hidden[0], teacher=hidden[1]), "hid_contrast", params)
    torch.testing.assert_close(kept, expected["hid_contrast"])


def test_gradients_survive_the_move_of_the_bank(world):
    hidden = world.student.at("hidden", 2).requires_grad_()
    loss = terms(world, "hid_contrast", MEMORY)["hid_contrast"]
    loss.backward()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("params", "examples", "message"),
    [
        (MEMORY, 1, "at least 2"),
        ({"num_negatives": 5}, 10, "no effect"),
        ({"momentum": 0.1}, 10, "no effect"),
    ],
)
def test_what_cannot_be_is_refused(params, examples, message):
    with pytest.raises(ValueError, match=message):
        find_objective("hid_contrast").make_head(STUDENT, TEACHER, PAIRS, params, num_examples=examples)


def test_labels_of_rows_are_needed_where_asked_for(world):
    with pytest.raises(ValueError, match="one label for each row"):
        terms(world, "hid_contrast", MEMORY | {"other_labels": True})

"""What decides about recordings; that they train the same is shown on a GPU, in test_engine.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsdistill.config.sections import Ramp
from dsdistill.core import Batch, LayerPairs, ModelShape
from dsdistill.objectives.registry import find_objective
from dsdistill.training.distiller import BoundTerm, Distiller
from dsdistill.training.graphs import (
    EAGER_CALLS,
    MOST_KINDS,
    GraphedLosses,
    Kinds,
    is_regular,
    kind_of,
    reason_against,
    standing_in,
)
from dsdistill.training.stage import record_graphs

SHAPE = ModelShape(num_layers=2, width=8, num_heads=2, num_key_heads=2, head_width=4, vocab_size=9)


def distiller(*terms: BoundTerm) -> Distiller:
    return Distiller(
        nn.Linear(3, 3),  # type: ignore[arg-type]
        terms,
        shape=SHAPE,
        teacher=SHAPE,
        num_examples=4,
        gather=lambda rows: rows,
        seed=0,
    )


def term(name: str, **more) -> BoundTerm:
    settings = {"label": name, "objective": find_objective(name), "pairs": LayerPairs((2,), (2,)), "weight": 1.0}
    return BoundTerm(**settings | {"params": {}} | more)


def batch(rows: int, length: int = 4, *, padded: bool = False, segments: bool = False) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return Batch(input_ids=ids, mask=ids == 0, sample_ids=ids[:, 0], segments=ids if segments else None, padded=padded)


def test_a_kind_is_recorded_when_it_has_been_seen_often_enough():
    kinds: Kinds[str] = Kinds()
    seen = [kinds.get("a", lambda: "recorded") for _ in range(EAGER_CALLS + 2)]
    assert seen == [None] * EAGER_CALLS + ["recorded"] * 2
    assert kinds.get("b", lambda: "other") is None


def test_no_more_kinds_are_recorded_than_memory_should_hold():
    kinds: Kinds[int] = Kinds()
    for _ in range(EAGER_CALLS + 1):
        for kind in range(MOST_KINDS + 3):
            kinds.get(kind, lambda kind=kind: kind)
    assert sorted(kinds.recorded) == list(range(MOST_KINDS))
    assert kinds.get(MOST_KINDS, lambda: -1) is None
    assert kinds.get(0, lambda: -1) == 0


def test_what_a_recording_holds_makes_the_kind_of_a_batch():
    kinds = {kind_of(b) for b in (batch(2), batch(3), batch(2, 5), batch(2, padded=True), batch(2, segments=True))}
    assert len(kinds) == 5
    assert kind_of(batch(2)) == kind_of(batch(2)._map(torch.ones_like))


def test_batches_whose_parts_differ_in_number_run_kernel_by_kernel():
    assert is_regular(batch(2))
    assert not is_regular(batch(2, segments=True))
    assert not is_regular(batch(2)._replace(targets=torch.zeros(3, dtype=torch.long)))


@pytest.mark.parametrize("where", ["weight", "params"])
def test_nothing_is_recorded_while_a_number_changes(where):
    ramp = Ramp.model_validate({"from": 1.0, "to": 2.0, "until": 10})
    changing = {"weight": ramp} if where == "weight" else {"params": {"temperature": ramp}}
    losses = GraphedLosses(distiller(term("minilm"), term("kd", **changing)))
    assert losses._constants(5) is None
    assert losses._constants(9) is None
    assert losses._constants(10) == losses._constants(400)
    assert losses._constants(10) != GraphedLosses(distiller(term("minilm")))._constants(10)


def test_terms_over_all_ranks_and_mixed_types_are_not_recorded():
    assert reason_against(distiller(term("minilm"))) is None
    assert "pooled compares the rows of all ranks" in str(reason_against(distiller(term("pooled"))))
    mixed = distiller(term("minilm"))
    mixed.student.half()
    mixed.extra = nn.Linear(2, 2)
    assert "several types" in str(reason_against(mixed))


def test_rows_that_cannot_be_recorded_are_told():
    notes: list[str] = []
    stage = SimpleNamespace(probe=batch(2, segments=True), teacher=None)
    student = distiller(term("minilm"))
    assert record_graphs(stage, student, notes) is stage
    assert student.replay is None
    assert "documents differ in number" in notes[0]
    assert record_graphs(SimpleNamespace(probe=batch(2), teacher=None), student, notes) is not None
    assert student.replay is not None
    assert len(notes) == 1


def test_stand_ins_give_the_same_gradients_and_leave():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model.append(nn.Linear(3, 3))
    model[3].weight = nn.Parameter(torch.ones(3, 3))
    tied = model[3].weight
    model[2].extra = tied
    x, parameters = torch.randn(5, 3), list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    leaves = {id(p): nn.Parameter(p.detach()) for p in parameters}
    with standing_in(model, leaves):
        assert not any(p is q for p in model.parameters() for q in parameters)
        assert model[2].extra is model[3].weight
        loss = model(x).square().sum()
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    found = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        parameters[0].add_(1.0)
    assert torch.equal(leaves[id(parameters[0])], parameters[0])

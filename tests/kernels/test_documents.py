"""The fused comparisons of packed rows: documents stay apart, and tiles of other documents are not visited."""

import dataclasses
import functools
import itertools

import pytest
import torch

from dsdistill.kernels import pairwise
from dsdistill.objectives import relation_kl
from tests.kernels.test_pairwise import FUNCTIONS, SCALES, Shape, values
from tests.models.test_documents import FUSED, check_borders


@pytest.mark.skipif(torch.cuda.is_available(), reason="models are on the CPU, where a GPU's Triton does not interpret")
@pytest.mark.parametrize("family", ["modernbert", pytest.param("bert", marks=pytest.mark.slow)])
def test_nothing_crosses_the_border_of_a_document_in_fused_comparisons(family):
    check_borders(family, FUSED, kernel="fused")


def draw_segments(kind: str, length: int) -> torch.Tensor:
    """Documents one after the other, as the data has them; numbers in no order; one document."""
    generator = torch.Generator().manual_seed(0)
    if kind == "one":
        return torch.zeros(2, length, dtype=torch.int32)
    begins = torch.rand(2, length, generator=generator) < 0.1
    numbers = begins.int().cumsum(1).int()
    return numbers if kind == "packed" else (numbers * 7 + 3) % 5 - 2


@pytest.mark.parametrize("kind", ["packed", "shuffled", "one"])
@pytest.mark.parametrize(("size", "step"), [(4, 8), (8, 4), (16, 16), (64, 8)])
def test_bounds_hold_every_tile_that_shares_a_document(kind, size, step, monkeypatch):
    monkeypatch.setattr(pairwise, "BOUNDED_FROM", 0)
    length = 53
    segments = draw_segments(kind, length)
    bounds = pairwise.bounds_of(segments, size, step)
    assert bounds.shape == (2, -(-length // size), 2)
    visited = 0
    for row, blocks in enumerate(bounds.tolist()):
        for number, (first, last) in enumerate(blocks):
            own = set(segments[row, number * size : (number + 1) * size].tolist())
            shared = [j for j in range(0, length, step) if own & set(segments[row, j : j + step].tolist())]
            assert first % step == 0
            assert first <= shared[0]
            assert shared[-1] < last
            visited += last - first
            if kind == "packed":
                assert (first, last) == (shared[0], shared[-1] + step)
    if kind == "packed" and size < 64:
        assert visited < 0.7 * bounds.shape[0] * bounds.shape[1] * -(-length // step) * step


def test_short_rows_and_rows_without_documents_are_visited_whole():
    assert pairwise.bounds_of(None, 8, 8) is None
    assert pairwise.bounds_of(draw_segments("packed", pairwise.BOUNDED_FROM - 1), 8, 8) is None
    assert pairwise.bounds_of(draw_segments("packed", pairwise.BOUNDED_FROM), 8, 8) is not None


LONG = Shape(lengths=(50, 33), length=50)
SMALL_TILE = pairwise.Tile(16, 16, 4, 2)


def results(function, tensors, learned, segments, bounded: bool, monkeypatch, **options) -> list[torch.Tensor]:
    monkeypatch.setattr(pairwise, "BOUNDED_FROM", 0 if bounded else 10**9)
    return values(function, tensors, learned, segments=segments, **options, kernel="fused")


SLOW = pytest.mark.slow
CASES = [("kl", "packed", None)] + [
    pytest.param(*case, marks=SLOW)
    for case in itertools.product(FUNCTIONS, ("packed", "shuffled"), (None, 9))
    if case != ("kl", "packed", None)
]


@pytest.mark.parametrize(("measure", "kind", "window"), CASES)
def test_tiles_of_other_documents_change_no_bit(measure, kind, window, monkeypatch, device):
    """Of the value and of both gradients, with padding; queries share keys."""
    monkeypatch.setattr(pairwise, "tile_for", lambda *_: SMALL_TILE)
    shape = dataclasses.replace(LONG, heads=2, key_heads=1)
    options = {"mask": shape.limits(device)["mask"], **SCALES, "window": window}
    given = (FUNCTIONS[measure], shape.tensors(device), 2, draw_segments(kind, shape.length).to(device))
    whole, skipping = (results(*given, bounded, monkeypatch, **options) for bounded in (False, True))
    torch.testing.assert_close(skipping, whole, rtol=0, atol=0)
    assert all(value.abs().sum() > 0 for value in whole)


@SLOW
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_nor_in_relations_of_a_tensor_with_itself(size, monkeypatch, device):
    """Also beyond log-sum-exps of 50, and for a row without a real token."""
    monkeypatch.setattr(pairwise, "tile_for", lambda *_: SMALL_TILE)
    shape = dataclasses.replace(LONG, lengths=(50, 0))
    student, _, teacher, _ = ((x.detach() * size).requires_grad_(x.requires_grad) for x in shape.tensors(device))
    relations = functools.partial(relation_kl, relation_heads=2)
    given = (relations, [student, teacher], 1, draw_segments("packed", shape.length).to(device))
    mask = shape.limits(device)["mask"]
    whole, skipping = (results(*given, bounded, monkeypatch, mask=mask) for bounded in (False, True))
    torch.testing.assert_close(skipping, whole, rtol=0, atol=0)
    assert whole[1].abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("measure", FUNCTIONS)
def test_nor_do_they_at_the_tiles_of_a_gpu(measure, width, monkeypatch, device):
    shape = Shape(lengths=(2048, 1500), length=2048, heads=4, key_heads=4, teacher_key_heads=4, widths=(width, width))
    segments = (torch.arange(2048) // 300).expand(2, -1).int().to(device)
    given = (FUNCTIONS[measure], shape.tensors(device), 2, segments)
    options = {"mask": shape.limits(device)["mask"], **SCALES}
    whole, skipping = (results(*given, bounded, monkeypatch, **options) for bounded in (False, True))
    torch.testing.assert_close(skipping, whole, rtol=0, atol=0)

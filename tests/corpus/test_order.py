import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdistill.corpus.order import accumulation_steps, micro_batch_positions, positions_to_rows


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_each_epoch_has_every_row_once(num_rows):
    epochs, rows = positions_to_rows(np.arange(3 * num_rows), num_rows=num_rows, seed=5)
    assert epochs.tolist() == [0] * num_rows + [1] * num_rows + [2] * num_rows
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(num_rows))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(positions_to_rows(np.arange(start, start + 100), num_rows=100, seed=seed)[1].tolist())
        for start in (0, 100, 200)
        for seed in (0, 1, -1)
    }
    assert len(orders) == 9


@given(
    num_rows=st.integers(1, 10**12),
    seed=st.integers(-(2**63), 2**63),
    positions=st.lists(st.integers(0, 2**60), min_size=1, max_size=20),
)
@settings(max_examples=50, deadline=None)
def test_any_position_is_found_alone_as_in_company(num_rows, seed, positions):
    epochs, rows = positions_to_rows(np.array(positions), num_rows=num_rows, seed=seed)
    assert (rows >= 0).all()
    assert (rows < num_rows).all()
    for position, epoch, row in zip(positions, epochs, rows, strict=True):
        alone = positions_to_rows(np.array([position]), num_rows=num_rows, seed=seed)
        assert (alone[0][0], alone[1][0]) == (epoch, row) == (position // num_rows, row)


@pytest.mark.parametrize("num_rows", [10, 100, 1 << 20, 10**9 + 7])
def test_first_rows_are_uniform(num_rows):
    """Chi-square over 10 bins of the first 10 places in 2000 epochs: 9 degrees of freedom, 99.99 % below 33.7."""
    places = (np.arange(2000)[:, None] * num_rows + np.arange(10)).ravel()
    _, rows = positions_to_rows(places, num_rows=num_rows, seed=3)
    counts = np.bincount(rows * 10 // num_rows, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 33.7
    _, first = positions_to_rows(np.arange(2000) * num_rows, num_rows=num_rows, seed=3)
    counts = np.bincount(first * 10 // num_rows, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


def test_neighbours_do_not_stay_together():
    _, rows = positions_to_rows(np.arange(10_000), num_rows=10_000, seed=0)
    assert abs(np.corrcoef(rows, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.05
    assert (np.abs(np.diff(rows)) == 1).sum() < 12  # expected: 2
    fixed_points = (rows == np.arange(10_000)).sum()
    assert fixed_points < 8  # Poisson with mean 1


def test_consecutive_epochs_are_unrelated():
    _, rows = positions_to_rows(np.arange(20_000), num_rows=10_000, seed=0)
    assert abs(np.corrcoef(rows[:10_000], rows[10_000:])[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 24), (1, 1), (2, 12), (2, 3), (3, 4), (4, 6), (8, 3), (24, 1), (6, 2)]
)
def test_global_batch_is_the_same_for_every_world_and_micro_batch(world_size, micro_batch):
    batches = {"global_batch": 24, "micro_batch": micro_batch, "world_size": world_size}
    for step in (0, 1, 7, 10**9):
        parts = [
            micro_batch_positions(step, micro_step, rank, **batches)
            for micro_step in range(accumulation_steps(**batches))
            for rank in range(world_size)
        ]
        assert all(len(part) == micro_batch for part in parts)
        assert np.concatenate(parts).tolist() == list(range(step * 24, step * 24 + 24))


def test_steps_cross_epochs_without_loss():
    positions = np.concatenate(
        [micro_batch_positions(s, 0, r, global_batch=6, micro_batch=3, world_size=2) for s in range(5) for r in (0, 1)]
    )
    epochs, rows = positions_to_rows(positions, num_rows=10, seed=0)
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(10))


@pytest.mark.parametrize(
    "batches",
    [
        {"global_batch": 24, "micro_batch": 5, "world_size": 1},
        {"global_batch": 24, "micro_batch": 12, "world_size": 3},
        {"global_batch": 0, "micro_batch": 1, "world_size": 1},
    ],
)
def test_unequal_micro_batches_are_refused(batches):
    with pytest.raises(ValueError, match=f"global_batch={batches['global_batch']} is not a multiple"):
        accumulation_steps(**batches)


def test_bad_positions_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        positions_to_rows(np.arange(3), num_rows=0, seed=0)
    with pytest.raises(ValueError, match="-1 is negative"):
        positions_to_rows(np.array([-1]), num_rows=3, seed=0)
    with pytest.raises(ValueError, match="out of range"):
        micro_batch_positions(0, 0, 2, global_batch=4, micro_batch=2, world_size=2)


def test_order_is_pinned():
    """A change of these numbers makes every unfinished run continue with other data."""
    assert positions_to_rows(np.arange(8), num_rows=1000, seed=1)[1].tolist() == [181, 520, 893, 748, 73, 350, 304, 567]

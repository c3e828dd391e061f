import math

import pytest

from dsdistill.training.health import check_gradients, skips_in_a_row


def run(history: str, limit: int) -> int:
    """Steps survived; `x` is a skipped step."""
    row = 0
    for step, mark in enumerate(history, start=1):
        if mark == "x" and row == limit - 1:
            with pytest.raises(FloatingPointError, match=rf"{limit} steps in a row, up to step {step} .loss scale 1.;"):
                skips_in_a_row(row, True, limit=limit, step=step, loss_scale=1.0)
            return step - 1
        row = skips_in_a_row(row, mark == "x", limit=limit, step=step, loss_scale=1.0)
    return len(history)


@pytest.mark.parametrize(
    ("history", "survived"),
    [("." * 9, 9), ("xx.xx.xx.", 9), ("xxx", 2), (".xx.xxx..", 6), ("", 0)],
)
def test_only_overflows_in_a_row_stop_a_run(history, survived):
    assert run(history, limit=3) == survived


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stop_a_run_and_the_largest_term_is_named(norm):
    check_gradients(1e30, {"a": 1.0}, step=3)
    with pytest.raises(FloatingPointError, match=r"norm was .* at step 3, .*largest is 'b' with -50"):
        check_gradients(norm, {"a": 2.0, "b": -50.0}, step=3)

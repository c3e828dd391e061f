"""Whether training can go on after a step: overflows of fp16 in a row, gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping


def skips_in_a_row(before: int, skipped: bool, *, limit: int, step: int, loss_scale: float) -> int:
    """Skipped steps in a row, after one more step.

    Args:
        before: What this returned after the step before.
        skipped: Whether this step was skipped because gradients overflowed in fp16.
        limit: As many are too many: the loss scale is searched in far fewer.
        step: Steps done, for the message.
        loss_scale: For the message.

    Raises:
        FloatingPointError: If there are too many.
    """
    row = before + 1 if skipped else 0
    if row >= limit:
        raise FloatingPointError(
            f"gradients overflowed fp16 in {row} steps in a row, up to step {step} (loss scale {loss_scale:g}); "
            "they changed no weight, so the newest checkpoint is good; use bf16, a smaller learning rate, or smaller "
            "weights of the objectives"
        )
    return row


def check_gradients(norm: float, losses: Mapping[str, float], *, step: int) -> None:
    """Refuse gradients that are not finite though every loss term is.

    Args:
        norm: Of the gradients of a step that was taken.
        losses: Terms by name, means since the last look.
        step: Steps done.

    Raises:
        FloatingPointError: If the norm is not finite; names the largest term.
    """
    if math.isfinite(norm):
        return
    largest = max(losses, key=lambda name: abs(losses[name]), default="none")
    raise FloatingPointError(
        f"the gradient's norm was {norm} at step {step}, though every loss term was finite (the largest is {largest!r} "
        f"with {losses.get(largest, 0.0):.4g}); nothing after it was saved"
    )

"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from dsdistill.config.sections import OptimizationSettings


def learning_rate(step: int, settings: OptimizationSettings) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then decay to 0 at the last step.

    Args:
        step: 0 .. steps - 1.
        settings: Peak, schedule, warm-up and length.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[settings.schedule]
    return settings.learning_rate * factor

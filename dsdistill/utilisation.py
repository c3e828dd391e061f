"""Model FLOPs utilisation: which share of what its devices could compute at best a run spends on its models.

Chowdhery et al. 2022, PaLM (arXiv:2204.02311), appendix B: the matrix products of the models only, those of recomputed
activations left out; here a teacher's forward as far as it runs, and a student's forward and backward. Rows count as
full: shorter ones need a little less attention.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from dsdistill.plan import Plan, StagePlan
from dsdistill.training.dist import Place
from dsdistill.training.engine import half_precision

PEAKS = (
    (r"B200", 2250, 75),
    (r"H100 PCIe", 756, 51),
    (r"H100 NVL", 835, 60),
    (r"H100|H200|GH200", 989, 67),
    (r"A100(?!0)", 312, 19.5),
    (r"A40(?!\d)", 149.7, 37.4),
    (r"A10(?!\w)", 125, 31.2),
    (r"L40S", 362, 91.6),
    (r"L4(?!\w)", 121, 30.3),
    (r"V100.*PCI", 112, 14),
    (r"V100", 125, 15.7),
    (r"T4(?!\w)", 65, 8.1),
)
"""Name of a GPU, and its TFLOP/s in half precision (tensor cores, dense) and in float32, from NVIDIA's data sheets. The
first that fits counts."""


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device reaches at best, by its name; None if that is not known."""
    found = next((peaks for pattern, *peaks in PEAKS if re.search(pattern, name)), None)
    return None if found is None else 1e12 * found[dtype == torch.float32]


def tokens_at_peak(plan: Plan[Any], stage: StagePlan, place: Place, *, asks_teacher: bool = True) -> float | str:
    """Tokens per second of a whole job whose devices do nothing but the products of its models, at their peak.

    Args:
        plan: What will be done.
        stage: Which part of it.
        place: This process.
        asks_teacher: Whether the teacher runs in training, rather than being read from disk.

    Returns:
        The number, or why there is none.
    """
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "this CPU"
    dtype = half_precision(stage.engine_config)
    peak = peak_flops(name, dtype)
    if peak is None:
        return f"no MFU: the peak FLOP/s of {name} are not known"
    return peak * place.num_processes / flops_per_token(plan, stage, asks_teacher=asks_teacher)


def flops_per_token(plan: Plan[Any], stage: StagePlan, *, asks_teacher: bool = True) -> float:
    """Products of both models for one token of a full row."""
    trace = plan.trace(stage, on_gpu=True, recomputing=False)
    flops = trace.student.model_flops
    if trace.teacher is not None and asks_teacher:
        flops += trace.teacher.model_flops
    return flops / (stage.engine_config["train_micro_batch_size_per_gpu"] * stage.row_length)

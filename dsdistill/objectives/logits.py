"""Objectives on logits: masked-language-model labels.

Shapes: N chosen positions, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dsdistill.core import IGNORED_LABEL, Batch, Features, LayerPairs
from dsdistill.objectives.numerics import promote
from dsdistill.objectives.registry import objective


def token_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy against token labels.

    Args:
        logits_NV: (N, V), any float dtype; gradients flow. Half types are promoted to float32.
        labels_N: int64 (N,); -100 is ignored.

    Returns:
        Scalar in nats, mean over the labels that count; 0 if there are none.
    """
    total = F.cross_entropy(promote(logits_NV), labels_N, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels_N != IGNORED_LABEL).sum().clamp(min=1)


@objective(
    "mlm",
    student={"logits"},
    equation="mean_{masked i} -log softmax(z^S_i)[label_i]",
    paper="BERT, arXiv:1810.04805, section 3.1",
)
def mlm(student: Features, teacher: Features | None, batch: Batch, pairs: LayerPairs) -> dict[str, Tensor]:
    """Masked language modelling at `Batch.targets`."""
    if batch.labels is None or batch.targets is None:
        raise ValueError("mlm needs token labels, but this batch has none; mask the corpus (masking.probability > 0)")
    return {"mlm": token_cross_entropy(student.logits, batch.labels.flatten()[batch.targets])}

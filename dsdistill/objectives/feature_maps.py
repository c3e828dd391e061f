"""MobileBERT's feature map transfer: normalised states and their statistics, compared separately.

Shapes: B rows, L length, E width.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsdistill.core import Batch, Features, LayerPairs
from dsdistill.objectives.hidden import Projection, hidden_pairs, projections
from dsdistill.objectives.numerics import check_same_shape, masked_mean, over_pairs, promote, zero_outside
from dsdistill.objectives.registry import objective


def feature_map_losses(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of hidden states in three parts, over each position's width.

    Sun et al. 2020, MobileBERT (arXiv:2004.02984), section 3.4, in the form of its released code. Half types are
    promoted to float32, float64 is kept.

    Args:
        student: (B, L, E), any float dtype; gradients flow.
        teacher: (B, L, E); treated as constant.
        mask: bool (B, L), True = real.

    Returns:
        Means over real positions (0 if there are none) of: the squared difference of the states normalised to mean 0
        and variance 1, averaged over the width; the squared difference of the means; the absolute difference of the
        (biased) variances.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape("hidden states", student, teacher, instead="use a projection")
    ours, our_mean, our_variance = _standardised(student, mask)
    theirs, their_mean, their_variance = _standardised(teacher.detach(), mask)
    return (
        masked_mean((ours - theirs).square().mean(-1), mask),
        masked_mean((our_mean - their_mean).square(), mask),
        masked_mean((our_variance - their_variance).abs(), mask),
    )


def _standardised(hidden_BLE: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States with mean 0 and variance 1 over the width (B, L, E), their means and variances (B, L)."""
    hidden = promote(zero_outside(hidden_BLE, mask[..., None]))
    mean = hidden.mean(-1, keepdim=True)
    variance = (hidden - mean).square().mean(-1, keepdim=True)
    return (hidden - mean) * (variance + 1e-6).rsqrt(), mean.squeeze(-1), variance.squeeze(-1)


@objective(
    "mobilebert",
    student={"hidden"},
    teacher={"hidden"},
    head=projections,
    equation="100 mean (LN(H^S) - LN(H^T))^2 + 5000 mean (mu^S - mu^T)^2 + 5 mean |var^S - var^T|, over real positions",
    paper="MobileBERT, arXiv:2004.02984, sec. 3.4 (feature map transfer) and its released code",
)
def mobilebert(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    normalised: float = 100.0,
    means: float = 5000.0,
    variances: float = 5.0,
    projection: Projection = "auto",
    head: nn.Module | None = None,
) -> dict[str, Tensor]:
    """`feature_map_losses` with the factors of the released code, averaged over layer pairs, one term for each part.

    The paper's models are equally wide; other widths get a projection here. Its second loss, attention transfer, is
    the objective `att_kl`.
    """
    states = hidden_pairs(student, teacher, pairs, batch.mask, head)
    parts = [feature_map_losses(ours, theirs, batch.mask) for ours, theirs in states]
    factors = {"normalised": normalised, "means": means, "variances": variances}
    return {
        name: factor * over_pairs(losses, "mean")
        for (name, factor), losses in zip(factors.items(), zip(*parts, strict=True), strict=True)
    }

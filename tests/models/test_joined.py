import pytest
import torch

from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.joined import join_projections
from tests.models.families_under_test import QUICK_FAMILIES, WITHOUT_ENTRY
from tests.models.test_capture import EVERYTHING, build, make_batch

JOINED = {"albert": 1, "modernbert": 0, "deberta-v2": 0, WITHOUT_ENTRY: 0}
"""ALBERT's layers share one attention module, ModernBERT projects jointly by itself, DeBERTa projects positions too."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_joined_projections_give_the_same_signals(family, compiled):
    batch = make_batch(True)
    expected = Captured(build(family, ATTENTION), EVERYTHING)(batch)
    model = build(family, ATTENTION)
    weights = sum(p.numel() for p in model.parameters())
    assert join_projections(model) == JOINED.get(family, 4)
    assert sum(p.numel() for p in model.parameters()) == weights
    captured = Captured(model, EVERYTHING)
    torch._dynamo.reset()
    run = torch.compile(captured, fullgraph=True, backend="aot_eager") if compiled else captured
    for _ in range(2):
        with torch.no_grad():
            features = run(batch)
    for signal, layers in expected.signals.items():
        for layer, tensor in layers.items():
            torch.testing.assert_close(features.at(signal, layer), tensor, rtol=1e-5, atol=2e-6)

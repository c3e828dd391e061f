"""Families with attention code of their own: positions as transformers counts them, and half types."""

import pytest
import torch
from transformers import AutoModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.own_attention import deberta_distance, mpnet_bucket
from tests.models.families_under_test import tiny_configs
from tests.models.test_capture import WANTED, make_batch

DISTANCES = torch.arange(-1100, 1101)


@pytest.mark.parametrize("buckets", [2, 8, 32, 64])
def test_mpnet_distances_fall_into_its_buckets(buckets):
    expected = MPNetEncoder.relative_position_bucket(DISTANCES, num_buckets=max(buckets, 4))
    assert torch.equal(mpnet_bucket(DISTANCES, max(buckets, 4)), expected)


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (128, 512), (8, 64), (32, 100), (4, 5), (64, 33)])
def test_deberta_distances_are_counted_as_it_counts(buckets, furthest):
    expected = make_log_bucket_position(DISTANCES, buckets, furthest).to(torch.int64)
    assert torch.equal(deberta_distance(DISTANCES, buckets, furthest), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_half_types_stay_finite_beside_padding(family, dtype):
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_configs()[family], attn_implementation=ATTENTION).eval()
    batch = make_batch(True)
    batch.mask[1, 1:] = False
    exact = Captured(model, WANTED)(batch)
    features = Captured(model.to(dtype), WANTED)(batch)
    for signal, layers in features.signals.items():
        for layer, tensor in layers.items():
            assert tensor.isfinite().all()
            if signal == "hidden":
                ours, theirs = tensor[batch.mask].float(), exact.at(signal, layer)[batch.mask]
                torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05)

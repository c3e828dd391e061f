import pytest
import torch
from transformers import AutoConfig, AutoModel

from dsdistill.config.recipe import check_recipe
from dsdistill.plan import make_plan
from dsdistill.training.dist import Place
from dsdistill.utilisation import flops_per_token, peak_flops, tokens_at_peak

PLACE = Place(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_a_token_are_those_of_the_layers_that_run(recipe_content, checkpointing):
    """By hand: 2 products a weight forward, 4 backward; attention 4 L E forward, 8 backward."""
    recipe_content["objectives"] = [{"objective": "hid_seq", "layers": "last", "projection": "never"}]
    recipe_content["student"] |= {"init": [1, 3], "activation_checkpointing": checkpointing}
    plan = make_plan(check_recipe(recipe_content, "test"), {"train_micro_batch_size_per_gpu": 2}, PLACE)
    config = AutoConfig.from_pretrained(recipe_content["teacher"]["model"])
    layer = AutoModel.from_config(config).encoder.layer[0]
    weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    forward = 2 * weights + 4 * 32 * config.hidden_size  # rows of 32 tokens
    # the student's embeddings need a gradient too, so that all of backward runs
    assert flops_per_token(plan, plan.stages[0]) == pytest.approx((4 + 2 * 3) * forward)
    assert flops_per_token(plan, plan.stages[0], asks_teacher=False) == pytest.approx(2 * 3 * forward)


def test_no_utilisation_of_a_device_whose_peak_is_unknown(recipe_content):
    plan = make_plan(check_recipe(recipe_content, "test"), {"train_micro_batch_size_per_gpu": 2}, PLACE)
    assert tokens_at_peak(plan, plan.stages[0], PLACE) == "no MFU: the peak FLOP/s of this CPU are not known"
    assert plan.traces == {}, "seconds for nothing"


@pytest.mark.parametrize(
    ("name", "half", "full"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("Tesla V100-PCIE-32GB", 112e12, 14e12),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
    ],
)
def test_peaks_are_found_by_a_gpus_name(name, half, full):
    assert peak_flops(name, torch.bfloat16) == half
    assert peak_flops(name, torch.float32) == full

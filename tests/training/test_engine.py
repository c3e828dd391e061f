import pytest
import torch

from tests.workers import run_workers

pytestmark = pytest.mark.multiprocess
WORKERS = "tests.training.engine_workers"


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_zero_stage_equals_plain_pytorch(recipe_content, world_size):
    run_workers(f"{WORKERS}:check_parity", world_size, content=recipe_content)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resumed_run_is_bit_equal_at_every_zero_stage(recipe_content, world_size):
    run_workers(f"{WORKERS}:check_resume", world_size, content=recipe_content)


def test_a_term_that_is_not_finite_stops_all_ranks_and_is_never_saved(recipe_content):
    run_workers(f"{WORKERS}:check_non_finite", 2, content=recipe_content)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp16_without_zero_learns_as_fast_as_with_it(recipe_content):
    """DeepSpeed's fp16 optimizer without ZeRO unscales gradients; somebody must have scaled the loss."""
    run_workers(f"{WORKERS}:check_fp16_stages", 1, content=recipe_content)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp16_runs_resume_at_every_zero_stage(recipe_content):
    run_workers(f"{WORKERS}:check_resume", 1, content=recipe_content, fp16=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replayed_graphs_train_as_kernel_by_kernel(recipe_content):
    run_workers(f"{WORKERS}:check_graphs", 1, content=recipe_content)

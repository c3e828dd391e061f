import pytest

from tests.workers import run_workers


@pytest.mark.multiprocess
def test_every_family_at_zero_3_on_two_processes_equals_plain_pytorch():
    run_workers("tests.training.family_workers:check_families", 2)

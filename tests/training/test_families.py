import pytest

from tests.models.families_under_test import FAMILIES
from tests.workers import run_workers

QUICK = ("albert", "bert", "modernbert", "mpnet")
OTHERS = [family for family in FAMILIES if family not in QUICK]


@pytest.mark.multiprocess
@pytest.mark.parametrize("families", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_every_family_at_zero_3_on_two_processes_equals_plain_pytorch(families):
    run_workers("tests.training.family_workers:check_families", 2, families=families)

"""Every shipped DeepSpeed JSON trains the same model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsdistill.config.offload import OFFLOADS, check_machine, offload_device
from tests.faults.jobs import Job
from tests.faults.test_kills import training_losses
from tests.workers import ROOT

pytestmark = pytest.mark.multiprocess
JSONS = sorted(path.stem.removeprefix("zero") for path in (ROOT / "ds_configs").glob("*.json"))
STEPS = 50
TOLERANCE = 1e-5
"""Relative, of any step's loss: gradients are summed in another order."""


@pytest.fixture
def recipe(tmp_path, recipe_content) -> Path:
    recipe_content["optimization"]["steps"] = STEPS
    recipe_content["logging"]["every_steps"] = 1
    recipe_content["evaluation"]["every_steps"] = recipe_content["checkpoint"]["every_steps"] = STEPS
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content))
    return path


def losses_of(recipe: Path, name: str, directory: Path, warm) -> list[float]:
    """Training losses of a run on two processes; with NVMe in a directory of its own, and buffers for a tiny model."""
    content = json.loads((ROOT / "ds_configs" / f"zero{name}.json").read_text())
    zero = content["zero_optimization"]
    for key in OFFLOADS:
        if offload_device(zero, key) == "nvme":
            zero[key] |= {"nvme_path": str(directory / "nvme")}
    if offload_device(zero, "offload_param") == "nvme":
        zero["offload_param"]["buffer_size"] = 100_000
    file = directory / f"zero{name}.json"
    file.write_text(json.dumps(content))
    run = directory / name
    job = Job(recipe, f"output={run}", world_size=2, stage=str(file), warm=warm)
    assert not any(job.codes()), job.tails()
    losses = training_losses(run)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return [loss for _, loss in losses]


@pytest.fixture
def nvme() -> None:
    """Skips where NVMe offload cannot work, and else has DeepSpeed compile what it needs, which takes minutes once."""
    try:
        check_machine({"offload_param": {"device": "nvme"}})
    except ValueError as error:
        pytest.skip(str(error))
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", build], check=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in JSONS if name != "0"])
def test_losses_of_fifty_steps_are_those_of_zero_0(recipe, name, tmp_path, warm, request):
    if "nvme" in name:
        request.getfixturevalue("nvme")
    expected, found = (losses_of(recipe, which, tmp_path, warm) for which in ("0", name))
    differences = [abs(one / other - 1) for one, other in zip(found, expected, strict=True)]
    print(f"zero{name}: largest relative difference {max(differences):.1e}")
    assert max(differences) < TOLERANCE, differences

from pathlib import Path

import pytest
import yaml

from tests.faults.jobs import LONG, Job
from tests.task.conftest import glue_directory, task_content  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, warm):
    """Gives, for a recipe and a number of processes, the directory of a run that nothing happened to."""
    made = {}

    def run(recipe: Path, world_size: int) -> Path:
        content = yaml.safe_load(recipe.read_text())
        key = (world_size, yaml.safe_dump(content | {"output": None}))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("unbroken") / "run"
            job = Job(
                recipe, *LONG, "checkpoint.every_steps=1000", f"output={made[key]}", world_size=world_size, warm=warm
            )
            assert not any(job.codes()), job.tails()
        return made[key]

    return run

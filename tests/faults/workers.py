"""What the worker process of `test_security.py` does."""

import shutil
from pathlib import Path

from dsdistill.config.recipe import check_recipe
from dsdistill.plan import make_plan
from dsdistill.pretrain import distil, open_corpus
from dsdistill.training.checkpoint import ENGINE, MANIFEST, seal
from dsdistill.training.dist import find_place
from dsdistill.training.engine import start_processes
from dsdistill.training.run_directory import CHECKPOINTS


def load_planted_states(content: dict, mark: str) -> None:
    """Plant a bomb in every engine file of a checkpoint, one after the other, and resume from it."""
    from tests.faults.test_security import plant

    place = find_place()
    start_processes(place)
    planted = 0
    for stage in (0, 2, 3):
        recipe = check_recipe({**content, "output": f"{content['output']}-{stage}"}, "test")
        json = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
        plan = make_plan(recipe, json, place)
        distil(plan, *open_corpus(recipe, plan, place), place, "auto")
        whole = recipe.output / CHECKPOINTS / "step-00000001"
        for file in (whole / ENGINE).glob("*.pt"):
            copy = Path(content["output"]).with_name("planted")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            plant(copy / ENGINE / file.name, Path(mark))
            (copy / MANIFEST).unlink()
            seal(copy)
            try:
                distil(plan, *open_corpus(recipe, plan, place), place, copy)
            except ValueError as error:
                assert "may run code" in str(error), error  # noqa: PT017 (no pytest in workers)
                planted += 1
            else:
                raise AssertionError(f"{file.name} was loaded at stage {stage}")
            assert not Path(mark).exists(), f"{file.name} ran code at stage {stage}"
    assert planted >= 5, planted

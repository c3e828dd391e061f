"""What the worker process of `test_security.py` does."""

import shutil
from pathlib import Path

from dsdistill.config.recipe import check_recipe
from dsdistill.plan import make_plan
from dsdistill.pretrain import distil, open_corpus
from dsdistill.training.checkpoint import MANIFEST, seal
from dsdistill.training.dist import find_place
from dsdistill.training.engine import start_processes
from dsdistill.training.run_directory import CHECKPOINTS


def load_planted_states(content: dict, mark: str) -> None:
    """Plant a bomb in every file of a checkpoint, one after the other, seal it as if it were whole, and resume."""
    from tests.faults.test_security import plant

    place = find_place()
    start_processes(place)
    recipe = check_recipe(content, "test")
    plan = make_plan(recipe, {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}, place)
    distil(plan, *open_corpus(recipe, plan, place), place, "auto")
    whole = recipe.output / CHECKPOINTS / "step-00000001"
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert len(names) == 4, names
    for name in [*names, Path("optimizer/more.safetensors")]:
        copy = recipe.output.with_name("planted")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        plant(copy / name, Path(mark))
        (copy / MANIFEST).unlink()
        seal(copy)
        try:
            distil(plan, *open_corpus(recipe, plan, place), place, copy)
        except ValueError as error:
            assert str(copy) in str(error), error  # noqa: PT017 (no pytest in workers)
        else:
            raise AssertionError(f"{name} was loaded")
        assert not Path(mark).exists(), f"{name} ran code"

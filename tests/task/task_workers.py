"""What the worker processes of `test_runs.py` do."""

import copy
import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from dsdistill import task_distill
from dsdistill.config.recipe import check_task_recipe, read_task_recipe
from dsdistill.task_distill import run
from dsdistill.training.dist import find_place
from dsdistill.training.engine import start_processes

RECIPES = Path(__file__).parents[2] / "launch" / "recipes" / "glue"


def ds_json(stage: int) -> dict:
    return {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}


def at(content: dict, output: str, **changes) -> dict:
    return {**copy.deepcopy(content), "output": f"{content['output']}-{output}", **changes}


def run_all(content: dict, stages: list[int]) -> None:
    """The same recipe at several ZeRO stages, sharing one teacher."""
    start_processes(find_place())
    for stage in stages:
        run(check_task_recipe(at(content, str(stage)), "test"), ds_json(stage))


class KilledError(Exception):
    pass


def stop_after(batches: int):
    """Make the data source fail after some micro-batches, as a kill would stop the run."""
    plain = task_distill.train_batches

    def failing(*args, **kwargs):
        yield from itertools.islice(plain(*args, **kwargs), batches)
        raise KilledError

    return failing


def check_resume(content: dict, stages: list[int]) -> None:
    """Stopped in its first stage and again in its second, a run ends with the very weights of an unbroken one."""
    place = find_place()
    start_processes(place)
    plain = task_distill.train_batches
    for stage in stages:
        run(check_task_recipe(at(content, f"unbroken-{stage}"), "test"), ds_json(stage))
        broken = check_task_recipe(at(content, f"broken-{stage}"), "test")
        micro_batches = 16 // (4 * place.world_size)
        for steps in (4, 5):  # the first stage saves at 3 and 6; what is left of it and of the second is more than 5
            task_distill.train_batches = stop_after(steps * micro_batches)
            try:
                run(broken, ds_json(stage))
            except KilledError:
                pass
            else:
                raise AssertionError("the run was meant to stop")
            task_distill.train_batches = plain
        run(broken, ds_json(stage))
        if place.is_first:
            weights = [
                load_file(Path(f"{content['output']}-{kind}-{stage}") / "model" / "model.safetensors")
                for kind in ("unbroken", "broken")
            ]
            for name, value in weights[0].items():
                assert torch.equal(value, weights[1][name]), (stage, name)


def check_caches(content: dict) -> None:
    """Signals from disk train the student that a teacher beside it trains."""
    start_processes(find_place())
    content["student"]["dropout"] = 0.0
    weights = {}
    for cache in ("none", "logits", "all"):
        changed = at(content, cache, teacher={**content["teacher"], "cache": cache})
        run(check_task_recipe(changed, "test"), ds_json(0))
        weights[cache] = load_file(Path(f"{content['output']}-{cache}") / "model" / "model.safetensors")
        results = json.loads((Path(f"{content['output']}-{cache}") / "results.json").read_text())
        assert (results["teacher_signals"] is None) == (cache == "none")
    for cache in ("logits", "all"):
        for name, value in weights["none"].items():
            torch.testing.assert_close(weights[cache][name], value, rtol=1e-4, atol=1e-4, msg=f"{cache}: {name}")


def run_placements(content: dict, placements: list[dict]) -> None:
    """The same recipe with a live teacher in several places, at ZeRO 2; `ranks` in a call of its own."""
    if all("ranks" not in keys for keys in placements):
        start_processes(find_place())
    for keys in placements:
        teacher = {**content["teacher"], "cache": "none", **keys}
        run(check_task_recipe(at(content, keys["placement"], teacher=teacher), "test"), ds_json(2))


def run_recipes(content: dict, output: str, regressions: list[str]) -> None:
    """A few steps of every shipped recipe, some on a regression too, of a multi-label task, and of augmented rows."""
    start_processes(find_place())
    shared = [
        *(f"teacher.model={content['teacher']['model']}", f"teacher.directory={output}/teachers"),
        *("student.num_layers=2", "data.max_length=32", "teacher.fine_tuning.epochs=0.2"),
    ]
    for path in sorted(RECIPES.glob("*.yaml")):
        stages = len(read_task_recipe(path).stages)
        short = [f"stages.{i}.optimization.epochs=0.2" for i in range(stages)]
        for task in ["cola", *(["stsb"] if path.stem in regressions else [])]:
            where = [
                f"task={task}",
                f"data.directory={content['data']['directory']}",
                f"output={output}/{{task}}/{{name}}",
            ]
            run(read_task_recipe(path, [*shared, *short, *where]), ds_json(0))
    more = {"copies": 2, "probability": 0.5, "candidates": 3, "masked_lm": content["teacher"]["model"]}
    augmented = at(content, "augmented", data={**content["data"], "augment": more, "train_rows": 40})
    del augmented["own"]
    run(check_task_recipe(augmented, "test"), ds_json(0))
    for name, data in content["own"].items():
        changed = {**at(content, name), "task": name, "data": data}
        del changed["own"]
        run(check_task_recipe(changed, "test"), ds_json(0))

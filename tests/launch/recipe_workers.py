"""What the worker process of `test_recipes.py` does: a short run of every shipped recipe, all in one process."""

import json
import math
from pathlib import Path

from dsdistill.config.recipe import read_recipe
from dsdistill.plan import make_plan
from dsdistill.pretrain import distil, open_corpus
from dsdistill.summary import held_out_at
from dsdistill.training.dist import find_place
from dsdistill.training.engine import start_processes

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PER_RECIPE = {
    "mobilebert": ["student.overrides={hidden_size: 16, intermediate_size: 32}"],
    "minilmv2": ["objectives.0.relation_heads=8"],
    "long_context": ["student.init=[1, 4]", "objectives.0.relation_heads=8", "objectives.1.layers=[[1, 1], [2, 4]]"],
    "quickstart": ["objectives.0.relation_heads=8", "corpus.prepare=null"],
}
"""What a teacher of width 32 with 4 heads asks for; everything else runs as shipped."""

MORE = {
    "kd at all positions of unmasked text": (
        RECIPES / "study" / "vanilla_kd.yaml",
        ["objectives=[{objective: kd}]", "masking={probability: 0, targets: all}"],
    ),
    "narrower student from the teacher": (
        RECIPES / "mobilebert.yaml",
        ["student.init=uniform", "student.resize=importance"],
    ),
}
"""Settings that no shipped recipe has."""


def pretraining_recipes() -> dict[str, Path]:
    """The shipped recipes of task-agnostic distillation by name."""
    files = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name not in ("glue", "grids")]
    return {str(path.relative_to(RECIPES).with_suffix("")): path for path in files}


def cases() -> dict[str, tuple[Path, list[str]]]:
    """Recipe file and overrides by name."""
    return {name: (path, []) for name, path in pretraining_recipes().items()} | MORE


def short_overrides(steps: int) -> list[str]:
    return [
        "student.num_layers=2",
        f"optimization.steps={steps}",
        f"optimization.warmup_steps={steps // 10}",
        "optimization.global_batch=4",
        "evaluation.rows=32",
        f"evaluation.every_steps={steps}",
        f"checkpoint.every_steps={steps}",
    ]


def run_all(teacher: str, corpus: str, output: str, steps: int, stages: list[int]) -> None:
    """Run every case at every ZeRO stage; write held-out losses before and after to `losses.json`."""
    place = find_place()
    start_processes(place)
    losses = {}
    for name, (path, overrides) in cases().items():
        for stage in stages:
            directory = Path(output) / str(len(losses))
            recipe = read_recipe(
                path,
                [
                    *short_overrides(steps),
                    *PER_RECIPE.get(path.stem, []),
                    *overrides,
                    f"teacher.model={teacher}",
                    f"corpus.directory={corpus}",
                    f"output={directory}",
                ],
            )
            ds_json = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
            plan = make_plan(recipe, ds_json, place)
            distil(plan, *open_corpus(recipe, plan, place), place, "never")
            pair = [held_out_at(directory, index)["total"] for index in (0, -1)]
            assert all(math.isfinite(loss) and loss > 0 for loss in pair), (name, pair)
            losses[f"{name} at ZeRO {stage}"] = pair
    (Path(output) / "losses.json").write_text(json.dumps(losses))

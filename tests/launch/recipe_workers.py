"""What the worker process of `test_recipes.py` does: a short run of every shipped recipe, all in one process."""

import json
import math
import random
import shutil
from pathlib import Path

from dsdistill.config.recipe import read_recipe
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.plan import make_plan
from dsdistill.pretrain import distil, open_corpus
from dsdistill.summary import held_out_at
from dsdistill.training.dist import find_place
from dsdistill.training.engine import start_processes
from tests.conftest import WORDS, write_text

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PER_RECIPE = {
    "mobilebert": ["student.overrides={hidden_size: 16, intermediate_size: 32}"],
    "minilmv2": ["objectives.0.relation_heads=8"],
    "long_context": ["student.init=[1, 4]", "objectives.0.relation_heads=8", "objectives.1.layers=[[1, 1], [2, 4]]"],
    "quickstart": ["objectives.0.relation_heads=8", "corpus.prepare=null"],
    "sentence_encoder": [
        "objectives.2.relation_heads=8",
        "corpus.prepare=null",
        "evaluation.sentences={rows: 30, neighbours: 3, sts: SENTENCES/sts.tsv}",
    ],
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


def sentence_encoder(teacher: Path, output: Path) -> list[str]:
    """A sentence encoder that pools the first token, a corpus of one text a row, and scored pairs; what names them."""
    directory = Path(shutil.copytree(teacher, output / "sentence-teacher"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in MODULES.items()]
    (directory / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), **module} for i, module in enumerate(modules)])
    )
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    settings = CorpusSettings(
        input=str(write_text(output / "text.txt")),
        tokenizer=str(teacher),
        output=output / "sentences",
        length=32,
        rows="document",
        held_out=0.3,
        processes=1,
    )
    prepare(settings, progress=False)
    draw = random.Random(0)
    lines = ["sentence1\tsentence2\tscore"]
    for _ in range(40):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(2))
        lines.append(f"{first}\t{second}\t{draw.uniform(0, 5):.2f}")
    (output / "sts.tsv").write_text("\n".join(lines) + "\n")
    return [f"teacher.model={directory}", f"corpus.directory={settings.output}"]


MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def run_all(teacher: str, corpus: str, output: str, steps: int, stages: list[int]) -> None:
    """Run every case at every ZeRO stage; write held-out losses before and after to `losses.json`."""
    place = find_place()
    start_processes(place)
    losses = {}
    sentences = sentence_encoder(Path(teacher), Path(output))
    for name, (path, overrides) in cases().items():
        for stage in stages:
            directory = Path(output) / str(len(losses))
            recipe = read_recipe(
                path,
                [
                    *short_overrides(steps),
                    *(o.replace("SENTENCES", output) for o in PER_RECIPE.get(path.stem, [])),
                    *overrides,
                    f"teacher.model={teacher}",
                    f"corpus.directory={corpus}",
                    *(sentences if path.stem == "sentence_encoder" else ()),
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

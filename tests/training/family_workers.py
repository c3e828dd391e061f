"""What the worker processes of `test_families.py` do: every family at ZeRO-3 against plain PyTorch."""

import torch
from transformers import AutoModelForMaskedLM

from dsdistill.config.recipe import term_model
from dsdistill.config.sections import OptimizationSettings
from dsdistill.core import Batch
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.families import shape_of
from dsdistill.models.student import build_student, student_config
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.objectives import find_objective, layer_pairs
from dsdistill.training.dist import find_place, gather_rows
from dsdistill.training.distiller import BoundTerm, Distiller, freeze_unreached, wanted_signals
from dsdistill.training.engine import backward, parameter_groups, start_engine, start_processes
from dsdistill.training.loop import optimizer_of
from dsdistill.training.optimizer_state import full_weights
from tests.models.families_under_test import tiny_configs

SETTINGS = OptimizationSettings(steps=3, global_batch=4, learning_rate=1e-3, schedule="constant")


def rows(step: int, start: int = 0, stop: int = 4) -> Batch:
    ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(step))[start:stop]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 20:] = False
    return Batch(input_ids=ids, mask=mask, sample_ids=torch.arange(start, stop))


def bound(name: str, layers: str, student, teacher) -> BoundTerm:
    """A term that reads the given layers only, so that the loss leaves the model in its middle."""
    params = {"relation_heads": 4} if name == "minilmv2" else {}
    pairs = layer_pairs(layers, student.num_layers, teacher.num_layers)
    given = term_model(name)(objective=name, layers=layers, **params)
    return BoundTerm(label=name, objective=find_objective(name), pairs=pairs, weight=1.0, params=given.params)


def make(family: str, device) -> tuple[Distiller, ResidentTeacher]:
    torch.manual_seed(0)
    teacher = AutoModelForMaskedLM.from_config(tiny_configs()[family], attn_implementation=ATTENTION).eval()
    config = student_config(teacher.config, 3, (1, 2, 4), dropout=0.0)
    shapes = shape_of(config), shape_of(teacher.config)
    terms = [bound("att_kl", "last", *shapes), bound("minilmv2", "first", *shapes), bound("hid_seq", "first", *shapes)]
    wanted = wanted_signals(terms)
    student = build_student(teacher, config, (1, 2, 4), seed=0)
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    distiller = Distiller(
        Captured(student, wanted[0]),
        terms,
        shape=shapes[0],
        teacher=shapes[1],
        num_examples=10,
        gather=gather_rows,
        seed=0,
    )
    return distiller.to(device), ResidentTeacher(teacher, wanted[1], device=device, dtype=torch.float32)


def check_families(families: list[str]) -> None:
    """Three steps at ZeRO-3 equal plain PyTorch, where the loss reads the middle and a captured last layer."""
    place = find_place()
    start_processes(place)
    size = 4 // place.world_size
    for family in families:
        plain, teacher = make(family, place.device)
        freeze_unreached(plain, rows(9).to(place.device), teacher(rows(9).to(place.device)))
        optimizer = torch.optim.AdamW(parameter_groups(plain, 0.01), lr=1e-3, betas=SETTINGS.betas, eps=SETTINGS.eps)
        for step in range(3):
            batch = rows(step).to(place.device)
            plain(batch, teacher(batch), step).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        sharded, teacher = make(family, place.device)
        freeze_unreached(sharded, rows(9).to(place.device), teacher(rows(9).to(place.device)))
        json = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        engine = start_engine(sharded, SETTINGS, {**json, "zero_optimization": {"stage": 3}}, place)
        for step in range(3):
            batch = rows(step, place.rank * size, (place.rank + 1) * size).to(place.device)
            for group in optimizer_of(engine).param_groups:
                group["lr"] = 1e-3
            backward(engine, engine(batch, teacher(batch), step).total)
            engine.step()
        (weights,) = full_weights(engine, sharded)
        if place.is_first:
            for name, value in plain.named_parameters():
                message = f"{family}: {name}"
                torch.testing.assert_close(weights[name], value.detach().cpu(), rtol=1e-4, atol=1e-5, msg=message)

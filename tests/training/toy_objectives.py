"""Objectives from outside the package, which fail at a chosen step's temperature."""

import torch

from dsdistill.objectives.registry import objective


@objective("explodes", student={"hidden"}, teacher={"hidden"}, equation="sqrt(x)", paper="none")
def explodes(student, teacher, batch, pairs, *, temperature: float = 1.0):
    difference = sum(student.at("hidden", s).mean() - teacher.at("hidden", t).mean() for s, t in pairs)
    return {"explodes": difference.square() + torch.tensor(temperature).log()}


@objective("cliff", student={"hidden"}, teacher={"hidden"}, equation="sqrt(0 x)", paper="none")
def cliff(student, teacher, batch, pairs, *, temperature: float = 1.0):
    difference = sum(student.at("hidden", s).mean() - teacher.at("hidden", t).mean() for s, t in pairs)
    return {"cliff": (0 * difference).sqrt() if temperature < 0 else difference.square()}


@objective("records", student={"hidden"}, equation="0", paper="none")
def records(student, teacher, batch, pairs, *, file: str):
    """Adds nothing to the loss; writes down which rows were trained on."""
    if torch.is_grad_enabled():
        line = " ".join(str(row) for row in batch.sample_ids.tolist())
        with open(file, "a") as record:
            record.write(line + "\n")
    return {"records": 0.0 * student.at("hidden", pairs.student[0]).sum()}

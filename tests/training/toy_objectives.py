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

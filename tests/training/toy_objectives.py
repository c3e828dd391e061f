"""An objective from outside the package, which fails at a chosen step's temperature."""

import torch

from dsdistill.objectives.registry import objective


@objective("explodes", student={"hidden"}, teacher={"hidden"}, equation="sqrt(x)", paper="none")
def explodes(student, teacher, batch, pairs, *, temperature: float = 1.0):
    difference = sum(student.at("hidden", s).mean() - teacher.at("hidden", t).mean() for s, t in pairs)
    return {"explodes": difference.square() + torch.tensor(temperature).log()}

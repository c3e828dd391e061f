"""Queries, keys and values of a frozen model in one product instead of three: wider products run faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.models.families import encoder_of, family_of


class _Joined(nn.Linear):
    """Stands where the first projection stood; keeps the results of the others until they are asked for."""

    def __init__(self, projections: list[nn.Linear]):
        super().__init__(1, 1, bias=False)
        self.widths = [projection.out_features for projection in projections]
        self.in_features, self.out_features = projections[0].in_features, sum(self.widths)
        self.weight = nn.Parameter(torch.cat([p.weight.detach() for p in projections]), requires_grad=False)
        if projections[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([p.bias.detach() for p in projections]), requires_grad=False)
        self.kept: tuple[Tensor, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        results = super().forward(input).split(self.widths, dim=-1)
        self.kept = results[1:]
        return results[0]


class _Later(nn.Module):
    """Stands where another projection stood."""

    def __init__(self, joined: _Joined):
        super().__init__()
        self.joined = (joined,)  # in a tuple it is no child of this module as well

    def forward(self, _input: Tensor) -> Tensor:
        (joined,) = self.joined
        result, joined.kept = joined.kept[0], joined.kept[1:]
        return result


def join_projections(model: PreTrainedModel) -> int:
    """Join the projections of every attention module that keeps them apart, in place; its weights are frozen.

    Returns:
        How many modules were joined; families that project jointly by themselves have none.
    """
    names = family_of(encoder_of(model).config).projections
    found = 0
    for module in list(model.modules()) if names else ():
        projections = [getattr(module, name, None) for name in names]
        linear = [p for p in projections if type(p) is nn.Linear]
        same = {(p.in_features, p.bias is None) for p in linear}
        if len(linear) == len(names) and len(same) == 1:
            joined = _Joined(linear)
            setattr(module, names[0], joined)
            for name in names[1:]:
                setattr(module, name, _Later(joined))
            found += 1
    return found

"""What a student learns from its teacher: the table of objectives, their maths on plain tensors, and layer mappings."""

from dsdistill.objectives.attention import attention_kl, attention_mse
from dsdistill.objectives.hidden import hidden_mse
from dsdistill.objectives.logits import token_cross_entropy
from dsdistill.objectives.mapping import initial_layers, layer_pairs
from dsdistill.objectives.registry import OBJECTIVES, SUPPLIED, Objective, find_objective, objective
from dsdistill.objectives.relations import relation_kl

__all__ = [
    "OBJECTIVES",
    "SUPPLIED",
    "Objective",
    "attention_kl",
    "attention_mse",
    "find_objective",
    "hidden_mse",
    "initial_layers",
    "layer_pairs",
    "objective",
    "relation_kl",
    "token_cross_entropy",
]

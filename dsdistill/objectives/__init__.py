"""What a student learns from its teacher: the table of objectives, their maths on plain tensors, and layer mappings."""

from dsdistill.objectives.attention import attention_kl, attention_mse
from dsdistill.objectives.contrastive import crd, info_nce
from dsdistill.objectives.correlation import attention_pearson, logit_pearson
from dsdistill.objectives.feature_maps import feature_map_losses
from dsdistill.objectives.hidden import hidden_cosine, hidden_mse
from dsdistill.objectives.logits import binary_divergence, soft_cross_entropy, soft_divergence, token_cross_entropy
from dsdistill.objectives.mapping import initial_layers, layer_pairs
from dsdistill.objectives.registry import OBJECTIVES, SUPPLIED, Objective, find_objective, objective
from dsdistill.objectives.relations import relation_kl
from dsdistill.objectives.sentences import pool, similarity_kl

__all__ = [
    "OBJECTIVES",
    "SUPPLIED",
    "Objective",
    "attention_kl",
    "attention_mse",
    "attention_pearson",
    "binary_divergence",
    "crd",
    "feature_map_losses",
    "find_objective",
    "hidden_cosine",
    "hidden_mse",
    "info_nce",
    "initial_layers",
    "layer_pairs",
    "logit_pearson",
    "objective",
    "pool",
    "relation_kl",
    "similarity_kl",
    "soft_cross_entropy",
    "soft_divergence",
    "token_cross_entropy",
]

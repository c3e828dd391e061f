"""Tiny random models of every family that the tests sweep."""

import pytest
import transformers
from transformers import (
    AlbertConfig,
    BertConfig,
    CamembertConfig,
    Data2VecTextConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    EuroBertConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    RoCBertConfig,
    XLMRobertaConfig,
    XLMRobertaXLConfig,
)

WITHOUT_ENTRY = "roc_bert"
"""A family that the table of families does not know."""

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


NO_SHAPES = {
    "enable_pronunciation": False,
    "enable_shape": False,
    "pronunciation_vocab_size": 8,
    "shape_vocab_size": 8,
}
"""What RoCBERT knows of Chinese characters beside their numbers, left out."""


def tiny_configs() -> dict[str, PreTrainedConfig]:
    """A fresh config per family; models share a config object they are built from, so never reuse one."""
    return {
        "bert": BertConfig(**SIZES),
        "data2vec-text": Data2VecTextConfig(**SIZES),
        "ernie": ErnieConfig(**SIZES),
        "eurobert": EuroBertConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "nomic_bert": NomicBertConfig(**SIZES),
        "roberta": RobertaConfig(**SIZES),
        WITHOUT_ENTRY: RoCBertConfig(**SIZES, **NO_SHAPES),
        "xlm-roberta": XLMRobertaConfig(**SIZES),
        "xlm-roberta-xl": XLMRobertaXLConfig(**SIZES),
        **({"gte": transformers.GteConfig(**SIZES)} if hasattr(transformers, "GteConfig") else {}),
        "camembert": CamembertConfig(**SIZES),
        "deberta-v2": DebertaV2Config(
            **SIZES,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            conv_kernel_size=3,
        ),
        "distilbert": DistilBertConfig(dim=32, n_layers=4, n_heads=4, hidden_dim=64, vocab_size=100),
        "electra": ElectraConfig(**SIZES, embedding_size=16),
        "albert": AlbertConfig(**SIZES, embedding_size=16),
        "mpnet": MPNetConfig(**SIZES),
        "modernbert": ModernBertConfig(
            **SIZES,
            local_attention=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    }


FAMILIES = sorted(tiny_configs())

_CODE_OF_ITS_OWN = ("albert", "bert", "deberta-v2", "distilbert", "modernbert", "mpnet")

QUICK_FAMILIES = [
    family if family in _CODE_OF_ITS_OWN else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]
"""For tests that take seconds for each family: those whose code resembles another's are part of `make test-all`."""

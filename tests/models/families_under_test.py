"""Tiny random models of every family that the tests sweep."""

from transformers import (
    AlbertConfig,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def tiny_configs() -> dict[str, PreTrainedConfig]:
    """A fresh config per family; models share a config object they are built from, so never reuse one."""
    return {
        "bert": BertConfig(**SIZES),
        "roberta": RobertaConfig(**SIZES),
        "xlm-roberta": XLMRobertaConfig(**SIZES),
        "camembert": CamembertConfig(**SIZES),
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

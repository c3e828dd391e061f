"""Whether a head that a config claims is there, known from the names of weights."""

import pytest
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, BertConfig, ElectraConfig

from dsdistill.locate import Source
from dsdistill.models.loading import head_of, load_config, load_encoder
from dsdistill.models.weight_names import has_masked_lm_head
from tests.models.families_under_test import QUICK_FAMILIES, SIZES, tiny_configs


def known(directory) -> bool:
    """What is known before loading, which must not be denied by it."""
    source = Source(model=str(directory))
    found = has_masked_lm_head(source, load_config(source))
    assert found or head_of(load_encoder(source)) == "none"
    return found


RENAMED = ("gte", "nomic_bert")
"""Saved under other names than the model's."""


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_heads_are_known_by_names(family, tmp_path):
    AutoModelForMaskedLM.from_config(tiny_configs()[family]).save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    assert (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert known(tmp_path / "whole")
    assert head_of(load_encoder(Source(model=str(tmp_path / "whole")))) == "masked LM"
    encoder = AutoModel.from_pretrained(tmp_path / "whole")
    encoder.save_pretrained(tmp_path / "headless")
    assert not known(tmp_path / "headless")
    claims = load_config(Source(model=str(tmp_path / "whole")))
    claims.save_pretrained(tmp_path / "headless")
    assert claims.architectures
    assert known(tmp_path / "headless") == (family in RENAMED)


def test_other_heads_are_believed_and_those_of_pretraining_too(tmp_path):
    AutoModelForPreTraining.from_config(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    assert known(tmp_path / "bert")
    AutoModelForPreTraining.from_config(ElectraConfig(**SIZES)).save_pretrained(tmp_path / "electra")
    source = Source(model=str(tmp_path / "electra"))
    assert has_masked_lm_head(source, load_config(source))
    assert head_of(load_encoder(source)) == "none"  # a discriminator's, as loading finds


def test_files_that_are_not_here_are_believed_and_damaged_ones_refused(tmp_path):
    config = BertConfig(**SIZES, architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path)
    assert has_masked_lm_head(Source(model=str(tmp_path)), config)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="its weights are damaged"):
        has_masked_lm_head(Source(model=str(tmp_path)), config)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no JSON"):
        has_masked_lm_head(Source(model=str(tmp_path)), config)

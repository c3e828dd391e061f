"""Weights that go from one family to another: the student of all layers computes what its teacher does."""

import itertools

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from dsdistill.models.capture import ATTENTION
from dsdistill.models.families import FAMILIES, encoder_of, max_length
from dsdistill.models.student import build_student, check_start, student_config
from tests.models.families_under_test import tiny_configs

BUILT_LIKE_BERT = sorted(name for name, family in FAMILIES.items() if family.names is not None)
LAYERS = (1, 2, 3, 4)


def make_teacher(family: str, auto=AutoModelForMaskedLM):
    """Random, without what other families do not have: a position bias."""
    torch.manual_seed(0)
    config = tiny_configs()[family]
    if hasattr(config, "embedding_size"):
        config.embedding_size = config.hidden_size
    if hasattr(config, "layer_norm_eps"):
        config.layer_norm_eps = 1e-12  # DistilBERT knows no other
    model = auto.from_config(config, attn_implementation=ATTENTION).eval()
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
        if "relative_attention_bias" in name:
            parameter.data.zero_()
    return model


PAIRS = [pair for pair in itertools.permutations(BUILT_LIKE_BERT, 2) if {"bert", "mpnet"} & set(pair)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_all_layers_of_a_teacher_are_the_teacher_in_another_family(ours, theirs):
    teacher = make_teacher(theirs)
    config = student_config(teacher.config, 4, LAYERS, family=ours)
    check_start(teacher.config, config, layers=LAYERS, resize=None, init_from=None)
    student = build_student(teacher, config, LAYERS, seed=3).eval()
    assert student.config.model_type == ours
    assert max_length(student.config) == max_length(teacher.config)
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    expected, got = (encoder_of(model)(input_ids=ids).last_hidden_state for model in (teacher, student))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_position_bias_is_what_is_lost():
    teacher = make_teacher("mpnet", AutoModel)
    teacher.encoder.relative_attention_bias.weight.data.normal_()
    student = build_student(teacher, student_config(teacher.config, 4, LAYERS, family="bert"), LAYERS, seed=0).eval()
    ids = torch.arange(5, 25)[None]
    assert (student(input_ids=ids)[0] - teacher(input_ids=ids)[0]).abs().max() > 0.1
    teacher.encoder.relative_attention_bias.weight.data.zero_()
    torch.testing.assert_close(student(input_ids=ids)[0], teacher(input_ids=ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ours", ["bert", "mpnet", "distilbert"])
@pytest.mark.parametrize("method", ["slice", "importance"])
def test_narrower_students_of_another_family_keep_what_a_narrower_teacher_would(ours, method):
    """Cut first and translated afterwards is the same."""
    teacher = make_teacher("mpnet")
    sizes = {"hidden_size": 16, "num_attention_heads": 2}
    neurons = {"hidden_dim" if ours == "distilbert" else "intermediate_size": 32}
    student = build_student(
        teacher,
        student_config(teacher.config, 2, (2, 4), family=ours, overrides=sizes | neurons),
        (2, 4),
        seed=0,
        resize=method,
    ).eval()
    small = build_student(
        teacher,
        student_config(teacher.config, 2, (2, 4), overrides=sizes | {"intermediate_size": 32}),
        (2, 4),
        seed=0,
        resize=method,
    ).eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(student(input_ids=ids)[0], small(input_ids=ids)[0], rtol=1e-5, atol=1e-5)


def test_a_position_bias_follows_its_heads():
    """Heads that write nothing go; the bias of those that stay stays with them."""
    teacher = make_teacher("mpnet", AutoModel)
    teacher.encoder.relative_attention_bias.weight.data.normal_()
    for layer in teacher.encoder.layer:
        layer.attention.attn.o.weight.data[:, 8:24] = 0.0
    config = student_config(teacher.config, 4, LAYERS, overrides={"num_attention_heads": 2, "hidden_size": 16})
    student = build_student(teacher, config, LAYERS, seed=0, resize="importance")
    kept = teacher.encoder.relative_attention_bias.weight[:, [0, 3]]
    torch.testing.assert_close(student.encoder.relative_attention_bias.weight, kept, rtol=0, atol=0)


def test_random_students_may_be_of_any_family():
    teacher = make_teacher("mpnet")
    config = student_config(teacher.config, 2, None, family="modernbert", overrides={"hidden_size": 16})
    check_start(teacher.config, config, layers=None, resize=None, init_from=None)
    student = build_student(teacher, config, None, seed=0)
    assert (config.model_type, config.num_hidden_layers, config.pad_token_id) == ("modernbert", 2, 1)
    assert student(input_ids=torch.arange(5, 25)[None]).logits.shape == (1, 20, 100)


def test_what_cannot_be_is_refused_with_every_size_named():
    teacher = tiny_configs()["mpnet"]
    with pytest.raises(ValueError, match=r"student\.family='bart_' is none"):
        student_config(teacher, 2, (1, 2), family="bart_")
    modern = student_config(teacher, 2, (1, 2), family="modernbert")
    with pytest.raises(ValueError, match="since modernbert is not built as BERT is"):
        check_start(teacher, modern, layers=(1, 2), resize=None, init_from=None)
    narrow = student_config(teacher, 2, (1, 2), family="bert", overrides={"hidden_size": 16, "intermediate_size": 8})
    with pytest.raises(ValueError, match=r"hidden_size is 16 .* and 32 .*; intermediate_size is 8 .* and 64"):
        check_start(teacher, narrow, layers=(1, 2), resize=None, init_from=None)

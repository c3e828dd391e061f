"""Narrower students from the teacher's weights: what is kept is exact where nothing of weight is lost."""

import itertools

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dsdistill.config.recipe import check_recipe
from dsdistill.models.resize import Sizes, resize_weights, sizes_of
from dsdistill.models.student import build_student, check_start, student_config

METHODS = ("slice", "importance")
OLD = Sizes(width=12, num_heads=3, head_width=4, neurons=10)
SIZES = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 10}


def bert(**changes) -> BertForMaskedLM:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=16, **changes)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model


def in_layer(weights: dict, name: str) -> torch.Tensor:
    return weights[f"bert.encoder.layer.1.{name}"].double()


def per_head(weights: dict, name: str, heads: int) -> torch.Tensor:
    return in_layer(weights, f"attention.self.{name}.weight").unflatten(0, (heads, -1))


def products(weights: dict, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's form of scores W_Q^T W_K / sqrt(D), and what it writes W_V^T W_O^T; (H, E, E)."""
    query, key, value = (per_head(weights, name, heads) for name in ("query", "key", "value"))
    out = in_layer(weights, "attention.output.dense.weight").T.unflatten(0, (heads, -1))
    return query.transpose(1, 2) @ key / query.shape[1] ** 0.5, value.transpose(1, 2) @ out


@pytest.mark.parametrize("method", METHODS)
def test_equal_sizes_change_nothing(method):
    weights = bert().state_dict()
    for name, tensor in resize_weights(weights, OLD, OLD, method).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_heads_and_neurons_that_write_nothing_go_first(silent):
    weights = bert().state_dict()
    layer = "bert.encoder.layer.1."
    weights[f"{layer}attention.output.dense.weight"][:, 4 * silent : 4 * silent + 4] = 0
    weights[f"{layer}output.dense.weight"][:, [0, 7]] = 0
    got = resize_weights(weights, OLD, Sizes(width=12, num_heads=2, head_width=4, neurons=8), "importance")
    for mine, whole in zip(products(got, 2), products(weights, 3), strict=True):
        torch.testing.assert_close(mine, whole[[head for head in range(3) if head != silent]], rtol=1e-12, atol=1e-12)
    kept = [1, 2, 3, 4, 5, 6, 8, 9]
    torch.testing.assert_close(
        got[f"{layer}intermediate.dense.bias"], weights[f"{layer}intermediate.dense.bias"][kept], rtol=0, atol=0
    )


def test_coordinates_with_energy_behind_the_norms_stay_everywhere():
    weights = bert().state_dict()
    strong = [1, 2, 5, 6, 8, 11]
    for name, tensor in weights.items():
        if "LayerNorm" in name:
            tensor[strong] += 100.0
    got = resize_weights(weights, OLD, Sizes(width=6, num_heads=3, head_width=4, neurons=10), "importance")
    for name in ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias", "encoder.layer.0.output.dense.bias"):
        torch.testing.assert_close(got[f"bert.{name}"], weights[f"bert.{name}"][..., strong], rtol=0, atol=0)
    query = "bert.encoder.layer.2.attention.self.query.weight"
    torch.testing.assert_close(got[query], weights[query][:, strong], rtol=0, atol=0)
    transform = "cls.predictions.transform.dense.weight"
    torch.testing.assert_close(got[transform], weights[transform][strong][:, strong], rtol=0, atol=0)


@pytest.mark.parametrize(("method", "heads"), itertools.product(METHODS, (3, 1)))
def test_students_of_bert_and_roberta_run_and_keep_their_tied_head(method, heads):
    torch.manual_seed(0)
    roberta = RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=20)).eval()
    for parameter in roberta.parameters():
        parameter.data = torch.randn_like(parameter)
    for teacher in (bert(), roberta):
        config = student_config(teacher.config, 2, (1, 3), overrides=shape(heads))
        student = build_student(teacher, config, (1, 3), seed=0, resize=method)
        logits = student(input_ids=torch.arange(3, 13)[None]).logits
        for mine, theirs in ((0, 0), (1, 2)):
            bias = [
                model.base_model.encoder.layer[i].output.dense.bias for model, i in ((student, mine), (teacher, theirs))
            ]
            assert torch.isin(bias[0], bias[1]).all()
        assert logits.shape == (1, 10, 50)
        assert logits.isfinite().all()
        assert student.get_input_embeddings().weight is student.get_output_embeddings().weight


def shape(heads: int) -> dict[str, int]:
    """Three narrower heads, or one of the old width."""
    return {"hidden_size": 6 if heads == 3 else 4, "num_attention_heads": heads, "intermediate_size": 7}


def test_slicing_keeps_the_first_dimensions_of_the_first_heads():
    weights = bert().state_dict()
    got = resize_weights(weights, OLD, Sizes(width=6, num_heads=2, head_width=3, neurons=4), "slice")
    key, out = "bert.encoder.layer.2.attention.self.key", "bert.encoder.layer.2.attention.output.dense.weight"
    torch.testing.assert_close(got[f"{key}.bias"], weights[f"{key}.bias"][[0, 1, 2, 4, 5, 6]], rtol=0, atol=0)
    torch.testing.assert_close(got[out], weights[out][:6][:, [0, 1, 2, 4, 5, 6]], rtol=0, atol=0)


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ValueError, match="head_width grows from 4 to 6"):
        resize_weights(bert().state_dict(), OLD, Sizes(width=12, num_heads=2, head_width=6, neurons=10), "slice")
    with pytest.raises(ValueError, match="multiple"):
        sizes_of(BertConfig(hidden_size=10, num_attention_heads=3))
    modern = ModernBertForMaskedLM(ModernBertConfig(**SIZES, pad_token_id=0, global_attn_every_n_layers=1))
    config = student_config(modern.config, 2, (1, 3), overrides={"hidden_size": 6})
    with pytest.raises(ValueError, match="built like BERT"):
        build_student(modern, config, (1, 3), seed=0, resize="slice")
    config = student_config(bert().config, 2, (1, 3), overrides={"hidden_size": 6})
    with pytest.raises(ValueError, match="resize"):
        build_student(bert(), config, (1, 3), seed=0)


def test_starts_that_cannot_work_are_known_from_configs(tmp_path):
    """So that a dry run reports them."""
    teacher = bert()
    teacher.save_pretrained(tmp_path)
    narrower, wider = (student_config(teacher.config, 3, None, overrides={"intermediate_size": n}) for n in (8, 20))
    check_start(teacher.config, narrower, resize="slice", init_from=None)
    check_start(teacher.config, teacher.config, resize=None, init_from=tmp_path)
    with pytest.raises(ValueError, match="neurons grows from 10 to 20"):
        check_start(teacher.config, wider, resize="slice", init_from=None)
    with pytest.raises(ValueError, match="intermediate_size 10, the student 20"):
        check_start(teacher.config, wider, resize=None, init_from=tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        check_start(teacher.config, wider, resize=None, init_from=tmp_path / "nothing")


def test_a_student_starts_from_another_checkpoint(tmp_path):
    teacher = bert()
    config = student_config(teacher.config, 2, (1, 3))
    first = build_student(teacher, config, (1, 3), seed=0)
    first.bert.embeddings.word_embeddings.weight.data.add_(1.0)
    first.save_pretrained(tmp_path / "first")
    again = build_student(teacher, config, None, seed=1, init_from=tmp_path / "first")
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    deeper = student_config(teacher.config, 3, None)
    with pytest.raises(ValueError, match=r"init_from.*not built as the student: .*layer.2"):
        build_student(teacher, deeper, None, seed=1, init_from=tmp_path / "first")
    narrower = student_config(teacher.config, 2, None, overrides={"intermediate_size": 6})
    with pytest.raises(ValueError, match=r"init_from.*has shape"):
        build_student(teacher, narrower, None, seed=1, init_from=tmp_path / "first")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "first").bert.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="same num_layers and head"):
        build_student(teacher, config, None, seed=1, init_from=tmp_path / "headless")


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"num_layers": 2}, "give either `init` or `init_from`"),
        ({"num_layers": 2, "init": "lower", "init_from": "x"}, "give either `init` or `init_from`"),
        ({"num_layers": 2, "init": "random", "resize": "slice"}, "has no effect"),
        ({"num_layers": 2, "init_from": "x", "resize": "slice"}, "has no effect"),
        ({"num_layers": 2, "init": "lower", "resize": "cut"}, "student.resize"),
    ],
)
def test_contradicting_starts_are_refused(recipe_content, student, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe_content | {"student": student}, "recipe.yaml")

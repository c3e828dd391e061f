"""The table of families: docs/ has the one that the program prints, and what it says of each family is so."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dsdistill.core import Features
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.documents import isolation_problem
from dsdistill.models.families import ANY, FAMILIES, shape_of
from dsdistill.models.family_table import COLUMNS, GROUPED, MARKERS, families_table
from dsdistill.models.student import build_student, check_start, student_config
from dsdistill.objectives import find_objective, layer_pairs
from dsdistill.objectives.table import with_table
from tests import oracles
from tests.models.families_under_test import FAMILIES as UNDER_TEST
from tests.models.families_under_test import WITHOUT_ENTRY, tiny_configs
from tests.models.test_capture import make_batch

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ABSENT = [family.title for family in FAMILIES.values() if not hasattr(transformers, family.tested)]


@pytest.mark.skipif(bool(ABSENT), reason=f"the page's table is of a transformers that has {', '.join(ABSENT)}")
def test_the_table_is_current():
    document = PAGE.read_text(encoding="utf-8")
    assert with_table(document, families_table(), MARKERS) == document, (
        "run: python -m dsdistill.models --update docs/families.md"
    )


def test_every_family_is_tested_with_the_class_that_the_table_names():
    known = {name for name in FAMILIES if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES}  # in this version of transformers
    assert set(UNDER_TEST) == known | {WITHOUT_ENTRY}
    for name, config in tiny_configs().items():
        assert config.model_type == name
        assert type(AutoModelForMaskedLM.from_config(config)).__name__ == FAMILIES.get(name, ANY).tested


def test_families_that_transformers_lacks_say_so():
    rows = [line for line in families_table().splitlines() if "not in the installed transformers" in line]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == sorted(ABSENT, key=str.lower)


def told_of(family: str) -> dict[str, str]:
    """What the table says, by column."""
    lines = (line.strip("| ").split(" | ") for line in families_table().splitlines())
    row = next(cells for cells in lines if cells[0] == FAMILIES.get(family, ANY).title)
    return dict(zip(COLUMNS, row, strict=True))


def build(family: str, seed: int, auto=AutoModel):
    torch.manual_seed(seed)
    model = auto.from_config(tiny_configs()[family], attn_implementation=ATTENTION).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


BATCH = make_batch(True, length=16)
"""One row ends in padding."""


def said_by_two(family: str) -> tuple[Features, Features]:
    wanted = {"query": [3], "key": [3], "value": [3], "bias": [3]}
    with torch.no_grad():
        student, teacher = (Captured(build(family, seed), wanted)(BATCH) for seed in (0, 1))
    return student, teacher


@pytest.mark.parametrize("family", UNDER_TEST)
def test_attention_objectives_are_computed_as_the_table_says(family):
    sides = said_by_two(family)
    told = told_of(family)["attention objectives"]
    assert told.startswith("yes")
    assert ("with" in told) == all("bias" in features.signals for features in sides)
    maps = []
    for features in sides:
        query, key = features.at("query", 3), features.at("key", 3)
        maps += [query.tolist(), key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).tolist()]
    scales = (features.scaling[3] for features in sides)
    biases = (None if b is None else b.expand(2, -1, -1, -1).tolist() for b in (f.bias(3) for f in sides))
    expected = oracles.attention_kl(*maps, BATCH.mask.tolist(), *scales, None, sides[0].windows.get(3), *biases)
    (got,) = find_objective("att_kl")(*sides, BATCH, layer_pairs([(3, 3)], 4, 4), {}).values()
    assert got.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected > 1e-3


CROSSED = (("query", "key"), ("value", "query"))


@pytest.mark.parametrize("family", UNDER_TEST)
def test_relations_are_computed_as_the_table_says(family):
    """Relation heads are not the models' own. Where queries share keys, other relations are refused by name."""
    sides, told = said_by_two(family), told_of(family)["relations"]
    shape, objective, pairs = shape_of(tiny_configs()[family]), find_objective("minilmv2"), layer_pairs([(3, 3)], 4, 4)
    relations = (("query", "query"), ("key", "key"), ("value", "value"))
    if told == GROUPED:
        assert shape.num_key_heads < shape.num_heads
        with pytest.raises(ValueError, match="several of its queries share a key"):
            objective.make_head(shape, shape, pairs, {"relation_heads": 8, "relations": CROSSED})
    else:
        assert told == "yes"
        relations += CROSSED
    params = {"relation_heads": 8, "relations": relations}
    objective.make_head(shape, shape, pairs, params)
    got = objective(*sides, BATCH, pairs, params)
    for left, right in relations:
        (ours, other), (theirs, another) = ([f.at(left, 3).tolist(), f.at(right, 3).tolist()] for f in sides)
        expected = oracles.relation_kl(ours, theirs, BATCH.mask.tolist(), 8, other, another)
        assert got[f"{left}_{right}"].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert expected > 1e-4


HEADS = {"masked LM": AutoModelForMaskedLM, "task": AutoModelForSequenceClassification}


@pytest.mark.parametrize("family", UNDER_TEST)
def test_logits_come_from_the_heads_that_the_table_names(family):
    named = told_of(family)["logits"].split(" and ")
    assert set(named) <= set(HEADS)
    for head, auto in HEADS.items():
        if head not in named:
            with pytest.raises(ValueError, match="Unrecognized configuration"):
                auto.from_config(tiny_configs()[family])
            continue
        pairs, sides, batch = layer_pairs("last", 4, 4), [], BATCH
        batch = batch._replace(targets=None) if head == "task" else batch
        for seed in (0, 1):
            model = build(family, seed, auto)
            with torch.no_grad():
                sides.append(Captured(model, {"logits": [-1]})(batch))
                full = model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
            expected = full if batch.targets is None else full.flatten(0, 1)[batch.targets]
            torch.testing.assert_close(sides[-1].logits, expected, rtol=1e-4, atol=1e-5)
        (got,) = find_objective("kd")(*sides, batch, pairs, {"temperature": 2.0}, problem="classification").values()
        expected = oracles.kd(*(features.logits.tolist() for features in sides), "forward", 2.0)
        assert got.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", UNDER_TEST)
def test_documents_are_kept_apart_where_the_table_says(family):
    """`test_documents.py` proves the yes."""
    assert told_of(family)["documents apart"] == ("yes" if isolation_problem(tiny_configs()[family]) is None else "no")


@pytest.mark.parametrize("family", UNDER_TEST)
def test_weights_go_to_other_families_where_the_table_says(family):
    """`test_translate.py` proves that they are the same model there."""
    config, other = tiny_configs()[family], "bert" if family != "bert" else "roberta"
    student = student_config(config, 2, (1, 2), family=other)
    if told_of(family)["weights to other families"] == "yes":
        if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
            config.embedding_size = config.hidden_size  # BERT has no other
        check_start(config, student, layers=(1, 2), resize=None, init_from=None)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=ATTENTION)
        assert build_student(model, student, (1, 2), seed=0).config.model_type == other
    else:
        with pytest.raises(ValueError, match=f"since {family} is not built as BERT is"):
            check_start(config, student, layers=(1, 2), resize=None, init_from=None)

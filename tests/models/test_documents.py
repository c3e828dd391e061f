"""Documents packed into one row: each is what it would be alone, and nothing of a neighbour reaches it."""

import pytest
import torch
from transformers import AutoModel, DebertaV2Config

from dsdistill.core import Batch, document_borders
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.documents import isolation_problem, same_document
from dsdistill.objectives import find_objective
from dsdistill.objectives.mapping import layer_pairs
from tests.models.families_under_test import FAMILIES, tiny_configs

ISOLATING = [family for family in FAMILIES if family != "deberta-v2"]
LENGTH = 24
DOCUMENTS = ([(0, 7), (7, 19), (19, 24)], [(0, 10), (10, 19)])
"""Begin and end of the documents of two rows; the second ends in padding."""
WANTED = {"query": [1, 2, 3], "key": [1, 2, 3], "value": [3], "hidden": [0, 2, 4]}


def packed(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    segments, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, documents in enumerate(DOCUMENTS):
        for number, (begin, end) in enumerate(documents):
            segments[row, begin:] = number
            mask[row, begin:end] = True
    return Batch(
        input_ids=torch.randint(3, 100, (2, LENGTH), generator=generator),
        mask=mask,
        sample_ids=torch.arange(2),
        segments=segments,
        borders=document_borders(segments, mask),
    )


def alone(batch: Batch, row: int, begin: int, end: int) -> Batch:
    return Batch(
        input_ids=batch.input_ids[row : row + 1, begin:end],
        mask=batch.mask[row : row + 1, begin:end],
        sample_ids=batch.sample_ids[:1],
        padded=False,
    )


def build(family: str, wanted=WANTED, seed: int = 0) -> Captured:
    torch.manual_seed(seed)
    model = AutoModel.from_config(tiny_configs()[family], attn_implementation=ATTENTION).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return Captured(model, wanted)


def places(signal: str, tensor: torch.Tensor, row: int, begin: int, end: int) -> torch.Tensor:
    """What belongs to some positions of a row."""
    return tensor[row, begin:end] if signal == "hidden" else tensor[row, :, begin:end]


@pytest.mark.parametrize("family", ISOLATING)
def test_a_packed_document_is_what_it_is_alone(family):
    """Positions, absolute or rotary, and windows included."""
    captured, batch = build(family), packed()
    together = captured(batch)
    for row, documents in enumerate(DOCUMENTS):
        for begin, end in documents:
            single = captured(alone(batch, row, begin, end))
            for signal, layers in WANTED.items():
                for layer in layers:
                    ours = places(signal, together.at(signal, layer), row, begin, end)
                    theirs = places(signal, single.at(signal, layer), 0, 0, end - begin)
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


OBJECTIVES = (
    ("att_kl", {}, [(1, 1), (2, 2)]),
    ("att_mse", {}, [(1, 1), (2, 2)]),
    ("minilm", {}, [(3, 3)]),
    ("minilmv2", {"relation_heads": 2, "relations": (("query", "query"), ("query", "key"))}, [(2, 3)]),
    ("pearson", {"of": "attention"}, [(3, 3)]),
    ("hid_seq", {}, [(2, 2), (4, 4)]),
)
"""With their layers: in ModernBERT 2 and 3 attend within a window, 1 and 4 do not."""
FUSED = tuple((name, params, pairs[-1:]) for name, params, pairs in OBJECTIVES if name in ("att_kl", "minilmv2"))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_nothing_crosses_the_border_of_a_document(family):
    check_borders(family, OBJECTIVES)


def check_borders(family: str, objectives, **options) -> None:
    """Other tokens in one document change no signal of the others, and no gradient that reaches them.

    Signals are equal bit for bit, in both models; gradients but for the order of sums.
    """
    student, teacher = build(family, seed=0), build(family, seed=1)
    batch = packed()
    row, (begin, end) = 0, DOCUMENTS[0][1]
    changed = batch._replace(input_ids=batch.input_ids.clone())
    changed.input_ids[row, begin:end] = packed(seed=2).input_ids[row, begin:end]
    outside = torch.ones_like(batch.mask)
    outside[row, begin:end] = False
    results = []
    for rows in (batch, changed):
        ours = student(rows)
        with torch.no_grad():
            theirs = teacher(rows)
        gradients = {}
        for name, params, layers in objectives:
            objective = find_objective(name)
            pairs = layer_pairs(layers, 4, 4)
            known = {key: value for key, value in options.items() if key in objective.params}
            loss = sum(objective(ours, theirs, rows, pairs, {**params, **known}).values())
            gradients[name] = torch.autograd.grad(loss, ours.at("hidden", 0), retain_graph=True)[0]
        results.append((ours, theirs, gradients))
    (ours, theirs, gradients), (ours_changed, theirs_changed, gradients_changed) = results
    for before, after in ((ours, ours_changed), (theirs, theirs_changed)):
        for signal, layers in before.signals.items():
            for layer, tensor in layers.items():
                one, other = (t if signal == "hidden" else t.transpose(1, 2) for t in (tensor, after.at(signal, layer)))
                assert torch.equal(one[outside], other[outside]), (signal, layer)
                assert not torch.equal(one[~outside], other[~outside])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_changed[name][outside], gradient[outside], rtol=1e-6, atol=1e-9)
        assert gradient[outside & batch.mask].abs().sum() > 0
        assert (gradients_changed[name][~outside] - gradient[~outside]).abs().max() > 1e-5


def test_without_segments_the_neighbour_is_seen():
    captured, batch = build("bert"), packed()._replace(segments=None, borders=None)
    changed = batch._replace(input_ids=batch.input_ids.clone())
    changed.input_ids[0, 7:19] = packed(seed=2).input_ids[0, 7:19]
    one, other = (captured(b).at("hidden", 4)[0, :7] for b in (batch, changed))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_recomputed_layers_keep_documents_apart(family):
    """The borders stand in the mask's place, which checkpointing hands to the layer a second time."""
    gradients = []
    for checkpointing in (False, True):
        captured = build(family, {"hidden": [4]}).train()
        for module in captured.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        if checkpointing:
            captured.model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in captured.modules())
        captured(packed()).at("hidden", 4).pow(3).sum().backward()
        gradients.append({n: p.grad for n, p in captured.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_documents_stay_apart_in_one_compiled_graph():
    batch, captured = packed(), build("modernbert")
    expected = captured(batch)
    torch._dynamo.reset()
    features = torch.compile(captured, fullgraph=True, backend="aot_eager")(batch)
    for layer in WANTED["hidden"]:
        torch.testing.assert_close(features.at("hidden", layer), expected.at("hidden", layer), rtol=1e-5, atol=5e-6)


def test_borders_are_those_of_the_documents():
    batch = packed()
    starts = [0, 7, 19, 24, 34, 43]  # the last is the padding of the second row
    assert batch.borders is not None
    assert batch.borders.tolist() == [*starts, *[2 * LENGTH] * (65 - len(starts))]
    allowed = same_document(batch.borders, 2, LENGTH, window=3)
    for row in range(2):
        for i in range(LENGTH):
            for j in range(LENGTH):
                same = batch.segments[row, i] == batch.segments[row, j] and batch.mask[row, i] == batch.mask[row, j]
                assert allowed[row, 0, i, j] == (bool(same) and abs(i - j) <= 3)


def test_more_documents_make_a_longer_list_of_a_few_lengths():
    segments = torch.arange(100)[None]
    borders = document_borders(segments, torch.ones(1, 100, dtype=torch.bool))
    assert len(borders) == 129
    assert borders[:101].tolist() == list(range(101))


@pytest.mark.parametrize("family", ISOLATING)
def test_families_that_keep_documents_apart_are_known_from_their_configs(family):
    assert isolation_problem(tiny_configs()[family]) is None


@pytest.mark.parametrize("config", [DebertaV2Config])
def test_families_that_cannot_are_refused_by_name(config):
    assert f"corpus.isolate: {config.model_type} keeps attention code of its own" in (isolation_problem(config()) or "")

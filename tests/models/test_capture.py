import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, DebertaConfig, FunnelConfig

from dsdistill.core import Batch
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.families import available, truncate
from dsdistill.models.loading import check_family
from tests.models.families_under_test import FAMILIES, QUICK_FAMILIES, tiny_configs

WANTED = {"query": [2, 3], "key": [2, 3], "bias": [2, 3], "value": [3], "hidden": [0, 1, 3, 4]}


def make_batch(padded: bool, length: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, length, dtype=torch.bool)
    if padded:
        mask[1, 15:] = False
    return Batch(
        input_ids=torch.randint(3, 100, (2, length), generator=generator),
        mask=mask,
        sample_ids=torch.arange(2),
        token_type_ids=torch.zeros(2, length, dtype=torch.long),
        targets=torch.tensor([1, 5, 30]),
        padded=padded,
    )


def build(family: str, attention: str, auto=AutoModel, seed: int = 0):
    torch.manual_seed(seed)
    return auto.from_config(tiny_configs()[family], attn_implementation=attention).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_equals_eager_attentions_and_hidden_states(family, padded):
    batch = make_batch(padded)
    features = Captured(build(family, ATTENTION), WANTED)(batch)
    reference = build(family, "eager")(
        input_ids=batch.input_ids, attention_mask=batch.mask.long(), output_attentions=True, output_hidden_states=True
    )
    for layer in WANTED["hidden"]:
        ours, theirs = features.at("hidden", layer), reference.hidden_states[layer]
        torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], rtol=1e-5, atol=2e-6)
    for layer in WANTED["query"]:
        query, key = features.at("query", layer), features.at("key", layer)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # EuroBERT's queries share keys
        scores = query @ key.transpose(-1, -2) * features.scaling[layer]
        if features.bias(layer) is not None:
            scores = scores + features.bias(layer)
        allowed = batch.mask[:, None, None, :]
        if layer in features.windows:
            i = torch.arange(scores.shape[-1])
            allowed = allowed & ((i[:, None] - i[None, :]).abs() <= features.windows[layer])
        probabilities = scores.masked_fill(~allowed, -1e9).softmax(-1)
        ours = probabilities.transpose(1, 2)[batch.mask]
        theirs = reference.attentions[layer - 1].transpose(1, 2)[batch.mask]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_modernbert_windows_are_those_of_its_local_layers():
    features = Captured(build("modernbert", ATTENTION), {"query": [1, 2, 3, 4]})(make_batch(False))
    assert features.windows == {2: 4, 3: 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_targets_equal_the_full_head(family):
    batch = make_batch(True)
    model = build(family, ATTENTION, AutoModelForMaskedLM)
    features = Captured(model, {"logits": [-1], "hidden": [4]})(batch)
    full = model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
    torch.testing.assert_close(features.logits, full.flatten(0, 1)[batch.targets], rtol=1e-5, atol=1e-6)
    assert features.at("hidden", 4).shape == (2, 24, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_that_hides_nothing_changes_nothing(family):
    batch = make_batch(False)
    captured = Captured(build(family, ATTENTION), WANTED)
    without, with_mask = captured(batch), captured(batch._replace(padded=True))
    for layer in WANTED["hidden"]:
        torch.testing.assert_close(without.at("hidden", layer), with_mask.at("hidden", layer), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_never_waits_for_the_device(family):
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(tiny_configs()[family], attn_implementation=ATTENTION).eval()
    batch = make_batch(True).to("meta")
    features = Captured(model, {**WANTED, "logits": [-1]})(batch)  # asking a meta tensor for a value raises
    assert features.logits.shape == (3, 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_truncated_model_gives_the_same_signals(family):
    batch = make_batch(True)
    wanted = {"query": [2], "hidden": [2]}
    complete = Captured(build(family, ATTENTION), wanted)(batch)
    model = build(family, ATTENTION)
    truncate(model, 2)
    shorter = Captured(model, wanted, full_depth=4)
    features = shorter(batch)
    assert shorter.num_layers == 2
    for signal in ("query", "hidden"):
        torch.testing.assert_close(features.at(signal, 2), complete.at(signal, 2), rtol=0, atol=0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("albert", "mpnet")])  # which have no checkpointing
def test_checkpointing_records_once_with_equal_gradients(family):
    batch = make_batch(True)
    gradients = []
    for checkpointing in (False, True):
        model = build(family, ATTENTION).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        captured = Captured(model, {"query": [3], "hidden": [4]})
        if checkpointing:
            model.gradient_checkpointing_enable()
            captured.exempt_from_checkpointing()
        features = captured(batch)
        (features.at("query", 3).pow(2).sum() + features.at("hidden", 4).pow(3).sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


COMPILED = ("bert", "albert", "modernbert", "mpnet")
"""Compiled in an ordinary run: separate layers, shared ones, rotary ones with windows, a bias; each takes seconds."""


@pytest.mark.parametrize("family", [f if f in COMPILED else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_capture_survives_compilation_of_the_full_graph(family):
    batch = make_batch(True)
    captured = Captured(build(family, ATTENTION), WANTED)
    expected = captured(batch)
    torch._dynamo.reset()
    features = torch.compile(captured, fullgraph=True, backend="aot_eager")(batch)
    wanted = available(tiny_configs()[family], WANTED)
    assert {s: set(layers) for s, layers in features.signals.items()} == {s: set(x) for s, x in wanted.items()}
    for signal, layers in expected.signals.items():
        for layer, tensor in layers.items():
            torch.testing.assert_close(features.at(signal, layer), tensor, rtol=1e-5, atol=2e-6)
    assert features.scaling == expected.scaling
    assert features.windows == expected.windows


ENDS = [
    ({"query": [1, 3], "value": [3], "hidden": [0, 2]}, ("attention", 3)),
    ({"key": [2], "hidden": [3]}, ("layer", 3)),
    ({"value": [2], "hidden": [2]}, ("layer", 2)),
]


EVERYTHING = {"query": [1, 2, 3, 4], "key": [1, 2, 3, 4], "value": [1, 2, 3, 4], "hidden": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("wanted", "end"), ENDS)
@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_a_forward_that_stops_early_records_the_same(family, wanted, end, compiled):
    batch = make_batch(True)
    complete = Captured(build(family, ATTENTION), EVERYTHING)(batch)
    captured = Captured(build(family, ATTENTION), wanted)
    assert captured.end == end
    torch._dynamo.reset()
    features = (torch.compile(captured, fullgraph=True, backend="aot_eager") if compiled else captured)(batch)
    for signal, layers in wanted.items():
        assert list(features.signals[signal]) == layers
        for layer in layers:
            torch.testing.assert_close(features.at(signal, layer), complete.at(signal, layer), rtol=1e-5, atol=2e-6)


def test_zero_3_may_gather_layers_whole_whose_inside_is_not_trained_on():
    model = build("bert", ATTENTION)
    captured = Captured(model, {"query": [2], "hidden": [3]})
    layers = list(model.encoder.layer)
    assert captured.closed_layers() == [layers[0], *layers[2:]]
    assert Captured(model.requires_grad_(False), {"query": [2]}).closed_layers() == layers
    assert Captured(build("albert", ATTENTION), {"hidden": [2]}).closed_layers() == []


def test_hidden_states_are_what_later_hooks_make_of_them():
    model = build("bert", ATTENTION)
    captured = Captured(model, {"hidden": [2]})
    model.encoder.layer[1].register_forward_hook(lambda _module, _args, output: output * 2)
    captured.hook_last()
    half = Captured(build("bert", ATTENTION), {"hidden": [2]})(make_batch(True)).at("hidden", 2)
    torch.testing.assert_close(captured(make_batch(True)).at("hidden", 2), 2 * half)


def test_nothing_runs_that_nobody_wants():
    model = build("bert", ATTENTION)
    captured = Captured(model, {"query": [1, 3], "hidden": [2]})
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    captured(make_batch(True))
    assert [name for name in calls if name.startswith("encoder.layer.2")] == [
        f"encoder.layer.2.attention.self.{projection}" for projection in ("query", "key", "value")
    ]
    assert not any(name.startswith(("encoder.layer.3", "pooler")) for name in calls)


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_compiled_attention_gets_no_mask_where_nothing_is_hidden(family):
    """With one, SDPA cannot be flash attention."""
    captured = Captured(build(family, ATTENTION), {"hidden": [4]})
    masks = []

    def backend(graph: torch.fx.GraphModule, _):
        attention = torch.nn.functional.scaled_dot_product_attention
        masks.extend(node.kwargs.get("attn_mask") for node in graph.graph.nodes if node.target is attention)
        return graph

    torch._dynamo.reset()
    torch.compile(captured, fullgraph=True, backend=backend)(make_batch(False))
    assert len(masks) == 4
    assert sum(mask is not None for mask in masks) == {"modernbert": 2, "mpnet": 4, "deberta-v2": 4}.get(
        family, 0
    )  # windows, biases


@pytest.mark.slow
def test_a_compiled_student_trains_as_an_eager_one():
    """Dropout included: the compiled forward draws what the eager one draws."""
    gradients = []
    for compiled in (False, True):
        captured = Captured(build("bert", ATTENTION), {"query": [2], "hidden": [1]}).train()
        if compiled:
            torch._dynamo.reset()
            captured.compile_forward()
        torch.manual_seed(3)
        features = captured(make_batch(False))
        (features.at("query", 2).pow(2).sum() + features.at("hidden", 1).pow(3).sum()).backward()
        gradients.append({n: p.grad for n, p in captured.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_can_be_captured_are_known_from_their_configs(family):
    check_family(tiny_configs()[family])


@pytest.mark.parametrize("config", [DebertaConfig, FunnelConfig])
def test_families_with_attention_of_their_own_are_refused_by_name(config):
    with pytest.raises(ValueError, match=f"{config.model_type} keeps attention code of its own"):
        check_family(config())

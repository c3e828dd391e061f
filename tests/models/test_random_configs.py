"""Capture against eager attention on configurations drawn at random: heads, widths, lengths, padding, variants."""

import random

import pytest
import torch
from transformers import AutoModel, PreTrainedConfig

from dsdistill.core import Batch
from dsdistill.models.capture import ATTENTION, Captured
from tests.models.families_under_test import FAMILIES, tiny_configs

DRAWS = 3


def drawn(family: str, draw: random.Random) -> PreTrainedConfig:
    """A family's tiny config with other sizes; built anew, since some values follow from others."""
    heads = draw.choice([1, 2, 3, 5])
    width = heads * draw.choice([2, 6, 8, 10])
    layers = draw.randint(1, 5)
    kind = type(tiny_configs()[family])
    content = tiny_configs()[family].to_dict()
    for name in ("layer_types", "head_dim", "pooler_hidden_size", "num_key_value_heads", "transformers_version"):
        content.pop(name, None)
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    sizes = {kind.attribute_map.get(name, name): value for name, value in sizes.items()}
    sizes["hidden_dim" if family == "distilbert" else "intermediate_size"] = draw.choice([7, 24, 33])
    if family == "modernbert":
        sizes |= {"local_attention": draw.choice([4, 8, 30]), "global_attn_every_n_layers": draw.choice([1, 2, 3])}
    if family == "eurobert":
        sizes["num_key_value_heads"] = draw.choice([1, heads])
    if family == "deberta-v2":
        sizes |= {
            "pos_att_type": draw.choice([["p2c", "c2p"], ["c2p"], ["p2c"]]),
            "share_att_key": draw.random() < 0.5,
            "position_buckets": draw.choice([-1, 4, 8, 32]),
            "conv_kernel_size": draw.choice([0, 3]),
            "norm_rel_ebd": draw.choice(["none", "layer_norm"]),
            "position_biased_input": draw.random() < 0.5,
            "relative_attention": draw.random() < 0.8,
        }
    return kind(**content | sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_configurations_are_captured_as_eager_attention_computes(family):
    for seed in range(DRAWS):
        draw = random.Random(f"{family}{seed}")
        config, length = drawn(family, draw), draw.randint(1, 60)
        layers = list(range(1, config.num_hidden_layers + 1))
        lengths = torch.tensor([length, draw.randint(1, length)])
        batch = Batch(
            input_ids=torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(seed)),
            mask=torch.arange(length)[None] < lengths[:, None],
            sample_ids=torch.arange(2),
        )
        wanted = {"query": layers, "key": layers, "value": layers, "bias": layers, "hidden": [0, *layers]}
        models = []
        for attention in (ATTENTION, "eager"):
            torch.manual_seed(seed)
            models.append(
                AutoModel.from_config(drawn(family, random.Random(f"{family}{seed}")), attn_implementation=attention)
            )
            for parameter in models[-1].parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        with torch.no_grad():
            features = Captured(models[0].eval(), wanted)(batch)
            reference = models[1].eval()(
                input_ids=batch.input_ids,
                attention_mask=batch.mask.long(),
                output_attentions=True,
                output_hidden_states=True,
            )
        real = batch.mask
        for layer in layers:
            message = f"{family}, seed {seed}, layer {layer}: {config}"
            ours, theirs = features.at("hidden", layer)[real], reference.hidden_states[layer][real]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=message)
            query, key = features.at("query", layer), features.at("key", layer)
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = query @ key.mT * features.scaling[layer]
            scores = scores if features.bias(layer) is None else scores + features.bias(layer)
            allowed = real[:, None, None, :]
            if layer in features.windows:
                place = torch.arange(length)
                allowed = allowed & ((place[:, None] - place[None, :]).abs() <= features.windows[layer])
            maps = scores.masked_fill(~allowed, -1e9).softmax(-1).transpose(1, 2)[real]
            expected = reference.attentions[layer - 1].transpose(1, 2)[real]
            torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5, msg=message)

"""Long rows of packed documents on a GPU: attention without masks, in memory that grows with the tokens only."""

import pytest
import torch
from transformers import AutoModel, ModernBertConfig

from dsdistill.core import Batch, document_borders
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.documents import attend_within, runs_flash, same_document
from dsdistill.objectives import find_objective
from dsdistill.objectives.mapping import layer_pairs

pytestmark = pytest.mark.gpu
TOKENS = 16384
MIB = 2**20


def packed(length: int, document: int, tokens: int = TOKENS) -> Batch:
    """Rows of documents of about this length, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    rows = tokens // length
    begins = torch.rand(rows, length, generator=generator) < 1 / document
    segments, mask = begins.cumsum(1), torch.ones(rows, length, dtype=torch.bool)
    mask[-1, -length // 8 :] = False
    return Batch(
        input_ids=torch.randint(3, 1000, (rows, length), generator=generator),
        mask=mask,
        sample_ids=torch.arange(rows),
        segments=segments,
        borders=document_borders(segments, mask),
    ).to("cuda")


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_without_a_mask_is_attention_with_one(dtype, window):
    batch = packed(2048, 300, tokens=4096)
    assert batch.borders is not None
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 4, 2048, 64)
    plain = [torch.randn(shape, generator=generator, device="cuda", requires_grad=True) for _ in range(3)]
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in plain]
    upstream = torch.randn(2, 2048, 4, 64, generator=generator, device="cuda")
    assert runs_flash(half[0], 0.0)
    assert not runs_flash(plain[0], 0.0)
    options = {"scaling": 0.2, "dropout": 0.0, "window": window}
    outputs = [attend_within(*tensors, batch.borders, **options) for tensors in (half, plain)]
    for output in outputs:
        output.backward(upstream.to(output.dtype))
    tolerance = 2e-2 if dtype is torch.bfloat16 else 4e-3
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(half, plain, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=5 * tolerance, atol=5 * tolerance)
    assert same_document(batch.borders, 2, 2048, window).sum() < 2 * 2048 * 2048 / 2


def modernbert(layers: int, wanted: dict) -> Captured:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=1152,
        num_hidden_layers=layers,
        num_attention_heads=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    model = AutoModel.from_config(config, attn_implementation=ATTENTION, dtype=torch.float16)
    return Captured(model.cuda(), wanted)


def step_mib(length: int) -> float:
    """Peak memory of one training step of a student of 4 layers beside a teacher of 7, beyond weights and gradients."""
    wanted = {"query": [2, 4], "key": [2, 4], "value": [4]}
    student = modernbert(4, wanted).train()
    teacher = modernbert(7, {"query": [2, 7], "key": [2, 7], "value": [7]}).eval().requires_grad_(False)

    def step(batch: Batch) -> None:
        with torch.no_grad():
            theirs = teacher(batch)
        ours = student(batch)
        loss = find_objective("minilmv2")(ours, theirs, batch, layer_pairs([(4, 7)], 4, 7), {"relation_heads": 12})
        maps = find_objective("att_kl")(ours, theirs, batch, layer_pairs([(2, 2), (4, 7)], 4, 7), {"kernel": "fused"})
        sum([*loss.values(), *maps.values()]).backward()

    batch = packed(length, 400)
    step(batch)  # kernels are compiled and gradients there
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(batch)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def test_memory_of_a_step_goes_by_its_tokens_not_by_the_length_of_its_rows():
    short, long = step_mib(2048), step_mib(8192)
    print(f"{TOKENS} tokens, rows of 2048: {short:.0f} MiB, rows of 8192: {long:.0f} MiB")
    # a mask of (2, 1, 8192, 8192) bools is 128 MiB, what SDPA makes of it in half precision 256 MiB for each layer
    assert long < 1.05 * short + 32


def test_documents_at_8192_tokens_do_not_see_each_other():
    batch = packed(8192, 400)
    first = batch.segments[0] == 3
    changed = batch._replace(input_ids=batch.input_ids.clone())
    changed.input_ids[0, first] = changed.input_ids[0, first].flip(0)
    captured = modernbert(4, {"query": [4], "hidden": [4]}).eval()
    with torch.no_grad():
        one, other = captured(batch), captured(changed)
    outside = torch.ones_like(batch.mask)
    outside[0, first] = False
    assert torch.equal(one.at("hidden", 4)[outside], other.at("hidden", 4)[outside])
    assert not torch.equal(one.at("hidden", 4)[~outside], other.at("hidden", 4)[~outside])

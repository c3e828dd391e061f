import dataclasses

import pytest
import torch
from transformers import AutoModel, BertConfig

from dsdistill.core import Batch, LayerPairs
from dsdistill.memory import Engine, predict_memory
from dsdistill.models.capture import ATTENTION
from dsdistill.models.families import shape_of
from dsdistill.models.streamed import StreamedTeacher
from dsdistill.objectives import find_objective
from dsdistill.tracing import LiveBytes, Trace, trace_step
from dsdistill.training.distiller import BoundTerm, wanted_signals
from tests.models.families_under_test import tiny_configs
from tests.models.test_capture import WANTED, make_batch


def trace(layers: int = 6, width: int = 768, rows: int = 256) -> Trace:
    """The first case of benchmarks/speed.md."""
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    student, teacher = (
        BertConfig(vocab_size=30522, num_hidden_layers=n, attn_implementation=ATTENTION, **sizes)
        for n in (layers, 2 * layers)
    )
    pairs = LayerPairs((layers,), (2 * layers,))
    term = BoundTerm(
        label="minilm", objective=find_objective("minilm"), pairs=pairs, weight=1.0, params={"kernel": "auto"}
    )
    ids = torch.empty(rows, 128, dtype=torch.long, device="meta")
    batch = Batch(input_ids=ids, mask=ids.bool(), sample_ids=ids[:, 0], token_type_ids=ids, padded=False)

    def maker(config):
        return lambda: AutoModel.from_config(config, attn_implementation=ATTENTION, add_pooling_layer=False)

    shapes = (shape_of(student), shape_of(teacher))
    wants = wanted_signals([term])
    models = (maker(student), maker(teacher))
    return trace_step(*models, wants, [term], shapes, batch, dtype=torch.float16, fused=True)


@pytest.mark.parametrize(("buckets", "measured_gib"), [(2, 7.74), (1, 6.78)])
def test_predicted_peaks_are_those_measured_on_an_h100(buckets, measured_gib):
    engine = Engine(stage=1, processes=1, weight_bytes=2, accumulation=4, bucket=500_000_000, buckets=buckets)
    assert predict_memory(trace(), engine, "resident").peak / 2**30 == pytest.approx(measured_gib, rel=0.05)


def test_what_is_traced_is_what_a_model_on_a_cpu_holds():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=1)
    peaks = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = AutoModel.from_config(config, attn_implementation="eager").eval()
            ids = torch.zeros(4, 16, dtype=torch.long)
        with LiveBytes(device, [*model.parameters(), *model.buffers(), ids]) as live:
            model(ids).last_hidden_state.float().sum().backward()
        peaks.append(live.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_stages_and_placements_hold_less_one_after_the_other():
    found = trace(layers=2, width=128, rows=8)
    engine = Engine(stage=1, processes=4, weight_bytes=2, accumulation=2, bucket=1000, buckets=1)
    peaks = [predict_memory(found, engine, kind) for kind in ("resident", "zero3", "cpu", "ranks")]
    assert peaks[0].teacher > peaks[2].teacher > peaks[3].teacher == 0
    optimizer = [
        predict_memory(found, dataclasses.replace(engine, stage=stage), "ranks").optimizer for stage in (0, 1, 3)
    ]
    assert optimizer == [12 * found.student.trained, *[3 * found.student.trained] * 2]


def test_a_streamed_teacher_holds_two_layers_and_does_not_grow():
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_configs()["bert"], attn_implementation=ATTENTION).eval()
    layer = sum(p.nbytes for p in model.encoder.layer[0].parameters())
    teacher = StreamedTeacher(model, WANTED, device=torch.device("cpu"), dtype=torch.float32)
    assert layer <= teacher.stream.device_bytes / 2 < layer + 512 * 16
    batch = make_batch(True)
    with LiveBytes("cpu") as live:
        teacher(batch)
        before = live.now
        for _ in range(50):
            teacher(batch)
        assert live.now == before

"""Pictures of models that are known through and through; whole runs draw them in `tests/placement`."""

import sys
import time

import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoTokenizer

from dsdistill.core import Batch, LayerPairs, Losses, document_borders
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.objectives.likeness import attention_maps
from dsdistill.training import pictures
from dsdistill.training.dist import Place
from dsdistill.training.pictures import Gallery, Pictures, ask_teacher, cut, every_layer, make_probes, spread
from dsdistill.training.telemetry import Telemetry, read_metrics
from tests.models.families_under_test import FAMILIES, tiny_configs

CPU = torch.device("cpu")
PLACE = Place(rank=0, local_rank=0, world_size=1, device=CPU)


def batch_of(rows: int, length: int, *, padded: bool = True) -> Batch:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, length // 2 :] = not padded
    return Batch(input_ids=ids, mask=mask, sample_ids=torch.arange(rows), padded=padded)


class Engine:
    """What pictures ask of DeepSpeed's engine."""

    def __init__(self, student: Captured):
        self.student = student

    def __call__(self, batch, teacher, step):
        assert (teacher, self.student.training, torch.is_grad_enabled()) == (None, False, False)
        return Losses(torch.zeros(()), {}, self.student(batch))

    def eval(self):
        self.student.eval()

    def train(self):
        self.student.train()


@pytest.fixture
def make(tmp_path, teacher_directory):
    """A gallery over a teacher of four layers and a student with the same weights, or with its lower two layers."""

    def gallery(*, every=None, layers=4, asked=True) -> Gallery:
        def load():
            return AutoModel.from_pretrained(teacher_directory, attn_implementation=ATTENTION)

        model = load()
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
        student = Captured(model, {"hidden": [layers]}).train()
        teacher = ResidentTeacher(load(), {"query": [4]}, device=CPU, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(teacher_directory)
        probes = make_probes(tokenizer, ["a great film", "the plot is $x$, the scene never $ends$"], batch_of(3, 16))
        made = Pictures(
            probes=probes, every=every, teacher=(lambda: ask_teacher(teacher, probes, 4, CPU)) if asked else None
        )
        telemetry = Telemetry(tmp_path, PLACE, first_step=0, last_step=9)
        return Gallery(made, Engine(student), student, [LayerPairs((layers,), (4,))], PLACE, telemetry)

    return gallery


@pytest.mark.parametrize("family", FAMILIES)
def test_a_look_shows_the_attention_of_every_layer_and_leaves_no_trace(family):
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_configs()[family], attn_implementation=ATTENTION)
    teacher = ResidentTeacher(model, {"query": [4], "key": [4]}, device=CPU, dtype=torch.float32)
    batch, before, random = batch_of(2, 20), None, torch.get_rng_state()
    before = teacher(batch)
    seen = teacher.look(batch, every_layer(4))
    after = teacher(batch)
    assert torch.equal(random, torch.get_rng_state())
    assert {name: [*layers] for name, layers in after.signals.items() if layers} == {"query": [4], "key": [4]}
    assert torch.equal(before.at("key", 4), after.at("key", 4))
    assert [*seen.signals["hidden"]] == [0, 1, 2, 3, 4]
    torch.manual_seed(0)
    eager = AutoModel.from_config(tiny_configs()[family], attn_implementation="eager").eval()
    told = eager(input_ids=batch.input_ids, attention_mask=batch.mask.long(), output_attentions=True).attentions
    for layer in (1, 2, 3, 4):
        ours, theirs = attention_maps(seen, layer, batch)[batch.mask], told[layer - 1].mean(1)[batch.mask]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_look_compiles_nothing_anew():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    model = AutoModel.from_config(tiny_configs()["bert"], attn_implementation=ATTENTION)
    captured = Captured(model, {"query": [2]}).eval()
    captured.compile(fullgraph=True, dynamic=False, backend=backend)
    batch = batch_of(2, 20, padded=False)
    with torch.no_grad():
        first = captured(batch)
        assert len(compiled) == 1
        for _ in range(2):
            with captured.recording(every_layer(4)):
                assert len(captured(batch_of(3, 12)).signals["hidden"]) == 5
            torch.testing.assert_close(captured(batch).at("query", 2), first.at("query", 2), rtol=0, atol=0)
    assert len(compiled) == 1


def test_a_student_that_is_its_teacher_is_all_alike(make, tmp_path):
    gallery = make(every=3)
    gallery.at_start()
    assert [gallery.is_due(step, evaluated=False, last=step == 8) for step in range(1, 9)] == [
        *(False, False, True, False, False, True, False),
        True,
    ]
    gallery.show(3)
    gallery.telemetry.close()
    told = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if entry["kind"] == "likeness"]
    assert [entry["step"] for entry in told] == [0, 3]
    for layer in (1, 2, 3, 4):
        assert told[1][f"likeness/cka_layer_{layer}"] == pytest.approx(1.0, abs=1e-5)
        assert told[1][f"likeness/attention_kl_layer_{layer}"] == pytest.approx(0.0, abs=1e-6)
    shown = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    names = ["attention_1", "attention_2", "layers"]
    assert sorted(shown.Tags()["images"]) == [f"pictures/{name}" for name in names]
    for name in names:
        images = shown.Images(f"pictures/{name}")
        assert [image.step for image in images] == [0, 3]
        png = tmp_path / "pictures" / f"{name}.png"
        assert png.read_bytes() == images[-1].encoded_image_string
        pixels = imread(png)
        assert pixels.shape == (images[-1].height, images[-1].width, 4)
        assert pixels[..., :3].std() > 0.1, "blank"


def test_without_a_teacher_the_student_is_drawn_alone(make, tmp_path):
    gallery = make(every=1, layers=2, asked=False)
    gallery.show(1)
    assert sorted(path.name for path in tmp_path.glob("pictures/*")) == ["attention_1.png", "attention_2.png"]
    assert gallery.pairs(2) == [(1, 1), (2, 2)]


def test_layers_belong_together_as_the_objectives_say_or_evenly(make):
    gallery = make(layers=2)
    gallery.show(1)
    assert gallery.pairs(2) == [(1, 2), (2, 4)], "one pair is too few"
    gallery.compared = (LayerPairs((0, 1), (0, 1)), LayerPairs((2,), (3,)), LayerPairs((1,), (4,), combine=True))
    assert gallery.pairs(2) == [(1, 1), (2, 3)]
    assert spread([(i, i) for i in range(1, 8)], 3) == [(1, 1), (4, 4), (7, 7)]


@pytest.mark.parametrize("reason", ["matplotlib is missing", "the disk is full"])
def test_pictures_that_fail_are_told_once_and_stop_nothing(make, tmp_path, capsys, monkeypatch, reason):
    gallery = make(every=1)
    gallery.at_start()
    if reason == "matplotlib is missing":
        monkeypatch.delitem(sys.modules, "dsdistill.training.drawing", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        (tmp_path / "pictures").write_text("a file where the folder should be")
    for step in range(1, 4):
        if gallery.is_due(step, evaluated=True, last=False):
            gallery.show(step)
    assert capsys.readouterr().err.count("WARNING: pictures cannot be") == 1
    assert gallery.engine.student.training


def test_without_an_interval_pictures_take_a_hundredth_of_the_time(make, capsys):
    gallery = make()
    gallery.at_start()
    assert not gallery.is_due(2, evaluated=True, last=False), "the run has only begun"
    gallery.began = time.perf_counter() - 101 * (gallery.spent_s + gallery.next_s)
    assert not gallery.is_due(3, evaluated=False, last=False)
    assert gallery.is_due(4, evaluated=True, last=False)
    gallery.show(4)
    gallery.began = time.perf_counter() - 99 * (gallery.spent_s + gallery.next_s)
    assert not gallery.is_due(6, evaluated=True, last=True)
    gallery.began = time.perf_counter() - 101 * (gallery.spent_s + gallery.next_s)
    assert gallery.is_due(8, evaluated=True, last=True)
    assert "no pictures" not in capsys.readouterr().err
    short = make()
    assert not short.is_due(8, evaluated=True, last=True)
    assert "logging.pictures: 8 draws them nevertheless" in capsys.readouterr().err


def test_rows_are_cut_where_their_documents_were_told_apart():
    rows = batch_of(4, 10)
    segments = torch.arange(10).expand(4, 10) // 3
    rows = rows._replace(segments=segments, borders=document_borders(segments, rows.mask), labels=rows.input_ids)
    few = cut(rows, 14, 7)
    assert few.input_ids.shape == few.mask.shape == few.segments.shape == (2, 7)
    assert torch.equal(few.borders, document_borders(few.segments, few.mask))
    assert not few.padded
    assert cut(rows, 5, 7).input_ids.shape == (1, 7)


def test_probes_are_tokenized_as_the_models_read_and_carry_no_labels(teacher_directory):
    tokenizer = AutoTokenizer.from_pretrained(teacher_directory)
    rows = batch_of(2, 8)._replace(labels=torch.zeros(2, 8, dtype=torch.long), targets=torch.tensor([3]))
    before = tokenizer.backend_tokenizer.to_str()
    probes = make_probes(tokenizer, ["the film", "a " * 90], rows)
    assert tokenizer.backend_tokenizer.to_str() == before, "caches of signals are bound to it"
    assert probes.tokens[1][-1] == "[SEP]"
    assert probes.tokens[0] == ("[CLS]", "the", "film", "[SEP]")
    assert len(probes.tokens[1]) == pictures.LONGEST_SENTENCE
    assert probes.sentences.mask.sum(1).tolist() == [4, pictures.LONGEST_SENTENCE]
    assert probes.rows.labels is None
    assert probes.rows.targets.tolist() == probes.sentences.targets.tolist() == [0]

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from dsdistill.locate import Source
from dsdistill.models.card import model_card
from dsdistill.models.export import export_student, rebuild, save_skeleton
from dsdistill.models.families import layer_list
from dsdistill.models.loading import head_of, load_encoder, load_tokenizer
from dsdistill.models.student import build_student, student_config
from dsdistill.models.teacher import ResidentTeacher
from tests.models.test_capture import make_batch


def named(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_model_with_a_head_keeps_it_and_one_without_has_none(teacher_directory, tmp_path):
    assert head_of(load_encoder(Source(model=str(teacher_directory)))) == "masked LM"
    AutoModel.from_pretrained(teacher_directory).save_pretrained(tmp_path)
    assert head_of(load_encoder(Source(model=str(tmp_path)))) == "none"


def test_missing_weights_are_refused_instead_of_left_random(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=60)
    model = BertModel(config)
    state = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        load_encoder(Source(model=str(tmp_path)))


def test_models_that_do_not_exist_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder(Source(model="/nowhere/at/all"))


def test_the_teacher_stops_at_its_deepest_wanted_layer_and_never_changes(teacher_directory):
    model = load_encoder(Source(model=str(teacher_directory)))
    full = model.bert(input_ids=make_batch(False).input_ids, output_hidden_states=True).hidden_states
    teacher = ResidentTeacher(model, {"query": [1], "hidden": [2]}, device=torch.device("cpu"), dtype=torch.float32)
    before = teacher.checksum()
    features = teacher(make_batch(False))
    assert teacher.num_layers == 2
    assert len(layer_list(teacher.captured.model)) == 2
    assert not any(module.training for module in teacher.captured.modules())
    assert not features.at("hidden", 2).requires_grad
    torch.testing.assert_close(features.at("hidden", 2), full[2], rtol=1e-5, atol=1e-5)
    assert teacher.checksum() == before
    next(teacher.captured.parameters()).data[0, 0] += 1
    assert teacher.checksum() != before


@pytest.mark.parametrize("with_head", [True, False])
def test_export_loads_everywhere_and_computes_the_same(teacher_directory, tmp_path, with_head):
    source = Source(model=str(teacher_directory))
    if not with_head:
        AutoModel.from_pretrained(teacher_directory).save_pretrained(tmp_path / "plain")
        AutoTokenizer.from_pretrained(teacher_directory).save_pretrained(tmp_path / "plain")
        source = Source(model=str(tmp_path / "plain"))
    teacher = load_encoder(source)
    student = build_student(teacher, student_config(teacher.config, 2, (2, 4)), (2, 4), seed=0).eval()
    tokenizer = load_tokenizer(source)
    save_skeleton(student, tokenizer, tmp_path / "skeleton")
    rebuilt = rebuild(tmp_path / "skeleton", named(student))
    facts = {"name": "tiny", "teacher": "t", "head": "masked LM" if with_head else "none"}
    card = model_card(facts, "name: tiny\n", teacher=source, is_sentence_encoder=False)
    export_student(rebuilt, tokenizer, tmp_path / "model", card=card, teacher=source)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "model")("a great film", return_tensors="pt")
    auto = AutoModelForMaskedLM if with_head else AutoModel
    with torch.no_grad():
        ours = student(**inputs)[0]
        theirs = auto.from_pretrained(tmp_path / "model").eval()(**inputs)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_weights_that_are_missing_or_left_over_are_refused(teacher_directory, tmp_path):
    teacher = load_encoder(Source(model=str(teacher_directory)))
    save_skeleton(teacher, load_tokenizer(Source(model=str(teacher_directory))), tmp_path)
    weights = named(teacher)
    with pytest.raises(ValueError, match="left over"):
        rebuild(tmp_path, {**weights, "more": torch.zeros(1)})
    weights.pop("bert.encoder.layer.0.attention.self.query.weight")
    with pytest.raises(ValueError, match=r"missing .*query\.weight"):
        rebuild(tmp_path, weights)


def test_sentence_encoders_stay_sentence_encoders(teacher_directory, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    shutil.copytree(teacher_directory, tmp_path / "teacher")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (tmp_path / "teacher" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "teacher" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "teacher" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    source = Source(model=str(tmp_path / "teacher"))
    model = load_encoder(source)
    export_student(model, load_tokenizer(source), tmp_path / "model", card="# card\n", teacher=source)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    text = "a great film"
    with torch.no_grad():
        hidden = model.bert(**load_tokenizer(source)(text, return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[:, 0], dim=-1)[0]
    torch.testing.assert_close(torch.tensor(loaded.encode(text)), expected, rtol=1e-4, atol=1e-5)

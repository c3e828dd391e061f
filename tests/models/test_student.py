import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from dsdistill.models.capture import ATTENTION
from dsdistill.models.families import encoder_of, layer_list, shape_of
from dsdistill.models.student import build_student, restore_dropout, student_config
from tests.models.families_under_test import FAMILIES, tiny_configs


def make_teacher(family: str):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny_configs()[family], attn_implementation=ATTENTION).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize("layers", [(1, 2), (3, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "albert"])
def test_layers_and_everything_outside_them_are_the_teachers(family, layers):
    teacher = make_teacher(family)
    config = student_config(encoder_of(teacher).config, 2, layers)
    student = build_student(teacher, config, layers, seed=1)
    assert len(layer_list(student)) == shape_of(student.config).num_layers == 2
    for target, number in zip(layer_list(student), layers, strict=True):
        source = layer_list(teacher)[number - 1].state_dict()
        copied = [name for name in target.state_dict() if name in source]
        assert len(copied) >= len(source) - 1
        for name in copied:
            assert torch.equal(target.state_dict()[name], source[name]), name
    inside = {name for name, p in student.named_parameters() if any(p is q for q in layer_list(student).parameters())}
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name not in inside:
            assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_is_the_teacher(family):
    teacher = make_teacher(family)
    layers = (1, 2, 3, 4)
    student = build_student(teacher, student_config(encoder_of(teacher).config, 4, layers), layers, seed=1).eval()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=0)


def test_random_students_depend_on_the_seed_only():
    teacher = make_teacher("bert")
    config = student_config(teacher.config, 2, None)
    students = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        students.append(torch.cat([p.flatten() for p in build_student(teacher, config, None, seed=seed).parameters()]))
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])
    embeddings = dict(build_student(teacher, config, None, seed=1).named_parameters())
    assert not torch.equal(
        embeddings["bert.embeddings.word_embeddings.weight"], teacher.bert.embeddings.word_embeddings.weight
    )


def test_building_a_student_leaves_random_state_and_teacher_alone():
    teacher = make_teacher("bert")
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    student = build_student(teacher, student_config(teacher.config, 2, (1, 2)), (1, 2), seed=0)
    assert torch.equal(torch.rand(4), expected)
    for parameter in student.parameters():
        parameter.data.zero_()
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert teacher.config.num_hidden_layers == 4


def test_modernbert_students_keep_the_kinds_of_their_layers():
    config = student_config(tiny_configs()["modernbert"], 2, (2, 4))
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.num_hidden_layers == 2


def test_dropout_and_overrides_reach_the_config():
    teacher = tiny_configs()["bert"]
    config = student_config(teacher, 2, None, dropout=0.25, overrides={"hidden_size": 16})
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.25
    assert config.hidden_size == 16
    assert teacher.hidden_size == 32
    restore_dropout(config, teacher)
    assert config.hidden_dropout_prob == teacher.hidden_dropout_prob == 0.1
    with pytest.raises(ValueError, match="hidden_sizes"):
        student_config(teacher, 2, None, overrides={"hidden_sizes": 16})


def test_weights_that_do_not_fit_are_refused():
    teacher = make_teacher("bert")
    config = student_config(teacher.config, 2, (1, 2), overrides={"intermediate_size": 48})
    with pytest.raises(ValueError, match=r"shape \(64, 32\) in the teacher and \(48, 32\)"):
        build_student(teacher, config, (1, 2), seed=0)


def test_configs_of_students_are_read_by_transformers(tmp_path):
    teacher = make_teacher("modernbert")
    student = build_student(teacher, student_config(teacher.config, 2, (1, 4)), (1, 4), seed=0)
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == ["full_attention", "full_attention"]

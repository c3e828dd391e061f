"""Models with the head of a task: loaded, started from, and never mistaken for another task's."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.locate import Source
from dsdistill.models.loading import head_of, load_classifier, load_config, task_config
from dsdistill.models.student import build_student, student_config
from dsdistill.plan import teacher_outputs
from dsdistill.tasks.spec import TaskSpec

LABELS = ("entailment", "neutral", "contradiction")
SPEC = TaskSpec(name="nli", problem="classification", labels=LABELS, metrics=("accuracy",))


def classifier(source: Source, *, seed: int = 0, columns=None):
    config = task_config(load_config(source), LABELS, "classification")
    return load_classifier(source, config, seed=seed, columns=columns)


@pytest.fixture
def saved(teacher_directory, tmp_path) -> Source:
    """A classifier whose labels stand in another order than the task's."""
    model = classifier(Source(model=str(teacher_directory)))
    model.config.id2label = {0: "contradiction", 1: "entailment", 2: "neutral"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(teacher_directory).save_pretrained(tmp_path / "saved")
    return Source(model=str(tmp_path / "saved"))


def logits(model, ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17)[None]).logits


def test_a_random_head_is_a_function_of_the_seed(teacher_directory):
    source = Source(model=str(teacher_directory))
    models = [classifier(source, seed=seed) for seed in (1, 1, 2)]
    assert [head_of(model) for model in models] == ["task"] * 3
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not torch.equal(logits(models[0]), logits(models[2]))
    assert torch.equal(
        models[0].bert.embeddings.word_embeddings.weight, models[2].bert.embeddings.word_embeddings.weight
    )


def test_outputs_are_put_into_the_tasks_order(saved):
    plain = AutoModelForSequenceClassification.from_pretrained(saved.model).eval()
    columns = teacher_outputs(saved, SPEC)
    assert columns == (1, 2, 0)
    model = classifier(saved, columns=columns)
    torch.testing.assert_close(logits(model), logits(plain)[:, [1, 2, 0]], rtol=1e-5, atol=1e-6)
    assert model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("labels", [("yes", "no", "maybe"), ("entailment", "neutral")])
def test_a_head_for_other_labels_is_refused(saved, labels):
    spec = TaskSpec(name="other", problem="classification", labels=labels, metrics=("accuracy",))
    with pytest.raises(ValueError, match=r"entailment|3 outputs"):
        teacher_outputs(saved, spec)


def test_an_encoder_without_head_has_no_outputs_to_check(teacher_directory):
    assert teacher_outputs(Source(model=str(teacher_directory)), SPEC) is None


@pytest.mark.parametrize("random_head", [True, False])
def test_a_student_takes_layers_and_perhaps_the_head(saved, random_head):
    teacher = classifier(saved)
    student = build_student(teacher, student_config(teacher.config, 2, (1, 3)), (1, 3), seed=5, random_head=random_head)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight) != random_head
    ours, theirs = student.bert.encoder.layer[1].state_dict(), teacher.bert.encoder.layer[2].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_student_starts_from_one_that_was_distilled_without_a_task(saved, teacher_directory, tmp_path, pooler):
    teacher = classifier(saved)
    config = student_config(teacher.config, 2, None)
    distilled = AutoModel.from_config(config, add_pooling_layer=pooler)
    distilled.save_pretrained(tmp_path / "distilled")
    student = build_student(teacher, config, None, seed=5, init_from=tmp_path / "distilled", random_head=True)
    assert torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, distilled.encoder.layer[1].output.dense.weight
    )
    assert torch.equal(student.bert.pooler.dense.weight, distilled.pooler.dense.weight) if pooler else True


def test_a_narrower_student_keeps_a_narrower_head(saved):
    teacher = classifier(saved)
    config = student_config(teacher.config, 2, (1, 2), overrides={"hidden_size": 16, "intermediate_size": 32})
    student = build_student(teacher, config, (1, 2), seed=0, resize="slice")
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, :16])

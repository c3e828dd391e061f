"""A tokenizer of one's own, from text to a student that has learned with it, and to a task."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.config.recipe import check_recipe
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.train_tokenizer import train_tokenizer
from dsdistill.mlm_head import run as fit_and_run
from dsdistill.models.vocabulary import change_vocabulary, sources_of
from dsdistill.plan import make_plan
from dsdistill.pretrain import run
from dsdistill.summary import held_out_at
from dsdistill.training.dist import find_place
from tests.faults.jobs import TASK, Job, assert_same_weights
from tests.workers import ROOT

JSON = {"train_micro_batch_size_per_gpu": 8}


def settings_for(text, teacher, output) -> CorpusSettings:
    return CorpusSettings(input=str(text), tokenizer=str(teacher), output=output, length=32, held_out=0.2, processes=1)


def own_tokenizer(text: Path, teacher: Path, directory: Path) -> Path:
    """Made by the command."""
    command = ["launch/train_tokenizer.py", "--input", text, "--like", teacher, "--output", directory]
    command += ["--kind", "unigram", "--vocab_size", "90"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, env=environment)
    return directory


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_tokens_that_both_know_keep_their_embeddings(kind, text, teacher_directory, tmp_path):
    made = train_tokenizer(settings_for(text, teacher_directory, tmp_path), kind=kind, vocab_size=90)
    theirs = AutoTokenizer.from_pretrained(teacher_directory)
    assert made.convert_ids_to_tokens(made("film").input_ids)[:: len(made("film").input_ids) - 1] == ["[CLS]", "[SEP]"]
    model = AutoModelForMaskedLM.from_pretrained(teacher_directory)
    before = model.get_input_embeddings().weight.clone()
    shared = change_vocabulary(model, made, theirs, seed=0)
    after, sources = model.get_input_embeddings().weight, sources_of(made, theirs)
    assert after.shape[0] == len(made) == model.config.vocab_size
    assert shared == sum(len(found) == 1 for found in sources) > 20
    words = [(n, theirs.convert_tokens_to_ids(t.removeprefix("\u2581"))) for t, n in made.get_vocab().items()]
    whole = [(n, m) for n, m in words if sources[n] == [m] and m != theirs.unk_token_id]
    assert len(whole) > 5
    assert all((after[n] == before[m]).all() for n, m in whole)
    assert (after[made.mask_token_id] == before[theirs.mask_token_id]).all()
    assert (after == model.get_output_embeddings().weight).all()


def test_text_to_tokenizer_to_student(text, teacher_directory, recipe_content, tmp_path, capsys):
    own = own_tokenizer(text, teacher_directory, tmp_path / "own")
    prepare(settings_for(text, own, tmp_path / "corpus"), progress=False)
    recipe_content["student"]["tokenizer"] = str(own)
    recipe_content["corpus"]["directory"] = str(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"minilmv2, att_kl, hid_seq cannot be used with student\.tokenizer"):
        make_plan(check_recipe(recipe_content, "test"), JSON, find_place())
    recipe_content["objectives"] = [{"objective": "mlm"}]
    run(check_recipe(recipe_content, "test"), JSON, resume="never", dry_run=False)
    assert "tokens start from the teacher's embeddings" in capsys.readouterr().err
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model(**tokenizer("a great film", return_tensors="pt")).logits.shape[-1] == len(tokenizer) <= 90


def of_own_domain(content: dict, text: Path, tokenizer: Path, corpus: Path) -> dict:
    """A recipe that makes its corpus itself, and learns without what the teacher says."""
    prepare = {"input": str(text), "tokenizer": str(tokenizer), "length": 32, "held_out": 0.2, "processes": 1}
    return {
        **content,
        "student": {**content["student"], "tokenizer": str(tokenizer)},
        "corpus": {"directory": str(corpus), "prepare": prepare},
        "objectives": [{"objective": "mlm"}],
        "optimization": {**content["optimization"], "steps": 20, "learning_rate": 0.003},
        "evaluation": {"every_steps": 10, "rows": 16},
        "checkpoint": {"every_steps": 10, "keep": 2},
    }


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("head", [True, False], ids=["with a head", "headless teacher"])
def test_own_tokens_survive_a_resume_and_go_on_to_a_task(
    head, text, teacher_directory, recipe_content, task_content, tmp_path, warm
):
    """Command by command. A teacher without a masked-LM head gives its layers; the student's head is new then."""
    teacher = teacher_directory
    if not head:
        teacher = tmp_path / "headless"
        AutoModel.from_pretrained(teacher_directory).save_pretrained(teacher)
        AutoTokenizer.from_pretrained(teacher_directory).save_pretrained(teacher)
    own = own_tokenizer(text, teacher, tmp_path / "own")
    recipe_content["teacher"]["model"] = str(teacher)
    content = of_own_domain(recipe_content, text, own, tmp_path / "corpus")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    whole, second = tmp_path / "run", tmp_path / "second"
    job = Job(tmp_path / "recipe.yaml", world_size=2, warm=warm)
    assert job.codes() == [0, 0], job.tails()
    assert ("the student's starts random" in job.output(0)) == (not head)
    half = whole / "checkpoints" / "step-00000010"
    flags = ("--resume", str(half))
    job = Job(tmp_path / "recipe.yaml", f"output={second}", flags=flags, world_size=2, warm=warm)
    assert job.codes() == [0, 0], job.tails()
    assert "resumed at step 10" in job.output(0)
    assert_same_weights(whole, second, 20)
    assert held_out_at(second, -1)["mlm"] < held_out_at(whole, 0)["mlm"] - 0.1
    model, tokenizer = (auto.from_pretrained(second / "model") for auto in (AutoModelForMaskedLM, AutoTokenizer))
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(own).get_vocab()
    assert model.config.vocab_size == len(tokenizer) <= 90
    check_task(second / "model", teacher, task_content, tmp_path, warm)


def check_task(student: Path, teacher: Path, content: dict, directory: Path, warm) -> None:
    """The student goes on in a task as its own teacher; with the other's tokens it is refused."""
    content["student"] = {"num_layers": 2, "init_from": str(student)}
    content["stages"] = [{**content["stages"][1], "objectives": [{"objective": "task"}]}]
    for model, codes in ((teacher, [2, 2]), (student, [0, 0])):
        content["teacher"]["model"] = str(model)
        content["output"] = str(directory / "task")
        (directory / "task.yaml").write_text(yaml.safe_dump(content))
        job = Job(directory / "task.yaml", script=TASK, world_size=2, warm=warm)
        assert job.codes() == codes, job.tails()
        assert ("was trained with another tokenizer" in job.output(0)) == (model == teacher)
    results = json.loads((directory / "task" / "results.json").read_text())
    assert set(results["scores"]["dev"])
    classifier = AutoModelForSequenceClassification.from_pretrained(directory / "task" / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "task" / "model")
    assert classifier.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(student))


def test_what_does_not_go_with_own_tokens_is_told_at_once(text, teacher_directory, recipe_content, tmp_path):
    made = train_tokenizer(settings_for(text, teacher_directory, tmp_path / "own"), kind="unigram", vocab_size=90)
    content = of_own_domain(recipe_content, text, tmp_path / "own", tmp_path / "corpus")
    content["evaluation"]["sentences"] = {"rows": 20, "neighbours": 3}
    content["student"] |= {"init": None, "init_from": str(tmp_path / "student"), "num_layers": 4}
    AutoModelForMaskedLM.from_pretrained(teacher_directory).save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(teacher_directory).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="was trained with another tokenizer") as told:
        make_plan(check_recipe(content, "test"), JSON, find_place())
    assert "evaluation.sentences: the teacher cannot read rows of other tokens" in str(told.value)
    made.save_pretrained(tmp_path / "student")
    del content["evaluation"]["sentences"]
    make_plan(check_recipe(content, "test"), JSON, find_place())
    with pytest.raises(ValueError, match=r"--fit_mlm_head has no effect with student\.tokenizer"):
        fit_and_run(check_recipe(content, "test"), JSON, resume="auto", dry_run=True)

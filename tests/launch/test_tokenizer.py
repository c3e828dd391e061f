"""A tokenizer of one's own, from text to a student that has learned with it."""

import subprocess
import sys

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dsdistill.config.recipe import check_recipe
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.train_tokenizer import train_tokenizer
from dsdistill.models.vocabulary import change_vocabulary, sources_of
from dsdistill.plan import make_plan
from dsdistill.pretrain import run
from dsdistill.training.dist import find_place
from tests.workers import ROOT

JSON = {"train_micro_batch_size_per_gpu": 8}


def settings_for(text, teacher, output) -> CorpusSettings:
    return CorpusSettings(input=str(text), tokenizer=str(teacher), output=output, length=32, held_out=0.2, processes=1)


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
    own = tmp_path / "own"
    command = [
        "launch/train_tokenizer.py",
        "--input",
        str(text),
        "--like",
        str(teacher_directory),
        "--output",
        str(own),
    ]
    command += ["--kind", "unigram", "--vocab_size", "90"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"})
    prepare(settings_for(text, own, tmp_path / "corpus"), progress=False)
    recipe_content["student"]["tokenizer"] = str(own)
    recipe_content["corpus"]["directory"] = str(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"minilmv2, att_kl, hid_seq cannot be used with student\.tokenizer"):
        make_plan(check_recipe(recipe_content, "test"), JSON, find_place())
    recipe_content["objectives"] = [{"objective": "mlm"}]
    run(check_recipe(recipe_content, "test"), JSON, resume="never", dry_run=False)
    assert "tokens start from the teacher's embeddings" in capsys.readouterr().out
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model(**tokenizer("a great film", return_tensors="pt")).logits.shape[-1] == len(tokenizer) <= 90

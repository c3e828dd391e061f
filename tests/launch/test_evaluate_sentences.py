"""`launch/evaluate.py --sts --texts`: sentence embeddings of a student beside its teacher's."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import yaml

from dsdistill.evaluate_sentences import SENTENCES
from tests.launch.test_evaluate import CARD, command
from tests.models.test_sentences import describe

__all__ = ["command"]  # a fixture

LINES = ["a great film", "the story", "long short end", "a great film", "never always", "see the plot", "music"]


@pytest.fixture
def run(teacher_directory, tmp_path) -> Path:
    """A run whose student is its teacher, except that it pools in another way."""
    for name, pooling in (("teacher", "mean"), ("run/model", "max")):
        shutil.copytree(teacher_directory, tmp_path / name)
        describe(tmp_path / name, pooling={"pooling_mode": pooling})
    (tmp_path / "run" / "model" / "README.md").write_text(CARD)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"teacher": {"model": str(tmp_path / "teacher")}}))
    pairs = [f"{a}\t{b}\t{i}" for i, (a, b) in enumerate(itertools.pairwise(LINES))]
    (tmp_path / "sts.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *pairs]) + "\n")
    (tmp_path / "texts.txt").write_text("\n\n".join(LINES) + "\n")
    return tmp_path / "run"


def test_scores_go_to_the_page_the_card_and_a_file(command, capsys, run):
    files = run.parent
    for _ in range(2):
        arguments = ("--sts", files / "sts.tsv", "--texts", files / "texts.txt", "--neighbours", 2, "--device", "cpu")
        assert command(run, *arguments) == 0
        table = capsys.readouterr().out.strip()
        card = (run / "model" / "README.md").read_text()
        assert card.count(table) == card.count("## Sentence embeddings") == 1
        assert card.index("## Sentence embeddings") < card.index("## Recipe")
    told = json.loads((run / "model" / SENTENCES).read_text())
    assert -1 < told["student"]["sts_spearman"] != told["teacher"]["sts_spearman"] < 1
    assert 0 < told["student"]["neighbours_at_2"] <= 1
    assert command(files / "teacher", "--teacher", files / "teacher", *arguments) == 0
    assert json.loads((files / "teacher" / SENTENCES).read_text())["student"]["neighbours_at_2"] == 1


def test_what_cannot_be_scored_is_refused(command, capsys, run):
    files = run.parent
    for arguments, problem in (
        ((run, "--texts", files / "texts.txt"), "10 nearest neighbours, but 6 different texts"),
        ((files / "teacher", "--texts", files / "texts.txt", "--neighbours", 2), "no teacher to agree with"),
        ((run, "--texts", files / "nothing.txt"), "no such file"),
        ((run, "--sts", files / "nothing.tsv"), "no scored sentence pairs"),
    ):
        assert command(*arguments, "--device", "cpu") == 2
        assert problem in capsys.readouterr().err

"""Files from elsewhere: none of them runs code, none leads out of its folder, and nothing of this machine gets out."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from dsdistill.config.recipe import check_recipe, read_recipe
from dsdistill.corpus.store import Corpus
from dsdistill.locate import Source
from dsdistill.models.loading import load_config, load_encoder
from dsdistill.plan import make_plan
from dsdistill.plan_page import describe_plan
from dsdistill.training.checkpoint import OPTIMIZER, STATE, seal, verify
from dsdistill.training.dist import find_place
from tests.faults.jobs import LONG, Job
from tests.workers import run_workers


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What a bomb makes; the fixture first shows that it works."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(path)))
    path.rmdir()
    return path


def plant(path: Path, mark: Path) -> None:
    torch.save({"module": Bomb(mark), "step": 1}, path)


@pytest.mark.multiprocess
def test_checkpoints_with_code_are_refused(recipe_content, mark):
    recipe_content["optimization"].update(steps=2, warmup_steps=0)
    recipe_content["checkpoint"]["every_steps"] = 1
    recipe_content["evaluation"]["every_steps"] = 2
    run_workers("tests.faults.workers:load_planted_states", 1, content=recipe_content, mark=str(mark))
    assert not mark.exists()


def test_weights_with_code_are_refused(teacher_directory, tmp_path, mark):
    model = tmp_path / "model"
    shutil.copytree(teacher_directory, model)
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", mark)
    with pytest.raises(ValueError, match="may run code; use a model saved as safetensors"):
        load_encoder(Source(model=str(model)))
    assert not mark.exists()


def test_a_models_own_code_is_refused_unless_trusted_and_then_said(teacher_directory, tmp_path, mark, recipe_content):
    model = tmp_path / "model"
    shutil.copytree(teacher_directory, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "planted.Planted"}, "model_type": "planted"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(Source(model=str(model)))
    assert not mark.exists()
    recipe_content["teacher"]["trust_remote_code"] = True
    plan = make_plan(check_recipe(recipe_content, "test"), {}, find_place())
    assert "comes with the teacher and is run" in describe_plan(plan, find_place())
    assert AutoConfig.from_pretrained(teacher_directory).model_type == "bert"


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.arrow", "verified.json"])
def test_pickles_in_a_corpus_are_refused(corpus_directory, tmp_path, mark, name):
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_directory, corpus)
    plant(corpus / name, mark)
    if name == "verified.json":  # only remembers what was checked: an unreadable one means checking again
        assert len(Corpus.open(corpus))
    else:
        with pytest.raises(ValueError, match=name):
            Corpus.open(corpus)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["../outside.arrow", "/etc/passwd", "train-00000.arrow/../../outside.arrow"])
def test_shards_outside_of_a_corpus_are_refused(corpus_directory, tmp_path, place):
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_directory, corpus)
    shutil.copy(corpus / "train-00000.arrow", tmp_path / "outside.arrow")
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = place
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="damaged manifest"):
        Corpus.open(corpus)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_checkpoint_whose_files_lie_elsewhere_is_refused(tmp_path, link):
    checkpoint, elsewhere = tmp_path / "step-00000001", tmp_path / "elsewhere"
    for directory in (checkpoint / OPTIMIZER, elsewhere):
        directory.mkdir(parents=True)
    (checkpoint / STATE).write_text("{}")
    (elsewhere / "moments.safetensors").write_bytes(b"state")
    shutil.copy(elsewhere / "moments.safetensors", checkpoint / OPTIMIZER / "moments.safetensors")
    seal(checkpoint)
    verify(checkpoint)
    shutil.rmtree(checkpoint / OPTIMIZER)
    if link == "folder":
        (checkpoint / OPTIMIZER).symlink_to(elsewhere)
    else:
        (checkpoint / OPTIMIZER).mkdir()
        (checkpoint / OPTIMIZER / "moments.safetensors").symlink_to(elsewhere / "moments.safetensors")
    with pytest.raises(ValueError, match="leads out of the directory"):
        verify(checkpoint)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_recipes_cannot_name_python(tmp_path, mark, tag):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: !!python/{tag} [{mark}]")
    with pytest.raises(ValueError, match="no YAML"):
        read_recipe(recipe)
    recipe.write_text("name: x")
    with pytest.raises(ValueError, match="no YAML"):
        read_recipe(recipe, [f"seed=!!python/{tag} [{mark}]"])
    assert not mark.exists()


@pytest.mark.multiprocess
def test_a_run_directory_tells_nothing_of_host_user_or_environment(recipe_file, tmp_path, monkeypatch):
    names = {"USER": "user-5d2a", "LOGNAME": "user-5d2a", "HOSTNAME": "host-9c41", "API_TOKEN": "secret-77e0"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import platform, socket\nsocket.gethostname = platform.node = lambda: 'host-9c41'\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    job = Job(recipe_file, *LONG, "optimization.steps=4", "checkpoint.every_steps=2")
    assert job.codes() == [0], job.tails()
    run = tmp_path / "run"
    assert (run / "model" / "README.md").is_file()
    told = json.loads((run / "run.json").read_text())
    assert len(told["data_sha256"]) == 64
    for path in [path for path in run.rglob("*") if path.is_file()]:
        content = path.name.encode() + path.read_bytes()
        assert not [value for value in names.values() if value.encode() in content], path

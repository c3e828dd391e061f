"""Model directories with damaged, foreign or missing files: refused with a sentence that names the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsdistill.locate import Source
from dsdistill.models.loading import load_classifier, load_config, load_encoder, load_tokenizer, task_config

WEIGHTS, CONFIG, TOKENIZER, TOKENIZER_CONFIG = (
    *("model.safetensors", "config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def config_with(**changes) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        config = json.loads((model / CONFIG).read_text())
        (model / CONFIG).write_text(json.dumps(config | changes))

    return change


def cut(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def torch_file(content: bytes) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / WEIGHTS).unlink()
        (model / "pytorch_model.bin").write_bytes(content)

    return change


DAMAGE = {
    "cut weights": cut,
    "empty weights": written(WEIGHTS, b""),
    "junk for weights": written(WEIGHTS, b"\xff" * 5000),
    "no weights": lambda model: (model / WEIGHTS).unlink(),
    "an empty torch file": torch_file(b""),
    "junk for a torch file": torch_file(b"junk" * 99),
    "a cut torch file": torch_file(b"PK\x03\x04" + b"\0" * 99),
    "a tokenizer that is no JSON": written(TOKENIZER, b"{"),
    "a tokenizer of another shape": written(TOKENIZER, b'{"model": 3}'),
    "a tokenizer without a model": written(
        TOKENIZER, b'{"version": "1.0", "added_tokens": [], "model": {"type": "x"}}'
    ),
    "a list for a tokenizer": written(TOKENIZER, b"[]"),
    "a pickle for a tokenizer": written(TOKENIZER, b"\x80\x04N."),
    "a tokenizer's config that is no JSON": written(TOKENIZER_CONFIG, b"["),
    "a list for a tokenizer's config": written(TOKENIZER_CONFIG, b"[]"),
    "no tokenizer": lambda model: [(model / name).unlink() for name in (TOKENIZER, TOKENIZER_CONFIG)],
    "a config that is no JSON": written(CONFIG, b"{"),
    "a list for a config": written(CONFIG, b"[]"),
    "a config of no model": written(CONFIG, b"{}"),
    "a config of an unknown model": config_with(model_type="no such"),
    "a width that is text": config_with(hidden_size="x"),
    "a width of other weights": config_with(hidden_size=64),
    "a vocabulary of other weights": config_with(vocab_size=7),
    "heads that do not divide": config_with(num_attention_heads=5),
    "more layers than weights": config_with(num_hidden_layers=5),
}


def read_all(source: Source) -> None:
    """What a run on a task, and one on a corpus, reads of a model."""
    load_tokenizer(source)
    config = task_config(load_config(source), ("no", "yes"), "classification")
    load_classifier(source, config, seed=0)
    load_encoder(source)


def test_the_model_that_is_damaged_below_is_good(teacher_directory):
    read_all(Source(model=str(teacher_directory)))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models_are_refused_with_a_sentence(teacher_directory, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(teacher_directory, model)
    DAMAGE[name](model)
    with pytest.raises((ValueError, OSError)) as caught:
        read_all(Source(model=str(model)))
    assert type(caught.value) in (ValueError, OSError)
    assert str(model) in str(caught.value) or name == "heads that do not divide"

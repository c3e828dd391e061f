"""The numbers of the page against computations of its own, from the lines alone."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from scipy import special

from dsdistill.compare.grid import GridSettings
from dsdistill.compare.scores import summarize
from dsdistill.compare.significance import compare, holm, paired_t
from dsdistill.compare.table import page

OBJECTIVES, INITS, SEEDS = ("kd", "minilm", "hid_seq"), ("lower", "4,8,12"), ("0", "1", "2", "3")
PRIMARY = {"cola": "matthews", "mnli": "accuracy", "stsb": "spearman"}


def line_of(draw: random.Random, objective: str, init: str, task: str, seed: str, **more) -> dict:
    score = draw.uniform(0.3, 0.8)
    splits = ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",)
    metrics = {"accuracy": 0.11, PRIMARY[task]: score} if task != "mnli" else {"accuracy": score, "f1": 0.2}
    return {
        "cell": f"{objective}__{init}__{task}__{seed}",
        "axes": {"objective": objective, "init": init, "task": task, "seed": seed},
        "status": "done",
        "task": task,
        "seed": int(seed),
        "primary": PRIMARY[task],
        "scores": {split: metrics if i == 0 else dict.fromkeys(metrics, 0.99) for i, split in enumerate(splits)},
        "baseline": {split: {**metrics, PRIMARY[task]: 0.25} for split in splits},
        "teacher_scores": {split: {PRIMARY[task]: 0.9 if task == "cola" else 0.8} for split in splits},
        "teacher_directory": f"teachers/{task}",
        "student": {"layers": 3, "width": 8, "parameters": 1_234_567, "bytes": 5_000_000},
        "teacher": {"model": "t", "layers": 6, "width": 8, "parameters": 2_345_678, "bytes": 9_000_000},
        "training": {"seconds": draw.uniform(5, 9), "steps": 100, "rows": 3200, "teacher_seconds": 0.0},
        "device": "cpu",
        **more,
    }


@pytest.fixture
def lines() -> list[dict]:
    draw = random.Random(3)
    made = [line_of(draw, *labels) for labels in itertools.product(OBJECTIVES, INITS, PRIMARY, SEEDS)]
    return json.loads(json.dumps(made))


def settings_of(**more) -> GridSettings:
    axes = {"objective": list(OBJECTIVES), "init": {init: {} for init in INITS}, "task": list(PRIMARY), "seed": [0]}
    return GridSettings(name="g", source="what it is", output="x", axes=axes, **more)


def first_table(text: str, heading: str) -> list[dict[str, str]]:
    """The first Markdown table after a heading, as a person's script would read it."""
    rows = re.search(r"((?:\|.*\n)+)", text[text.index(f"\n{heading}\n") :])[1].splitlines()
    head, _, *body = [[field.strip() for field in row.strip("|").split("|")] for row in rows]
    return [dict(zip(head, fields, strict=True)) for fields in body]


def array_of(lines: list[dict], objective: str, init: str) -> np.ndarray:
    """Scores in points, (tasks, seeds), without any of the package's code."""
    found = {}
    for line in lines:
        if line["axes"]["objective"] == objective and line["axes"]["init"] == init:
            split = "dev_matched" if line["task"] == "mnli" else "dev"
            found[line["axes"]["task"], line["axes"]["seed"]] = 100 * line["scores"][split][line["primary"]]
    return np.array([[found[task, seed] for seed in SEEDS] for task in PRIMARY])


def test_scores_averages_and_shares_are_those_of_an_independent_computation(lines):
    table = first_table(page(settings_of(), lines, {}, 0), "## Scores")
    rows, (majority, teacher) = table[:-2], table[-2:]
    assert [(row["objective"], row["init"]) for row in rows] == list(itertools.product(OBJECTIVES, INITS))
    for row in rows:
        scores = array_of(lines, row["objective"], row["init"])
        for values, task in zip(scores, PRIMARY, strict=True):
            assert row[f"{task} ({PRIMARY[task]})"] == f"{values.mean():.2f} +- {values.std(ddof=1):.2f}"
        averages = scores.mean(axis=0)
        assert row["average"] == f"{averages.mean():.2f} +- {averages.std(ddof=1):.2f}"
        assert row["kept %"] == f"{100 * averages.mean() / np.mean([90, 80, 80]):.1f}"
        assert row["n"] == "4"
    assert [*majority.values()] == ["majority", "", "25.00", "25.00", "25.00", "25.00", "", ""]
    assert [*teacher.values()] == ["teacher", "", "90.00", "80.00", "80.00", "83.33", "100.0", ""]


def student_t_two_sided(t: float, df: int) -> float:
    return float(special.betainc(df / 2, 0.5, df / (df + t * t)))


def holm_by_definition(p_values: list[float]) -> list[float]:
    """Adjusted value i: the largest of (m - k + 1) p_(k) over all k up to its rank, at most 1."""
    m, ordered = len(p_values), sorted(p_values)
    return [min(1.0, max((m - k) * ordered[k] for k in range(ordered.index(p) + 1))) for p in p_values]


def test_t_tests_are_those_of_the_formula(lines):
    text = page(settings_of(), lines, {}, 0)
    expected = {}
    for first, second in itertools.combinations(itertools.product(OBJECTIVES, INITS), 2):
        if (first[0] == second[0]) != (first[1] == second[1]):
            d = (array_of(lines, *first) - array_of(lines, *second)).ravel()
            t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
            expected[first, second] = (d.mean(), t, student_t_two_sided(t, len(d) - 1))
    assert len(expected) == 9
    corrected = dict(zip(expected, holm_by_definition([p for _, _, p in expected.values()]), strict=True))
    table = first_table(text, "## Paired t-tests")
    at_init = text[text.index("| objective | first init |") - 1 :]
    table += first_table("\nX\n" + at_init, "X")
    assert len(table) == 9
    for row in table:
        if "first objective" in row:
            pair = ((row["first objective"], row["init"]), (row["second objective"], row["init"]))
        else:
            pair = ((row["objective"], row["first init"]), (row["objective"], row["second init"]))
        difference, t, p = expected[pair]
        assert row["n"] == "12"
        assert (row["difference"], row["t"]) == (f"{difference:.2f}", f"{t:.2f}")
        assert float(row["p"]) == pytest.approx(p, rel=0.06, abs=6e-4)
        assert float(row["Holm"].strip(" \\*")) == pytest.approx(corrected[pair], rel=0.06, abs=6e-4)


def test_paired_t_and_holm_by_hand():
    # differences 1, 2, 3: mean 2, deviation 1, t = 2 / (1 / sqrt 3)
    t, p = paired_t([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert t == pytest.approx(2 * math.sqrt(3))
    assert p == pytest.approx(student_t_two_sided(t, 2))
    assert all(math.isnan(value) for value in (*paired_t([1.0], [2.0]), *paired_t([1.0, 2.0], [2.0, 3.0])))
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04, math.nan, 0.03])[::2] == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_only_shared_pairs_are_compared():
    rows = [({"o": "a"}, {("t", "0"): 1.0, ("t", "1"): 3.0, ("u", "0"): 9.0}), ({"o": "b"}, {("t", "0"): 2.0})]
    (test,) = compare([*rows, ({"o": "c"}, {("x", "0"): 1.0})])
    assert (test.n, test.difference) == (1, -1.0)
    assert math.isnan(test.p_holm)


def test_a_missing_seed_leaves_the_average_of_the_whole_ones(lines):
    kept = [line for line in lines if line["cell"] != "kd__lower__mnli__2"]
    row = first_table(page(settings_of(), kept, {}, 1), "## Scores")[0]
    scores = array_of([line for line in lines if line["axes"]["objective"] == "kd"], "kd", "lower")[:, [0, 1, 3]]
    averages = scores.mean(axis=0)
    assert row["mnli (accuracy)"] == f"{scores[1].mean():.2f} +- {scores[1].std(ddof=1):.2f}"
    assert row["average"] == f"{averages.mean():.2f} +- {averages.std(ddof=1):.2f}"
    assert row["n"] == "3-4"


def test_a_row_without_a_task_has_no_average(lines):
    kept = [line for line in lines if not line["cell"].startswith("kd__lower__mnli")]
    row = first_table(page(settings_of(), kept, {}, 4), "## Scores")[0]
    assert (row["mnli (accuracy)"], row["average"], row["kept %"]) == ("-", "-", "-")


def test_failed_cells_are_listed_and_not_counted(lines):
    failed = {**lines[0], "status": "failed", "error": "the data | is gone"}
    text = page(settings_of(), [failed, *lines[1:]], {}, 2)
    assert "71 cells done, 1 failed, 2 to do." in text
    assert "## Failed cells\n\n- `kd__lower__cola__0`: the data | is gone" in text
    assert first_table(text, "## Scores")[0]["n"] == "3-4"
    assert "## Scores" not in page(settings_of(), [failed], {}, 0)


def test_budgets_are_stated_and_differences_are_named(lines):
    text = page(settings_of(), lines, {}, 0)
    assert "Equal budgets: all rows had the same number" in text
    assert "cola 100 steps, 3,200 rows; mnli 100 steps" in text
    lines[0]["training"] |= {"steps": 200, "rows": 6400}
    text = page(settings_of(), lines, {}, 0)
    assert "Equal budgets" not in text
    assert "- cola: 200 steps, 6,400 rows: kd lower\n- cola: 100 steps, 3,200 rows: kd lower, kd 4,8,12, min" in text
    costs = first_table(text, "**Budgets differ** between rows, per run:")[0]
    seconds = [line["training"]["seconds"] for line in lines[:12]]
    assert costs["runs"] == "12"
    assert costs["seconds"] == f"{sum(seconds):.1f}"
    assert costs["seconds per run"] == f"{np.mean(seconds):.1f}"
    assert (costs["steps"], costs["rows seen"]) == ("1,300", "41,600")


def test_every_metric_and_split_is_shown(lines):
    table = first_table(page(settings_of(), lines, {}, 0), "### mnli")
    scores = array_of(lines, "kd", "lower")[1] / 100
    assert table[0]["dev_matched accuracy"] == f"{scores.mean():.4f} +- {scores.std(ddof=1):.4f}"
    assert table[0]["dev_mismatched f1"] == "0.9900 +- 0.0000"


def test_rows_without_a_teacher_are_measured_by_the_teacher_of_the_others(lines):
    for line in lines:
        if line["axes"]["objective"] == "hid_seq":
            line.update(teacher_scores=None, teacher_directory=None)
    summary = summarize(lines)
    assert summary.kept(summary.rows[-1]) == pytest.approx(
        100 * array_of(lines, "hid_seq", "4,8,12").mean() / np.mean([90, 80, 80])
    )
    for line in lines:
        line["teacher_scores"] = None
    assert math.isnan(summarize(lines).kept(summary.rows[0]))
    assert "| teacher |" not in page(settings_of(), lines, {}, 0)


def test_several_teachers_of_a_task_are_averaged_and_each_row_has_its_own(lines):
    for line in lines:
        if line["axes"]["init"] == "lower":
            line["teacher_directory"] += "/other"
            line["teacher_scores"] = {"dev": {line["primary"]: 0.5}}
    table = first_table(page(settings_of(), lines, {}, 0), "## Scores")
    assert table[-1]["cola (matthews)"] == f"70.00 +- {np.std([50, 90], ddof=1):.2f}"
    kept = [float(row["kept %"]) for row in table[:2]]
    means = [array_of(lines, "kd", init).mean() for init in INITS]
    assert kept == pytest.approx([100 * means[0] / 50, 100 * means[1] / np.mean([90, 80, 80])], abs=0.05)


def test_the_best_value_of_an_axis_is_chosen_by_its_mean_over_seeds(lines):
    text = page(settings_of(best_over=["init"]), lines, {}, 0)
    table = first_table(text, "## Scores")
    assert [row["objective"] for row in table] == [*OBJECTIVES, "majority", "teacher"]
    chosen = first_table(text[text.index("Chosen values:") - 1 :], "Chosen values:")
    for row, best in zip(table, chosen, strict=False):
        for i, task in enumerate(PRIMARY):
            by_init = {init: array_of(lines, row["objective"], init)[i] for init in INITS}
            init = max(by_init, key=lambda name: by_init[name].mean())
            assert best[task] == init
            expected = by_init[init]
            assert row[f"{task} ({PRIMARY[task]})"] == f"{expected.mean():.2f} +- {expected.std(ddof=1):.2f}"
    assert "best of 2 values of init, chosen by the mean over seeds on the dev set that is shown" in " ".join(
        text.split()
    )
    assert first_table(text, "## Budgets and cost")[0]["runs"] == "24"


def test_a_row_may_stand_for_the_teacher(lines):
    for line in lines:
        line.update(teacher_scores=None, teacher_directory=None)
    text = page(settings_of(teacher_row={"objective": "hid_seq", "init": "lower"}), lines, {}, 0)
    table = first_table(text, "## Scores")
    assert ("hid_seq", "lower") not in [(row["objective"], row["init"]) for row in table]
    teacher = array_of(lines, "hid_seq", "lower")
    assert table[-1]["cola (matthews)"] == f"{teacher[0].mean():.2f} +- {teacher[0].std(ddof=1):.2f}"
    assert table[-1]["average"] == f"{teacher.mean():.2f}"
    assert table[0]["kept %"] == f"{100 * array_of(lines, 'kd', 'lower').mean() / teacher.mean():.1f}"


def test_the_cost_of_teachers_is_told_once_for_each(lines):
    for line in lines:
        line["teacher"]["training"] = {"seconds": {"cola": 10.0, "mnli": 20.5, "stsb": 1.0}[line["task"]]}
    text = page(settings_of(), lines, {}, 0)
    assert "Fine-tuning the teachers took 31.5 s more, once for all rows: cola 10.0, mnli 20.5, stsb 1.0." in text

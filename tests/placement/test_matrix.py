import pytest
import torch

from dsdistill.config.offload import async_io_problem
from tests.conftest import WORDS
from tests.faults.jobs import run_warm
from tests.placement.workers import numbers_of
from tests.workers import run_workers

STAGES = [0, 1, 2, 3]
MATRIX = "tests.placement.workers:check_matrix"


def settings(names: str, nvme) -> dict[str, dict]:
    every = {
        "zero3": {"placement": "zero3"},
        "cpu": {"placement": "cpu"},
        "nvme": {"placement": "nvme", "nvme_path": str(nvme)},
        "ranks": {"placement": "ranks", "ranks": 1},
    }
    return {name: every[name] for name in names.split()}


def too_few_gpus(processes: int) -> bool:
    """Whether processes would have to share a GPU, which NCCL refuses."""
    return torch.cuda.is_available() and torch.cuda.device_count() < processes


@pytest.fixture
def short(recipe_content) -> dict:
    recipe_content["optimization"]["steps"] = 3
    return recipe_content


@pytest.mark.multiprocess
def test_a_teacher_says_the_same_to_the_last_bit_wherever_it_lives(short, tmp_path, warm):
    cases = [[0, settings("cpu", tmp_path)], [1, settings("zero3", tmp_path)], [3, settings("zero3", tmp_path)]]
    run_warm(warm, MATRIX, 2, content=short, cases=cases)


@pytest.mark.multiprocess
@pytest.mark.skipif(too_few_gpus(3), reason="needs 3 GPUs, or none")
def test_so_does_one_on_ranks_of_its_own(short, tmp_path, warm):
    run_warm(warm, MATRIX, 3, content=short, cases=[[2, settings("ranks", tmp_path)]], teachers=1)


@pytest.fixture
def scored(short, tmp_path) -> dict:
    """Sentence embeddings are scored too: on rows of many lengths, so that batches differ from those of training."""
    lines = [f"{' '.join(WORDS[:n])}\t{' '.join(WORDS[n : 2 * n])}\t{n % 4}" for n in range(1, 10)]
    (tmp_path / "sts.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    short["optimization"]["learning_rate"] = 0.02
    short["evaluation"]["sentences"] = {"sts": str(tmp_path / "sts.tsv"), "rows": 21, "neighbours": 3}
    return short


@pytest.mark.multiprocess
@pytest.mark.slow
def test_sentence_scores_are_the_same_wherever_the_teacher_lives(scored, tmp_path, warm):
    cases = [[2, settings("cpu zero3", tmp_path)], [3, settings("cpu", tmp_path)]]
    run_warm(warm, MATRIX, 2, content=scored, cases=cases)
    told = [entry for entry in numbers_of(tmp_path / "run-cpu-2") if entry["kind"] == "held_out"]
    names = {"score/sts_spearman", "score/teacher_sts_spearman", "score/neighbours_at_3"}
    assert all(names <= entry.keys() for entry in told)
    assert told[0]["score/teacher_sts_spearman"] == told[-1]["score/teacher_sts_spearman"]
    assert told[0]["score/sts_spearman"] != told[-1]["score/sts_spearman"]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("students", [1, 2])
def test_so_they_are_with_a_teacher_on_ranks_of_its_own(scored, tmp_path, warm, students):
    cases = [[stage, settings("ranks", tmp_path)] for stage in (0, 2)]
    run_warm(warm, MATRIX, students + 1, content=scored, cases=cases, teachers=1)
    assert "score/neighbours_at_3" in numbers_of(tmp_path / "run-ranks-2")[-1]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("teachers", [0, 1])
@pytest.mark.parametrize("students", [1, 2])
def test_every_placement_at_every_stage(recipe_content, tmp_path, students, teachers):
    alone = "zero3 cpu" if async_io_problem() else "zero3 cpu nvme"  # async_io is compiled at first use, for minutes
    if too_few_gpus(students + teachers):
        pytest.skip(f"needs {students + teachers} GPUs, or none")
    chosen = settings("ranks" if teachers else alone, tmp_path)
    cases = [[stage, chosen] for stage in STAGES]
    run_workers(MATRIX, students + teachers, content=recipe_content, cases=cases, teachers=teachers)

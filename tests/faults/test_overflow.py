"""Gradients that overflow fp16 on and on: counted, then the run stops, keeps what is good and says what can be done."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dsdistill.training.checkpoint import newest_undamaged
from tests.faults.jobs import LONG, Job

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU trains in float32"),
]
GOOD, LIMIT = 12, 9
FROM_THEN_ON = f"objectives.0.weight={{from: 1.0, to: 1.0e+30, until: {GOOD}, kind: step}}"
"""The loss itself stays finite in float32, so do all of its terms; no loss scale helps."""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_repeated_overflow_stops_the_run_and_keeps_the_last_good_checkpoint(recipe_file, tmp_path, stage):
    run = tmp_path / "run"
    settings = (*LONG, f"output={run}", FROM_THEN_ON, f"faults.skipped_steps={LIMIT}", "checkpoint.every_steps=2")
    job = Job(recipe_file, *settings, "logging.every_steps=1", "checkpoint.keep=100", stage=stage)
    assert job.codes(240) == [1], job.tails()
    said = job.output(0)
    assert f"gradients overflowed fp16 in {LIMIT} steps in a row, up to step {GOOD + LIMIT}" in said
    assert "use bf16, a smaller learning rate, or smaller weights" in said
    assert "Traceback" not in said
    assert not (run / "model").exists()
    newest = newest_undamaged(run / "checkpoints")
    assert newest is not None
    assert all(value.isfinite().all() for value in load_file(newest / "student.safetensors").values())
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = {entry["step"]: entry["optimization/skipped_steps"] for entry in entries if entry["kind"] == "train"}
    last = max(counted)
    assert counted[last] - counted[GOOD] == last - GOOD
    # the skipped steps changed nothing: what is newest is what the last good step left
    good = run / "checkpoints" / f"step-{GOOD:08d}" / "student.safetensors"
    for name, value in load_file(good).items():
        assert torch.equal(value, load_file(newest / "student.safetensors")[name]), name

    # started again it goes on from there, and stops for the same reason
    job = Job(recipe_file, *settings, stage=stage)
    assert job.codes(240) == [1], job.tails()
    assert "resumed at step" in job.output(0)
    assert "gradients overflowed fp16" in job.output(0)

import contextlib
import json
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsdistill import progress
from dsdistill.core import Losses
from dsdistill.summary import held_out_at
from dsdistill.training.dist import Place
from dsdistill.training.telemetry import LAYOUT, LossSums, Stopwatch, Telemetry, keep_entries, read_metrics

CPU = torch.device("cpu")
PLACE = Place(rank=0, local_rank=0, world_size=1, device=CPU)


def losses(first: float, second: float) -> Losses:
    return Losses(torch.tensor(first + second), {"first": torch.tensor(first), "second": torch.tensor(second)})


def test_sums_are_means_over_micro_batches_since_the_last_reading():
    sums = LossSums(CPU)
    sums.add(losses(1.0, 3.0), 1)
    sums.add(losses(2.0, 5.0), 1)
    assert sums.read() == {"total": 5.5, "first": 1.5, "second": 4.0}
    sums.add(losses(7.0, 0.0), 2)
    assert sums.read() == {"total": 7.0, "first": 7.0, "second": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_term_that_is_not_finite_is_named_with_its_step(bad):
    sums = LossSums(CPU)
    for step in (1, 2, 3, 4):
        sums.add(losses(1.0, bad if step >= 3 else 1.0), step)
    with pytest.raises(FloatingPointError, match="'second' was not finite at step 3"):
        sums.read()


def test_adding_never_waits_for_the_device():
    with torch.device("meta"):
        sums = LossSums(torch.device("meta"))
        for step in range(3):
            sums.add(Losses(torch.ones(()), {"x": torch.ones(())}), step)


def test_the_stopwatch_adds_up_parts():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.part("data"):
            pass
    assert len(watch.spans) == 2
    assert watch.read()["data"] > 0
    assert watch.read()["data"] == 0


def test_a_resumed_run_drops_the_entries_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in (2, 4, 6)) + '{"kind": "tr')
    keep_entries(path, 4)
    assert [entry["step"] for entry in read_metrics(path)] == [2, 4]


def break_at_the_start(run):
    (run / "tensorboard").write_text("a file where the folder should be")


def break_on_the_way(run):
    shutil.rmtree(run / "tensorboard")
    break_at_the_start(run)


@pytest.mark.parametrize("moment", [0, 2])
def test_training_goes_on_without_tensorboard_and_says_so_once(tmp_path, capsys, moment):
    if moment == 0:
        break_at_the_start(tmp_path)
    telemetry = Telemetry(tmp_path, PLACE, first_step=0, last_step=200)
    for step in range(1, 60):
        if step == moment:
            telemetry.writer.flush()
            break_on_the_way(tmp_path)
        telemetry.sums.add(losses(1.0, 2.0), step)
        telemetry.training(step, 640, 1, {})
        if telemetry.writer is not None:
            with contextlib.suppress(OSError):
                telemetry.writer.flush()
    telemetry.close()
    assert capsys.readouterr().err.count("WARNING: TensorBoard cannot be written") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 59


def test_lines_are_plain_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    telemetry = Telemetry(tmp_path, PLACE, first_step=0, last_step=10)
    telemetry.sums.add(losses(1.0, 2.0), 1)
    telemetry.step(4)
    telemetry.training(5, 640, 5, {"optimization/learning_rate": 0.1})
    telemetry.evaluation(5, {"total": 3.0, "first": 1.0}, {"dev/accuracy": 0.5})
    telemetry.close()
    shown = capsys.readouterr()
    assert re.search(r"^training:  50% 5/10 \[.*step.*, loss 3.0000, [\d,]+ tokens/s\]$", shown.err, re.MULTILINE)
    assert "held-out objective 3.0000 (first 1.0000)" in shown.err
    assert shown.out == ""
    kinds = [entry["kind"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds == ["train", "held_out"]


def test_tensorboard_shows_every_number_in_a_chart_of_its_group(tmp_path):
    telemetry = Telemetry(tmp_path, PLACE, first_step=0, last_step=10)
    telemetry.sums.add(losses(1.0, 2.0), 1)
    engine = ("learning_rate", "grad_norm", "loss_scale", "skipped_steps")
    told = telemetry.training(5, 640, 5, {f"optimization/{name}": 0.1 for name in engine})
    telemetry.evaluation(5, {"total": 3.0, "first": 1.0}, {"dev/accuracy": 0.5})
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.summary_metadata["custom_scalars__config__"].plugin_data.plugin_name == "custom_scalars"
    patterns = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    shown = {*told, "held_out/total", "held_out/first", "score/dev/accuracy"} - {"time/step_time_s"}
    assert shown <= set(events.Tags()["scalars"])
    assert [tag for tag in shown if not any(re.fullmatch(pattern, tag) for pattern in patterns)] == []


def test_a_card_tells_the_numbers_of_its_own_checkpoint(tmp_path):
    lines = ({"kind": "held_out", "step": step, "held_out/total": 9.0 - step} for step in (0, 3, 6))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out_at(tmp_path, -1, last_step=3) == {"total": 6.0}
    assert held_out_at(tmp_path, -1) == {"total": 3.0}
    assert held_out_at(tmp_path, 0) == {"total": 9.0}

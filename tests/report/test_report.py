"""Reports of whole, broken and several runs."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from dsdistill.report.collect import collect
from dsdistill.report.facts import facts, fastest, groups, how_to_load, repeat_command, score, sizes_and_speeds
from dsdistill.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_run(
    directory: Path, *, seed: int = 0, name: str = "mini", last: float = 0.5, task: str | None = None
) -> Path:
    """What a finished run leaves, with numbers of our own."""
    (directory / "model").mkdir(parents=True)
    (directory / "skeleton").mkdir()
    (directory / "checkpoints/step-00000040").mkdir(parents=True)
    recipe = {"name": name, "seed": seed, "output": str(directory), "teacher": {"model": "some/teacher"}}
    recipe["student"] = {"num_layers": 3, "init": "uniform"}
    terms = [{"objective": "minilm", "layers": "last"}, {"objective": "hid_seq", "layers": "uniform"}]
    if task is None:
        recipe |= {"objectives": terms, "corpus": {"directory": "data/mine"}}
        recipe["optimization"] = {"steps": 40, "global_batch": 32, "learning_rate": 1e-3}
        stages = [directory]
    else:
        recipe |= {"task": task, "stages": [{"name": "intermediate", "objectives": terms}]}
        stages = [directory / "1-intermediate"]
        scores = {"dev": {"f1": last}}
        told = {"task": task, "primary": "f1", "scores": scores, "baseline": {"dev": {"f1": 0.25}}}
        (directory / "results.json").write_text(json.dumps({**told, "teacher_scores": {"dev": {"f1": 0.75}}}))
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (directory / "ds_config.json").write_text(
        json.dumps({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    )
    command = ["pretrain_distill.py", "--ds_config", "ds_configs/zero1.json", "--recipe", "mini.yaml"]
    run = {"command": command, "versions": {"torch": "2.13"}, "git_commit": "a" * 40, "device": "GPU", "processes": 2}
    (directory / "run.json").write_text(json.dumps(run))
    config = {"num_hidden_layers": 3, "hidden_size": 32, "architectures": ["BertForMaskedLM"]}
    (directory / "skeleton/config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros((1000, 2000), np.float32)}, directory / "model/model.safetensors")
    for stage in stages:
        stage.mkdir(exist_ok=True)
        entries = [{"kind": "held_out", "step": 0, "held_out/total": 2.0, "held_out/minilm": 2.0}]
        for step in range(10, 50, 10):
            parts = {f"time/{part}_s": 0.1 for part in ("data", "teacher", "student", "backward", "step")}
            rates = {"throughput/tokens_per_s": 1000.0 * step, "time/step_time_s": 0.5, "memory/max_allocated_gib": 1.5}
            losses = {"loss/total": 2 / step, "loss/minilm": 1 / step, "optimization/grad_norm": None}
            entries.append({"kind": "train", "step": step, **parts, **rates, **losses})
        entries.append({"kind": "held_out", "step": 40, "held_out/total": last, "held_out/minilm": last})
        (stage / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return directory


class Page(HTMLParser):
    """Tags that are open at the end, what is fetched from elsewhere, and the text."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith(("#", "data:"))
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_whole_run_is_told_in_one_file_that_fetches_nothing(tmp_path):
    run = collect(write_run(tmp_path / "run"))
    assert run.problems == []
    html, markdown = write_report([run], tmp_path / "report")
    page = Page(html)
    assert page.open == []
    assert page.fetched == []
    assert "url(http" not in html.read_text()
    for told in (
        "some/teacher",
        "3 layers x 32, 2.0 M parameters",
        "2.0000 before, 0.5000 after",
        "2 x GPU, ZeRO 2, fp16",
    ):
        assert told in page.text
        assert told in markdown.read_text()
    assert html.read_text().count("<svg") == 4
    pictures = re.findall(r"!\[.*\]\((.*)\)", markdown.read_text())
    assert len(pictures) == 4
    assert all((markdown.parent / picture).read_text().startswith("<svg") for picture in pictures)


@pytest.mark.parametrize("task", [None, "mrpc"])
def test_pictures_that_training_drew_are_shown_and_a_torn_one_is_named(tmp_path, task):
    run = write_run(tmp_path / "run", task=task)
    folder = (run / "1-intermediate" if task else run) / "pictures"
    folder.mkdir()
    png = io.BytesIO()
    Figure(figsize=(3, 2), dpi=50).savefig(png, format="png")
    (folder / "layers.png").write_bytes(png.getvalue())
    (folder / "attention_1.png").write_bytes(png.getvalue()[:-20])
    found = collect(run)
    html, markdown = write_report([found], tmp_path / "report")
    page = Page(html)
    assert page.fetched == []
    assert page.open == []
    assert f'viewBox="0 0 150 100"><image width="150" height="100" href="data:image/png;base64,{encoded(png)}"' in (
        html.read_text()
    )
    title = "Every layer of the student and of the teacher compared" + (" (intermediate)" if task else "")
    assert title in page.text
    (name,) = re.findall(rf"!\[{re.escape(title)}\]\((.*)\)", markdown.read_text())
    assert encoded(png) in (markdown.parent / name).read_text()
    assert [problem for problem in found.problems if "attention_1.png is no whole PNG" in problem]


def encoded(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()


def test_numbers_are_those_of_the_metrics(tmp_path):
    told = dict(facts(collect(write_run(tmp_path / "run"))))
    assert told["throughput"] == "25,000 tokens/s (median)"
    assert told["time in steps"] == "20 s"
    assert told["peak memory per process"] == "1.50 GiB"
    assert told["objectives"] == "minilm (last) + hid_seq (uniform)"
    assert told["checkpoints kept"] == "40"


def test_a_task_is_told_with_its_scores_and_stages(tmp_path):
    run = collect(write_run(tmp_path / "run", task="mrpc", last=0.625))
    assert run.problems == []
    told = dict(facts(run))
    assert told["f1, dev"] == "62.5 (teacher 75.0, majority class 25.0)"
    assert told["held-out objective of intermediate"] == "2.0000 before, 0.6250 after"
    assert score(run) == ("mrpc, f1 on dev (higher is better)", 62.5)


def timing(rate: float) -> dict:
    return {
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "length": 128,
        "batch": 8,
        "calls": 5,
        "median_ms": 8000 / rate,
        "p90_ms": 9000 / rate,
        "rows_per_s": rate,
    }


def model(layers: int, rate: float) -> dict:
    size = {"layers": layers, "width": 32, "parameters": 1_000_000 * layers, "bytes": 2**22 * layers}
    return {"name": "a/model", **size, "timings": [timing(rate)]}


def summary() -> dict:
    return {
        "objective": {"total": [2.0, 0.5]},
        "scores": {},
        "cosine": [0.25, 0.875],
        "teacher": model(6, 20.0),
        "student": model(3, 40.5),
    }


SIZES = [
    ("layers", "6", "3"),
    ("width", "32", "32"),
    ("parameters", "6,000,000", "3,000,000"),
    ("weights, MiB", "24.0", "12.0"),
]


def test_sizes_speeds_and_cosine_are_those_of_the_end_of_the_run(tmp_path):
    directory = write_run(tmp_path / "run")
    (directory / "summary.json").write_text(json.dumps(summary()))
    run = collect(directory)
    assert run.problems == []
    assert sizes_and_speeds(run) == [*SIZES, ("rows/s, 8 x 128 tokens, cpu, float32", "20.0", "40.5")]
    assert dict(facts(run))["cosine with the teacher"] == "0.2500 before, 0.8750 after"
    html, markdown = write_report([run], tmp_path / "report")
    for told in ("24.0", "40.5", "6,000,000"):
        assert told in Page(html).text
        assert told in markdown.read_text()


def test_what_evaluate_measured_later_comes_first(tmp_path):
    directory = write_run(tmp_path / "run")
    (directory / "summary.json").write_text(json.dumps(summary()))
    (directory / "model/speed.json").write_text(json.dumps({"student": model(3, 77.0)}))
    run = collect(directory)
    assert sizes_and_speeds(run)[-1] == ("rows/s, 8 x 128 tokens, cpu, float32", "-", "77.0")
    assert fastest(run) == 77.0


def test_sizes_of_a_task_are_those_of_its_results(tmp_path):
    directory = write_run(tmp_path / "run", task="mrpc")
    told = json.loads((directory / "results.json").read_text())
    for who, layers in (("teacher", 6), ("student", 3)):
        told[who] = {key: value for key, value in model(layers, 1.0).items() if key not in ("name", "timings")}
    (directory / "results.json").write_text(json.dumps(told))
    assert sizes_and_speeds(collect(directory)) == SIZES


@pytest.mark.parametrize("broken", ["[]", "{", '{"teacher": 3}', json.dumps({**summary(), "cosine": "x"})])
@pytest.mark.parametrize("name", ["summary.json", "model/speed.json"])
def test_broken_sizes_and_speeds_are_named_and_left_out(tmp_path, name, broken):
    directory = write_run(tmp_path / "run")
    (directory / name).write_text(broken)
    run = collect(directory)
    assert [name in problem for problem in run.problems] == [True]
    assert sizes_and_speeds(run) == []


PIECES = (
    "recipe.yaml",
    "run.json",
    "ds_config.json",
    "skeleton/config.json",
    "model/model.safetensors",
    "metrics.jsonl",
)


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "bytes", "other"])
@pytest.mark.parametrize("piece", PIECES)
def test_what_is_missing_or_broken_is_named_and_the_rest_is_told(tmp_path, piece, how):
    directory = write_run(tmp_path / "run")
    path = directory / piece
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        broken = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "bytes": b"\xff\xfe{" + content,
            "other": b"[1, 2]\n",
        }
        path.write_bytes(broken[how])
    run = collect(directory)
    assert any(piece.partition("/")[0] in problem for problem in run.problems), run.problems
    html, markdown = write_report([run], tmp_path / "report")
    page = Page(html)
    assert page.open == []
    assert "Not everything could be read" in page.text
    assert "Not everything could be read" in markdown.read_text()


def test_nothing_of_a_run_can_break_the_page(tmp_path):
    directory = write_run(tmp_path / "run", name="<b>&|x")
    page = Page(write_report([collect(directory)], tmp_path / "report")[0])
    assert page.open == []
    assert "<b>&|x" in page.text


def test_runs_that_differ_in_their_seed_are_averaged(tmp_path):
    runs = [collect(write_run(tmp_path / f"a{seed}", seed=seed, last=0.5 + 0.1 * seed)) for seed in range(3)]
    runs.append(collect(write_run(tmp_path / "other", name="other", last=0.9)))
    assert {name: len(members) for name, members in groups(runs).items()} == {"mini": 3, "other": 1}
    html, markdown = write_report(runs, tmp_path / "report")
    assert "| mini | 3 layers x 32, 2.0 M parameters | minilm (last) + hid_seq (uniform) | 3 | 0.6 +- 0.1 |" in (
        markdown.read_text()
    )
    assert Page(html).open == []


def test_equal_names_of_different_recipes_are_told_apart(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["optimization"]["learning_rate"] = 1.0
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert list(groups([collect(one), collect(other)])) == ["mini (one)", "mini (two)"]


def test_loading_code_and_command_are_those_of_the_run(tmp_path):
    run = collect(write_run(tmp_path / "run"))
    assert "AutoModelForMaskedLM.from_pretrained" in how_to_load(run)
    assert repeat_command(run).startswith("deepspeed launch/pretrain_distill.py --ds_config ds_configs/zero1.json")
    (tmp_path / "run/model/modules.json").write_text("[]")
    assert "SentenceTransformer(" in how_to_load(run)


@pytest.mark.parametrize("directory", ["nowhere", "empty"])
def test_a_directory_that_holds_no_run_is_refused(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="output directory of a run"):
        collect(tmp_path / directory)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(tmp_path, width):
    html, _ = write_report([collect(write_run(tmp_path / "run"))], tmp_path / "report")
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    html.write_text(html.read_text().replace("</body>", probe))
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        "--virtual-time-budget=2000",
    )
    seen = subprocess.run([CHROMIUM, *options, "--dump-dom", str(html)], capture_output=True, text=True, timeout=120)
    (sizes,) = re.findall(r"<title>(\d+ \d+)</title>", seen.stdout)
    needed, given = map(int, sizes.split())
    assert needed <= given

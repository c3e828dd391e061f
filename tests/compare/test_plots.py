"""Pictures that show something: axes, points in the palette's colours, both references."""

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb

from dsdistill.compare.plots import COLOURS, plot_scores, plot_speed
from dsdistill.compare.scores import summarize
from dsdistill.speed import Timing
from tests.compare.test_table import lines as lines  # a fixture


def timing(rows_per_s: float) -> list[Timing]:
    facts = {"device": "cpu", "dtype": "float32", "threads": 1, "length": 128, "batch": 32, "calls": 5}
    return [Timing(**facts, median_ms=1.0, p90_ms=2.0, rows_per_s=rows_per_s)]


def count(picture: np.ndarray, colour: str) -> int:
    """Pixels of (almost) one colour."""
    return int((np.abs(picture[..., :3] - to_rgb(colour)).max(-1) < 0.02).sum())


def test_the_scores_are_drawn(lines, tmp_path):
    plot_scores(tmp_path / "a.png", "title", summarize(lines))
    picture = image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 1200
    assert min(count(picture, colour) for colour in COLOURS[:2]) > 500
    assert count(picture, COLOURS[2]) == 0, "two initialisations, two colours"
    assert count(picture, "#666666") > 500


def test_one_axis_and_one_seed_are_enough(lines, tmp_path):
    few = [line for line in lines if line["axes"]["seed"] == "0" and line["axes"].pop("init") == "lower"]
    plot_scores(tmp_path / "a.png", "title", summarize(few))
    picture = image.imread(tmp_path / "a.png")
    assert count(picture, COLOURS[0]) > 300


def test_score_is_drawn_against_speed(lines, tmp_path):
    summary = summarize(lines)
    file = tmp_path / "b.png"
    assert not plot_speed(file, "title", summary, {})
    assert not file.exists()
    speeds = {"student 3 x 8": timing(90.0), "teacher 6 x 8": timing(50.0)}
    assert plot_speed(file, "title", summary, speeds)
    picture = image.imread(file)
    points = [count(picture, colour) for colour in COLOURS[:2]]
    assert min(points) > 300
    right = picture[:, picture.shape[1] // 2 :]
    assert [count(right, colour) for colour in COLOURS[:2]] == pytest.approx(points)
    left = picture[:, : picture.shape[1] // 2]
    assert count(left, "#666666") > 100, "the teacher is slower"

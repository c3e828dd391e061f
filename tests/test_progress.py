"""Progress: silent where it is quick, plain lines in a file, a bar on a terminal, one process of a job."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest

from dsdistill import progress
from dsdistill.progress import Progress, each, figure, waiting


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when it is told to."""
    now = [1000.0]
    monkeypatch.delenv("RANK", raising=False)  # a test before this one may have joined a job
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_what_is_quick_says_nothing(clock, capsys):
    for _ in each(range(19), "reading", 19, unit="row"):
        clock(0.1)
    assert capsys.readouterr() == ("", "")


def test_a_file_gets_plain_lines_at_growing_intervals_of_at_most_a_minute(clock, capsys):
    with Progress("reading", 400, unit="row") as told:
        for second in range(1, 301):
            clock(1.0)
            told.to(second, f"loss {second}")
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    steps = [int(re.search(r" (\d+)/400 ", line)[1]) for line in lines]
    assert steps == [2, 4, 8, 16, 32, 64, 124, 184, 244, 300]  # the last at its end
    assert lines[4] == "reading:   8% 32/400 [00:32<06:08,  1.00row/s, loss 32]"


def test_rate_and_remaining_time_do_not_count_what_was_done_before(clock, capsys):
    with Progress("training", 100, unit="step", start=60) as told:
        clock(10.0)
        told.to(80)
    assert "80% 80/100 [00:10<00:10,  2.00step/s" in capsys.readouterr().err


def test_bytes_are_told_in_larger_units(clock, capsys):
    with Progress("reading", 4e9, unit="B") as told:
        clock(2.0)
        told.to(1e9)
    assert "25% 1.00G/4.00G [00:02<00:06, 500MB/s" in capsys.readouterr().err


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"SLURM_PROCID": "3"}])
def test_other_processes_of_a_job_say_nothing(clock, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Progress("reading", 10, unit="row") as told, waiting("loading"):
        clock(99.0)
        told.to(5)
    assert capsys.readouterr().err == ""


def test_what_cannot_say_how_far_it_is_tells_how_long_it_takes(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_S", 0.05)
    monkeypatch.setattr(progress, "BEAT_S", 0.02)
    with waiting("loading a/model"):
        time.sleep(0.2)
    told = capsys.readouterr().err
    time.sleep(0.1)
    assert told.startswith("loading a/model: 00:00\n")
    assert capsys.readouterr().err == ""  # nothing beats after the end


def test_a_failure_passes_through(clock, capsys):
    def work():
        for number in each(range(10), "reading", 10, unit="row"):
            clock(3.0)
            if number == 5:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert "50% 5/10" in capsys.readouterr().err.splitlines()[-1]


ON_A_TERMINAL = """
from dsdistill import progress
progress.FIRST_S = progress.BEAT_S = 0.0
with progress.Progress("reading", 10, unit="row") as told:
    told.to(4, "loss 0.5")
    progress.note("a line between")
    told.to(10, "loss 0.25")
print("result")
"""


def test_a_terminal_sees_one_bar_and_notes_above_it():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    done = subprocess.run([sys.executable, "-c", ON_A_TERMINAL], stderr=theirs, stdout=subprocess.PIPE, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.stdout == b"result\n"
    assert "\ra line between" in re.sub(r"\r +\r", "\r", shown)
    last = shown.rstrip().rpartition("\r")[2]
    assert re.match(r"reading: 100%\|.*\| 10/10 \[.*loss 0.25\]", last)
    assert shown.count("\n") == 2  # after the note, and after the bar


def test_small_numbers_keep_their_digits():
    assert [figure(x) for x in (3.55881, 0.0, 3.29e-05, -0.0004)] == ["3.5588", "0.0000", "3.29e-05", "-4.00e-04"]

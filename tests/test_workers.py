"""What tests start and read is started and read whole."""

import sys

from tests.workers import start, wait

TALK = """
import os, pathlib, sys, time
said = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "1":
    print("x" * 300_000)
    said.touch()
while not said.exists():
    time.sleep(0.02)
"""


def test_a_rank_that_says_more_than_a_pipe_holds_does_not_stop_the_others(tmp_path):
    assert len(wait(start([sys.executable, "-c", TALK, str(tmp_path / "said")], 2), timeout=20)) > 300_000

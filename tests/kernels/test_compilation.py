import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.workers import ROOT

pytest.importorskip("triton")

ALL = list(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize(
    ("measures", "lengths", "widths", "masks"),
    [
        (["kl"], [1024], [64], [(True, True)]),
        pytest.param(["kl", "mse"], [128, 1024], [32, 64, 128], ALL, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_an_h100_without_one(measures, lengths, widths, masks, tmp_path):
    """Into machine code, within its shared memory; what they compute is tested elsewhere."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_h100", json.dumps([measures, lengths, widths, masks])],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {tuple(json.loads(line)) for line in done.stdout.splitlines()}
    assert len(compiled) == 3 * len(measures) * len(masks)  # and programs

"""The commands and the Python of the README and the guides, run as they stand.

In a copy of the repository whose recipes take two steps, with what a reader brings. Paths under /shared are those of
the copy; `ssh`, `sbatch` and `srun` run what they are given on this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from dsdistill.training.dist import free_port
from tests.docs.blocks import Block, Command, blocks, commands, guides
from tests.docs.stand_ins import shorten, shorten_grid, workspace
from tests.workers import ROOT

NOT_RUN = {
    "make test": "it is the suite that this test belongs to",
}
"""Commands that are not run here, and why. Their targets, options and files are checked by test_commands.py."""

STUBS = {
    # another launcher may be at work on this machine
    "deepspeed": 'exec "{venv}/bin/deepspeed" --master_port "$(cat port)" "$@"',
    "ssh": 'while [[ $1 == -* ]]; do shift 2; done\nshift\nexec "$@"',
    "sbatch": 'while [[ $1 == --* ]]; do shift; done\nSLURM_JOB_ID=1 exec bash "$@"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 exec "$@"',
}


class Machine:
    """Runs blocks in a workspace."""

    def __init__(self, root: Path):
        self.root = root
        replace_programs(root / ".venv")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{root}/.venv/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "USER": "me",
        }

    def run(self, command: Command) -> None:
        """A command, which must end with 0; a server must answer."""
        text = self.inside(command.text)
        (self.root / "port").write_text(free_port())
        if command.words[0] == "tensorboard" or command.words[-1].endswith("tensorboard.sbatch"):
            self.serve(command)
            return
        done = self.shell(["bash", "-c", text])
        assert done.returncode == 0, f"{command.place}: {text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def inside(self, text: str) -> str:
        return text.replace("/shared/", f"{self.root}/shared/")

    def shell(self, words: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )

    def serve(self, command: Command) -> None:
        """Start TensorBoard on a port of its own and ask for its page."""
        port = free_port()
        own = f" --port {port}" if command.words[0] == "tensorboard" else ""
        process = subprocess.Popen(
            ["bash", "-c", self.inside(command.text.partition("#")[0]) + own],
            cwd=self.root,
            env={**self.environment, "PORT": port},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, f"{command.place}: ended with {process.returncode}"
                assert time.monotonic() < deadline, f"{command.place}: does not answer"
                try:
                    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read()
                except OSError:
                    time.sleep(0.5)
                else:
                    assert b"TensorBoard" in page
                    return
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def python(self, block: Block) -> None:
        """Code as a reader would paste it."""
        done = self.shell(["python", "-c", block.text])
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def replace_programs(venv: Path) -> None:
    """Make the link to an environment a directory of links, with our programs in place of some."""
    real = venv.resolve()
    venv.unlink()
    (venv / "bin").mkdir(parents=True)
    for path in (*real.iterdir(), *(real / "bin").iterdir()):
        if path.name not in ("bin", *STUBS):
            (venv / path.relative_to(real)).symlink_to(path)
    for name, text in STUBS.items():
        program = venv / "bin" / name
        program.write_text("#!/bin/bash\n" + text.replace("{venv}", str(real)) + "\n")
        program.chmod(0o755)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    root = workspace(tmp_path_factory.mktemp("real"))
    shorten(root)
    shorten_grid(root)
    return Machine(root)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", guides())
def test_commands_run_as_they_stand(page, machine):
    """In the order of the guides: what one makes, later ones use."""
    start_anew(page, machine.root)
    for block in blocks(page, machine.root):
        if block.language == "python":
            machine.python(block)
        for command in commands(block) if block.language == "sh" else ():
            if " ".join(command.words) not in NOT_RUN:
                machine.run(command)


def start_anew(page: str, root: Path) -> None:
    """The README stands by itself, and so do the guides together."""
    if page == "README.md":
        (root / "shared/data").symlink_to(root / "data")
    elif page == guides()[1]:
        (root / "shared/data").unlink(missing_ok=True)
        for made in ("runs", "data/mine", "shared/runs"):
            shutil.rmtree(root / made, ignore_errors=True)


@pytest.mark.slow
def test_the_objective_of_the_guide_trains(machine):
    """Its Python in a module, its YAML in a recipe."""
    page = blocks("docs/extending.md", machine.root)
    code = next(b for b in page if b.language == "python" and "@objective" in b.text)
    part = next(b for b in page if b.language == "yaml" and "my_objectives:" in b.text)
    (machine.root / "my_objectives.py").write_text(code.text)
    recipe = (machine.root / "launch/recipes/minilm.yaml").read_text()
    kept = re.sub(r"objectives:\n(?:[- ].*\n)+", part.text, recipe)
    assert "my_objectives" in kept
    (machine.root / "launch/recipes/mine.yaml").write_text(kept)
    told = "--set teacher.model=path/or/hub-name --set corpus.directory=data/mine --set output=runs/own_objective"
    command = "python launch/pretrain_distill.py --ds_config ds_configs/zero0.json --recipe launch/recipes/mine.yaml "
    command += told
    machine.run(Command(place="docs/extending.md", text=command, variables={}, words=tuple(command.split())))
    assert (machine.root / "runs/own_objective/model/config.json").is_file()


def test_what_is_not_run_stands_in_the_guides():
    shell = [block for page in guides() for block in blocks(page, ROOT) if block.language == "sh"]
    told = {" ".join(command.words) for block in shell for command in commands(block)}
    assert set(NOT_RUN) <= told

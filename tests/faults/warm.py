"""A process that has imported everything and forks jobs from itself, so that a job starts in no time.

A job is a script with its arguments, or a function of a test's workers with its arguments in JSON.

What it forks are processes of their own: with a session, an output file and an exit code, killed like any others.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tests.workers import ROOT, environment

SCRIPTS = ("pretrain_distill", "task_distill")


class Forked:
    """A forked process, used as a `subprocess.Popen`."""

    def __init__(self, pid: int, code: Path):
        self.pid, self.code = pid, code

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        try:
            return int(self.code.read_text() or "x")
        except (OSError, ValueError):  # not there, or not written yet
            return None

    def wait(self, timeout: float = 100) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Warm:
    """The process that forks."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm", str(directory)],
            cwd=ROOT,
            env={name: value for name, value in environment(0, 1, "0").items() if name != "MASTER_PORT"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments: list[str], variables: dict[str, str], log: TextIO) -> Forked:
        """Fork a process; `arguments` begin with the path of a script, or with `module:function`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"arguments": arguments, "environment": variables, "log": f"/proc/{os.getpid()}/fd/{log.fileno()}"}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        return Forked(pid, self.directory / str(pid))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def serve(directory: Path) -> None:
    """Fork for each line of the input; write down how each process ended, in a file named by its number."""
    answers = os.fdopen(os.dup(1), "w")
    scripts = {name: load(name) for name in SCRIPTS}
    import dsdistill.pretrain
    import dsdistill.task_distill  # noqa: F401

    rest, running = b"", set[int]()
    while True:
        if select.select([0], [], [], 0.01)[0]:
            read = os.read(0, 65536)
            if not read:
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                pid = fork(json.loads(line), scripts)
                running.add(pid)
                print(pid, file=answers, flush=True)
        for pid in list(running):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                (directory / str(pid)).write_text(str(code))
                running.remove(pid)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fork(order: dict[str, Any], scripts: dict[str, Any]) -> int:
    """A new process that runs a script as `python script ...` would."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.read(reader, 1)  # until it has its own session
        os.close(reader)
        return pid
    os.setsid()
    os.close(writer)
    os.close(reader)
    for path, flags, *numbers in ((os.devnull, os.O_RDONLY, 0), (order["log"], os.O_RDWR | os.O_APPEND, 1, 2)):
        opened = os.open(path, flags)
        for number in numbers:
            os.dup2(opened, number)
        os.close(opened)
    os.environ.update(order["environment"])
    sys.argv = order["arguments"]
    from dsdistill.training import signals

    code = 1
    try:
        signals.install()
        module, _, function = sys.argv[0].partition(":")
        if function:
            getattr(importlib.import_module(module), function)(**json.loads(sys.argv[1]))
            code = 0
        else:
            code = scripts[Path(sys.argv[0]).stem].main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

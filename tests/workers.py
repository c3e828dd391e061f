"""Real processes for tests: `run_workers` starts N of them on this machine, each calls one function."""

import importlib
import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsdistill.training.dist import free_port

ROOT = Path(__file__).resolve().parents[1]


def environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def start(command: list[str], world_size: int) -> list[subprocess.Popen]:
    """Start one process per rank, output kept."""
    port = free_port()
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def wait(processes: list[subprocess.Popen], timeout: float = 280) -> str:
    """All output; fails unless every process ended well.

    Read at once: a rank whose pipe is full waits, and the others for it.
    """
    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=timeout)[0], processes))
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(output[-4000:] for output in outputs)
    return "\n".join(outputs)


def run_workers(function: str, world_size: int, **arguments: Any) -> str:
    """Call `module:function(**arguments)` in `world_size` processes that can reach each other."""
    return wait(start([sys.executable, "-m", "tests.workers", function, json.dumps(arguments)], world_size))


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    try:
        getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # other ranks may wait for this one for ever, and it for them

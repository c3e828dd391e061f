"""A worker process: takes runs one after the other, so that imports and the start of CUDA are paid once.

It reads one JSON line per run from its input and answers with JSON lines; what a run prints goes to a log of its own.
It ends when its input ends, that is, also when whoever started it was killed.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from dsdistill.compare.kinds import Kind, find_object, is_done
from dsdistill.training import signals
from dsdistill.training.one_job import lock_of

BEAT_S = 2.0
"""A worker that says nothing for many times this long is stopped or stuck."""


def serve() -> None:
    """Do what comes in until the input ends; leave after the first failure, since nobody knows what it left behind."""
    signals.install()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    telling = threading.Lock()

    def tell(**message: Any) -> None:
        with telling:
            print(json.dumps(message), file=answers, flush=True)

    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    threading.Thread(target=_beat, args=(tell,), daemon=True).start()
    while True:
        order = orders.get()
        _redirect(Path(order["log"]))
        try:
            work(order, tell)
        except (signals.StoppedError, SystemExit):
            tell(event="stopped")
            os._exit(signals.STOPPED)
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            tell(event="failed", error=sentence(error))
            os._exit(1)  # other threads of a broken run may never end
        tell(event="done")
        _clean()


def work(order: dict[str, Any], tell: Any) -> None:
    """Do one run unless it is done; wait while another process is at it.

    Raises:
        RuntimeError: If the run ends without its last file.
    """
    kind = Kind(**order["kind"])
    recipe = find_object(kind.check)(order["recipe"], order["id"])
    with lock_of(recipe.output):
        tell(event="started")
        if is_done(kind, recipe.output):
            return
        find_object(kind.run)(recipe, order["ds_json"], resume="auto", dry_run=False)
        if not is_done(kind, recipe.output):
            raise RuntimeError(f"the run ended without {kind.last_file} in {recipe.output}")


def sentence(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())[:2000]
    return text if isinstance(error, ValueError | FloatingPointError) and text else f"{type(error).__name__}: {text}"


def _listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(1)


def _beat(tell: Any) -> None:
    pause = threading.Event()
    while not pause.wait(BEAT_S):
        try:
            tell(event="beat")
        except BrokenPipeError:
            os._exit(1)


def _redirect(log: Path) -> None:
    """Send what this process prints to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _clean() -> None:
    """Give memory of the last run back."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    serve()

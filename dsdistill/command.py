"""The command line that all training commands share: its arguments, its errors as sentences, its exit codes.

Imports nothing heavy before it is called: a signal may come while torch is being imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdistill.training import signals

BAD_INPUT, FAULT = 2, 1
EXIT_CODES = """\
exit codes of each process:
  0  done    1  fault    2  bad input, nothing was started
  3  stopped by Ctrl-C, SIGTERM or SIGUSR1: the step in work and the next were finished and saved, and the same
     command goes on from there; a second Ctrl-C stops at once

The deepspeed launcher passes a code of 3 on, but itself ends with 1 when it is signalled: it then sends SIGTERM to
one process after the other and kills what is left after 30 s. Signal the processes instead (scancel, srun), or start
them without it.
"""


def parse_arguments(
    description: str, examples: str, *, recipe: Path | None, mlm_head: bool = False
) -> argparse.Namespace:
    """The command line.

    Args:
        description: What the command does.
        examples: Shown by `--help`.
        recipe: Used if none is given; None asks for one.
        mlm_head: Whether the command can fit a masked-LM head first.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds_config", required=True, type=Path, help="DeepSpeed JSON: how the run runs")
    parser.add_argument(
        "--recipe", type=Path, default=recipe, required=recipe is None, help="YAML, or a run directory to repeat"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value of the recipe"
    )
    parser.add_argument(
        "--resume", default="auto", help="auto (the default), never, or the path of a checkpoint to go on from"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    if mlm_head:
        parser.add_argument(
            "--fit_mlm_head",
            action="store_true",
            help="first train a masked-LM head on the frozen teacher, which has none (teacher.mlm_head says how)",
        )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def quiet_libraries() -> None:
    """Leave standard error to our own progress and to warnings."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, every step


def all_or_every_problem(*readers: Callable[[], Any]) -> list[Any]:
    """What the readers return.

    Raises:
        ValueError: With the problems of all of them.
    """
    results, problems = [], []
    for reader in readers:
        try:
            results.append(reader())
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return results


def execute(arguments: argparse.Namespace, read: Callable[[Path, list[str]], Any], run: Callable[..., None]) -> int:
    """Check everything that was given, run, and turn what went wrong into a sentence.

    Args:
        arguments: From `parse_arguments`.
        read: Makes a recipe of a path and overrides.
        run: Takes the recipe, the DeepSpeed JSON, and the keywords `resume` and `dry_run`.

    Returns:
        The exit code.
    """
    from dsdistill.config.deepspeed import read_deepspeed_json
    from dsdistill.training.watchdog import LostRankError

    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    quiet_libraries()
    resume = arguments.resume if arguments.resume in ("auto", "never") else Path(arguments.resume)
    try:
        recipe, ds_json = all_or_every_problem(
            lambda: read(arguments.recipe, arguments.set), lambda: read_deepspeed_json(arguments.ds_config)
        )
        run(recipe, ds_json, resume=resume, dry_run=arguments.dry_run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (FloatingPointError, LostRankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAULT
    except signals.StoppedError as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return signals.STOPPED
    return 0

"""What all commands share: help with groups, defaults and examples, errors as sentences, exit codes.

Imports nothing heavy before it is called: help comes at once, and a signal may come while torch is being imported.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdistill.training import signals

BAD_INPUT, FAULT = 2, 1
INTERRUPTED = 128 + signal.SIGINT

ON_REQUEST = (
    "stopped by Ctrl-C, SIGTERM or SIGUSR1: the step in work and the next were finished and saved, and the same "
    "command goes on from there; a second Ctrl-C stops at once"
)
LAUNCHER = """\
These are the codes of each process. The deepspeed launcher passes a code of 3 on, but itself ends with 1 when it is
signalled: it then sends SIGTERM to one process after the other and kills what is left after 30 s. Signal the
processes instead (scancel, srun), or start them without it.
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Texts as they stand, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def make_parser(
    description: str, examples: str, *, fault: str = "a fault", stopped: str | None = None, more: str = ""
) -> argparse.ArgumentParser:
    """A parser whose help ends with examples and exit codes.

    Args:
        description: What the command does.
        examples: Two or more, each as it is typed, a longer one on lines that end with a backslash.
        fault: What exit code 1 means.
        stopped: What exit code 3 means; None if nothing is saved when the command is stopped.
        more: Said after the exit codes.
    """
    codes = {0: "done", FAULT: fault, BAD_INPUT: "bad arguments or input, told in a sentence; nothing was started"}
    codes |= {signals.STOPPED: stopped} if stopped is not None else {INTERRUPTED: "stopped by Ctrl-C"}
    lines = [
        textwrap.fill(what, 110, initial_indent=f"  {code:<3}  ", subsequent_indent=" " * 7)
        for code, what in codes.items()
    ]
    shown = textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    epilog = "\n".join(["examples:", shown, "", "exit codes:", *lines, *(["", more] if more else [])])
    return argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=Help)


def training_parser(
    description: str, examples: str, *, recipe: Path | None, mlm_head: bool = False
) -> argparse.ArgumentParser:
    """The command line that all training commands share.

    Args:
        description: What the command does.
        examples: Shown by `--help`.
        recipe: Used if none is given; None asks for one.
        mlm_head: Whether the command can fit a masked-LM head first.
    """
    fault = "a fault: a loss that is not finite, a rank that is gone, a disk that is full"
    parser = make_parser(description, examples, fault=fault, stopped=ON_REQUEST, more=LAUNCHER)
    science = parser.add_argument_group("what is learned")
    science.add_argument(
        "--recipe", type=Path, default=recipe, required=recipe is None, help="YAML, or a run directory to repeat"
    )
    science.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a value of the recipe; may be repeated",
    )
    if mlm_head:
        science.add_argument(
            "--fit_mlm_head",
            action="store_true",
            help="first train a masked-LM head on the frozen teacher, which has none (teacher.mlm_head says how)",
        )
    machine = parser.add_argument_group("how it runs")
    machine.add_argument("--ds_config", required=True, type=Path, help="DeepSpeed JSON, such as ds_configs/zero2.json")
    machine.add_argument("--resume", default="auto", help="auto, never, or the path of a checkpoint to go on from")
    machine.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def quiet_libraries() -> None:
    """Leave standard error to our own progress and to warnings, and standard output to results.

    Must come before DeepSpeed is imported: its log goes where standard output leads at that moment.
    """
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401
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


def exit_code(act: Callable[[], int | None], *, goes_on: bool = False) -> int:
    """Do what a command is for, and turn what went wrong into a sentence.

    Args:
        act: Does it; returns an exit code, or None for 0.
        goes_on: Whether the same command goes on where Ctrl-C stopped it.

    Returns:
        The exit code.
    """
    try:
        return act() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAULT
    except RuntimeError as error:
        from dsdistill.training.watchdog import LostRankError

        if not isinstance(error, LostRankError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAULT
    except signals.StoppedError as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return signals.STOPPED
    except KeyboardInterrupt:
        print(f"stopped{'; the same command goes on from here' if goes_on else ''}", file=sys.stderr)
        return signals.STOPPED if goes_on else INTERRUPTED


def execute(arguments: argparse.Namespace, read: Callable[[Path, list[str]], Any], run: Callable[..., None]) -> int:
    """Check everything that was given, and run; after `quiet_libraries`.

    Args:
        arguments: Of a `training_parser`.
        read: Makes a recipe of a path and overrides.
        run: Takes the recipe, the DeepSpeed JSON, and the keywords `resume` and `dry_run`.

    Returns:
        The exit code.
    """
    from dsdistill.config.deepspeed import read_deepspeed_json

    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))

    def act() -> None:
        resume = arguments.resume if arguments.resume in ("auto", "never") else Path(arguments.resume)
        recipe, ds_json = all_or_every_problem(
            lambda: read(arguments.recipe, arguments.set), lambda: read_deepspeed_json(arguments.ds_config)
        )
        run(recipe, ds_json, resume=resume, dry_run=arguments.dry_run)

    return exit_code(act)

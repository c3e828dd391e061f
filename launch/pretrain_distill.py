"""Task-agnostic distillation: `deepspeed launch/pretrain_distill.py --ds_config ds_configs/zero2.json`."""

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

RECIPES = Path(__file__).parent / "recipes"
BAD_INPUT, FAULT = 2, 1
EPILOG = """\
examples:
  deepspeed launch/pretrain_distill.py --ds_config ds_configs/zero2.json
  deepspeed --num_gpus 2 launch/pretrain_distill.py --ds_config ds_configs/zero2.json
      --recipe launch/recipes/minilmv2.yaml --set corpus.directory=data/mine --set teacher.model=path/to/bert

exit codes of each process:
  0  done    1  fault    2  bad input, nothing was started
  3  stopped by Ctrl-C, SIGTERM or SIGUSR1: the step in work and the next were finished and saved, and the same
     command goes on from there; a second Ctrl-C stops at once

The deepspeed launcher passes a code of 3 on, but itself ends with 1 when it is signalled: it then sends SIGTERM to
one process after the other and kills what is left after 30 s. Signal the processes instead (scancel, srun), or start
them without it.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Distil an encoder on unlabelled text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds_config", required=True, type=Path, help="DeepSpeed JSON: how the run runs")
    parser.add_argument(
        "--recipe", type=Path, default=RECIPES / "quickstart.yaml", help="YAML, or a run directory to repeat"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value of the recipe"
    )
    parser.add_argument(
        "--resume", default="auto", help="auto (the default), never, or the path of a checkpoint to go on from"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
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


def main() -> int:
    """Parse, check, run."""
    arguments = parse_arguments()
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    quiet_libraries()
    from dsdistill.config.deepspeed import read_deepspeed_json
    from dsdistill.config.recipe import read_recipe
    from dsdistill.pretrain import run
    from dsdistill.training.watchdog import LostRankError

    resume = arguments.resume if arguments.resume in ("auto", "never") else Path(arguments.resume)
    try:
        recipe, ds_json = all_or_every_problem(
            lambda: read_recipe(arguments.recipe, arguments.set), lambda: read_deepspeed_json(arguments.ds_config)
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


if __name__ == "__main__":
    signals.install()  # before torch is imported: SLURM does not wait for that
    sys.exit(main())

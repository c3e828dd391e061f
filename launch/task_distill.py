"""Distillation on a task: `deepspeed launch/task_distill.py --ds_config ds_configs/zero1.json --recipe ...`."""

from __future__ import annotations

import argparse
import sys

from dsdistill.command import execute, quiet_libraries, training_parser
from dsdistill.training import signals

EXAMPLES = r"""
deepspeed launch/task_distill.py --ds_config ds_configs/zero1.json --recipe launch/recipes/glue/att_kl.yaml \
    --set task=sst2 --set data.directory=data/glue
deepspeed launch/task_distill.py --ds_config ds_configs/zero1.json --recipe launch/recipes/glue/fine_tuning.yaml \
    --set task=mine --set data.train=train.csv --set data.dev=dev.csv \
    --set student.init=null --set student.init_from=runs/mine/model
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    what = "Distil, or fine-tune, an encoder on a task with labels, export the student and score it."
    return training_parser(what, EXAMPLES, recipe=None)


def main() -> int:
    """Parse, check, run."""
    arguments = parser().parse_args()
    quiet_libraries()
    from dsdistill.config.recipe import read_task_recipe
    from dsdistill.task_distill import run

    return execute(arguments, read_task_recipe, run)


if __name__ == "__main__":
    signals.install()  # before torch is imported: SLURM does not wait for that
    sys.exit(main())

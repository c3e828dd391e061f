"""Task-agnostic distillation: `deepspeed launch/pretrain_distill.py --ds_config ds_configs/zero2.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import execute, quiet_libraries, training_parser
from dsdistill.training import signals

QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"
EXAMPLES = r"""
deepspeed launch/pretrain_distill.py --ds_config ds_configs/zero2.json
deepspeed --num_gpus 2 launch/pretrain_distill.py --ds_config ds_configs/zero2.json \
    --recipe launch/recipes/minilmv2.yaml --set corpus.directory=data/mine --set teacher.model=path/to/bert
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    what = "Distil an encoder on unlabelled text, export the student and compare it with its teacher."
    return training_parser(what, EXAMPLES, recipe=QUICKSTART, mlm_head=True)


def main() -> int:
    """Parse, check, run."""
    arguments = parser().parse_args()
    quiet_libraries()
    from dsdistill import mlm_head, pretrain
    from dsdistill.config.recipe import read_recipe

    return execute(arguments, read_recipe, mlm_head.run if arguments.fit_mlm_head else pretrain.run)


if __name__ == "__main__":
    signals.install()  # before torch is imported: SLURM does not wait for that
    sys.exit(main())

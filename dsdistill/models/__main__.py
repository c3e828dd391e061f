"""`python -m dsdistill.models` prints the table of families; `--update docs/families.md` puts it there."""

from dsdistill.models.family_table import MARKERS, families_table
from dsdistill.objectives.table import print_or_update

if __name__ == "__main__":
    print_or_update("python -m dsdistill.models", __doc__, families_table(), MARKERS)

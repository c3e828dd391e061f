"""`python -m dsdistill.objectives` prints the table of objectives; `--update docs/objectives.md` puts it there."""

from dsdistill.objectives.table import MARKERS, markdown_table, print_or_update

if __name__ == "__main__":
    print_or_update("python -m dsdistill.objectives", __doc__, markdown_table(), MARKERS)

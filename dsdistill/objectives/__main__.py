"""`python -m dsdistill.objectives` prints the table of objectives."""

from dsdistill.objectives.table import markdown_table

if __name__ == "__main__":
    print(markdown_table(), end="")

"""`python -m dsdistill.objectives` prints the table of objectives; `--update README.md` puts it there."""

import argparse
from pathlib import Path

from dsdistill.objectives.table import markdown_table, with_table


def main() -> None:
    """Parse, then print or update."""
    parser = argparse.ArgumentParser(prog="python -m dsdistill.objectives", description=__doc__)
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="replace the table between the markers of this file"
    )
    file = parser.parse_args().update
    if file is None:
        print(markdown_table(), end="")
        return
    try:
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {error}")


if __name__ == "__main__":
    main()

"""The table of objectives in docs/ is the one that the program prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsdistill.objectives.table import MARKERS, markdown_table, with_table

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_table_is_current():
    document = PAGE.read_text(encoding="utf-8")
    assert with_table(document, markdown_table()) == document, (
        "run: python -m dsdistill.objectives --update docs/objectives.md"
    )


def update(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsdistill.objectives", "--update", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_old_table_is_replaced_and_the_rest_stays(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"# Title\n\n{MARKERS[0]}\n| an old | table |\n{MARKERS[1]}\nend\n", encoding="utf-8")
    assert update(file).returncode == 0
    assert file.read_text(encoding="utf-8") == f"# Title\n\n{MARKERS[0]}\n{markdown_table()}{MARKERS[1]}\nend\n"


@pytest.mark.parametrize("text", ["none\n", f"{MARKERS[0]}\n", f"{MARKERS[1]}\n{MARKERS[0]}\n"])
def test_a_file_without_a_pair_of_markers_is_left_alone(tmp_path, text):
    file = tmp_path / "page.md"
    file.write_text(text, encoding="utf-8")
    done = update(file)
    assert done.returncode == 2
    assert "<!-- objectives -->" in done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_text(encoding="utf-8") == text

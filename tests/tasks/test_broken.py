"""Broken task files: refused in one sentence that names the file, and the line where there is one."""

import gzip
import json
import lzma
import random
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsdistill.tasks.settings import DataSettings
from dsdistill.tasks.task import open_task
from tests.tasks.glue_files import FOLDERS, sentences, write_glue

ROWS = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(sentences(6, seed=4))]


def jsonl(rows: list) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def table(rows: list[dict], delimiter: str) -> bytes:
    lines = [delimiter.join(rows[0]), *(delimiter.join(map(str, row.values())) for row in rows)]
    return "\n".join(lines).encode()


def parquet(rows: list[dict] | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def with_row(place: int, **changes) -> list[dict]:
    rows = [dict(row) for row in ROWS]
    rows[place] |= changes
    return rows


CSV, TSV, JSONL, PARQUET = table(ROWS, ","), table(ROWS, "\t"), jsonl(ROWS), parquet(ROWS)
CUT = gzip.compress(random.Random(0).randbytes(9000).hex().encode())[:3000]
LABEL = "label 'c' is not one of task own: a, b"

BROKEN = {  # name: (content, what the message says besides the file)
    "empty.csv": (b"", "empty"),
    "empty.tsv": (b"", "empty"),
    "empty.jsonl": (b"", "empty"),
    "empty.parquet": (b"", "empty"),
    "blank.csv": (b"\n\n\n", "no column 'text'"),
    "blank.jsonl": (b"\n \n", "no row found"),
    "header_only.csv": (b"text,label\n", "no row found"),
    "header_only.tsv": (b"text\tlabel\n", "no row found"),
    "no_rows.parquet": (parquet(pa.table({"text": [], "label": []})), "no row found"),
    "no_text_column.csv": (CSV.replace(b"text", b"body"), "line 1: no column 'text'; the columns are 'body', 'label'"),
    "no_text_column.tsv": (TSV.replace(b"text", b"body"), "line 1: no column 'text'"),
    "no_text_column.jsonl": (JSONL.replace(b'"text"', b'"body"'), "line 1: no column 'text'"),
    "no_text_column.parquet": (parquet([{"body": "x", "label": "a"}]), "no column 'text'"),
    "no_label_column.csv": (CSV.replace(b"label", b"class"), "line 1: no column 'label'"),
    "no_label_column.jsonl": (jsonl([*ROWS[:2], {"text": "film"}]), "line 3: no column 'label'"),
    "no_label_column.parquet": (parquet([{"text": "x"}]), "no column 'label'"),
    "few_fields.csv": (CSV + b"\nfilm", "line 8: 1 fields, but the header has 2"),
    "few_fields.tsv": (TSV + b"\nfilm", "line 8: 1 fields, but the header has 2"),
    "many_fields.csv": (CSV + b"\nfilm,good,a", "line 8: 3 fields, but the header has 2"),
    "many_fields.tsv": (TSV + b"\nfilm\tgood\ta", "line 8: 3 fields, but the header has 2"),
    "unclosed_quote.csv": (CSV + b'\n"film,a\nstory,b', "row from line 8 to line 9"),
    "text_after_quote.csv": (CSV + b'\n"film" x,a', "row from line 8"),
    "carriage_return.tsv": (TSV + b"\nfi\rlm\ta", "row from line 8"),
    "latin1.csv": (CSV + b"\ncaf\xe9,a", "not UTF-8 at line 8"),
    "latin1.tsv": (TSV + b"\ncaf\xe9\ta", "not UTF-8 at line 8"),
    "latin1.jsonl": (JSONL + b'\n{"text": "caf\xe9"}', "not UTF-8 at line 7"),
    "utf16.csv": (CSV.decode().encode("utf-16"), "line 1"),
    "zero_byte.csv": (CSV + b"\nfi\0lm,a", "zero byte at line 8"),
    "zero_byte.tsv": (TSV + b"\nfi\0lm\ta", "zero byte at line 8"),
    "zero_byte.jsonl": (jsonl(with_row(3, text="fi\0lm")), "line 4: binary data"),
    "zero_byte.parquet": (parquet(with_row(3, text="fi\0lm")), "row 4: binary data"),
    "surrogate.jsonl": (JSONL + b'\n{"text": "\\ud800", "label": "a"}', "line 7: half a surrogate pair"),
    "surrogate_label.jsonl": (JSONL + b'\n{"text": "x", "label": "\\ud800"}', "line 7: half a surrogate pair"),
    "not_json.jsonl": (JSONL + b'\n{"text": ', "line 7: not JSON"),
    "long_number.jsonl": (JSONL + b'\n{"text": "x", "label": ' + b"1" * 5000 + b"}", "line 7: not JSON"),
    "deep.jsonl": (JSONL + b"\n" + b"[" * 100_000, "line 7: not JSON"),
    "list.json": (b'["film", "a"]', "line 1: a JSON list"),
    "whole_file.json": (json.dumps(ROWS, indent=1).encode(), "line 1: not JSON"),
    "number_text.jsonl": (jsonl(with_row(2, text=3)), "line 3: column 'text' holds int"),
    "list_text.jsonl": (jsonl(with_row(2, text=["film"])), "line 3: column 'text' holds list"),
    "number_text.parquet": (parquet([{"text": 3, "label": "a"}]), "row 1: column 'text' holds int"),
    "empty_text.csv": (table(with_row(4, text=""), ","), "line 6: column 'text' has no text"),
    "empty_text.tsv": (table(with_row(4, text=" "), "\t"), "line 6: column 'text' has no text"),
    "empty_text.jsonl": (jsonl(with_row(4, text="\u3000")), "line 5: column 'text' has no text"),
    "null_text.jsonl": (jsonl(with_row(4, text=None)), "line 5: column 'text' has no text"),
    "null_text.parquet": (parquet(with_row(4, text=None)), "row 5: column 'text' has no text"),
    "empty_label.csv": (table(with_row(4, label=""), ","), "line 6: no label"),
    "empty_label.tsv": (table(with_row(4, label=""), "\t"), "line 6: no label"),
    "null_label.jsonl": (jsonl(with_row(4, label=None)), "line 5: no label"),
    "null_label.parquet": (parquet(with_row(4, label=None)), "row 5: no label"),
    "list_label.jsonl": (jsonl(with_row(4, label=["a"])), "line 5: label ['a'] is a list, not a class name"),
    "real_label.jsonl": (jsonl(with_row(4, label=0.5)), "line 5: label 0.5 is a float, not a class name"),
    "nan_label.jsonl": (JSONL + b'\n{"text": "x", "label": NaN}', "line 7: label nan is a float"),
    "infinite_label.jsonl": (JSONL + b'\n{"text": "x", "label": Infinity}', "line 7: label inf is a float"),
    "tab_label.jsonl": (jsonl(with_row(4, label="a\tb")), "line 5: label 'a\\tb' holds a tab"),
    "date_label.parquet": (parquet([{"text": "x", "label": date(2020, 1, 1)}]), "row 1: label"),
    "not_gzip.csv.gz": (CSV, "damaged or cut .gz"),
    "cut.tsv.gz": (CUT, "damaged or cut .gz"),
    "not_xz.jsonl.xz": (JSONL, "damaged or cut .xz"),
    "cut.jsonl.xz": (lzma.compress(random.Random(0).randbytes(9000).hex().encode())[:3000], "damaged or cut .xz"),
    "not_zstd.csv.zst": (CSV, "damaged or cut .zst"),
    "not.parquet": (CSV, "cannot be read as Parquet"),
    "cut.parquet": (PARQUET[: len(PARQUET) // 2], "cannot be read as Parquet"),
    "plain.txt": (CSV, "neither .csv, .tsv, .jsonl, .json nor .parquet"),
    "no_suffix": (CSV, "neither .csv"),
}
BROKEN_IN_DEV = {
    "unknown_label.csv": (CSV + b"\nfilm,c", f"line 8: {LABEL}"),
    "unknown_label.tsv": (TSV + b"\nfilm\tc", f"line 8: {LABEL}"),
    "unknown_label.jsonl": (jsonl(with_row(2, label="c")), f"line 3: {LABEL}"),
    "unknown_label.parquet": (parquet(with_row(2, label="c")), f"row 3: {LABEL}"),
    "number_out_of_range.jsonl": (jsonl(with_row(2, label=2)), "line 3: label '2' is not one of task own"),
    "negative_number.jsonl": (jsonl(with_row(2, label=-1)), "line 3: label '-1' is not one of task own"),
    "capital_label.csv": (CSV + b"\nfilm,A", "line 8: label 'A' is not one of task own"),
}


def refusal(name: str, settings: DataSettings, tokenizer) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the text is compared by the caller
        open_task(name, settings, tokenizer)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("name", "split"), [*((n, s) for n in BROKEN for s in ("train", "dev")), *((n, "dev") for n in BROKEN_IN_DEV)]
)
def test_broken_own_files_are_refused_by_file_and_line(tmp_path, tokenizer, name, split):
    content, expected = {**BROKEN, **BROKEN_IN_DEV}[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(JSONL)
    files = {"train": tmp_path / "good.jsonl", "dev": tmp_path / "good.jsonl", split: tmp_path / name}
    message = refusal("own", DataSettings(**files), tokenizer)
    assert str(tmp_path / name) in message
    assert expected in message


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("x\tfilm\tstory\t5.001", "label 5.001 is out of range; it must be from 0.0 to 5.0"),
        ("x\tfilm\tstory\t-0.1", "label -0.1 is out of range"),
        ("x\tfilm\tstory\tnan", "label 'nan' is not a number"),
        ("x\tfilm\tstory\tinf", "label 'inf' is not a number"),
        ("x\tfilm\tstory\t", "label '' is not a number"),
        ("x\tfilm\tstory\ttwo", "label 'two' is not a number"),
        ("x\tfilm\t\t1", "column 'sentence2' has no text"),
        ("x\t \tstory\t1", "column 'sentence1' has no text"),
        ("x\tfilm\tstory", "3 fields, but the header has 4"),
    ],
)
def test_broken_rows_of_sts_b_are_refused_by_line(tmp_path, tokenizer, cells, expected):
    folder = write_glue(tmp_path, "stsb")
    header = "index\tsentence1\tsentence2\tscore"
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(f"{header}\n0\tfilm\tplot\t2.5\n1\tplot\tend\t1\n")
    with (folder / "dev.tsv").open("a") as file:
        file.write(cells + "\n")
    message = refusal("stsb", DataSettings(directory=folder), tokenizer)
    assert message.startswith(f"{folder / 'dev.tsv'}: line 4: ")
    assert expected in message


@pytest.mark.parametrize("name", FOLDERS)
def test_labels_out_of_range_are_refused_in_every_glue_task(tmp_path, tokenizer, name):
    folder = write_glue(tmp_path, name)
    path = folder / ("dev_mismatched.tsv" if name == "mnli" else "dev.tsv")
    lines = path.read_text().splitlines()
    wrong = "maybe" if name in ("mnli", "rte", "qnli") else "7"
    column = {"cola": 1, "mrpc": 0}.get(name, -1)
    cells = lines[3].split("\t")
    cells[column] = wrong
    path.write_text("\n".join([*lines[:3], "\t".join(cells), *lines[4:]]))
    message = refusal(name, DataSettings(directory=folder), tokenizer)
    assert message.startswith(f"{path}: line 4: label ")
    assert wrong in message


def test_files_that_are_none(tmp_path, tokenizer):
    (tmp_path / "good.jsonl").write_bytes(JSONL)
    (tmp_path / "folder.csv").mkdir()
    for name in ("missing.csv", "folder.csv"):
        settings = DataSettings(train=tmp_path / "good.jsonl", dev=tmp_path / name)
        assert refusal("own", settings, tokenizer) == f"{tmp_path / name}: no such file"


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_is_read_or_refused_but_never_worse(tmp_path, tokenizer, seed):
    rng = random.Random(seed)
    (tmp_path / "good.jsonl").write_bytes(JSONL)
    whole = {"a.csv": CSV, "a.tsv": TSV, "a.jsonl": JSONL, "a.parquet": PARQUET, "a.tsv.gz": gzip.compress(TSV)}
    for name, content in whole.items():
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = tmp_path / name
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(1, len(damaged))])])
        settings = DataSettings(train=tmp_path / "good.jsonl", dev=path, skip_broken=bool(seed % 2))
        assert outcome(settings, tokenizer) in ("whole", str(path))


def outcome(settings: DataSettings, tokenizer) -> str:
    """ "whole", or the file that the refusal names."""
    try:
        open_task("own", settings, tokenizer)
    except ValueError as error:
        return next((str(path) for path in settings.dev or () if str(path) in str(error)), str(error))
    return "whole"

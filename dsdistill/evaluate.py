"""Speed and size of a student beside its teacher, measured and written into the student's model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel
from transformers.utils.hub import cached_file

from dsdistill.corpus.files import write_text
from dsdistill.locate import Source
from dsdistill.models.families import drop_pooler, max_length
from dsdistill.progress import waiting
from dsdistill.speed import Measured, Timing, measure

MODEL, CARD, SPEED = "model", "README.md", "speed.json"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
MIB = 2**20


def evaluate(
    target: str,
    *,
    teacher: str | None,
    lengths: Sequence[int],
    batches: Sequence[int],
    devices: Iterable[torch.device],
    budget_s: float = 2.0,
) -> str:
    """Measure a student and its teacher; a student in a local directory gets the table into its card, and speed.json.

    Args:
        target: Run directory, model directory, hub name, or package:<import name>.
        teacher: The same for the teacher; by default the one of the run directory's recipe, else none.
        lengths: Tokens per row.
        batches: Rows per call.
        devices: Where to measure.
        budget_s: About how long each measurement may take.

    Returns:
        The table, in Markdown.

    Raises:
        ValueError: If a model cannot be read, or takes no rows of these lengths.
    """
    student, of_recipe = find_models(target)
    source = Source(model=teacher) if teacher is not None else of_recipe
    sources = {"teacher": source, "student": student} if source is not None else {"student": student}
    devices = list(devices)
    models = {
        who: measure_model(source, lengths=lengths, batches=batches, devices=devices, budget_s=budget_s)
        for who, source in sources.items()
    }
    table = describe(models)
    directory = Path(student.model)
    if directory.is_dir():
        content = {who: asdict(model) for who, model in models.items()}
        write_text(directory / SPEED, json.dumps(content, indent=1) + "\n")
        write_card(directory / CARD, table)
    return table


def find_models(target: str) -> tuple[Source, Source | None]:
    """A model, and the teacher of the recipe if the model is that of a run directory.

    Raises:
        ValueError: If a run directory has no exported model.
    """
    recipe = Path(target) / "recipe.yaml"
    if not recipe.is_file():
        return Source(model=target), None
    if not (Path(target) / MODEL / "config.json").is_file():
        raise ValueError(f"{target} is a run directory without an exported {MODEL}/; export it first")
    import yaml

    teacher = yaml.safe_load(recipe.read_text(encoding="utf-8"))["teacher"]
    known = {key: teacher[key] for key in ("model", "revision", "trust_remote_code") if key in teacher}
    return Source(model=str(Path(target) / MODEL)), Source(**known)


def measure_model(
    source: Source,
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    devices: Iterable[torch.device],
    budget_s: float,
) -> Measured:
    """Size and speed of one encoder, heads and pooler left out of the timing.

    Raises:
        ValueError: If it cannot be read, or takes no rows of these lengths.
    """
    arguments = source.arguments()
    try:
        config = AutoConfig.from_pretrained(**arguments)
        with waiting(f"loading {source.model}"):
            model = AutoModel.from_pretrained(**arguments, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"model {source.model!r} cannot be read ({first_line}); give a directory or a name") from error
    longest = max_length(config)
    if longest is not None and max(lengths) > longest:
        raise ValueError(f"model {source.model!r} takes rows of at most {longest} tokens, not {max(lengths)}")
    drop_pooler(model)
    files = weight_files(source)
    timings = [
        timing
        for device in devices
        for timing in measure(model, device, lengths=lengths, batches=batches, budget_s=budget_s)
    ]
    return Measured(
        name=source.model,
        layers=getattr(config, "num_hidden_layers", None),
        width=getattr(config, "hidden_size", None),
        parameters=saved_parameters(files) or sum(p.numel() for p in model.parameters()),
        bytes=sum(file.stat().st_size for file in files),
        timings=timings,
    )


def weight_files(source: Source) -> list[Path]:
    """The files of a model's weights: safetensors, or torch's if there are none.

    Raises:
        ValueError: If there are neither.
    """
    arguments = source.arguments()
    config = cached_file(arguments["pretrained_model_name_or_path"], "config.json", revision=arguments["revision"])
    directory = Path(str(config)).parent
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{directory} holds no weights")
    return files


def saved_parameters(files: Iterable[Path]) -> int:
    """Numbers in the floating-point tensors of safetensors files; 0 for other files."""
    total = 0
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 (no mapping)
                total += sum(
                    int(torch.Size(part.get_shape()).numel()) for part in slices if "F" in str(part.get_dtype())
                )
    return total


def describe(models: Mapping[str, Measured]) -> str:
    """Sizes and timings of the models side by side, in Markdown."""
    names = list(models)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [
        _row("model", [f"`{Path(m.name).name if Path(m.name).is_dir() else m.name}`" for m in models.values()]),
        _row("layers x width", [f"{m.layers} x {m.width}" for m in models.values()]),
        _row("parameters", [f"{m.parameters:,}" for m in models.values()]),
        _row("file size, MiB", [f"{m.bytes / MIB:.1f}" for m in models.values()]),
    ]
    ratio = ["speed-up"] if "teacher" in models else []
    head = ["device", "batch", "length"]
    head += [f"{name} ms (p90)" for name in names] + [f"{name} rows/s" for name in names] + ratio
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for timings in zip(*(model.timings for model in models.values()), strict=True):
        first = timings[0]
        latencies = [f"{t.median_ms:.2f} ({t.p90_ms:.2f})" for t in timings]
        throughputs = [f"{t.rows_per_s:,.1f}" for t in timings]
        faster = [f"{timings[0].median_ms / timings[1].median_ms:.2f}" for _ in ratio]
        lines.append(_row(where(first), [str(first.batch), str(first.length), *latencies, *throughputs, *faster]))
    lines += ["", "Median latency of a call (nine of ten calls are faster than p90) and rows per second at the median,"]
    lines += ["after a warm-up, synchronised; encoder without head, rows without padding."]
    return "\n".join(lines)


def where(timing: Timing) -> str:
    """Device, number type and threads."""
    threads = f", {timing.threads} threads" if timing.threads else ""
    return f"{timing.device}, {timing.dtype}{threads}"


def _row(name: str, fields: Sequence[Any]) -> str:
    return f"| {' | '.join([name, *map(str, fields)])} |"


def write_card(card: Path, table: str, *, name: str = "speed", title: str = "Speed and size") -> None:
    """Put a table into a model card between its markers: in place of an older one, before the recipe, or last."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    begin, end = (mark.replace("speed", name) for mark in (BEGIN, END))
    section = f"{begin}\n## {title}\n\n{table}\n{end}\n"
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end) + r"\n?", re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section, text, count=1)
    elif "\n## Recipe\n" in text:
        before, _, after = text.partition("\n## Recipe\n")
        text = f"{before}\n{section}\n## Recipe\n{after}"
    else:
        text = f"{text.rstrip()}\n\n{section}".lstrip()
    write_text(card, text)

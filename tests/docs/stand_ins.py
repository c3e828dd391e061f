"""What a reader of the guides brings: text, teachers, labelled rows, scored pairs. Small, and named as there."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import BertConfig, BertForMaskedLM, BertModel

from tests.conftest import WORDS, train_wordpiece
from tests.workers import ROOT

TEACHER, HEADLESS, ENCODER = Path("path/or/hub-name"), Path("path/or/encoder"), Path("path/or/sentence-encoder")
GLUE_PAIRS = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2")
MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(6, 14)))


def texts(root: Path) -> None:
    """Documents of a few lines, enough for held-out rows at the default share."""
    draw = random.Random(0)
    (root / "texts").mkdir()
    documents = ("\n".join(sentence(draw) for _ in range(3)) for _ in range(2500))
    (root / "texts" / "all.txt").write_text("\n\n".join(documents) + "\n")
    (root / "lines.txt").write_text("".join(sentence(draw) + "\n" for _ in range(60)))


def teachers(root: Path) -> None:
    """A small BERT with a masked-LM head, one without, and a sentence encoder; a small vocabulary."""
    torch.manual_seed(0)
    tokenizer = train_wordpiece((root / "texts" / "all.txt").read_text().split("\n\n")[:200])
    tokenizer.model_max_length = 512
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=6, hidden_size=384, intermediate_size=1536)
    model = BertForMaskedLM(config).half()
    for directory, what in ((TEACHER, model), (HEADLESS, model.bert), (ENCODER, model.bert)):
        assert isinstance(what, BertForMaskedLM | BertModel)
        what.save_pretrained(root / directory)
        tokenizer.save_pretrained(root / directory)
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in MODULES.items()]
    listed = [{"idx": number, "name": str(number), **module} for number, module in enumerate(listed)]
    (root / ENCODER / "modules.json").write_text(json.dumps(listed))
    (root / ENCODER / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 384, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (root / ENCODER / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def labelled_rows(root: Path) -> None:
    """Rows of one's own with topics, and GLUE's CoLA and STS-B."""
    draw = random.Random(1)
    for split, count in (("train", 64), ("dev", 16)):
        rows = [f"{sentence(draw)},{draw.choice(['film', 'music', 'books'])}" for _ in range(count)]
        (root / f"{split}.csv").write_text("\n".join(["text,topic", *rows]) + "\n")
    for task in ("CoLA", "STS-B"):
        (root / "data/glue" / task).mkdir(parents=True)
    for split in ("train", "dev"):
        rows = [f"src\t{draw.randint(0, 1)}\t\t{sentence(draw)}" for _ in range(48)]
        (root / "data/glue/CoLA" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        pairs = [[str(i), *"gfy0ab", sentence(draw), sentence(draw), f"{draw.uniform(0, 5):.3f}"] for i in range(48)]
        (root / "data/glue/STS-B" / f"{split}.tsv").write_text(
            "\n".join("\t".join(row) for row in [(*GLUE_PAIRS, "score"), *pairs]) + "\n"
        )


def others(root: Path) -> None:
    """What lies elsewhere: text and tables on a shared disk, a list of machines, the objective of one's own."""
    shutil.copytree(root / "texts", root / "shared/texts")
    (root / "hosts").write_text("localhost slots=1\n")


BROUGHT: tuple[Callable[[Path], None], ...] = (texts, teachers, labelled_rows, others)


def workspace(root: Path) -> Path:
    """The repository's files, copied to an empty directory, and what a reader brings."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".venv").symlink_to(Path(sys.executable).parents[1])
    for bring in BROUGHT:
        bring(root)
    return root


def shorten(root: Path) -> None:
    """Make the recipes of a workspace run for two steps, so that commands can be run as they stand."""
    for path in (root / "launch" / "recipes").rglob("*.yaml"):
        first, _, _ = path.read_text(encoding="utf-8").partition("\n")
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "corpus" in recipe:
            shorten_pretraining(recipe)
        elif "stages" in recipe:
            shorten_task(recipe)
        else:
            continue
        path.write_text(f"{first}\n{yaml.safe_dump(recipe, sort_keys=False)}", encoding="utf-8")


def shorten_grid(root: Path) -> None:
    """Two cells instead of 224."""
    path = root / "launch/recipes/grids/default_teacher.yaml"
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    grid["set"]["stages.*.optimization.epochs"] = 0.5
    objectives = {name: grid["axes"]["objective"][name] for name in ("kd", "att_kl")}
    objectives["kd"]["stages"][0]["optimization"]["epochs"] = 0.5
    init, task = {"lower": {"student.init": "lower"}}, {"cola": {"task": "cola"}}
    grid["axes"] = {"seed": [0], "objective": objectives, "init": init, "task": task}
    path.write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")


def shorten_pretraining(recipe: dict) -> None:
    recipe["optimization"] |= {"steps": 2, "warmup_steps": 0, "global_batch": 4}
    recipe["teacher"]["mlm_head"] = {"steps": 2, "warmup_steps": 0, "global_batch": 4}
    recipe["evaluation"] |= {"every_steps": 2, "rows": 2}
    recipe["checkpoint"]["every_steps"] = 2
    recipe["logging"]["every_steps"] = 1
    if "prepare" in recipe["corpus"]:
        recipe["corpus"]["prepare"]["max_documents"] = 1500
    if recipe["evaluation"].get("sentences"):
        recipe["evaluation"]["sentences"] = {"rows": 10, "neighbours": 3}


def shorten_task(recipe: dict) -> None:
    recipe["teacher"]["fine_tuning"] = {"epochs": 0.2, "global_batch": 8}
    recipe["evaluation"]["every_epochs"] = recipe["checkpoint"]["every_epochs"] = 1
    for stage in recipe["stages"]:
        stage["optimization"] |= {"epochs": 0.2, "global_batch": 8}

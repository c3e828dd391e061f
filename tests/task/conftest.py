"""A task that a tiny encoder can learn, in GLUE's own files and in files of one's own."""

import random
from pathlib import Path

import pytest

from tests.conftest import WORDS


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences and whether "good" outnumbers "bad" in them."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.random() < 0.6
        words = draw.choices([w for w in WORDS if w not in ("good", "bad")], k=draw.randint(3, 9))
        words.insert(draw.randrange(len(words)), "good" if label else "bad")
        made.append((" ".join(words), int(label)))
    return made


@pytest.fixture(scope="session")
def glue_directory(tmp_path_factory) -> Path:
    """CoLA and STS-B in GLUE's layout."""
    root = tmp_path_factory.mktemp("glue")
    for split, count, seed in (("train", 96, 0), ("dev", 37, 1)):
        rows = sentences(count, seed)
        (root / "CoLA").mkdir(exist_ok=True)
        lines = [f"src\t{label}\t\t{text}" for text, label in rows]
        (root / "CoLA" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (root / "STS-B").mkdir(exist_ok=True)
        pairs = ["index genre filename year old_index source1 source2 sentence1 sentence2 score".replace(" ", "\t")]
        for i, (text, label) in enumerate(rows):
            pairs.append("\t".join([str(i), "g", "f", "y", "0", "a", "b", text, rows[i - 1][0], f"{label * 5:.3f}"]))
        (root / "STS-B" / f"{split}.tsv").write_text("\n".join(pairs) + "\n")
    test = ["index\tsentence", *(f"{i}\t{text}" for i, (text, _) in enumerate(sentences(11, 2)))]
    (root / "CoLA" / "test.tsv").write_text("\n".join(test) + "\n")
    return root


@pytest.fixture
def task_content(tmp_path, teacher_directory, glue_directory) -> dict:
    """Plain settings of a short run of two stages."""
    optimization = {"epochs": 1.0, "global_batch": 16, "learning_rate": 0.003}
    return {
        "name": "tiny",
        "seed": 3,
        "output": str(tmp_path / "run"),
        "task": "cola",
        "data": {"directory": str(glue_directory), "max_length": 32},
        "teacher": {
            "model": str(teacher_directory),
            "directory": str(tmp_path / "teachers"),
            "fine_tuning": {"epochs": 10.0, "global_batch": 16, "learning_rate": 0.003},
        },
        "student": {"num_layers": 2, "init": "lower", "dropout": 0.1},
        "stages": [
            {
                "name": "intermediate",
                "objectives": [
                    {"objective": "att_kl", "layers": "init"},
                    {"objective": "hid_seq", "layers": "init", "embeddings": True, "projection": "always"},
                    {"objective": "minilmv2", "relation_heads": 8},
                ],
                "optimization": optimization,
            },
            {
                "name": "prediction",
                "objectives": [{"objective": "kd", "weight": 0.5}, {"objective": "task", "weight": 0.5}],
                "optimization": optimization,
            },
        ],
        "logging": {"every_steps": 3},
        "checkpoint": {"every_epochs": 0.5},
    }

"""Fixtures that stand for what a user has: a pretrained teacher on disk, text, and a recipe. All tiny and random."""

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

WORDS = (
    *("the", "a", "film", "story", "actor", "scene", "great", "poor", "plot", "music"),
    *("long", "short", "end", "begin", "see", "think", "good", "bad", "never", "always"),
)


def pytest_collection_modifyitems(items) -> None:
    """Tests for a GPU are told as skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def write_text(path: Path, documents: int = 120, seed: int = 0) -> Path:
    """Documents separated by blank lines, of words that a small vocabulary covers."""
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(30, 90))) for _ in range(documents))
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def train_wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer of at most 150 tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    ids = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Starts jobs without their imports; None on a GPU, whose driver does not survive a fork."""
    if torch.cuda.is_available():
        yield None
        return
    from tests.faults.warm import Warm

    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory, text) -> Path:
    """A 4-layer BERT with a masked-LM head and its tokenizer."""
    directory = tmp_path_factory.mktemp("teacher") / "tiny-bert"
    torch.manual_seed(0)
    tokenizer = train_wordpiece(text.read_text().split("\n\n"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config)
    for parameter in model.parameters():
        # random weights as small as BERT's would leave nothing to learn from
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory, text, teacher_directory) -> Path:
    """The text prepared for the teacher, rows of 32 tokens."""
    from dsdistill.corpus.prepare import prepare
    from dsdistill.corpus.settings import CorpusSettings

    directory = tmp_path_factory.mktemp("corpus") / "prepared"
    return prepare(
        CorpusSettings(
            input=str(text), tokenizer=str(teacher_directory), output=directory, length=32, held_out=0.2, processes=1
        ),
        progress=False,
    )


@pytest.fixture
def recipe_content(tmp_path, teacher_directory, corpus_directory) -> dict:
    """Plain settings of a short run that uses every kind of signal."""
    return {
        "name": "tiny",
        "seed": 3,
        "output": str(tmp_path / "run"),
        "teacher": {"model": str(teacher_directory)},
        "student": {"num_layers": 2, "init": "uniform", "dropout": 0.1},
        "corpus": {"directory": str(corpus_directory)},
        "objectives": [
            {"objective": "minilmv2", "relation_heads": 8},
            {"objective": "att_kl", "layers": "uniform", "weight": 0.5},
            {"objective": "hid_seq", "layers": "uniform", "embeddings": True, "projection": "always"},
            {"objective": "mlm", "weight": {"from": 1.0, "to": 0.5, "until": 5}},
        ],
        "optimization": {
            "steps": 6,
            "global_batch": 8,
            "learning_rate": 0.001,
            "warmup_steps": 2,
            "gradient_clipping": 1.0,
        },
        "evaluation": {"every_steps": 3, "rows": 8},
        "logging": {"every_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }


@pytest.fixture
def recipe_file(tmp_path, recipe_content) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content))
    return path

"""Made-up text and tiny tokenizers of the three kinds, trained here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings

WORDS = """
river stone walking slowly under bridge because winter evening light remained upon water children running towards
houses mountain teacher student knowledge distils quietly larger smaller models learning again caf\u00e9 na\u00efve
Z\u00fcrich 1984 don't well-known
""".split()  # noqa: SIM905 -- shorter than a list


def make_documents(number: int, *, seed: int = 0, words: int = 40) -> list[str]:
    """Documents of one to three paragraphs of made-up sentences."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(3, 12))).capitalize() + "."

    def paragraph() -> str:
        return " ".join(sentence() for _ in range(rng.integers(1, 2 + words // 8)))

    return ["\n".join(paragraph() for _ in range(rng.integers(1, 4))) for _ in range(number)]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def _save(tokenizer: Tokenizer, directory: Path, name: str, **special: str) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": name, "model_max_length": 512, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory) -> dict[str, Path]:
    """Directories of a WordPiece, a byte-level BPE and a SentencePiece unigram tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    texts = make_documents(300, seed=7)

    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    wordpiece.train_from_iterator(texts, trainer)
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    wordpiece.enable_truncation(16)  # like the default teacher's: must not touch the corpus
    wordpiece.enable_padding(length=16)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    _save(wordpiece, root / "wordpiece", "PreTrainedTokenizerFast", **names)

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_level.train_from_iterator(texts, trainer)
    byte_level.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    names |= {"cls_token": "<s>", "sep_token": "</s>"}
    _save(byte_level, root / "byte_level", "PreTrainedTokenizerFast", **names)

    unigram = root / "unigram"
    unigram.mkdir()
    (root / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        input=str(root / "text.txt"), model_prefix=str(root / "m"), vocab_size=120, model_type="unigram", minloglevel=2
    )
    shutil.move(root / "m.model", unigram / "sentencepiece.bpe.model")
    (unigram / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    (unigram / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    return {name: root / name for name in ("wordpiece", "byte_level", "unigram")}


@pytest.fixture(scope="session")
def wordpiece_dir(tokenizer_dirs) -> Path:
    return tokenizer_dirs["wordpiece"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """200 documents separated by blank lines."""
    return write_documents(tmp_path_factory.mktemp("text") / "text.txt", make_documents(200))


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory, text_file, wordpiece_dir) -> Path:
    """A packed corpus of rows of 32 in several shards; not to be changed by a test."""
    settings = CorpusSettings(
        input=(str(text_file),),
        tokenizer=str(wordpiece_dir),
        output=tmp_path_factory.mktemp("corpus") / "corpus",
        length=32,
        held_out=0.2,
        shard_mb=0.02,
        processes=1,
    )
    return prepare(settings, progress=False)

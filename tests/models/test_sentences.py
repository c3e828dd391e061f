"""Sentence encoders: what their directories say, against sentence-transformers itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from dsdistill.locate import Source
from dsdistill.models.export import export_student
from dsdistill.models.loading import load_encoder, load_tokenizer
from dsdistill.models.sentences import POOLINGS, read_sentence_modules
from dsdistill.models.student import build_student, student_config
from dsdistill.sentence_scores import embedder, nearest, neighbour_agreement, pairs_file, read_pairs
from dsdistill.tasks.rows import tokenize_rows

TEXTS = ["a great film", "the", "long story never begin the end see a poor plot", "music music"]
KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def write_json(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content))


def describe(directory: Path, kinds: dict[str, str] = KINDS, pooling: dict | None = None) -> Source:
    """Make a model's directory one of sentence-transformers."""
    package = "sentence_transformers.models"
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_json(directory / "modules.json", modules)
    write_json(directory / "1_Pooling" / "config.json", {"embedding_dimension": 32, **(pooling or {})})
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": 8})
    return Source(model=str(directory))


@pytest.fixture
def directory(teacher_directory, tmp_path) -> Path:
    return Path(shutil.copytree(teacher_directory, tmp_path / "teacher"))


def encoded(directory: Path) -> np.ndarray:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(TEXTS)


def embedded(source: Source) -> np.ndarray:
    embed, tokenizer, length = embedder(source, torch.device("cpu"))
    return embed(tokenize_rows(TEXTS, None, None, tokenizer, max_length=length))


@pytest.mark.parametrize("mode", POOLINGS)
def test_embeddings_are_those_of_sentence_transformers(directory, mode):
    """The third text is longer than the 8 tokens that the model reads."""
    source = describe(directory, {k: v for k, v in KINDS.items() if v != "Normalize"}, {"pooling_mode": mode})
    modules = read_sentence_modules(source)
    assert modules is not None
    assert (modules.pooling, modules.normalised, modules.max_length) == (POOLINGS[mode], False, 8)
    np.testing.assert_allclose(embedded(source), encoded(directory), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("switch", "pooling"),
    [
        ("pooling_mode_cls_token", "first"),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_length"),
        ("pooling_mode_weightedmean_tokens", "weighted_mean"),
        ("pooling_mode_lasttoken", "last"),
        ("pooling_mode_max_tokens", "max"),
    ],
)
def test_older_files_have_a_switch_for_each_way_of_pooling(directory, switch, pooling):
    modules = read_sentence_modules(describe(directory, pooling={"pooling_mode_mean_tokens": False, switch: True}))
    assert modules is not None
    assert (modules.pooling, modules.normalised, modules.problem) == (pooling, True, None)


def test_an_encoder_in_a_folder_of_its_own(teacher_directory, tmp_path):
    root = tmp_path / "old"
    shutil.copytree(teacher_directory, root / "0_Transformer")
    source = describe(root, {"0_Transformer": "Transformer", "1_Pooling": "Pooling"}, {"pooling_mode": "max"})
    shutil.move(root / "sentence_bert_config.json", root / "0_Transformer")
    modules = read_sentence_modules(source)
    assert modules is not None
    assert modules.max_length == 8
    np.testing.assert_allclose(embedded(source), encoded(root), rtol=1e-4, atol=1e-5)
    export_student(load_encoder(source), load_tokenizer(source), tmp_path / "model", card="# card\n", teacher=source)
    np.testing.assert_allclose(encoded(tmp_path / "model"), encoded(root), rtol=1e-4, atol=1e-5)


def test_a_narrower_student_is_a_sentence_encoder_too(directory, tmp_path):
    source = describe(directory, pooling={"word_embedding_dimension": 32, "pooling_mode_cls_token": True})
    teacher = load_encoder(source)
    config = student_config(teacher.config, 2, None, overrides={"hidden_size": 16, "intermediate_size": 32})
    student = build_student(teacher, config, None, seed=0).eval()
    export_student(student, load_tokenizer(source), tmp_path / "model", card="# card\n", teacher=source)
    vectors = encoded(tmp_path / "model")
    assert vectors.shape == (len(TEXTS), 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    exported = embedded(Source(model=str(tmp_path / "model")))
    lengths = np.linalg.norm(exported, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, exported / lengths, rtol=1e-4, atol=1e-5)


def refused(directory: Path, kinds: dict[str, str] = KINDS, pooling: dict | None = None, **files) -> str:
    source = describe(directory, kinds, pooling)
    for name, content in files.items():
        write_json(directory / f"{name}.json", content)
    modules = read_sentence_modules(source)
    assert modules is not None
    return modules.problem or ""


def test_what_an_encoder_alone_cannot_give_is_refused_by_name(directory, tmp_path):
    assert "through Dense, whose weights" in refused(directory, {**KINDS, "3_Dense": "Dense"})
    assert "built of CLIPModel" in refused(directory, {"": "CLIPModel"})
    assert "pools by mean and max" in refused(directory, pooling={"pooling_mode": ["mean", "max"]})
    assert "do_lower_case" in refused(directory, sentence_bert_config={"do_lower_case": True})
    prompted = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    assert "the prompt 'query'" in refused(directory, config_sentence_transformers=prompted)
    with pytest.raises(ValueError, match="the prompt 'query'"):
        embedder(Source(model=str(directory)), torch.device("cpu"))
    source = Source(model=str(directory))
    export_student(load_encoder(source), load_tokenizer(source), tmp_path / "model", card="# card\n", teacher=source)
    assert not (tmp_path / "model" / "modules.json").exists()


def test_damaged_files_are_refused(directory):
    for content, problem in (("[", "is no JSON"), ("{}", "no list of modules"), ('["a"]', "no list of modules")):
        (directory / "modules.json").write_text(content)
        with pytest.raises(ValueError, match=problem):
            read_sentence_modules(Source(model=str(directory)))


def test_agreement_counts_shared_neighbours():
    teacher = np.eye(5) + 0.1 * np.arange(25).reshape(5, 5)
    assert neighbour_agreement(3 * teacher, teacher, 2) == 1
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2100, 3)), random.normal(size=(2100, 7))
    shared = []
    for i in range(0, 2100, 300):
        sets = []
        for vectors in (student, teacher):
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            order = [j for j in np.argsort(-(unit @ unit[i]), kind="stable") if j != i]
            sets.append(set(order[:5]))
        shared.append(len(sets[0] & sets[1]) / 5)
    chosen = np.arange(0, 2100, 300)
    found = [
        len(set(a) & set(b)) / 5 for a, b in zip(nearest(student, 5)[chosen], nearest(teacher, 5)[chosen], strict=True)
    ]
    assert found == shared


def test_scored_pairs_are_read_from_glues_folders_and_own_files(teacher_directory, tmp_path):
    tokenizer = load_tokenizer(Source(model=str(teacher_directory)))
    table = 'index\tsentence1\tsentence2\tscore\n0\ta "great film\tthe film \t4.5\n1\tmusic\ta scene\t0.25\n'
    (tmp_path / "STS-B").mkdir()
    (tmp_path / "STS-B" / "dev.tsv").write_text(table)
    for path in (tmp_path, tmp_path / "STS-B", tmp_path / "STS-B" / "dev.tsv"):
        rows, likeness = read_pairs(path, tokenizer, max_length=16)
        assert rows.num_rows == 4
        assert likeness.tolist() == [4.5, 0.25]
        assert rows.ids[rows.offsets[2] : rows.offsets[3]].tolist() == tokenizer("the film")["input_ids"]
    with pytest.raises(ValueError, match="no scored sentence pairs"):
        pairs_file(tmp_path / "nothing.tsv")


def test_poolers_do_not_matter(tmp_path, teacher_directory):
    """Weights of a pooler that nobody uses may be missing."""
    BertModel(BertConfig.from_pretrained(teacher_directory), add_pooling_layer=False).save_pretrained(tmp_path)
    load_tokenizer(Source(model=str(teacher_directory))).save_pretrained(tmp_path)
    assert embedded(Source(model=str(tmp_path))).shape == (len(TEXTS), 32)

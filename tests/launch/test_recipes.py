"""Every shipped recipe really runs, on a tiny teacher with a masked-LM head."""

import itertools
import json
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from dsdistill.config.recipe import read_recipe
from dsdistill.corpus.store import Corpus
from dsdistill.plan import make_plan
from dsdistill.sentence_scores import corpus_rows, neighbour_agreement
from dsdistill.summary import export_run, scores_at
from dsdistill.training.dist import find_place
from tests.launch.recipe_workers import PER_RECIPE, RECIPES, cases, pretraining_recipes, short_overrides
from tests.workers import run_workers

NAMES = list(pretraining_recipes())
PROMISED = {
    *("distilbert", "pkd", "tinybert", "mobilebert", "minilm", "minilmv2", "codir"),
    *(f"study/{row}" for row in ("vanilla_kd", "hid_cls_contrast", "hid_cls", "hid_seq", "att_mse", "att_mse_hid_seq")),
    *(f"study/{row}" for row in ("att_kl", "att_kl_hid_seq", "att_kl_val_kl")),
}
WORKER = "tests.launch.recipe_workers:run_all"


def losses_of(teacher: Path, corpus: Path, output: Path, steps: int, stages: list[int]) -> dict[str, list[float]]:
    run_workers(WORKER, 1, teacher=str(teacher), corpus=str(corpus), output=str(output), steps=steps, stages=stages)
    losses = json.loads((output / "losses.json").read_text())
    assert set(losses) == {f"{name} at ZeRO {stage}" for name in cases() for stage in stages}
    return losses


@pytest.mark.multiprocess
def test_every_shipped_recipe_runs(teacher_directory, corpus_directory, tmp_path):
    losses_of(teacher_directory, corpus_directory, tmp_path, 2, [0])
    check_sentence_encoder(tmp_path / str(list(cases()).index("sentence_encoder")), tmp_path / "sts.tsv")


def check_sentence_encoder(run: Path, pairs: Path) -> None:
    """The exported student scores in sentence-transformers as it did at the end of its training."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    in_training = scores_at(run, -1)
    model, teacher = (
        sentence_transformers.SentenceTransformer(str(path), device="cpu")
        for path in (export_run(run), read_recipe(run).teacher.model)
    )
    first, second, likeness = zip(*(line.split("\t") for line in pairs.read_text().splitlines()[1:]), strict=True)
    for encoder, name in ((model, "sts_spearman"), (teacher, "teacher_sts_spearman")):
        cosines = (encoder.encode(first) * encoder.encode(second)).sum(1)
        assert spearmanr(cosines, [float(x) for x in likeness]).statistic == pytest.approx(in_training[name], abs=1e-6)
    rows = corpus_rows(Corpus.open(read_recipe(run).corpus.directory, "held_out"), 30)
    texts = model.tokenizer.batch_decode(
        [rows.ids[a:b] for a, b in itertools.pairwise(rows.offsets)], skip_special_tokens=True
    )
    shared = neighbour_agreement(model.encode(texts), teacher.encode(texts), 3)
    assert shared == pytest.approx(in_training["neighbours_at_3"], abs=1e-6)
    assert 3 / 29 < shared < 1
    card = (run / "model" / "README.md").read_text()
    assert f"| sts_spearman | {in_training['sts_spearman']:.4f} |" in card


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_every_shipped_recipe_learns_in_50_steps(teacher_directory, corpus_directory, tmp_path, stage):
    losses = losses_of(teacher_directory, corpus_directory, tmp_path, 50, [stage])
    print("\n" + "\n".join(f"{name}: {before:.4f} -> {after:.4f}" for name, (before, after) in losses.items()))
    assert not {name: pair for name, pair in losses.items() if not pair[1] < pair[0]}


def test_the_promised_papers_and_rows_are_there_and_say_where_they_are_from():
    assert set(NAMES) >= PROMISED
    for name in NAMES:
        assert "arXiv:" in (read_recipe(RECIPES / f"{name}.yaml").source or ""), name


def test_the_study_rows_share_the_numbers_of_its_table_5():
    rows = [read_recipe(RECIPES / f"{name}.yaml") for name in sorted(PROMISED) if name.startswith("study/")]
    assert len(rows) == 9
    for row in rows:
        settings = row.optimization
        assert settings == rows[0].optimization
        assert (settings.learning_rate, settings.global_batch, settings.steps) == (5e-4, 1024, 100_000)
        assert (settings.betas, settings.eps, settings.weight_decay) == ((0.9, 0.99), 1e-6, 0.01)
        assert (settings.warmup_steps, settings.schedule, settings.gradient_clipping) == (6000, "linear", 0.0)
        assert (row.student.init, row.student.num_layers) == ("random", 6)
        assert {term.layers for term in row.objectives} == {"last"}
        assert row.model_copy(update={"name": "", "source": "", "output": "", "objectives": []}) == rows[0].model_copy(
            update={"name": "", "source": "", "output": "", "objectives": []}
        )


@pytest.mark.parametrize("name", ["distilbert", "pkd", "codir", "mobilebert", "study/vanilla_kd"])
def test_recipes_with_logits_refuse_a_teacher_without_a_head(name, headless_directory, corpus_directory):
    recipe = read_recipe(
        RECIPES / f"{name}.yaml",
        [
            *short_overrides(2),
            *PER_RECIPE.get(name, []),
            f"teacher.model={headless_directory}",
            f"corpus.directory={corpus_directory}",
        ],
    )
    with pytest.raises(ValueError, match=r"no masked-LM head.*use a teacher saved with its head"):
        make_plan(recipe, {}, find_place())


@pytest.fixture(scope="module")
def headless_directory(tmp_path_factory, teacher_directory) -> Path:
    from transformers import AutoModel, AutoTokenizer

    directory = tmp_path_factory.mktemp("headless")
    AutoModel.from_pretrained(teacher_directory).save_pretrained(directory)
    AutoTokenizer.from_pretrained(teacher_directory).save_pretrained(directory)
    return directory

"""A task whose student is of another family than its teacher."""

import json

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.faults.jobs import TASK, Job
from tests.launch.test_family_runs import NARROW, draw_teacher, make_tokenizer
from tests.task.conftest import sentences
from tests.task.test_runs import columns

RELATIONS = {"objective": "minilmv2", "relation_heads": 8}
HIDDEN = {"objective": "hid_seq", "layers": "init", "embeddings": True}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("student", "objectives"),
    [
        ({}, [{"objective": "att_kl", "layers": "init"}, RELATIONS, HIDDEN]),
        ({"resize": "importance", "overrides": NARROW}, [RELATIONS, HIDDEN]),
    ],
    ids=["same shape", "narrower"],
)
def test_a_bert_learns_a_task_from_an_mpnet(student, objectives, task_content, text, tmp_path, warm):
    """The teacher is fine-tuned first; what the student exports is a BERT that predicts what the run told."""
    tokenizer = make_tokenizer("wordpiece", "roberta", tmp_path / "tokenizer", input=(str(text),))
    draw_teacher("mpnet", tokenizer, tmp_path / "mpnet")
    task_content["teacher"]["model"] = str(tmp_path / "mpnet")
    task_content["student"] = {"num_layers": 2, "init": "uniform", "family": "bert", "dropout": 0.1, **student}
    task_content["stages"][0]["objectives"] = objectives
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task_content))
    job = Job(tmp_path / "task.yaml", script=TASK, world_size=2, warm=warm)
    assert job.codes() == [0, 0], job.tails()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher_scores"]["dev"]["matthews"] > 0.3
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.hidden_size == student.get("overrides", {}).get("hidden_size", 32)
    told = columns(tmp_path / "run" / "predictions" / "dev.tsv")
    known = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        rows = known([text for text, _ in sentences(37, 1)], padding=True, return_tensors="pt")
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    expected = np.array([told[f"output {name}"] for name in ("unacceptable", "acceptable")], float).T
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-5)

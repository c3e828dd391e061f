"""A sentence encoder distilled into students of its own and of another family, against the same students without.

    python benchmarks/encoders.py --teacher all-mpnet-base-v2 --corpus data/wikipedia --glue data/glue

trains three students for `--minutes` each, as many at once as `--together` says, with the recipe `sentence_encoder`.
Then the teacher and the students, before distillation (with layers of the teacher) and after it, are scored on STS-B by
the cosine of their embeddings and fine-tuned on two tasks; a Markdown table is printed and `encoders.json` written. The
corpus holds one text a row (`launch/prepare_corpus.py --documents line --rows document --long_documents truncate`);
where it is missing, it is prepared from `--text`. Started again, it goes on with what is not done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDE = "{hidden_size: 384, intermediate_size: 1536, num_attention_heads: 6}"
STUDENTS: dict[str, list[str]] = {
    "mpnet-6x768": ["student.init=uniform"],
    "bert-6x768": ["student.family=bert", "student.init=uniform"],
    "bert-6x384": [
        "student.family=bert",
        "student.init=uniform",
        "student.resize=importance",
        f"student.overrides={WIDE}",
    ],
}
"""What differs from the recipe; the same family, another one, another one and half as wide."""
CALIBRATION_STEPS = 40


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="sentence-transformers directory of the MPNet or BERT kind")
    parser.add_argument("--corpus", type=Path, required=True, help="prepared text, one document a row")
    parser.add_argument("--text", nargs="*", default=[], help="to prepare the corpus from, one text a line")
    parser.add_argument("--glue", type=Path, required=True, help="folder with STS-B and the tasks")
    parser.add_argument("--output", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--layers", type=int, default=6, help="layers of the students")
    parser.add_argument("--overrides", help="config keys of the narrow student, if the teacher is no base model")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "sst2"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each student")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=256, help="rows of a step")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--together", type=int, default=3, help="students trained at once")
    parser.add_argument("--jobs", type=int, default=7, help="models fine-tuned at once")
    parser.add_argument("--gpus", nargs="*", default=[], help="numbers of the GPUs to spread processes over")
    parser.add_argument("--train_rows", type=int, default=8000, help="of a task, the first ones")
    parser.add_argument("--epochs", type=float, default=2.0, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=1, help="of fine-tuning; scores are their means")
    parser.add_argument("--set", action="append", default=[], help="more recipe settings for every student")
    return parser.parse_args()


def call(name: str, arguments: list[str], logs: Path, gpu: str | None) -> None:
    """Run one command of the project; what it says goes to a file.

    Raises:
        RuntimeError: If it fails; names the file.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise RuntimeError(f"{name} ended with {code}; see {log}")


def spread(jobs: list[tuple[str, list[str]]], together: int, arguments: argparse.Namespace) -> None:
    """Run named commands, some at once, on the GPUs in turn."""
    logs = arguments.output / "logs"
    with ThreadPoolExecutor(together) as pool:
        waiting = [
            pool.submit(call, name, command, logs, arguments.gpus[i % len(arguments.gpus)] if arguments.gpus else None)
            for i, (name, command) in enumerate(jobs)
        ]
    for done in waiting:
        done.result()


def settings_of(student: str, steps: int, output: Path, arguments: argparse.Namespace) -> list[str]:
    """Recipe settings of one student."""
    own = STUDENTS[student]
    if arguments.overrides and "student.resize=importance" in own:
        own = [*own[:-1], f"student.overrides={arguments.overrides}"]
    return [
        f"name={student}",
        f"output={output}",
        f"teacher.model={arguments.teacher}",
        "corpus.prepare=null",
        f"corpus.directory={arguments.corpus.resolve()}",
        f"student.num_layers={arguments.layers}",
        *own,
        f"optimization.steps={steps}",
        f"optimization.warmup_steps={steps // 10}",
        f"optimization.global_batch={arguments.batch}",
        f"optimization.learning_rate={arguments.learning_rate}",
        f"evaluation.every_steps={steps}",
        f"evaluation.sentences.sts={arguments.glue.resolve()}",
        f"checkpoint.every_steps={steps}",
        *arguments.set,
    ]


def distil_command(student: str, steps: int, output: Path, arguments: argparse.Namespace) -> list[str]:
    """The command that trains a student."""
    settings = settings_of(student, steps, output, arguments)
    recipe = ROOT / "launch" / "recipes" / "sentence_encoder.yaml"
    return [
        str(ROOT / "launch" / "pretrain_distill.py"),
        *("--ds_config", str(arguments.ds_config), "--recipe", str(recipe)),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def steps_that_fit(arguments: argparse.Namespace) -> dict[str, int]:
    """Steps for each student in its minutes, from a short run of all of them under the same load."""
    if arguments.steps is not None:
        return dict.fromkeys(arguments.students, arguments.steps)
    kept = arguments.output / "steps.json"
    if not kept.is_file():
        few = ["--set", "evaluation.sentences=null", "--set", "evaluation.rows=8", "--set", "logging.every_steps=10"]
        directory = arguments.output / "calibration"
        jobs = [
            (f"calibration-{s}", [*distil_command(s, CALIBRATION_STEPS, directory / s, arguments), *few])
            for s in arguments.students
        ]
        spread(jobs, arguments.together, arguments)
        steps = {}
        for student in arguments.students:
            told = [json.loads(line) for line in (directory / student / "metrics.jsonl").read_text().splitlines()]
            times = [entry["time/step_time_s"] for entry in told if "time/step_time_s" in entry]
            steps[student] = max(20, int(60 * arguments.minutes / min(times[1:])))
        kept.write_text(json.dumps(steps))
    return json.loads(kept.read_text())


def export_untrained(student: str, output: Path, arguments: argparse.Namespace) -> None:
    """The student as it is before distillation, as a model of its own."""
    if (output / "config.json").is_file():
        return
    from dsdistill.config.deepspeed import read_deepspeed_json
    from dsdistill.config.recipe import read_recipe
    from dsdistill.models.export import export_student
    from dsdistill.models.loading import load_tokenizer
    from dsdistill.plan import make_plan
    from dsdistill.pretrain import build_models
    from dsdistill.training.dist import find_place

    settings = settings_of(student, 1, output, arguments)
    recipe = read_recipe(ROOT / "launch" / "recipes" / "sentence_encoder.yaml", settings)
    place = find_place()
    plan = make_plan(recipe, read_deepspeed_json(arguments.ds_config), place)
    model, _ = build_models(plan, place)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_student(model.eval(), load_tokenizer(plan.source), output, card="# Untrained\n", teacher=plan.source)


def sts_of(model: str, glue: Path) -> float:
    """Spearman's correlation of cosines with people's scores on STS-B's development pairs."""
    import torch

    from dsdistill.locate import Source
    from dsdistill.sentence_scores import Probe, embedder, read_pairs

    embed, tokenizer, length = embedder(
        Source(model=model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    pairs, likeness = read_pairs(glue, tokenizer, max_length=length)
    probe = Probe(texts=None, neighbours=1, pairs=pairs, likeness=likeness)
    return probe.scores(embed, None)["sts_spearman"]


def layers_of(model: str) -> int:
    """How many layers a model has."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).num_hidden_layers


def fine_tune(models: dict[str, str], arguments: argparse.Namespace) -> None:
    """Fine-tune every model on every task; those that are done stay."""
    jobs = []
    for name, model in models.items():
        for task in arguments.tasks:
            for seed in range(arguments.seeds):
                output = run_of(name, task, seed, arguments)
                settings = [
                    *(f"task={task}", f"seed={seed}", f"output={output}", f"data.directory={arguments.glue.resolve()}"),
                    *(f"data.train_rows={arguments.train_rows}", f"teacher.model={model}"),
                    *(f"student.num_layers={layers_of(model)}", "student.init=lower"),
                    f"stages.0.optimization.epochs={arguments.epochs}",
                    *(f"evaluation.every_epochs={arguments.epochs}", f"checkpoint.every_epochs={arguments.epochs}"),
                ]
                recipe = ROOT / "launch" / "recipes" / "glue" / "fine_tuning.yaml"
                command = [str(ROOT / "launch" / "task_distill.py"), "--ds_config", str(arguments.ds_config)]
                command += ["--recipe", str(recipe), *(part for s in settings for part in ("--set", s))]
                if not (output / "results.json").is_file():
                    jobs.append((f"{name.replace(' ', '-')}-{task}-{seed}", command))
    spread(jobs, arguments.jobs, arguments)


def run_of(name: str, task: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Where a fine-tuning lies."""
    return (arguments.output / "tasks" / name.replace(" ", "-") / f"{task}-{seed}").resolve()


def score_of(name: str, task: str, arguments: argparse.Namespace) -> tuple[str, float]:
    """The task's metric, and its mean over seeds on the development rows."""
    told = [
        json.loads((run_of(name, task, seed, arguments) / "results.json").read_text())
        for seed in range(arguments.seeds)
    ]
    primary = told[0]["primary"]
    return primary, sum(result["scores"]["dev"][primary] for result in told) / len(told)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each model."""
    names = [name for name in rows[0] if name != "model"]
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [
            "" if row[n] is None else f"{row[n]:.4f}" if isinstance(row[n], float) else f"{row[n]:,}" for n in names
        ]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare, train, score, print."""
    arguments = parse_arguments()
    sys.path.insert(0, str(ROOT))
    began = time.time()
    arguments.output = arguments.output.resolve()
    if Path(arguments.teacher).is_dir():
        arguments.teacher = str(Path(arguments.teacher).resolve())
    if not (arguments.corpus / "manifest.json").is_file():
        script, shape = (
            str(ROOT / "launch" / "prepare_corpus.py"),
            ["--rows", "document", "--long_documents", "truncate"],
        )
        texts = [str(Path(path).resolve()) for path in arguments.text]
        names = ["--tokenizer", arguments.teacher, "--output", str(arguments.corpus.resolve())]
        command = [script, "--input", *texts, "--documents", "line", *shape, "--length", "64", *names]
        call("corpus", command, arguments.output / "logs", None)
    models = {"teacher": arguments.teacher}
    for student in arguments.students:
        models[f"{student} before"] = str(arguments.output / "before" / student)
        export_untrained(student, Path(models[f"{student} before"]), arguments)
    steps = steps_that_fit(arguments)
    trained = {student: arguments.output / "after" / student for student in arguments.students}
    spread(
        [(s, distil_command(s, steps[s], output, arguments)) for s, output in trained.items()],
        arguments.together,
        arguments,
    )
    models |= {f"{student} after": str(output / "model") for student, output in trained.items()}
    fine_tune(models, arguments)
    rows = []
    for name, model in sorted(models.items(), key=lambda entry: entry[0] != "teacher"):
        row: dict[str, Any] = {"model": name, "STS-B spearman": sts_of(model, arguments.glue)}
        for task in arguments.tasks:
            primary, row_score = score_of(name, task, arguments)
            row[f"{task} {primary}"] = row_score
        student = name.rpartition(" ")[0]
        row["steps"] = steps[student] if name.endswith("after") else None
        rows.append(row)
    facts = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "seconds": time.time() - began, "rows": rows}
    (arguments.output / "encoders.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows))
    print(f"\n{facts['seconds']:.0f} s in all; {arguments.output / 'encoders.json'}")


if __name__ == "__main__":
    main()

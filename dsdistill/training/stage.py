"""One stage of a run: engine, checkpoints and telemetry around the loop, from its start or from where it stopped."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from dsdistill.core import NOTHING
from dsdistill.models.capture import Captured, Wanted
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.progress import waiting
from dsdistill.training import run_directory
from dsdistill.training.checkpoint import HEADS, STUDENT, SaveError, load_optimizer, load_weights, save_checkpoint
from dsdistill.training.dist import Place, gather_rows
from dsdistill.training.distiller import Distiller, freeze_unreached
from dsdistill.training.engine import start_engine
from dsdistill.training.graphs import GraphedLosses, GraphedTeacher, is_regular, reason_against
from dsdistill.training.loop import Attempt, Stage, train
from dsdistill.training.pictures import Gallery
from dsdistill.training.teacher_ranks import RemoteTeacher
from dsdistill.training.telemetry import Telemetry
from dsdistill.training.watchdog import Watchdog


def capture_student(student: PreTrainedModel, wanted: Wanted, *, activation_checkpointing: bool) -> Captured:
    """The student wired for capture, in training mode."""
    captured = Captured(student, wanted)
    if activation_checkpointing:
        student.gradient_checkpointing_enable()
        captured.exempt_from_checkpointing()
    return captured.train()


def record_graphs(stage: Stage, distiller: Distiller, notes: list[str]) -> Stage:
    """Let training replay CUDA graphs, of the teacher where it is on this GPU, and of the student where it can be."""
    if not is_regular(stage.probe):
        notes.append("cuda_graphs: not of these rows, whose chosen positions or documents differ in number")
        return stage
    against = reason_against(distiller)
    if against is None:
        distiller.replay = GraphedLosses(distiller)
    else:
        notes.append(f"cuda_graphs: not of the student, because {against}")
    if isinstance(stage.teacher, ResidentTeacher):
        return replace(stage, teacher=GraphedTeacher(stage.teacher))
    return stage


def run_stage(stage: Stage, place: Place, watchdog: Watchdog) -> None:
    """Train a stage to its last step, which is saved; every process must call this.

    Raises:
        StoppedError: If a signal asked the run to stop; what was done is saved.
        FloatingPointError: If losses or gradients are not finite.
        SaveError: If a checkpoint that must be written cannot be.
    """
    distiller = Distiller(
        stage.student,
        stage.terms,
        shape=stage.student_shape,
        teacher=stage.teacher_shape,
        num_examples=stage.num_examples,
        gather=gather_rows,
        seed=stage.pace.seed,
        problem=stage.problem,
    ).to(place.device)
    probe = stage.probe.to(place.device)
    signals = stage.held_out_teacher(probe) if stage.held_out_teacher is not None else NOTHING
    frozen = freeze_unreached(distiller, probe, signals)
    modules = {STUDENT: stage.student.model, HEADS: distiller.heads}
    if stage.checkpoint is not None:
        load_weights(modules, stage.checkpoint)
    if stage.engine_config.get("torch_compile"):
        stage.student.compile_forward()
        if isinstance(stage.teacher, ResidentTeacher | RemoteTeacher):  # signals from disk need no forward
            stage.teacher.compile_forward()
    notes = list(stage.notes)
    if isinstance(stage.tokens_at_peak, str) and stage.tokens_at_peak:
        notes.append(stage.tokens_at_peak)
    if stage.engine_config.get("cuda_graphs") and place.device.type == "cuda":
        stage = record_graphs(stage, distiller, notes)
    watchdog.at("start of the engine")
    with waiting("starting the engine"):
        engine = start_engine(distiller, stage.pace.optimization, stage.engine_config, place)
    first_step, last_step = 0, stage.pace.optimization.steps
    if stage.checkpoint is not None:
        load_optimizer(engine, modules, stage.checkpoint)
        first_step = run_directory.step_of(stage.checkpoint)
    peak = stage.tokens_at_peak if isinstance(stage.tokens_at_peak, float) else None
    telemetry = Telemetry(stage.directory, place, first_step=first_step, last_step=last_step, tokens_at_peak=peak)
    telemetry.text("recipe", stage.recipe.to_yaml())
    for note in notes:
        telemetry.note(note)
    if frozen:
        telemetry.note(f"{len(frozen)} parameters that no objective reaches are frozen, such as {frozen[0]}")
    if stage.checkpoint is not None:
        telemetry.note(f"resumed at step {first_step} from {stage.checkpoint}")
        for change in run_directory.changes(stage.checkpoint, stage.engine_config, place):
            telemetry.note(change)

    def save(step: int) -> bool:
        state = run_directory.state_of(step, stage.recipe, stage.engine_config, place)
        directory, settings = stage.directory / run_directory.CHECKPOINTS, stage.pace.checkpoint
        try:
            with waiting(f"saving step {step}"):
                save_checkpoint(engine, modules, directory, state, keep=settings.keep)
        except SaveError as error:
            if settings.on_failure == "stop" or step == last_step:
                raise
            telemetry.note(f"WARNING: {error}; training goes on, the checkpoints before are kept")
            return False
        return True

    gallery = None
    if stage.pictures is not None:
        compared = [term.pairs for term in stage.terms]
        gallery = Gallery(stage.pictures, engine, stage.student, compared, place, telemetry)
    try:
        train(
            Attempt(
                stage=stage,
                engine=engine,
                save=save,
                place=place,
                telemetry=telemetry,
                watchdog=watchdog,
                first_step=first_step,
                gallery=gallery,
            )
        )
    finally:
        telemetry.close()

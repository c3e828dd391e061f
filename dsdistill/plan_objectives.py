"""What objectives ask of models and text: heads, masks, kernels; checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig

from dsdistill.config.recipe import Recipe
from dsdistill.locate import Source
from dsdistill.models.families import Wanted, added_to_scores, family_of
from dsdistill.training.distiller import BoundTerm

Configs = tuple[PreTrainedConfig, PreTrainedConfig]
"""Of student and teacher."""


def kernel_problems(terms: Iterable[BoundTerm], configs: Configs) -> list[str]:
    """Objectives for which the fused kernel is demanded, but which it cannot compute for these families."""
    biased = [config for config in configs if added_to_scores(config) is not None]
    return [
        f"{term.label}: kernel: fused cannot be used, because {said_of_scores(biased[0])}; use kernel: auto"
        for term in terms
        if biased
        and term.params.get("kernel") == "fused"
        and any("bias" in signals for signals in term.objective.needs(term.params))
    ]


def bias_notes(student: Wanted, teacher: Wanted, configs: Configs) -> list[str]:
    """Which attention scores have a bias and are therefore compared without the fused kernel."""
    named = {
        f"{said_of_scores(config)}: the objectives on them count it, and use the plain implementation"
        for wants, config in zip((student, teacher), configs, strict=True)
        if "bias" in wants
    }
    return sorted(named)


def said_of_scores(config: PreTrainedConfig) -> str:
    """What a family adds to its attention scores, as a sentence."""
    return f"{family_of(config).title} adds {added_to_scores(config)} to its attention scores"


def logit_problems(recipe: Recipe, source: Source, has_head: bool, terms: Iterable[BoundTerm]) -> list[str]:
    """What stands in the way of objectives that read logits.

    Args:
        recipe: What is learned.
        source: The teacher.
        has_head: Whether it has a masked-LM head, as far as it can be known, or one will be made.
        terms: All summands of the loss.
    """
    problems = []
    if not has_head:
        problems.append(missing_head(source))
    reads_labels = any(term.objective.name == "mlm" for term in terms)
    if recipe.masking.probability == 0 and (reads_labels or recipe.masking.targets == "masked"):
        problems.append("masking.probability is 0, but an objective reads logits at masked positions; use 0.15")
    return problems


def output_note(wants: Wanted, num_layers: int) -> str | None:
    """That no objective reads what the student's last layer puts out, which then stays partly untrained; else None.

    Args:
        wants: Signals that objectives read in the student.
        num_layers: Of the student.
    """
    if "logits" in wants or num_layers in wants.get("hidden", ()):
        return None
    return (
        "no objective reads the output of the student's last layer, part of which stays as it began: fine-tune the "
        "student on a task, or add hid_seq (layers: last) before its embeddings are used as they are"
    )


def missing_head(source: Source) -> str:
    """Why a recipe with logits cannot run on this teacher, and what can."""
    return (
        f"{source.model} has no masked-LM head, but an objective reads logits (kd, mlm): add --fit_mlm_head, "
        "which trains one on the frozen encoder first, use a teacher saved with its head, such as "
        "google-bert/bert-base-uncased, or objectives on relations, attention or hidden states"
    )

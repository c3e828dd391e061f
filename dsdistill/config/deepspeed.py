"""The DeepSpeed JSON: how a run runs. Keys are checked, and every "auto" is filled from the recipe and the machine."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsdistill.config.offload import offload_device, offload_problems
from dsdistill.config.problems import nearest
from dsdistill.config.sections import OptimizationSettings

LEARNING_KEYS = {
    "train_batch_size": "optimization.global_batch",
    "gradient_clipping": "optimization.gradient_clipping",
}
"""JSON keys whose home is the recipe: "auto" or absent here."""

MACHINE_KEYS = {
    "train_batch_size": 'rows per optimizer step over all processes; "auto" or absent, the recipe says it',
    "train_micro_batch_size_per_gpu": 'rows per process and forward pass; "auto": as many as make about 32768 tokens '
    "on a GPU and 4096 on a CPU, and divide a process's share of the global batch",
    "gradient_accumulation_steps": 'forward passes per step; "auto" or absent: what the global batch leaves',
    "gradient_clipping": '"auto" or absent, the recipe says it',
    "zero_optimization": "what of the student is spread over the processes, and what leaves the GPU",
    "fp16": "half precision with loss scaling; a CPU trains in float32 and says so",
    "bf16": "half precision with float32's range; a CPU trains in float32 and says so",
    "activation_checkpointing": "how recomputed activations are kept; student.activation_checkpointing switches it on",
    "aio": "reading and writing of NVMe",
    "comms_logger": "DeepSpeed's log of collectives",
    "communication_data_type": "type in which gradients are reduced",
    "compile": "DeepSpeed's own compiler; `torch_compile` is what compiles here",
    "cuda_graphs": "ours. true: the teacher's forward and the student's forward and backward are recorded and replayed",
    "data_types": "types of gradients that are added up, and of parameters",
    "disable_allgather": "of ZeRO 0 with fp16",
    "dump_state": "print the engine's state at its start",
    "flops_profiler": "DeepSpeed's profile of one step",
    "gradient_allreduce_op": "how gradients are reduced",
    "gradient_predivide_factor": "with `prescale_gradients`: gradients are divided by it before they are reduced",
    "log_level": "of DeepSpeed",
    "memory_breakdown": "print memory at every step",
    "prescale_gradients": "divide gradients before they are reduced, not after",
    "steps_per_print": "steps between DeepSpeed's own lines; none unless given",
    "timers": "DeepSpeed's timers; off unless given, since they wait for the device twice a step",
    "torch_autocast": "torch's autocast in place of fp16 and bf16",
    "torch_compile": "ours. true: the forwards of both models are compiled by torch; minutes at the first step",
    "wall_clock_breakdown": "print DeepSpeed's times at every step",
    "zero_allow_untested_optimizer": "let ZeRO take an optimizer that DeepSpeed does not know",
    "zero_force_ds_cpu_optimizer": "with an offloaded optimizer: DeepSpeed's own, which is compiled first; off unless "
    "given, torch's fused AdamW steps on the host",
}
"""Top-level keys of DeepSpeed that make sense here, and two of our own, with what they mean here."""

ELSEWHERE = {
    "optimizer": "the recipe's section `optimization` makes the optimizer",
    "scheduler": "the recipe's `optimization.schedule` makes the schedule",
    "tensorboard": "TensorBoard is always written, into the run directory",
    "wandb": "only TensorBoard is written",
    "csv_monitor": "metrics are in metrics.jsonl of the run directory",
    "pipeline": "encoders are not trained in pipelines here",
    "tensor_parallel": "encoders are not tensor-parallel here",
    "elasticity": "the recipe's global batch holds for any number of processes",
    "amp": "use fp16 or bf16",
    "checkpoint": "checkpoints are sealed as a whole; the recipe's section `checkpoint` says when",
    "data_efficiency": "the recipe decides about data",
    "curriculum_learning": "the recipe decides about data",
}
"""Keys DeepSpeed knows and we refuse, with the reason."""

SECTION_KEYS = {
    "activation_checkpointing": (
        *("partition_activations", "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints"),
        *("synchronize_checkpoint_boundary", "profile"),
    ),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "flops_profiler": (
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed"),
        "output_file",
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
}
"""Keys of the sections for which DeepSpeed has no model."""

TOKENS_PER_MICRO_BATCH = {"cuda": 32768, "cpu": 4096}
"""What `train_micro_batch_size_per_gpu: "auto"` aims at."""


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read and check the keys of a DeepSpeed JSON.

    Raises:
        ValueError: With every problem found.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except OSError as error:
        raise ValueError(f"DeepSpeed JSON {path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"DeepSpeed JSON {path} is no JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"DeepSpeed JSON {path} has the key {error} twice in one section; keep one") from error
    if not isinstance(content, dict):
        raise ValueError(f"DeepSpeed JSON {path} must be an object, got {type(content).__name__}")
    problems = list(_key_problems(content))
    if problems:
        raise ValueError(f"{path} has {len(problems)} problem(s):\n" + "\n".join(f"  {p}" for p in problems))
    return content


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would take the last of several."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def _key_problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if key in ELSEWHERE:
            yield f"{key}: not set here; {ELSEWHERE[key]}"
        elif key not in MACHINE_KEYS:
            yield f"{key}: unknown key{nearest(key, MACHINE_KEYS)}; DeepSpeed would ignore it silently"
        elif key in LEARNING_KEYS and value != "auto":
            yield f'{key}: {value!r} is set here and in the recipe ({LEARNING_KEYS[key]}); write "auto"'
    for key, section in section_models().items():
        if key in content:
            problems = list(_section_problems(key, content[key], section))
            yield from problems or _value_problems(key, content[key], section)
    for key, names in SECTION_KEYS.items():
        section = content.get(key, {})
        if not isinstance(section, dict):
            yield f"{key}: must be an object, got {section!r}"
            continue
        for name in section:
            if name not in names:
                yield f"{key}.{name}: unknown key{nearest(name, names)}; DeepSpeed would ignore it silently"
    zero = content.get("zero_optimization", {})
    for key in ("torch_compile", "cuda_graphs"):
        value = content.get(key, False)
        if not isinstance(value, bool):
            yield f"{key}: must be true or false, got {value!r}"
        elif value and isinstance(zero, dict) and zero.get("stage") == 3:
            yield f"{key}: cannot be used with ZeRO 3, which collects weights between modules; use ZeRO 0, 1 or 2"
    if isinstance(zero, dict):
        yield from offload_problems(zero)
    fp16, bf16 = (content.get(key, {}) for key in ("fp16", "bf16"))
    if isinstance(fp16, dict) and isinstance(bf16, dict) and fp16.get("enabled") and bf16.get("enabled"):
        yield "fp16 and bf16 are both enabled; choose one"


def section_models() -> dict[str, Any]:
    """DeepSpeed's own pydantic models of the sections we use, which know all keys of this release."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
    }


def _section_problems(path: str, content: Any, model: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"{path}: must be an object, got {content!r}"
        return
    names = [name for field, info in model.model_fields.items() for name in {field, info.alias or field}]
    for key, value in content.items():
        if key not in names:
            yield f"{path}.{key}: unknown key{nearest(key, names)}"
            continue
        field = model.model_fields.get(key)
        for inner in getattr(field.annotation, "__args__", ()) if field else ():
            if isinstance(value, dict) and hasattr(inner, "model_fields"):
                yield from _section_problems(f"{path}.{key}", value, inner)
    if "stage" in content and content["stage"] not in (0, 1, 2, 3):
        yield f"{path}.stage: must be 0, 1, 2 or 3, got {content['stage']!r}"


def _value_problems(path: str, content: Mapping[str, Any], model: Any) -> Iterator[str]:
    """What DeepSpeed's own model of a section says about values, "auto" left to it."""
    try:
        model(**content)
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, (path, *problem["loc"])))
            yield f"{where}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"


def fill_auto(
    content: Mapping[str, Any],
    optimization: OptimizationSettings,
    *,
    world_size: int,
    device_type: str,
    row_length: int,
) -> tuple[dict[str, Any], list[str]]:
    """The JSON as DeepSpeed gets it.

    Args:
        content: From `read_deepspeed_json`.
        optimization: The recipe's section.
        world_size: Processes.
        device_type: `cuda` or `cpu`; a CPU trains in float32 whatever the JSON asks for.
        row_length: Tokens per row, for the automatic micro-batch.

    Returns:
        The filled JSON, and what was decided, one line each.

    Raises:
        ValueError: If the batch arithmetic does not come out.
    """
    filled, notes = copy.deepcopy(dict(content)), []
    if device_type == "cpu":
        for key in ("fp16", "bf16"):
            if filled.get(key, {}).get("enabled"):
                notes.append(f"{key} is for GPUs: this CPU trains in float32 instead, without loss scaling")
                filled[key] = {"enabled": False}
        if filled.get("cuda_graphs"):
            notes.append("cuda_graphs is for GPUs: this CPU runs kernel by kernel")
    per_process, rest = divmod(optimization.global_batch, world_size)
    if rest or not per_process:
        raise ValueError(
            f"optimization.global_batch={optimization.global_batch} cannot be split over {world_size} processes; "
            f"use a multiple of {world_size}"
        )
    micro = filled.get("train_micro_batch_size_per_gpu", "auto")
    if micro == "auto":
        most = max(1, TOKENS_PER_MICRO_BATCH[device_type] // row_length)
        micro = max(m for m in range(1, min(most, per_process) + 1) if per_process % m == 0)
        notes.append(f"micro-batch: {micro} rows per process, {per_process // micro} micro-batch(es) a step")
    if not isinstance(micro, int) or micro < 1 or per_process % micro:
        raise ValueError(
            f"train_micro_batch_size_per_gpu={micro!r} does not divide the {per_process} rows of each process "
            f"(global_batch {optimization.global_batch} / {world_size} processes)"
        )
    accumulation = filled.get("gradient_accumulation_steps", "auto")
    if accumulation not in ("auto", per_process // micro):
        raise ValueError(
            f"gradient_accumulation_steps={accumulation!r} contradicts global_batch {optimization.global_batch} = "
            f'{world_size} processes x {micro} rows x {per_process // micro}; write "auto"'
        )
    zero = filled.get("zero_optimization", {})
    if world_size == 1 and zero.get("overlap_comm") and zero.get("stage") in (1, 2):
        notes.append("overlap_comm is off: a single process has nobody to send to, and would wait after every backward")
        zero["overlap_comm"] = False
    filled["train_batch_size"] = optimization.global_batch
    filled["train_micro_batch_size_per_gpu"] = micro
    filled["gradient_accumulation_steps"] = per_process // micro
    filled["gradient_clipping"] = optimization.gradient_clipping
    zero = filled.get("zero_optimization", {})
    if offload_device(zero, "offload_optimizer") != "none":
        # torch's fused AdamW steps on the host; DeepSpeed's own for that must first be compiled on every machine
        filled.setdefault("zero_force_ds_cpu_optimizer", False)
    filled.setdefault("steps_per_print", 2**31)
    # it waits for the device twice a step, for numbers that nobody sees; ours are in metrics.jsonl
    filled.setdefault("timers", {"throughput": {"enabled": False}})
    return filled, notes

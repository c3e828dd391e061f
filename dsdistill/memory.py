"""Predicts the peak of a GPU's memory as torch's allocator counts it.

From what one micro-batch holds (`tracing`), and how DeepSpeed 0.19.8 keeps weights, gradients and optimizer. Letters: N
trained weights, F frozen ones, P processes that train, w bytes of a weight in the models (2 or 4). The peak is what is
there all the time, and the largest of three phases: the teacher's forward, the student's forward and backward, the
optimizer's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsdistill.tracing import Side, Trace
from dsdistill.training.placement import Kind
from dsdistill.training.sharded_teacher import LAYERS_AHEAD

WORKSPACE_BYTES = 64 * 2**20
"""What cuBLAS asks for on a GPU, once for each of two streams."""

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What decides how DeepSpeed keeps a student.

    Attributes:
        stage: Of ZeRO.
        processes: That train.
        weight_bytes: Of a weight in the models: 2 in fp16 and bf16, else 4.
        accumulation: Micro-batches per step.
        bucket: Gradients that are reduced at a time, in elements.
        buckets: How many buffers of that size there are.
        optimizer_offloaded: Whether the optimizer and the float32 weights are on a CPU or on NVMe.
        weights_offloaded: The same for a sharded student's weights.
        live: Weights that ZeRO 3 keeps gathered, at most.
        graphs: Whether steps are recorded: teacher and student then have memory that the other cannot use.
    """

    stage: int
    processes: int
    weight_bytes: int
    accumulation: int
    bucket: int
    buckets: int
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False
    live: int = 0
    graphs: bool = False

    @staticmethod
    def of(config: Mapping[str, Any], *, processes: int, weight_bytes: int) -> Engine:
        """From a filled DeepSpeed JSON."""
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        overlaps = zero.get("overlap_comm", stage == 3)
        contiguous = zero.get("contiguous_gradients", True)

        def offloaded(key: str) -> bool:
            return zero.get(key, {}).get("device", "none") != "none"

        return Engine(
            stage=stage,
            processes=processes,
            weight_bytes=weight_bytes,
            accumulation=config["gradient_accumulation_steps"],
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=0 if stage == 0 or not contiguous else 2 if overlaps and stage < 3 else 1,
            optimizer_offloaded=offloaded("offload_optimizer"),
            weights_offloaded=offloaded("offload_param"),
            live=int(zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", 1e9))),
            graphs=bool(config.get("cuda_graphs")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU; the first five are there in all three phases, the others when they are needed.

    Attributes:
        weights: Of the student.
        optimizer: Adam's state, and the weights in float32.
        teacher: Weights of the teacher that are here.
        gradients: Kept from one micro-batch to the next, or in ZeRO 3's own place.
        buffers: For reduction, and what the libraries ask for.
        signals: What the teacher said.
        activations: The most that the student and its objectives hold, weights that ZeRO 3 gathers included.
        teacher_work: The most that the teacher's forward holds.
        step_work: The most that the optimizer's step holds.
        graphs: Whether the last three have memory of their own each.
    """

    weights: int
    optimizer: int
    teacher: int
    gradients: int
    buffers: int
    signals: int
    activations: int
    teacher_work: int
    step_work: int
    graphs: bool = False

    @property
    def peak(self) -> int:
        """The most at a time."""
        always = self.weights + self.optimizer + self.teacher + self.gradients + self.buffers + self.signals
        if self.graphs:
            return always + self.activations + self.teacher_work + self.step_work
        return always + max(self.activations, self.teacher_work, self.step_work)


def predict_memory(trace: Trace, engine: Engine, placement: Kind) -> Memory:
    """The peak of a GPU that trains.

    Args:
        trace: What one micro-batch holds.
        engine: How DeepSpeed keeps the student.
        placement: Where the teacher lives.
    """
    N, F, P, w = trace.student.trained, trace.student.frozen, engine.processes, engine.weight_bytes
    sharded = P if engine.stage >= 1 else 1
    weights, gathered = w * (N + F), 0
    gradients = w * N if engine.accumulation > 1 else 0
    buffers = engine.buckets * engine.bucket * w
    # float32 copies of the weights, which ZeRO keeps in float32 too, and two moments
    optimizer = (12 if w == 2 or engine.stage >= 1 else 8) * N // sharded
    # gradients in float32, beside those they are made of and their flat copy
    step_work = (4 * N if w == 2 else 0) if engine.stage == 0 else (4 + 2 * w) * N // sharded
    if engine.stage == 0 and engine.accumulation == 1:
        step_work += w * N
    if engine.stage == 2:
        gradients //= P
    if engine.stage == 3:
        weights = 0 if engine.weights_offloaded else weights // P
        gathered = w * min(engine.live, N + F)
        gradients = w * N // P
        step_work = (4 + w) * N // P
    if engine.optimizer_offloaded:
        optimizer, step_work = 0, w * N // sharded
    teacher = trace.teacher
    return Memory(
        weights=weights,
        optimizer=optimizer,
        teacher=teacher_bytes(teacher, placement, P, w) if teacher is not None else 0,
        gradients=gradients,
        buffers=buffers + WORKSPACE_BYTES,
        signals=trace.signal_bytes,
        activations=trace.student.work_bytes + gathered,
        teacher_work=teacher.work_bytes if teacher is not None and placement != "ranks" else 0,
        step_work=step_work,
        graphs=engine.graphs,
    )


def teacher_bytes(teacher: Side, placement: Kind, processes: int, weight_bytes: int) -> int:
    """Weights of the teacher on the GPU of a process that trains."""
    every = teacher.trained + teacher.frozen
    passing = {
        "resident": every,
        "zero3": every // processes + LAYERS_AHEAD * teacher.layer + teacher.largest,
        "nvme": LAYERS_AHEAD * teacher.layer + teacher.largest,
        "cpu": teacher.beside_layers + 2 * teacher.layer,
        "ranks": 0,
    }
    return weight_bytes * passing[placement]

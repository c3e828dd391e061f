"""Pictures of what a student has learned of its teacher: attention maps, and every layer compared with every other.

Both models are asked about a few fixed rows in eval mode, outside of the steps: nothing is drawn from a random
generator, nothing is recorded or compiled anew, and training goes on bit for bit as without pictures. The teacher is
asked once. All ranks take part in the forwards, which ZeRO-3 needs; the first keeps what they say and draws.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dsdistill.core import Batch, Features, LayerPairs, Signal, document_borders
from dsdistill.models.capture import Captured
from dsdistill.models.families import Wanted
from dsdistill.objectives.likeness import FEWEST_TOKENS, attention_maps, centred_gram, divergence_map, likeness_map
from dsdistill.objectives.mapping import layer_pairs
from dsdistill.training.dist import Place
from dsdistill.training.telemetry import Telemetry

SHARE = 0.01
"""Of the time since training began that pictures may take, unless the recipe says when they are drawn."""

FIRST_GUESS_S, FIRST_GUESS_LOOKS = 1.5, 5
"""What the first pictures are taken to cost: seconds for matplotlib, and so many times what the look at the start took
for the models, of which the teacher is the larger."""

MOST_TOKENS, MOST_LENGTH, MOST_ROWS = 1024, 128, 64
"""Of the held-out rows whose hidden states are compared."""

MOST_ATTENTION_TOKENS = 256
"""Of those among them whose attention is compared."""

LONGEST_SENTENCE = 32
"""Tokens of a sentence whose maps are drawn: more cannot be read."""

MOST_COLUMNS = 3
"""Layer pairs whose maps are drawn."""


class Probes(NamedTuple):
    """What both models are asked about.

    Attributes:
        sentences: For attention maps.
        tokens: Their tokens, without padding.
        rows: Held-out rows, as in training.
    """

    sentences: Batch
    tokens: tuple[tuple[str, ...], ...]
    rows: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a stage's pictures are made of.

    Attributes:
        probes: What the models are asked about.
        every: Steps between them; None for as often as `SHARE` allows, at evaluations.
        teacher: Says every layer's signals for sentences and rows, every process at the same moment; None without.
    """

    probes: Probes
    every: int | None
    teacher: Callable[[], tuple[Features, Features]] | None


class Looks(Protocol):
    """A teacher, wherever it lives."""

    def look(self, batch: Batch, wanted: Wanted) -> Features: ...


def ask_teacher(teacher: Looks, probes: Probes, num_layers: int, device: torch.device) -> tuple[Features, Features]:
    """What a teacher says of sentences and rows; every process must call this.

    Args:
        teacher: Any.
        probes: What it is asked about.
        num_layers: Of the complete teacher; those that do not run are not seen.
        device: Where it runs.
    """
    wanted = every_layer(num_layers)
    return teacher.look(probes.sentences.to(device), wanted), teacher.look(probes.rows.to(device), wanted)


def moved(features: Features, device: torch.device | str) -> Features:
    """The same on another device."""
    signals = {name: {layer: x.to(device) for layer, x in layers.items()} for name, layers in features.signals.items()}
    return features._replace(signals=signals)


class View(NamedTuple):
    """What pictures need of one model, on the CPU.

    Attributes:
        depth: Layers that were looked at.
        maps: Attention maps of the sentences by layer, (sentences, L, L), mean over heads.
        grams: Of the hidden states of layers 0..depth, see `centred_gram`; none of too few tokens.
        attention: Queries and keys of a few rows.
    """

    depth: int
    maps: Mapping[int, Tensor]
    grams: tuple[Tensor, ...]
    attention: Features


def make_probes(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], rows: Batch) -> Probes:
    """Tokenize the sentences, and cut the rows.

    Args:
        tokenizer: The models'.
        sentences: For attention maps.
        rows: Held-out rows on the CPU.
    """
    encoded = [_encode(tokenizer, sentence) for sentence in sentences]
    length = max(len(row) for row, _ in encoded)
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id or 0] * (length - len(row))] for row, _ in encoded])
    mask = torch.arange(length)[None] < torch.tensor([[len(row)] for row, _ in encoded])
    batch = Batch(input_ids=ids, mask=mask, sample_ids=torch.arange(len(ids)), padded=not bool(mask.all()))
    return Probes(
        _like(rows, batch), tuple(told for _, told in encoded), _like(rows, cut(rows, MOST_TOKENS, MOST_LENGTH))
    )


def _encode(tokenizer: PreTrainedTokenizerFast, sentence: str) -> tuple[list[int], tuple[str, ...]]:
    """Numbers and names of a sentence's tokens; too many are left out before the last, which most models want.

    Asked of the tokenizer's inside: its own call would change how it cuts and pads, and so its checksum.
    """
    encoding = tokenizer.backend_tokenizer.encode(sentence)
    real = [i for i, is_real in enumerate(encoding.attention_mask) if is_real]
    kept = real if len(real) <= LONGEST_SENTENCE else [*real[: LONGEST_SENTENCE - 1], real[-1]]
    return [encoding.ids[i] for i in kept], tuple(plain_token(encoding.tokens[i]) for i in kept)


def plain_token(token: str) -> str:
    """A token for people: a space before it as `_`."""
    return token.replace("\u0120", "_").replace("\u2581", "_")


def _like(rows: Batch, batch: Batch) -> Batch:
    """Without labels; with one position for a masked-LM head, where rows have some."""
    return batch._replace(labels=None, targets=None if rows.targets is None else torch.zeros(1, dtype=torch.long))


def cut(batch: Batch, tokens: int, length: int) -> Batch:
    """The first rows of a batch, and of these the first positions: at most so many tokens, and one row at least."""
    length = min(length, batch.input_ids.shape[1])
    rows = max(1, tokens // length)

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:rows, :length].contiguous()

    mask, segments = batch.mask[:rows, :length].contiguous(), part(batch.segments)
    return batch._replace(
        input_ids=batch.input_ids[:rows, :length].contiguous(),
        mask=mask,
        sample_ids=batch.sample_ids[:rows],
        segments=segments,
        token_type_ids=part(batch.token_type_ids),
        padded=batch.padded and not bool(mask.all()),
        borders=None if segments is None else document_borders(segments, mask),
    )


def every_layer(num_layers: int) -> Wanted:
    """The signals that pictures are made of."""
    layers: dict[Signal, Sequence[int]] = {name: range(1, num_layers + 1) for name in ("query", "key", "bias")}
    return {"hidden": range(num_layers + 1), **layers}


class Gallery:
    """Looks at the models of a stage, and draws.

    Args:
        pictures: What of.
        engine: Holds the student.
        student: The part of it that is wired for capture.
        compared: Layer pairs of the stage's objectives.
        place: This process.
        telemetry: Where pictures go.
    """

    def __init__(
        self,
        pictures: Pictures,
        engine: DeepSpeedEngine,
        student: Captured,
        compared: Iterable[LayerPairs],
        place: Place,
        telemetry: Telemetry,
    ):
        self.pictures, self.engine, self.student = pictures, engine, student
        self.place, self.telemetry = place, telemetry
        self.compared = tuple(compared)
        self.probes = pictures.probes._replace(
            sentences=pictures.probes.sentences.to(place.device), rows=pictures.probes.rows.to(place.device)
        )
        self.teacher: View | None = None
        self.asked = False
        self.broken = False
        self.waiting: list[tuple[int, View]] = []
        self.began, self.spent_s, self.next_s = time.perf_counter(), 0.0, FIRST_GUESS_S

    def at_start(self) -> None:
        """Look at the student before its first step; what is seen is drawn with the next pictures."""
        self.began = time.perf_counter()
        answers = self._ask()
        with self._going_on():
            self._keep(0, answers)
        self.spent_s = time.perf_counter() - self.began
        self.next_s += FIRST_GUESS_LOOKS * self.spent_s

    def is_due(self, step: int, *, evaluated: bool, last: bool) -> bool:
        """Whether to draw after a step; every process must ask, and all get the same answer."""
        every = self.pictures.every
        if not (evaluated if every is None else step % every == 0 or last):
            return False
        # clocks differ: the first rank decides for all
        affordable = self.spent_s + self.next_s <= SHARE * (time.perf_counter() - self.began)
        answer = torch.tensor(float(not self.broken and (every is not None or affordable)), device=self.place.device)
        if self.place.world_size > 1:
            dist.broadcast(answer, 0)
        due = bool(answer.item())  # sync
        if last and not due and not self.asked and not self.broken:
            self.telemetry.note(
                f"no pictures: they would have taken more than {SHARE:.0%} of so short a run; logging.pictures: {step} "
                "draws them nevertheless"
            )
        return due

    def show(self, step: int) -> None:
        """Look at the student and draw; every process must call this."""
        before = time.perf_counter()
        theirs = self.pictures.teacher() if not self.asked and self.pictures.teacher is not None else None
        self.asked = True
        answers = self._ask()
        if not self.place.is_first:
            return
        with self._going_on():
            if theirs is not None:
                self.teacher = self._view(*theirs)
            self._keep(step, answers)
            for number, seen in self.waiting:
                began = time.perf_counter()
                self._draw(number, seen)
                self.next_s = 2 * (time.perf_counter() - began)  # the models are asked too
        self.waiting.clear()
        taken = time.perf_counter() - before
        self.spent_s += taken
        self.telemetry.numbers("pictures", step, {"time/pictures_s": taken})

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Whatever a plotting library, a disk or a GPU without room says, training is worth more."""
        try:
            yield
        except Exception as error:
            self.broken = True
            told = f"{type(error).__name__}: {error}"
            self.telemetry.note(f"WARNING: pictures cannot be drawn ({told}); training goes on without them")

    @torch.no_grad()
    def _ask(self) -> list[Features]:
        """What the student says now of sentences and rows."""
        self.engine.eval()
        with self.student.recording(every_layer(self.student.num_layers)):
            answers = [self.engine(batch, None, 0).answer for batch in (self.probes.sentences, self.probes.rows)]
        self.engine.train()
        return answers

    def _keep(self, step: int, answers: list[Features]) -> None:
        if self.place.is_first and not self.broken:
            self.waiting.append((step, self._view(*answers)))

    def _view(self, sentences: Features, rows: Features) -> View:
        sentences, rows = (moved(features, self.place.device) for features in (sentences, rows))
        depth = max(rows.signals["hidden"])
        real = self.probes.rows.mask.flatten()
        grams: list[Tensor] = []
        if int(real.sum()) >= FEWEST_TOKENS:  # sync
            states = (rows.at("hidden", layer).flatten(0, 1)[real] for layer in range(depth + 1))
            grams = [centred_gram(states_NE).cpu() for states_NE in states]
        few = len(self._attention_rows().mask)
        kept = {
            name: {layer: x[:few] for layer, x in layers.items()}  # a bias may be one for all rows
            for name, layers in rows.signals.items()
            if name in ("query", "key", "bias")
        }
        maps = {
            layer: attention_maps(sentences, layer, self.probes.sentences).float().cpu()
            for layer in range(1, depth + 1)
        }
        return View(depth, maps, tuple(grams), moved(rows._replace(signals=kept), "cpu"))

    def _attention_rows(self) -> Batch:
        """On the CPU, where layers are compared."""
        return cut(self.pictures.probes.rows, MOST_ATTENTION_TOKENS, MOST_LENGTH)

    def _draw(self, step: int, view: View) -> None:
        from dsdistill.training.drawing import draw_attention, draw_likeness

        pairs = self.pairs(view.depth)
        columns = spread(pairs, MOST_COLUMNS)
        drawn: dict[str, bytes] = {}
        for number, tokens in enumerate(self.probes.tokens):
            N = len(tokens)
            sides = [("student", [view.maps[s][number, :N, :N].numpy() for s, _ in columns])]
            titles = [[f"layer {s}" for s, _ in columns]]
            if self.teacher is not None:
                sides.insert(0, ("teacher", [self.teacher.maps[t][number, :N, :N].numpy() for _, t in columns]))
                titles.insert(0, [f"layer {t}" for _, t in columns])
            heading = f"attention of each token (row) to each (column), mean over heads, after {step} steps"
            drawn[f"attention_{number + 1}"] = draw_attention(tokens, sides, titles, heading)
        scalars: dict[str, float] = {}
        if self.teacher is not None and view.grams:
            cka = likeness_map(view.grams, self.teacher.grams)
            layers = view.depth, self.teacher.depth
            kl = divergence_map(view.attention, self.teacher.attention, self._attention_rows(), layers)
            for s, t in pairs:
                scalars[f"likeness/cka_layer_{s}"] = float(cka[s, t])
                scalars[f"likeness/attention_kl_layer_{s}"] = float(kl[s - 1, t - 1])
            panels = [
                ("linear CKA of hidden states", cka.numpy(), 0, (0.0, 1.0)),
                ("KL of attention, nats", kl.numpy(), 1, (0.0, max(float(kl.max()), 1e-6))),
            ]
            heading = f"layers compared after {step} steps; framed: layers that belong together"
            drawn["layers"] = draw_likeness(panels, pairs, heading)
        self.telemetry.pictures(step, drawn)
        if scalars:
            self.telemetry.numbers("likeness", step, scalars)

    def pairs(self, depth: int) -> list[tuple[int, int]]:
        """Layers of student and teacher that belong together: the objectives', or evenly spread if they have one."""
        depths = depth, depth if self.teacher is None else self.teacher.depth
        found = {pair for pairs in self.compared if not pairs.combine for pair in pairs if 0 not in pair}
        found = {(s, t) for s, t in found if s <= depths[0] and t <= depths[1]}
        return sorted(found if len(found) > 1 else layer_pairs("uniform", *depths))


def spread(pairs: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """A few of the pairs: the first, the last, and some between."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[round(i * (len(pairs) - 1) / (most - 1))] for i in range(most)]

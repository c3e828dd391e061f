"""The maths of pictures: CKA and KL of every two layers."""

import pytest
import torch

from dsdistill.core import Batch, Features
from dsdistill.objectives.likeness import attention_maps, centred_gram, divergence_map, likeness_map
from tests import oracles

MASK = torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])


def random(*dims, seed, dtype=torch.float64):
    return torch.randn(*dims, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def features(layers, heads, width, seed, *, scaling, windows=None, biased=False):
    def tensors(kind, *shape):
        return {n: random(3, heads, 6, *shape, seed=seed + 10 * n + kind) for n in range(1, layers + 1)}

    signals = {"query": tensors(0, width), "key": tensors(1, width)} | ({"bias": tensors(2, 6)} if biased else {})
    return Features(signals=signals, scaling=dict.fromkeys(range(1, layers + 1), scaling), windows=windows or {})


def batch(segments=None):
    ids = torch.zeros(3, 6, dtype=torch.long)
    return Batch(input_ids=ids, mask=MASK, sample_ids=torch.arange(3), segments=segments)


def test_cka_is_its_u_statistic():
    s, t = random(7, 3, seed=0), random(7, 5, seed=1) + 2
    found = likeness_map([centred_gram(s)], [centred_gram(t), centred_gram(s)])
    torch.testing.assert_close(
        found, torch.tensor([[oracles.cka(s.tolist(), t.tolist()), 1.0]], dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_cka_knows_no_rotation_scale_or_shift_and_no_likeness_of_noise():
    s, noise = random(300, 200, seed=0), random(300, 200, seed=1)
    turned = 3 * s @ torch.linalg.qr(random(200, 200, seed=2))[0] + 5
    same, other = likeness_map([centred_gram(s)], [centred_gram(turned), centred_gram(noise)])[0].tolist()
    assert same == pytest.approx(1.0, abs=1e-9)
    assert abs(other) < 0.02, "the biased estimate would say 0.4"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cka_of_half_types_is_that_of_float32(dtype):
    states = [(10 * random(40, 16, seed=i)).to(dtype) for i in range(2)]
    half, full = (likeness_map([centred_gram(x)], [centred_gram(y)]) for x, y in (states, [s.float() for s in states]))
    torch.testing.assert_close(half, full)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["all", "isolated"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_divergence_map_holds_the_objective_of_every_two_layers(segments, biased):
    student = features(2, 2, 3, 0, scaling=0.7, windows={2: 2}, biased=biased)
    teacher = features(3, 2, 5, 1, scaling=0.5, windows={3: 1})
    found = divergence_map(student, teacher, batch(segments), (2, 3))
    for s in (1, 2):
        for t in (1, 2, 3):
            windows = [w for w in (student.windows.get(s), teacher.windows.get(t)) if w is not None]
            expected = oracles.attention_kl(
                *(f.signals[kind][n].tolist() for f, n in ((student, s), (teacher, t)) for kind in ("query", "key")),
                MASK.tolist(),
                0.7,
                0.5,
                None if segments is None else segments.tolist(),
                min(windows, default=None),
                student.signals["bias"][s].tolist() if biased else None,
            )
            assert found[s - 1, t - 1].item() == pytest.approx(expected, rel=1e-9), (s, t)


def test_a_certain_teacher_and_a_doubtful_student_are_far_apart():
    """Where a probability rounds to 1 its logarithm is 0, and must still count."""
    sure = features(1, 2, 3, 0, scaling=1e6)._replace(
        signals={kind: {1: x[1].float()} for kind, x in features(1, 2, 3, 0, scaling=1.0).signals.items()}
    )
    flat = features(1, 2, 3, 1, scaling=0.0)
    found = divergence_map(flat, sure, batch(), (1, 1)).item()
    keys = torch.tensor([6.0, 4.0, 1.0])
    assert found == pytest.approx((keys * keys.log()).sum().item() / keys.sum().item(), rel=1e-6)


def test_unequal_heads_are_compared_by_their_means():
    student, teacher = features(1, 1, 3, 0, scaling=0.7), features(2, 4, 3, 1, scaling=0.5)
    found = divergence_map(student, teacher, batch(), (1, 2))
    assert divergence_map(teacher, teacher, batch(), (2, 2)).diagonal().abs().max() < 1e-12
    for layer in (1, 2):
        ours, theirs = attention_maps(student, 1, batch()), attention_maps(teacher, layer, batch())
        rows = [
            oracles.kl(theirs[b, i][: MASK[b].sum()].tolist(), ours[b, i][: MASK[b].sum()].tolist())
            for b in range(3)
            for i in range(int(MASK[b].sum()))
        ]
        assert found[0, layer - 1].item() == pytest.approx(oracles.mean(rows), rel=1e-9)


def test_maps_are_probabilities_of_what_may_be_seen():
    found = attention_maps(features(1, 2, 3, 0, scaling=1.0, windows={1: 1}), 1, batch(SEGMENTS))
    assert found[2, 0, 0] == 1
    torch.testing.assert_close(found.sum(-1), MASK.double())
    assert found[0, 0, 2:].max() == 0, "beyond the window"
    assert found[0, 1, 2] == 0, "in another document"

"""Logits: chunks change nothing and keep memory small; refusals."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsdistill.core import LayerPairs
from dsdistill.objectives import chunks, find_objective, soft_cross_entropy, soft_divergence, token_cross_entropy
from tests import oracles
from tests.objectives.worlds import PAIRS, STUDENT, TEACHER, make_world, terms

N, V = 40, 50


def random(seed, dtype=torch.float64):
    values = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    return values.to(dtype)


def losses(student, teacher):
    labels = torch.arange(N) % V
    labels[::3] = -100
    return [
        soft_divergence(student, teacher, kind="forward", temperature=2.0),
        soft_divergence(student, teacher, kind="reverse", temperature=2.0),
        soft_divergence(student, teacher, kind="jsd", temperature=2.0, beta=0.3),
        soft_cross_entropy(student, teacher, temperature=2.0),
        token_cross_entropy(student, labels),
    ]


@pytest.mark.parametrize("rows", [1, 7, 20, N])
def test_chunks_change_neither_value_nor_gradient(rows, monkeypatch):
    student, teacher = random(0).requires_grad_(), random(1)
    whole = losses(student, teacher)
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", rows * V)
    for one, other in zip(whole, losses(student, teacher), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss * 3, student)[0] for loss in (one, other)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


class LargestFloat32(TorchDispatchMode):
    """Remembers the size of the largest float32 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.largest = max(self.largest, leaf.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_logits_never_exist_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 8 * V)
    student, teacher = random(0, dtype).requires_grad_(), random(1, dtype)
    with LargestFloat32() as seen:
        total = torch.stack(losses(student, teacher)).sum() * 1024
        (gradient,) = torch.autograd.grad(total, student)
    assert gradient.dtype == dtype
    assert 0 < seen.largest <= 8 * V


def test_soft_cross_entropy_agrees_with_its_oracle_and_has_the_gradient_of_kl():
    student, teacher = random(0).requires_grad_(), random(1)
    value = soft_cross_entropy(student, teacher, temperature=2.5)
    expected = oracles.soft_cross_entropy(student.tolist(), teacher.tolist(), 2.5)
    torch.testing.assert_close(value.item(), expected, rtol=1e-9, atol=1e-12)
    kl = soft_divergence(student, teacher, temperature=2.5)
    torch.testing.assert_close(torch.autograd.grad(value, student), torch.autograd.grad(kl, student))


def test_jensen_shannon_is_symmetric_at_one_half():
    a, b = random(0), random(1)
    torch.testing.assert_close(soft_divergence(a, b, kind="jsd"), soft_divergence(b, a, kind="jsd"))


def test_no_positions_give_zero_with_a_gradient():
    student, teacher = torch.zeros(0, V, requires_grad=True), torch.zeros(0, V)
    for kind in ("forward", "reverse", "jsd"):
        value = soft_divergence(student, teacher, kind=kind)
        assert value.item() == 0
        assert torch.autograd.grad(value, student)[0].shape == (0, V)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beta": 0.5}, "no effect"),
        ({"divergence": "mse", "temperature": 2.0}, "no effect"),
    ],
)
def test_parameters_without_effect_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        find_objective("kd").make_head(STUDENT, TEACHER, PAIRS, params)


@pytest.mark.parametrize(
    ("name", "params", "problem", "message"),
    [
        ("kd", {"divergence": "reverse"}, "regression", "is for classes"),
        ("kd", {"divergence": "jsd"}, "multi_label", "is for classes"),
        ("pearson", {}, "regression", "over classes"),
    ],
)
def test_what_makes_no_sense_in_a_task_is_refused(name, params, problem, message):
    with pytest.raises(ValueError, match=message):
        find_objective(name).make_head(STUDENT, TEACHER, PAIRS, params, problem=problem)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\(40, 50\).*\(40, 49\)"):
        soft_divergence(random(0), random(1)[:, :-1])
    with pytest.raises(ValueError, match="temperature=0"):
        soft_cross_entropy(random(0), random(1), temperature=0)
    with pytest.raises(ValueError, match=r"beta=1\.5"):
        soft_divergence(random(0), random(1), kind="jsd", beta=1.5)
    with pytest.raises(ValueError, match="mse for regression"):
        terms(make_world(task=True, outputs=1), "kd", {})
    with pytest.raises(ValueError, match="token labels"):
        terms(make_world(task=True), "mlm", {})
    with pytest.raises(ValueError, match="fit the labels"):
        terms(make_world(task=True, outputs=2, labels="real"), "task", {})


def test_logit_objectives_need_no_layers():
    world = make_world(pairs=LayerPairs((), ()))
    assert terms(world, "kd", {})["kd"] > 0

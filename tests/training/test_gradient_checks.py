"""DeepSpeed's looks at gradients, taken at once: the same answers as one by one."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dsdistill.training import gradient_checks


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) * 100 for shape in ((64, 32), (7,), (0,), (128, 3))]


def optimizer(*groups: list[torch.Tensor] | None) -> SimpleNamespace:
    return SimpleNamespace(
        averaged_gradients=dict(enumerate(groups)), device=torch.device("cpu"), dp_process_group=None
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [None, float("inf"), float("-inf"), float("nan")], ids=str)
def test_overflow_is_seen_in_any_gradient(bad, dtype):
    first, second = gradients(dtype), gradients(dtype)
    if bad is not None:
        second[3][5, 1] = bad
    found = gradient_checks._has_overflow(optimizer(first, None, second))
    assert found.shape == (1,)
    assert found.item() == (bad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_norm_is_that_of_all_elements_without_padding(dtype, monkeypatch):
    """The sum of squares is beyond fp16's largest number."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    own = gradients(dtype)
    padding = torch.full((9,), 1e4, dtype=dtype)
    padding._zero_padding = True
    norm = gradient_checks._norm(optimizer(), [*own, padding], [torch.nn.Parameter(g) for g in own])
    expected = torch.cat([g.double().flatten() for g in own]).norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
    own[1][2] = float("nan")
    assert gradient_checks._norm(optimizer(), own, [torch.nn.Parameter(g) for g in own]).item() == -1


def test_a_part_without_gradients_has_norm_zero(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    assert gradient_checks._norm(optimizer(), [], []).item() == 0
    assert not gradient_checks._has_overflow(optimizer([torch.zeros(0)], None)).item()


def test_deepspeed_still_asks_through_these_methods():
    assert callable(DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial)
    assert callable(DeepSpeedZeroOptimizer.get_grad_norm_direct)

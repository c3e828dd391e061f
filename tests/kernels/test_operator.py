"""The fused comparisons as operators: what `torch.library` asks of them, and compilation of the full graph."""

import pytest
import torch

from dsdistill.kernels import pairwise
from dsdistill.objectives import attention_kl, relation_kl
from tests.kernels.test_pairwise import SCALES, USUAL

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("measure", ["kl", "mse"])
def test_operator_is_registered_as_torch_library_wants_it(measure, own, device):
    left, right, teacher_left, teacher_right = USUAL.tensors(device)
    mask = USUAL.limits(device)["mask"].to(torch.uint8)
    arguments = (measure, left, None if own else right, teacher_left, teacher_left if own else teacher_right)
    torch.library.opcheck(pairwise._forward, (*arguments, mask, mask, None, 3, 0.3, 0.4), test_utils=CHECKS)


def test_compilation_keeps_the_graph_whole(device):
    tensors = USUAL.tensors(device)
    limits = USUAL.limits(device)

    def loss(sq, sk, tq, tk, mask):
        maps = attention_kl(sq * 2, sk, tq, tk, mask, **SCALES, kernel="fused")
        return maps + relation_kl(sk * 2, tk, mask, relation_heads=4, kernel="fused")

    def run(function):
        value = function(*tensors, limits["mask"])
        return [value, *torch.autograd.grad(value, tensors[:2])]

    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch.testing.assert_close(
        run(torch.compile(loss, fullgraph=True, backend=backend)), run(loss), rtol=1e-3, atol=1e-5
    )

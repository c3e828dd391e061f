"""The fused comparisons against the plain ones in float64: values and gradients, every way of limiting attention."""

import dataclasses
import functools

import pytest
import torch

from dsdistill.kernels.selection import use_fused
from dsdistill.objectives import attention_kl, attention_mse, relation_kl
from tests import oracles

TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FUNCTIONS = {"kl": attention_kl, "mse": attention_mse}
SCALES = {"student_scaling": 0.3, "teacher_scaling": 0.4}
UPSTREAM = 3.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One comparison; lengths are the real tokens of each row."""

    lengths: tuple[int, ...] = (21, 9)
    length: int = 21
    heads: int = 2
    key_heads: int = 2
    teacher_key_heads: int = 2
    widths: tuple[int, int] = (16, 16)
    window: int | None = None
    segments: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float16, torch.float16)
    reduction: str = "mean"

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed) or "usual"

    def tensors(self, device) -> list[torch.Tensor]:
        """Queries and keys of both models, (B, L, H, D) seen as (B, H, L, D) as capture hands them out."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.key_heads, self.heads, self.teacher_key_heads)
        return [
            torch.randn(len(self.lengths), self.length, H, self.widths[i // 2], generator=generator)
            .to(device, self.dtypes[i // 2])
            .transpose(1, 2)
            .requires_grad_(i < 2)
            for i, H in enumerate(heads)
        ]

    def limits(self, device) -> dict:
        position = torch.arange(self.length, device=device)
        return {
            "mask": position[None] < torch.tensor(self.lengths, device=device)[:, None],
            "segments": (position // 6 % 3).expand(len(self.lengths), -1) if self.segments else None,
            "reduction": self.reduction,
            "padded": min(self.lengths) < self.length,
        }


USUAL = Shape()
SMALL = [
    USUAL,
    Shape(lengths=(32, 32), length=32),
    Shape(lengths=(1,), length=1),
    Shape(lengths=(0, 5, 1), length=5),
    Shape(lengths=(7, 0), length=17, reduction="study"),
    Shape(widths=(3, 20)),
    Shape(window=3),
    Shape(window=0, length=40, lengths=(40, 33)),
    Shape(segments=True),
    Shape(segments=True, window=2),
    Shape(heads=4, key_heads=2, teacher_key_heads=1),
    *(Shape(dtypes=(dtype, dtype)) for dtype in (torch.float32, torch.bfloat16)),
    Shape(dtypes=(torch.float32, torch.float16)),
]
LARGE = [
    Shape(lengths=(length,) * 3, length=length, heads=6, key_heads=6, teacher_key_heads=6, widths=(width, width))
    for width in (16, 32, 64, 128)
    for length in (128, 200, 1024)
] + [
    Shape(lengths=(300, 111), length=300, widths=(48, 64), dtypes=(dtype, dtype), window=window, segments=segments)
    for dtype in TOLERANCES
    for window in (None, 64)
    for segments in (False, True)
]


def values(function, tensors, learned: int, **options) -> list[torch.Tensor]:
    """The value and, for an upstream gradient other than 1, the student's gradients."""
    value = function(*tensors, **options)
    gradients = torch.autograd.grad(value * UPSTREAM, tensors[:learned])
    for tensor, gradient in zip(tensors, gradients, strict=False):
        assert gradient.dtype == tensor.dtype
    return [value.detach(), *gradients]


def assert_agree(function, tensors, dtype, learned: int = 2, **options) -> None:
    """The fused numbers on these tensors are the plain ones on the same numbers in float64."""
    got = values(function, tensors, learned, **options, kernel="fused")
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    expected = values(function, doubles, learned, **options, kernel="plain")
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), expected[0], rtol=2e-5, atol=2e-6)
    for ours, truth in zip(got[1:], expected[1:], strict=True):
        error, size = (ours.double() - truth).norm(), truth.norm()
        assert error <= TOLERANCES[dtype] * size + 1e-5, f"relative error {error / size}"


def compare(shape: Shape, measure: str, device) -> None:
    options = shape.limits(device) | SCALES | {"window": shape.window}
    assert_agree(FUNCTIONS[measure], shape.tensors(device), shape.dtypes[0], **options)


def compare_relations(shape: Shape, heads: int, device) -> None:
    student, _, teacher, _ = shape.tensors(device)
    assert_agree(
        functools.partial(relation_kl, relation_heads=heads),
        [student, teacher],
        shape.dtypes[0],
        learned=1,
        **shape.limits(device),
    )


@pytest.mark.parametrize("measure", FUNCTIONS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_fused_maps_agree_with_the_plain_ones(shape, measure, device):
    compare(shape, measure, device)


@pytest.mark.gpu
@pytest.mark.parametrize("measure", FUNCTIONS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_fused_maps_agree_on_a_gpu(shape, measure, device):
    compare(shape, measure, device)


RELATIONS = [
    (USUAL, 2),
    (Shape(widths=(12, 20)), 4),
    (Shape(lengths=(32, 32), length=32, widths=(24, 24)), 3),
    (Shape(segments=True), 4),
    (Shape(lengths=(7, 0), length=17, reduction="study"), 1),
]


@pytest.mark.parametrize(("shape", "heads"), RELATIONS, ids=str)
def test_fused_relations_of_a_tensor_with_itself_agree(shape, heads, device):
    compare_relations(shape, heads, device)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 12, 48])
@pytest.mark.parametrize("lengths", [(128, 128), (300, 77), (1024, 1024)], ids=str)
def test_fused_relations_agree_on_a_gpu(lengths, heads, device):
    shape = Shape(lengths=lengths, length=max(lengths), heads=12, widths=(32, 64))
    if heads == 1:
        shape = dataclasses.replace(shape, heads=2, widths=(64, 32))
    compare_relations(shape, heads, device)


@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_relations_of_any_size_agree(dtype, size, device):
    """Beyond log-sum-exps of 50 one exponential no longer serves a pair both ways."""
    shape = dataclasses.replace(USUAL, dtypes=(dtype, dtype))
    student, _, teacher, _ = ((x.detach() * size).requires_grad_(x.requires_grad) for x in shape.tensors(device))
    relations = functools.partial(relation_kl, relation_heads=2)
    assert_agree(relations, [student, teacher], dtype, learned=1, **shape.limits(device))


def test_relations_of_two_tensors_agree(device):
    student, student_other, teacher, teacher_other = USUAL.tensors(device)

    def mixed(student, student_other, teacher, teacher_other, mask, **options):
        others = {"student_other": student_other, "teacher_other": teacher_other}
        return relation_kl(student, teacher, mask, relation_heads=4, **others, **options)

    assert_agree(mixed, [student, student_other, teacher, teacher_other], torch.float16, **USUAL.limits(device))


def test_squared_differences_of_a_tensor_with_itself_agree(device):
    student, _, teacher, _ = USUAL.tensors(device)

    def own(student, teacher, mask, **options):
        return attention_mse(student, student, teacher, teacher, mask, **SCALES, **options)

    assert_agree(own, [student, teacher], torch.float16, learned=1, **USUAL.limits(device))


def test_a_tensor_with_itself_against_two_of_the_teacher_agrees(device):
    student, _, teacher, teacher_other = USUAL.tensors(device)

    def mixed(student, teacher, teacher_other, mask, **options):
        others = {"student_other": student, "teacher_other": teacher_other}
        return relation_kl(student, teacher, mask, relation_heads=4, **others, **options)

    assert_agree(mixed, [student, teacher, teacher_other], torch.float16, learned=1, **USUAL.limits(device))


@pytest.mark.parametrize("measure", FUNCTIONS)
def test_fused_values_are_those_of_the_oracle(measure, device):
    shape = Shape(lengths=(5, 3), length=6, widths=(4, 5), window=2, dtypes=(torch.float32, torch.float32))
    tensors = shape.tensors(device)
    mask = shape.limits(device)["mask"]
    got = FUNCTIONS[measure](*tensors, mask, **SCALES, window=2, kernel="fused")
    oracle = getattr(oracles, f"attention_{measure}")
    expected = oracle(*(x.tolist() for x in tensors), mask.tolist(), 0.3, 0.4, window=2)
    torch.testing.assert_close(got.item(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("measure", FUNCTIONS)
def test_what_stands_in_padding_is_never_used(measure, garbage, device):
    shape = dataclasses.replace(USUAL, dtypes=(torch.float32, torch.bfloat16))
    clean = shape.tensors(device)
    limits = shape.limits(device)
    spoiled = [
        torch.where(limits["mask"][:, None, :, None], x.detach(), garbage).requires_grad_(x.requires_grad)
        for x in clean
    ]
    run = functools.partial(values, FUNCTIONS[measure], learned=2, **limits, **SCALES, kernel="fused")
    torch.testing.assert_close(run(spoiled), run(clean), rtol=0, atol=0)
    assert all((x[~limits["mask"][:, None, :, None].expand_as(x)] == 0).all() for x in run(spoiled)[1:])


@pytest.mark.parametrize("measure", FUNCTIONS)
def test_nothing_is_left_to_learn_at_equality(measure, device):
    student = USUAL.tensors(device)[:2]
    tensors = [*student, *(x.detach().clone() for x in student)]
    scales = {"student_scaling": 0.3, "teacher_scaling": 0.3}
    options = USUAL.limits(device) | scales
    for value in values(FUNCTIONS[measure], tensors, 2, **options, kernel="fused"):
        assert (value.abs() <= 1e-6).all()  # a fused multiply and add rounds the two sides differently


@pytest.mark.parametrize("measure", FUNCTIONS)
def test_every_layout_gives_the_same_bits_again(measure, device):
    """Strides of (B, H, L, D), of slices of a joint projection, and columns that are not side by side."""
    tensors = USUAL.tensors(device)
    run = functools.partial(values, FUNCTIONS[measure], learned=2, **USUAL.limits(device), **SCALES, kernel="fused")
    expected = run(tensors)
    layouts = (
        lambda x: x.contiguous(),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    for layout in layouts:
        laid = [layout(x.detach()).requires_grad_(x.requires_grad) for x in tensors]
        torch.testing.assert_close(run(laid), expected, rtol=0, atol=0)


def test_gradients_of_a_huge_mean_survive_fp16(device):
    """A loss scale of 2^16 over a mean of 10^6 rows; differences of probabilities near 1e-5 count."""
    shape = Shape(lengths=(64,), length=64, widths=(16, 16))
    tensors = shape.tensors(device)
    tensors[:2] = [(x.detach() + 1e-3 * torch.randn_like(x)).requires_grad_() for x in tensors[2:]]
    options = shape.limits(device) | {"student_scaling": 0.25, "teacher_scaling": 0.25}
    got = torch.autograd.grad(attention_kl(*tensors, **options, kernel="fused") * 2**16, tensors[:2])
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    expected = torch.autograd.grad(attention_kl(*doubles, **options, kernel="plain") * 2**16, doubles[:2])
    for ours, truth in zip(got, expected, strict=True):
        assert (ours.double() - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("reach", [100.0, 1000.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("measure", FUNCTIONS)
def test_extreme_scores_are_finite(measure, dtype, reach, device):
    shape = dataclasses.replace(USUAL, dtypes=(dtype, dtype))
    tensors = [(x.detach().sign() * (reach / 16) ** 0.5).requires_grad_(x.requires_grad) for x in shape.tensors(device)]
    options = shape.limits(device) | {"student_scaling": 1.0, "teacher_scaling": 1.0}
    got = values(FUNCTIONS[measure], tensors, 2, **options, kernel="fused")
    assert all(x.isfinite().all() for x in got)
    exact = FUNCTIONS[measure](*(x.detach().double() for x in tensors), **options, kernel="plain")
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_without_need_no_gradient_is_computed(device):
    tensors = [x.detach() for x in USUAL.tensors(device)]
    assert not attention_kl(*tensors, **USUAL.limits(device), **SCALES, kernel="fused").requires_grad
    tensors[1].requires_grad_()
    attention_kl(*tensors, **USUAL.limits(device), **SCALES, kernel="fused").backward()
    assert tensors[0].grad is None
    assert tensors[1].grad is not None


def test_auto_stays_plain_on_a_cpu():
    tensors = USUAL.tensors("cpu")
    assert not use_fused("auto", tensors[:2], tensors[2:])
    assert not use_fused("plain", tensors[:2], tensors[2:])


@pytest.mark.gpu
def test_auto_is_fused_on_a_gpu(device):
    tensors = USUAL.tensors(device)
    assert use_fused("auto", tensors[:2], tensors[2:])
    assert not use_fused("auto", [x.double() for x in tensors[:2]], tensors[2:])


def test_what_cannot_be_fused_is_refused_with_the_reason(monkeypatch):
    small, wide = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 129)
    for student, teacher, reason in (
        ([small, small], [wide, wide], "heads of width 129 are wider than 128"),
        ([small.double()] * 2, [small, small], "float64 is none of"),
        ([small, small.half()], [small, small], r"types torch.float32 and torch.float16"),
    ):
        with pytest.raises(ValueError, match=f"kernel: fused cannot be used: .*{reason}"):
            use_fused("fused", student, teacher)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu, not on an NVIDIA GPU; use auto or plain"):
        use_fused("fused", [small, small], [small, small])

"""Attention maps and relations on plain tensors: windows, documents, grouped keys, refusals, and very many rows."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdistill.objectives import attention, attention_kl, attention_mse, chunks, find_objective, relation_kl
from dsdistill.objectives.numerics import inner_products
from dsdistill.objectives.relations import SELF_RELATIONS
from tests import oracles
from tests.objectives.worlds import OTHER_HEADS, PAIRS, STUDENT, TEACHER, make_world, shape, terms

MASK = torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
SCALES = {"student_scaling": 0.7, "teacher_scaling": 0.5}


def random(*dims, seed, dtype=torch.float64):
    return torch.randn(*dims, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def maps():
    """Student query and key, teacher query and key."""
    return [random(3, 2, 6, width, seed=i) for i, width in enumerate([3, 3, 5, 5])]


@pytest.mark.parametrize("window", [None, 0, 2])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["all", "isolated"])
@pytest.mark.parametrize("name", ["attention_kl", "attention_mse"])
def test_windows_and_documents_limit_who_attends(maps, name, window, segments):
    function = {"attention_kl": attention_kl, "attention_mse": attention_mse}[name]
    got = function(*maps, MASK, **SCALES, window=window, segments=segments)
    documents = None if segments is None else segments.tolist()
    expected = getattr(oracles, name)(*(x.tolist() for x in maps), MASK.tolist(), 0.7, 0.5, documents, window)
    torch.testing.assert_close(got.item(), expected, rtol=1e-9, atol=1e-12)


def test_relations_stay_inside_documents_when_told():
    student, teacher = random(3, 2, 6, 6, seed=0), random(3, 4, 6, 4, seed=1)
    got = relation_kl(student, teacher, MASK, relation_heads=4, segments=SEGMENTS)
    expected = oracles.relation_kl(student.tolist(), teacher.tolist(), MASK.tolist(), 4, segments=SEGMENTS.tolist())
    torch.testing.assert_close(got.item(), expected, rtol=1e-9, atol=1e-12)


def test_isolated_documents_equal_documents_in_rows_of_their_own(maps):
    packed = [x[:1] for x in maps]
    mask = torch.ones(1, 6, dtype=torch.bool)
    together = attention_kl(*packed, mask, **SCALES, segments=SEGMENTS[:1])
    alone = sum(
        attention_kl(*(x[:, :, a:b] for x in packed), mask[:, a:b], **SCALES) * (b - a)
        for a, b in [(0, 2), (2, 5), (5, 6)]
    )
    torch.testing.assert_close(together, alone / 6, rtol=1e-9, atol=1e-12)


def test_keys_shared_by_groups_of_queries_are_repeated():
    """Queries 0 and 1 share key 0, queries 2 and 3 share key 1."""
    query, teacher_query, teacher_key = (random(3, 4, 6, 3, seed=i) for i in range(3))
    key = random(3, 2, 6, 3, seed=3)
    grouped = attention_kl(query, key, teacher_query, teacher_key, MASK, **SCALES)
    repeated = attention_kl(query, key[:, [0, 0, 1, 1]], teacher_query, teacher_key, MASK, **SCALES)
    torch.testing.assert_close(grouped, repeated, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="3 key heads do not divide 4 query heads"):
        attention_kl(query, random(3, 3, 6, 3, seed=3), teacher_query, teacher_key, MASK, **SCALES)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    regrouped=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.none() | st.integers(0, 4),
)
def test_any_shape_agrees_with_the_oracle(lengths, heads, regrouped, widths, window):
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    student, teacher = (
        [random(len(lengths), heads, 5, regrouped * width, seed=seed) for seed in seeds]
        for width, seeds in zip(widths, [(0, 1), (2, 3)], strict=True)
    )
    values = [x.tolist() for x in student + teacher]
    for function, oracle in ((attention_kl, oracles.attention_kl), (attention_mse, oracles.attention_mse)):
        got = function(*student, *teacher, mask, **SCALES, window=window)
        expected = oracle(*values, mask.tolist(), 0.7, 0.5, window=window)
        torch.testing.assert_close(got.item(), expected, rtol=1e-9, atol=1e-12)
    got = relation_kl(student[0], teacher[0], mask, relation_heads=regrouped * heads)
    expected = oracles.relation_kl(values[0], values[2], mask.tolist(), regrouped * heads)
    torch.testing.assert_close(got.item(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("function", [attention_kl, attention_mse, relation_kl])
def test_a_few_rows_at_a_time_give_the_same_value_and_gradient(maps, function, recompute, monkeypatch):
    tensors = [x.requires_grad_() for x in maps]

    def value_and_gradients():
        if function is relation_kl:
            first, options = [tensors[0], tensors[2]], {"relation_heads": 1, "segments": SEGMENTS}
        else:
            first, options = tensors, {**SCALES, "segments": SEGMENTS, "window": 2}
        value = function(*first, MASK, **options)
        return value, torch.autograd.grad(value, tensors[:1])

    whole = value_and_gradients()
    calls = []
    original = chunks.checkpoint
    monkeypatch.setattr(chunks, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "GPU_ELEMENTS", 1)
    if recompute:
        monkeypatch.setattr(attention, "sum_over_rows", functools.partial(chunks.sum_over_rows, recompute=True))
    torch.testing.assert_close(value_and_gradients(), whole, rtol=1e-12, atol=1e-12)
    assert len(calls) == (3 if recompute else 0)


def test_strided_signals_are_read_right():
    """Capture hands out (B, L, H, D) seen as (B, H, L, D)."""
    tensors = [random(3, 6, 2, 4, seed=i).transpose(1, 2) for i in range(4)]
    packed = [x.contiguous() for x in tensors]
    for function in (attention_kl, attention_mse):
        torch.testing.assert_close(function(*tensors, MASK, **SCALES), function(*packed, MASK, **SCALES))
    torch.testing.assert_close(
        relation_kl(*tensors[:2], MASK, relation_heads=4), relation_kl(*packed[:2], MASK, relation_heads=4)
    )


@pytest.mark.parametrize("name", ["att_kl", "att_mse", "minilm"])
def test_unequal_heads_are_refused_and_pointed_to_relations(name):
    world = make_world(student=OTHER_HEADS)
    with pytest.raises(ValueError, match=r"4 student heads and 2 teacher heads.*minilmv2"):
        terms(world, name, {})
    with pytest.raises(ValueError, match="minilmv2"):
        find_objective(name).make_head(OTHER_HEADS, TEACHER, PAIRS, {})


def test_relation_heads_must_divide_both_widths():
    with pytest.raises(ValueError, match="relation_heads=48 does not divide width 6"):
        terms(make_world(), "minilmv2", {})
    with pytest.raises(ValueError, match="relation_heads=4 does not divide width 6"):
        find_objective("minilmv2").make_head(STUDENT, TEACHER, PAIRS, {"relation_heads": 4})
    with pytest.raises(ValueError, match="second factor"):
        relation_kl(*[random(1, 2, 3, 4, seed=0)] * 2, MASK[:1, :3], relation_heads=2, student_other=random(1, seed=0))


@pytest.mark.parametrize("name", ["att_kl", "att_mse"])
def test_layers_with_other_windows_are_refused(name):
    world = make_world()
    teacher = world.teacher._replace(windows={2: 64})
    with pytest.raises(ValueError, match="window all, teacher layer 2 over 64"):
        terms(replace(world, teacher=teacher), name, {})
    both = replace(world, teacher=teacher, student=world.student._replace(windows={1: 64}))
    torch.testing.assert_close(terms(both, name, {}), terms(world, name, {}))


def test_heads_are_merged_before_they_are_split():
    """The published code reshapes (B, H, L, D) directly, which scrambles positions."""
    x = random(1, 4, 5, 3, seed=0)
    regrouped = x.transpose(1, 2).reshape(1, 5, 2, 6).transpose(1, 2)
    other = random(1, 2, 5, 6, seed=1)
    mask = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(
        relation_kl(x, other, mask, relation_heads=2), relation_kl(regrouped, other, mask, relation_heads=2)
    )


def test_five_nats_over_as_many_rows_as_a_large_batch_has_do_not_overflow_in_fp16():
    """256 x 12 x 128 rows; their sum, 2e6, is far beyond fp16."""
    query = torch.ones(256 * 16, 12, 8, 1, dtype=torch.float16, requires_grad=True)
    key = torch.zeros(256 * 16, 12, 8, 1, dtype=torch.float16)
    ours, theirs = key.clone(), key.clone()
    ours[:, :, 0], theirs[:, :, 1] = 5, 40
    mask = torch.ones(256 * 16, 8, dtype=torch.bool)
    value = attention_kl(query, ours, query, theirs, mask, student_scaling=1.0, teacher_scaling=1.0)
    assert 5 < value.item() < 5.1
    (gradient,) = torch.autograd.grad(value * 65536, query)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


@pytest.mark.parametrize("reach", [100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_scores_are_finite(reach, dtype):
    size = (reach / 16) ** 0.5
    tensors = [(random(2, 2, 6, 16, seed=i).sign() * size).to(dtype).requires_grad_() for i in range(4)]
    mask = MASK[:2]
    for function in (attention_kl, attention_mse):
        value = function(*tensors, mask, student_scaling=1.0, teacher_scaling=1.0)
        gradients = torch.autograd.grad(value, tensors[:2])
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients)
        doubles = [x.detach().double() for x in tensors]
        exact = function(*doubles, mask, student_scaling=1.0, teacher_scaling=1.0)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padding_gets_no_probability_however_low_the_real_scores_are(dtype):
    tensors = [(1 + random(1, 2, 6, 16, seed=i).abs()).to(dtype) for i in range(4)]
    tensors[0], tensors[2] = -20 * tensors[0], -20 * tensors[2]
    assert (tensors[0] @ tensors[1].transpose(-1, -2)).max() < -300
    scales = {"student_scaling": 1.0, "teacher_scaling": 1.0}
    padded = attention_kl(*tensors, MASK[1:2], **scales)
    cut = attention_kl(*(x[:, :, :4] for x in tensors), MASK[1:2, :4], **scales)
    torch.testing.assert_close(padded, cut, rtol=1e-6, atol=0)


def test_products_stay_exact_under_autocast():
    x = random(4, 8, seed=0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = inner_products(x, x)
    torch.testing.assert_close(product, x @ x.T, rtol=1e-6, atol=1e-6)


def test_signals_follow_the_relations():
    needs = find_objective("minilmv2").needs({"relations": (("query", "key"),)})
    assert needs == (frozenset({"query", "key"}), frozenset({"query", "key"}))
    assert find_objective("minilmv2").needs({})[0] == {"query", "key", "value"}


def test_head_counts_of_shapes_are_checked_by_width():
    find_objective("val_kl").make_head(OTHER_HEADS, TEACHER, PAIRS, {})
    with pytest.raises(ValueError, match="does not divide"):
        find_objective("val_kl").make_head(shape(1, 3, 3), TEACHER, PAIRS, {})


GROUPED = shape(4, 2, 8, num_key_heads=2)
"""Four heads of queries, two of keys and values: widths 8 and 4."""


@pytest.mark.parametrize(
    ("name", "params", "shapes", "problem"),
    [
        ("minilmv2", {"relation_heads": 8}, (STUDENT, GROUPED), "relation_heads=8 does not divide width 6 of the stud"),
        ("minilmv2", {"relation_heads": 8}, (GROUPED, GROUPED), "=8 does not divide width 4 of the student's key"),
        ("minilmv2", {"relation_heads": 8}, (TEACHER, GROUPED), "=8 does not divide width 4 of the teacher's key"),
        ("minilmv2", {"relation_heads": 4, "relations": (("query", "key"),)}, (TEACHER, GROUPED), "query has width 8"),
        ("val_kl", {}, (GROUPED, shape(8, 1, 8)), "=8 does not divide width 4 of the student's value"),
        (
            "minilm",
            {},
            (GROUPED, shape(4, 3, 12, num_key_heads=3)),
            "=3 does not divide width 4 of the student's value",
        ),
    ],
)
def test_relations_that_grouped_heads_do_not_allow_are_refused_before_anything_runs(name, params, shapes, problem):
    with pytest.raises(ValueError, match=problem):
        find_objective(name).make_head(*shapes, PAIRS, params)


def test_relations_of_grouped_heads_that_fit_are_not_refused():
    for relations in (SELF_RELATIONS, (("key", "value"),)):
        params = {"relation_heads": 4, "relations": relations}
        find_objective("minilmv2").make_head(GROUPED, TEACHER, PAIRS, params)
    find_objective("minilmv2").make_head(
        GROUPED, TEACHER, PAIRS, {"relation_heads": 8, "relations": SELF_RELATIONS[:1]}
    )
    find_objective("val_kl").make_head(shape(2, 3, 6), GROUPED, PAIRS, {})


def test_factors_of_a_relation_are_equally_wide():
    wide, narrow = (random(1, heads, 3, 2, seed=0) for heads in (4, 2))
    others = {"student_other": narrow, "teacher_other": narrow}
    with pytest.raises(ValueError, match=r"factors of widths \(8, 4\)"):
        relation_kl(wide, wide, MASK[:1, :3], relation_heads=2, **others)


@pytest.mark.parametrize("function", [attention_kl, attention_mse])
def test_a_bias_shared_by_all_rows_is_the_same_bias_in_each(maps, function, monkeypatch):
    """Also where rows are taken a few at a time, and in what the bias learns."""
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 2 * 2 * 6 * 6)
    shared = random(1, 2, 6, 6, seed=7).requires_grad_()
    theirs = random(1, 2, 6, 6, seed=8)
    losses = [
        function(*maps, MASK, **SCALES, student_bias=ours, teacher_bias=other)
        for ours, other in ((shared, theirs), (shared.expand(3, -1, -1, -1), theirs.expand(3, -1, -1, -1)))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, shared)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)
    assert not torch.equal(losses[0], function(*maps, MASK, **SCALES, teacher_bias=theirs))


def test_a_bias_has_no_fused_kernel(maps):
    with pytest.raises(ValueError, match=r"kernel: fused cannot be used: a model adds a bias"):
        attention_kl(*maps, MASK, **SCALES, teacher_bias=random(1, 2, 6, 6, seed=8), kernel="fused")

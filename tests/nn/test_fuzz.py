"""Every kernel on drawn shapes, strides and dtypes, empty ones and long ones, against the plain computation in float64.

With FUZZ_EXAMPLES=1000 it looks longer; `tests/sanitize.py` runs it with kernels that notice what they read and write wrongly.
"""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.nn import kernels
from anabranch.nn.grouped import expert_mlp, reference_expert_mlp
from anabranch.nn.kernels import attention, paged, rows
from anabranch.nn.packed import KINDS, Packed
from anabranch.routing.dispatch import DispatchPlan

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiled kernels on this machine")
fuzz = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5")), deadline=None)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
THREADS = st.sampled_from([1, 2, 3])
WIDTHS = st.sampled_from([16, 32, 48, 112, 512, 528, 1040])
SEEDS = st.integers(0, 2**32 - 1)


def near(got, wanted, dtype=torch.float32):
    tolerance = 2e-4 if dtype == torch.float32 else 4e-2
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance * (1 + scale))


@st.composite
def tensors(draw, shape, dtype=torch.float32):
    """A tensor of this shape that lies in memory in any way: its axes in another order, or a part of a larger one."""
    order = draw(st.permutations(range(len(shape) - 1)))
    margin = [draw(st.sampled_from([0, 0, 1, 3])) for _ in shape]
    whole = [shape[axis] + margin[axis] for axis in (*order, len(shape) - 1)]
    data = torch.randn(whole, dtype=dtype)
    back = [order.index(axis) for axis in range(len(shape) - 1)]
    data = data.permute(*back, len(shape) - 1)
    return data[tuple(slice(extra, size + extra) for extra, size in zip(margin, shape, strict=True))]


@pytest.fixture(autouse=True)
def _threads():
    yield
    torch.set_num_threads(1)


@fuzz
@given(
    data=st.data(),
    leading=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    width=WIDTHS,
    dtype=DTYPES,
    threads=THREADS,
    seed=SEEDS,
)
def test_norm(data, leading, width, dtype, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    x, gradient = (data.draw(tensors([*leading, width], dtype)) for _ in range(2))
    if not rows.can_norm(x, gradient):
        assert not x.numel()
        return
    weight = torch.randn(width).requires_grad_()
    dense, y, scale_N = rows.norm(x, weight, 1e-5, keep=True)
    dx, dweight = rows.norm_gradients(gradient, dense, weight, scale_N)
    wide = x.double().requires_grad_()
    wanted = F.rms_norm(wide, (width,), weight.double(), 1e-5)
    wanted.backward(gradient.double())
    near(y, wanted.detach(), dtype)
    near(dx, wide.grad, dtype)
    near(dweight, weight.grad, dtype)


@fuzz
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    length=st.integers(1, 40),
    width=st.sampled_from([32, 64, 160]),
    dtype=DTYPES,
    shared=st.booleans(),
    threads=THREADS,
    seed=SEEDS,
)
def test_turn(data, batch, heads, length, width, dtype, shared, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    x = data.draw(tensors([batch, heads, length, width], dtype))
    half = torch.randn(1 if shared else batch, 1, length, width // 2)
    cos, sin = (torch.cat((part, part), -1).to(dtype) for part in (half.cos(), half.sin()))
    left, right = x.double().chunk(2, -1)
    wanted = x.double() * cos.double() + torch.cat((-right, left), -1) * sin.double()
    y = rows.rotate(x, cos, sin, 1.0)
    near(y, wanted, dtype)
    near(rows.rotate(y, cos, sin, -1.0), x, dtype)


@fuzz
@given(
    count=st.integers(1, 5),
    length=st.integers(1, 300),
    width=WIDTHS,
    dtype=DTYPES,
    threads=THREADS,
    seed=SEEDS,
)
def test_sum(count, length, width, dtype, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    parts = [torch.randn(length, width, dtype=dtype) for _ in range(count)]
    weight, gradient = torch.randn(length, count), torch.randn(length, width, dtype=dtype)
    stacked, wide = torch.stack(parts, 1).double().requires_grad_(), weight.double().requires_grad_()
    wanted = (stacked * wide.unsqueeze(-1)).sum(1)
    wanted.backward(gradient.double())
    near(rows.weighted_sum(parts, weight), wanted.detach(), dtype)
    made, dweight = rows.sum_gradients(gradient, parts, weight)
    near(torch.stack(made, 1), stacked.grad, dtype)
    near(dweight, wide.grad, dtype)


@st.composite
def plans(draw):
    """A plan of N items to E experts, K each, of which some choices may be unused."""
    items, choices, experts = (
        draw(st.sampled_from([1, 2, 7, 13, 40, 130])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
    )
    generator = np.random.default_rng(draw(SEEDS))
    used = generator.random(items * choices) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    expert = generator.integers(0, experts, items * choices)
    expert[generator.random(items * choices) < draw(st.sampled_from([0.0, 0.9]))] = 0  # most to one
    order = np.argsort(np.where(used, expert, experts), kind="stable")
    ends = np.cumsum(np.bincount(expert[used], minlength=experts)).astype(np.int32)
    return DispatchPlan(torch.from_numpy(order), torch.from_numpy(ends), items, choices)


@fuzz
@given(
    plan=plans(),
    width=st.sampled_from([16, 48, 528]),
    hidden=st.sampled_from([16, 80, 544]),
    dtype=DTYPES,
    on=st.sampled_from(["output", "input"]),
    recompute=st.booleans(),
    needs=st.tuples(*[st.booleans()] * 3),
    threads=THREADS,
    seed=SEEDS,
)
def test_experts(plan, width, hidden, dtype, on, recompute, needs, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    experts = len(plan.offset_E)
    x = torch.randn(plan.num_items, width, dtype=dtype)
    w13, w2 = torch.randn(experts, 2 * hidden, width) / width**0.5, torch.randn(experts, width, hidden) / hidden**0.5
    weight = torch.zeros(plan.num_items * plan.num_choices)
    used = plan.choice_R[: int(plan.offset_E[-1])]
    weight[used] = torch.rand(len(used)) + 0.1
    inputs = (x, weight.view(plan.num_items, -1), w13.to(dtype), w2.to(dtype))
    flags = (needs[0], True, needs[1], needs[2])
    ours = [part.clone().requires_grad_(flag) for part, flag in zip(inputs, flags, strict=True)]
    theirs = [part.double().requires_grad_(flag) for part, flag in zip(inputs, flags, strict=True)]
    y = expert_mlp(ours[0], plan, *ours[1:], weight_on=on, backend="native", recompute=recompute)
    wanted = reference_expert_mlp(theirs[0], plan, *theirs[1:], weight_on=on)
    near(y.detach(), wanted.detach(), dtype)
    gradient = torch.randn(y.shape, dtype=dtype)
    if y.requires_grad and wanted.requires_grad:
        y.backward(gradient)
        wanted.backward(gradient.double())
        for mine, other in zip(ours, theirs, strict=True):
            if mine.requires_grad:
                near(mine.grad, other.grad, dtype)


@fuzz
@given(
    data=st.data(),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    length=st.sampled_from([1, 5, 17, 48, 100]),
    front=st.sampled_from([0, 1, 30, 600]),
    width=st.sampled_from([16, 48, 256]),
    dtype=DTYPES,
    threads=THREADS,
    seed=SEEDS,
)
def test_attention(data, batch, groups, shared, length, front, width, dtype, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    query = data.draw(tensors([batch, groups * shared, length, width], dtype))
    key, value = (data.draw(tensors([batch, groups, front + length, width], dtype)) for _ in range(2))
    dy = data.draw(tensors(list(query.shape), dtype))
    assert attention.can(query, key, value)
    y, log_sum = attention.forward(query, key, value)
    found = attention.backward(dy, query, key, value, y, log_sum)
    wide = [part.double().requires_grad_() for part in (query, key, value)]
    mask = torch.ones(length, front + length, dtype=torch.bool).tril(front)
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    wanted.backward(dy.double())
    near(y, wanted.detach(), dtype)
    for got, part in zip(found, wide, strict=True):
        near(got, part.grad, dtype)


@fuzz
@given(
    data=st.data(),
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 9)), min_size=1, max_size=4),
    streams=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    width=st.sampled_from([1, 8, 17, 64, 512]),
    front=st.sampled_from([0, 3, 70]),
    block=st.sampled_from([1, 4, 16]),
    dtype=DTYPES,
    threads=THREADS,
    seed=SEEDS,
)
def test_paged(data, spans, streams, groups, shared, width, front, block, dtype, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rows_of_step = sum(count for _, count in spans)
    counts = [-(-(past + count) // block) for past, count in spans]
    table = np.random.default_rng(seed).permutation(sum(counts) + 2)[: sum(counts)].astype(np.int32)
    pool = [torch.randn(streams, (sum(counts) + 2) * block, groups, width, dtype=dtype) for _ in range(2)]
    query = data.draw(tensors([streams, groups * shared, rows_of_step, width], dtype))
    new = [data.draw(tensors([streams, groups, rows_of_step, width], dtype)) for _ in range(2)]
    prefix = tuple(torch.randn(streams, groups, front, width, dtype=dtype) for _ in range(2)) if front else None
    sequence, first, start = [], 0, 0
    for (past, count), blocks in zip(spans, counts, strict=True):
        sequence.append((first, count, past, start))
        first, start = first + count, start + blocks
    y = paged.attend(query, *new, *pool, np.array(sequence, np.int64), table, block_tokens=block, prefix=prefix)
    for (first, count, past, start), blocks in zip(sequence, counts, strict=True):
        slots = (
            torch.from_numpy(table[start : start + blocks]).long()[:, None] * block + torch.arange(block)
        ).flatten()[: past + count]
        key, value = (part[:, slots].transpose(1, 2) for part in pool)
        for stored, part in zip((key, value), new, strict=True):
            assert torch.equal(stored[:, :, past:], part[:, :, first : first + count])
        if prefix is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
        mask = torch.ones(count, front + past + count, dtype=torch.bool).tril(front + past)
        part = query[:, :, first : first + count].double()
        wanted = F.scaled_dot_product_attention(part, key.double(), value.double(), attn_mask=mask, enable_gqa=True)
        near(y[:, :, first : first + count], wanted, dtype)


@fuzz
@given(
    kind=st.sampled_from(KINDS),
    count=st.sampled_from([0, 1, 3, 12, 13, 33, 70]),
    outputs=st.integers(1, 70),
    depth=st.sampled_from([32, 96, 512, 1056]),
    by=st.sampled_from([None, 32]),
    dtype=DTYPES,
    bias=st.booleans(),
    threads=THREADS,
    seed=SEEDS,
)
def test_packed(kind, count, outputs, depth, by, dtype, bias, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    packed = Packed.pack(torch.randn(outputs, depth), kind, group=by if kind in ("int8", "int4") else None)
    x = torch.randn(count, 2 * depth, dtype=dtype)[:, ::2]
    bias_N = torch.randn(outputs) if bias else None
    y = packed.linear(x, bias_N)
    wanted = x.double() @ packed.unpack(torch.float64)[0].T
    wanted = wanted if bias_N is None else wanted + bias_N
    error = 5e-2 * depth**0.5 if kind in ("int8", "int4") else 2e-2 * depth**0.5 if kind == "bfloat16" else 0
    assert float((y.double() - wanted).abs().max() if count else 0) <= error + (
        3e-2 * float(wanted.abs().max()) if count else 0
    )
    assert y.dtype == dtype


@fuzz
@given(sizes=st.lists(st.sampled_from([0, 1, 3, 16, 33, 64, 1 << 20]), min_size=4, max_size=4), seed=SEEDS)
def test_sizes_that_do_not_fit_are_refused_or_computed(sizes, seed):
    """Whatever the sizes: a result of the right shape, or an error of ours; never more memory than there is."""
    items, width, wide, parts = (min(size, 64) if number != 1 else min(size, 4096) for number, size in enumerate(sizes))
    x, weight = torch.zeros(items, width), torch.zeros(wide)
    try:
        _, y, _ = rows.norm(x, weight, 1e-5, keep=True) if width else (None, x, None)
        assert y.shape == x.shape
        assert width == wide or not width
    except InputError:
        assert width != wide or width % 16 or not items
    try:
        total = rows.weighted_sum([x] * max(parts, 1), torch.zeros(items, parts))
        assert total.shape == x.shape
    except InputError:
        assert width % 16 or not parts or not items

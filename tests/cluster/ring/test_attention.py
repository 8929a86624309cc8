"""Attention over ranks equals attention in one process: simulated ranks, message by message."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.cluster.ring import (
    SCHEMES,
    ContextParallel,
    Layout,
    Placement,
    RingOptions,
    Run,
    Topology,
    Traffic,
    context_parallel_attention,
    placed_attention,
    plan_attention,
    ring_attention,
    simulated_attention,
    simulated_placed_attention,
    token_ring_attention,
)
from anabranch.cluster.ring.agreement import told_apart
from anabranch.cluster.ring.link import SimulatedLinks
from anabranch.cluster.ring.options import read_documents, read_layout, read_length, read_options
from anabranch.cluster.ring.schedule import RINGS
from anabranch.errors import InputError, PeerError
from anabranch.testing import DEVICES
from naive_attention import drawn, naive

KINDS = ("contiguous", "zigzag", "stripe")
# Of float64 on values of order 1.
FORWARD, BACKWARD = 1e-12, 1e-11


def check(case, world, causal, *, forward=FORWARD, backward=BACKWARD, told=None, wanted=None, **options):
    """Output and all gradients against the loop over queries, or what that gave."""
    *leaves, dout = case
    expected, grads = reference(case, causal, told) if wanted is None else wanted
    found = simulated_attention(*leaves, world, causal, **options)
    torch.testing.assert_close(found, expected, atol=forward, rtol=0)
    for part, right in zip(torch.autograd.grad(found, leaves, dout), grads, strict=True):
        torch.testing.assert_close(part, right, atol=backward, rtol=0)


def reference(case, causal, told=None):
    """Output and gradients of the loop over queries."""
    *leaves, dout = case
    expected = naive(*leaves, causal=causal, **({} if told is None else told))
    return expected.detach(), torch.autograd.grad(expected, leaves, dout)


@cache
def odd(causal: bool):
    """29 positions: no number of ranks divides them; groups of 2."""
    case = drawn(1, 29, 4, 2, 4)
    return case, reference(case, causal)


@pytest.mark.parametrize("scheme", RINGS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", KINDS)
def test_every_scheme_and_layout_at_an_odd_length(layout, causal, scheme):
    case, wanted = odd(causal)
    check(case, 3, causal, layout=layout, scheme=scheme, wanted=wanted)


@pytest.mark.parametrize("world", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_number_of_ranks(scheme, world):
    # Ulysses wants a head for each rank.
    case, wanted = (drawn(1, 29, world, world // 2, 4), None) if world > 4 else odd(True)
    check(case, world, True, layout="zigzag", scheme=scheme, wanted=wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_groups_of_heads(group, scheme):
    check(drawn(2, 24, 8, 8 // group, 4), 4, True, layout="zigzag", scheme=scheme)


@given(
    st.sampled_from(RINGS),
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.integers(1, 26),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(0, 10**6),
    st.randoms(),
)
@settings(max_examples=25)
def test_packs_and_windows(scheme, layout, world, length, causal, window, seed, draw):
    inner = sorted(draw.choices(range(length + 1), k=draw.randrange(4)))
    documents, window = (0, *inner, length), window if causal else None
    case = drawn(1, length, 2, 1, 4, seed=seed)
    told = {"window": window, "documents": documents}
    check(case, world, causal, layout=layout, scheme=scheme, seed=seed, told=told, **told)


@pytest.mark.parametrize("device", DEVICES)
def test_on_every_device(device):
    """With a window, so that masks are made there too."""
    case = [part.detach().to(device).requires_grad_(part.requires_grad) for part in drawn(1, 21, 4, 2, 8)]
    check(case, 4, True, layout="zigzag", scheme="token_ring", window=6, told={"window": 6})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32(scheme):
    *leaves, _ = drawn(1, 64, 4, 2, 16, torch.float32)
    found = simulated_attention(*leaves, 4, True, layout="zigzag", scheme=scheme)
    expected = naive(*(part.double() for part in leaves), causal=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


def test_the_scale_and_large_scores():
    *leaves, dout = drawn(1, 12, 2, 2, 4)
    case = [(leaves[0] * 1e4).detach().requires_grad_(), *leaves[1:], dout]
    check(case, 3, True, layout="zigzag", scheme="token_ring", softmax_scale=0.7, told={"scale": 0.7}, backward=1e-7)


@pytest.mark.parametrize("scale", [0.0, -0.6])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_that_are_not_above_0(scheme, scale):
    """0 is the mean over what is seen."""
    case = drawn(1, 12, 4, 2, 4)
    check(case, 2, True, layout="zigzag", scheme=scheme, softmax_scale=scale, told={"scale": scale})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_lose_no_more_than_one_shot_attention(dtype):
    """Partial results of float32 do not; those of the inputs' type are allowed, and lose more."""
    *leaves, _ = (part.detach() for part in drawn(1, 256, 4, 4, 16, dtype, seed=3))
    exact = naive(*(part.double() for part in leaves), causal=True)
    once = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in leaves), is_causal=True)
    error = (once.transpose(1, 2).double() - exact).square().mean().sqrt()
    kept = simulated_attention(*leaves, 8, True, layout="zigzag", scheme="token_ring")
    assert kept.dtype == dtype
    assert (kept.double() - exact).square().mean().sqrt() <= 1.2 * error
    coarse = simulated_attention(*leaves, 8, True, layout="zigzag", scheme="token_ring", out_dtype=dtype)
    assert (coarse.double() - exact).square().mean().sqrt() > (kept.double() - exact).square().mean().sqrt()


def test_gradients_of_half_types_are_of_their_type_and_near():
    *leaves, dout = drawn(1, 32, 4, 2, 8, torch.bfloat16)
    found = torch.autograd.grad(simulated_attention(*leaves, 4, True, layout="zigzag", scheme="ring"), leaves, dout)
    fine = [part.detach().double().requires_grad_() for part in leaves]
    exact = torch.autograd.grad(naive(*fine, causal=True), fine, dout.double())
    for part, wanted in zip(found, exact, strict=True):
        assert part.dtype == torch.bfloat16
        torch.testing.assert_close(part.double(), wanted, atol=4e-2, rtol=0)


@pytest.mark.parametrize("orders", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_many_orders_of_events_give_the_same_bits(orders):
    """Ranks take turns as they come, messages are late as they like."""
    *leaves, dout = drawn(1, 24, 2, 2, 4, torch.float32)
    found = []
    for seed in range(orders):
        out = simulated_attention(*leaves, 4, True, layout="zigzag", scheme="token_ring", seed=seed)
        found.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(one, other) for other in found[1:] for one, other in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("heads", "groups", "world"), [(4, 4, 2), (4, 2, 4), (8, 2, 2), (6, 6, 3), (4, 1, 4)])
@pytest.mark.parametrize("layout", KINDS)
def test_heads_are_cut_where_they_divide(layout, heads, groups, world):
    """Also where heads of several ranks see one key head."""
    documents = (0, 9, 23)
    told = {"documents": documents}
    check(drawn(1, 23, heads, groups, 4), world, True, layout=layout, scheme="ulysses", told=told, seed=1, **told)


def test_heads_that_do_not_divide_are_told_so():
    *leaves, _ = drawn(1, 6, 6, 3, 4)
    for world, said in ((4, "6 query heads over 3 key heads cannot be cut over 4 ranks"), (2, "over 2 ranks")):
        with pytest.raises(InputError, match=said):
            simulated_attention(*leaves, world, True, scheme="ulysses")


# b bytes of a number, n rows of a rank, N ranks.
B, HEADS, GROUPS, WIDTH, LENGTH, WORLD = 2, 8, 2, 4, 48, 4
ROWS, HOPS = LENGTH // WORLD, WORLD * (WORLD - 1)


def sent(scheme, dtype, *, causal=False, layout="contiguous", backward=False, **options) -> Traffic:
    *leaves, dout = drawn(B, LENGTH, HEADS, GROUPS, WIDTH, dtype)
    traffic = Traffic()
    out = simulated_attention(*leaves, WORLD, causal, layout=layout, scheme=scheme, traffic=traffic, **options)
    if backward:
        traffic.sent = None
        torch.autograd.grad(out, leaves, dout)
    return traffic


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_a_forward_pass_are_those_of_the_table(dtype, size):
    keys = 2 * ROWS * GROUPS * WIDTH * size * B * HOPS
    for scheme in ("ring", "ring2", "all_gather"):
        assert sent(scheme, dtype).size_bytes == keys
    found = sent("token_ring", dtype).sent
    assert found.of_kind("travel") == ROWS * HEADS * WIDTH * size * B * HOPS
    assert found.of_kind("home") == (ROWS * HEADS * WIDTH * 4 + 4 * ROWS * HEADS) * B * HOPS
    coarse = sent("token_ring", dtype, out_dtype=dtype).sent
    assert coarse.of_kind("home") == (ROWS * HEADS * WIDTH * size + 4 * ROWS * HEADS) * B * HOPS


def test_bytes_of_a_backward_pass_are_those_of_the_table():
    found = sent("token_ring", torch.float32, backward=True).sent
    assert found.of_kind("travel") == (2 * ROWS * HEADS * WIDTH + 2 * ROWS * HEADS) * 4 * B * HOPS
    assert found.of_kind("home") == ROWS * HEADS * WIDTH * 4 * B * HOPS
    # Keys, values and the gradients of both: 4 n G D.
    assert sent("ring", torch.float32, backward=True).size_bytes == 4 * ROWS * GROUPS * WIDTH * 4 * B * HOPS


def test_both_directions_of_a_link_work():
    """TokenRing's first neighbours carry queries one way and results the other; a ring's links are idle one way."""
    token, ring = sent("token_ring", torch.float32).sent.bytes_RR, sent("ring", torch.float32).sent.bytes_RR
    assert token[0, 1] > 0
    assert token[1, 0] > 0
    assert ring[0, 1] > 0
    assert ring[1, 0] == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("causal", "layout"), [(False, "contiguous"), (True, "zigzag"), (True, "stripe")])
@pytest.mark.parametrize("backward", [False, True])
def test_the_plan_counts_what_is_sent(scheme, causal, layout, backward):
    found = sent(scheme, torch.bfloat16, causal=causal, layout=layout, backward=backward).sent
    planned = plan_attention(
        LENGTH, WORLD, HEADS, GROUPS, WIDTH, torch.bfloat16, batch=B, causal=causal, layout=layout, backward=backward
    )
    cost = next(cost for cost in planned.costs if cost.scheme == scheme)
    assert (cost.size_bytes, cost.link_bytes) == (found.bytes_RR.sum(), found.bytes_RR.max())


def test_pass_q_sends_little_where_keys_are_many():
    """8 new positions over 200 resident ones; each rank has its stretch of these, and its new ones behind them."""
    q, k, v, _ = (part.detach() for part in drawn(1, 208, 4, 4, 4))
    queries = Layout("contiguous", 4, 8, first=200)
    before = Layout("contiguous", 4, 200)
    keys = before.placement.followed_by(queries.placement)
    parts = []
    for rank in range(4):
        resident, new = before.places(rank), queries.places(rank) + 200
        own = torch.cat((resident, new))
        parts.append((q[:, new], k[:, own], v[:, own]))
    expected = naive(q, k, v, causal=True)[:, 200:]
    counts = {}
    for scheme in SCHEMES:
        traffic = Traffic()
        told = RingOptions(scheme=scheme, causal=True, traffic=traffic)
        found = simulated_placed_attention(parts, queries.placement, keys, told)
        torch.testing.assert_close(queries.unshard(found), expected, atol=FORWARD, rtol=0)
        counts[scheme] = traffic.size_bytes
    planned = plan_attention(
        8,
        4,
        4,
        4,
        4,
        torch.float64,
        causal=True,
        layout="contiguous",
        kv_cached=200,
        topology=Topology(latency_s=0.0, gather_bytes=0),
    )
    assert planned.choice == "token_ring"
    assert {cost.scheme: cost.size_bytes for cost in planned.costs} == counts
    assert counts["token_ring"] <= 0.05 * counts["ring"]


def test_one_process_without_a_group_is_one_rank():
    *leaves, _ = drawn(2, 9, 4, 2, 4)
    for call in (ring_attention, token_ring_attention):
        found = call(*leaves, causal=True)
        torch.testing.assert_close(found, naive(*leaves, causal=True), atol=FORWARD, rtol=0)
        out, lse = call(*leaves, causal=True, return_lse=True)
        assert torch.equal(out, found)
        assert lse.shape == (2, 9, 4)


def test_the_sum_of_a_softmax_has_a_gradient():
    """What attention sinks need."""
    *leaves, _ = drawn(1, 7, 2, 2, 4)
    _, lse = ring_attention(*leaves, causal=True, return_lse=True)
    score = torch.einsum("blhd,bshd->bhls", leaves[0], leaves[1]) / 2
    expected = score.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf).logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(lse, expected, atol=FORWARD, rtol=0)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves[:2], weight)
    for part, right in zip(torch.autograd.grad(lse, leaves[:2], weight), wanted, strict=True):
        torch.testing.assert_close(part, right, atol=BACKWARD, rtol=0)


def test_autocast_does_not_reach_partial_results():
    *leaves, _ = drawn(1, 16, 2, 2, 8, torch.float32)
    plain = ring_attention(*leaves, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ring_attention(*leaves, causal=True), plain)


@pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4)])
def test_nothing_gives_nothing(shape):
    empty = torch.zeros(shape, requires_grad=True)
    found = ring_attention(empty, empty, empty, causal=True)
    assert found.shape == shape
    found.sum().backward()
    assert simulated_attention(empty, empty, empty, 3, True).shape == shape


def test_padding_gives_nothing_and_gets_no_gradient():
    *leaves, dout = drawn(1, 8, 2, 2, 4)
    out, lse = ring_attention(*leaves, length=5, return_lse=True)
    torch.testing.assert_close(out[:, :5], naive(*(part[:, :5] for part in leaves)), atol=FORWARD, rtol=0)
    assert out[:, 5:].abs().sum() == 0
    assert (lse[:, 5:] == -torch.inf).all()
    for part in torch.autograd.grad(out, leaves, dout):
        assert part[:, 5:].abs().sum() == 0
        assert part.isfinite().all()


def test_rows_that_are_placed_freely():
    """Two queries of one document see what stands before them, wherever that lies."""
    *leaves, _ = drawn(1, 6, 2, 2, 4)
    q, k, v = (part.detach() for part in leaves)
    order = [3, 0, 5, 1]
    keys = Placement((4,), (tuple(Run(row, range(place, place + 1)) for row, place in enumerate(order)),))
    queries = Placement((2,), ((Run(0, range(2, 6, 3)),),))  # positions 2 and 5
    found = placed_attention(q[:, [2, 5]], k[:, order], v[:, order], queries, keys, causal=True)
    torch.testing.assert_close(found[:, :1], naive(q[:, 2:3], k[:, :2], v[:, :2]), atol=FORWARD, rtol=0)
    torch.testing.assert_close(found[:, 1:], naive(q[:, 5:6], k[:, order], v[:, order]), atol=FORWARD, rtol=0)


def test_ranks_that_all_wait_are_told_of():
    def waits(links):
        _, handles = links.link(0).exchange("travel", 0, [], [(1, 0, [torch.empty(2, device="meta")])])
        yield from handles

    links = SimulatedLinks(2)
    with pytest.raises(PeerError, match=r"all ranks wait.*rank 0 for \(1, 0, 'travel', 0, 0\)"):
        links.run([waits(links), iter(())])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(1, 4, 2)}, r"the shapes are query \[1, 4, 2\]"),
        ({"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)}, "there are 4 query heads and 3 key heads"),
        ({"v": torch.zeros(1, 3, 2, 8)}, "keys as many as values"),
        ({"q": torch.zeros(1, 4, 4, 8, dtype=torch.float64)}, "the types are torch.float64, torch.float32"),
        ({"q": torch.zeros(1, 4, 4, 8, device="meta")}, "the tensors are on meta, cpu and cpu; use one device"),
        ({"scheme": "star"}, "scheme is 'star'; use auto, token_ring, ring, ring2, all_gather, ulysses"),
        ({"layout": "spiral"}, "layout is 'spiral'"),
        ({"layout": "zigzag", "length": 5}, "each rank has 4 positions, and zigzag of 5 over 1 ranks has 6"),
        ({"out_dtype": torch.bfloat16}, "out_dtype is torch.bfloat16; use torch.float32"),
        ({"documents": (0, 3)}, r"documents are \[0, 3\]"),
        ({"documents": ("a",)}, r"documents is \('a',\); give the positions where documents begin"),
        ({"documents": torch.tensor([0.5, 4.0])}, r"documents is \[0.5, 4.0\]; give the positions"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; use a finite number"),
        ({"softmax_scale": float("-inf"), "scheme": "ulysses"}, "softmax_scale is -inf; use a finite number"),
        ({"window": 2}, "window is 2 and causal False"),
        ({"window": 1.5, "causal": True}, "window is 1.5; use a whole number"),
        ({"causal": "yes"}, "causal is 'yes'; use True or False"),
        ({"length": 4.5}, "length is 4.5; use a whole number of positions"),
        ({"length": torch.tensor([4, 4])}, r"length is tensor\(\[4, 4\]\); use a whole number of positions"),
        ({"window": float("nan"), "causal": True}, "window is nan; use a whole number"),
        ({"causal": torch.tensor(2)}, r"causal is tensor\(2\); use True or False"),
        ({"causal": [True]}, r"causal is \[True\]; use True or False"),
        ({"documents": [torch.tensor([0, 4])]}, r"documents is \[tensor\(\[0, 4\]\)\]; give the positions"),
        ({"softmax_scale": "a"}, "softmax_scale is 'a'; use a finite number"),
        ({"softmax_scale": np.array([0.3, 0.3])}, "softmax_scale is array"),
        ({"softmax_scale": np.array([None])}, "softmax_scale is array"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf; use a finite number"),
        ({"softmax_scal": 0.5}, "has no option 'softmax_scal'; did you mean 'softmax_scale'"),
        ({"timeout_s": 0}, "timeout_s is 0; use a finite number above 0"),
        ({"topology": "ring"}, "topology is 'ring'; use a Topology"),
        ({"q": [[0.0]]}, "must be tensors, and one of them is of type list"),
    ],
)
def test_what_cannot_be_is_said(change, said):
    given = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8), **change}
    with pytest.raises(InputError, match=said):
        context_parallel_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "ring2"}, "scheme is 'ring2', and ring_attention is by ring; call context_parallel_attention"),
        ({"scal": 1.0}, "has no option 'scal'"),
        ({"softmax_scale": "a"}, "softmax_scale is 'a'"),
    ],
)
def test_every_door_says_what_options_there_are(options, said):
    """By all functions that take them, in words, and before a type is found out to be wrong."""
    part = torch.zeros(1, 4, 2, 8)
    with pytest.raises(InputError, match=said):
        ring_attention(part, part, part, **options)
    assert ring_attention(part, part, part, scheme="ring", softmax_scale=torch.tensor(0.5)).shape == part.shape
    if "scheme" in options:
        return
    placement = Layout("contiguous", 1, 4).placement
    for call in (
        lambda: placed_attention(part, part, part, placement, placement, **options),
        lambda: simulated_attention(part, part, part, 2, **options),
        lambda: ContextParallel(nn.Identity(), **options),
    ):
        with pytest.raises(InputError, match=said):
            call()


DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_type_of_numbers_is_worked_on_or_refused(dtype):
    part = torch.empty(1, 4, 2, 8, dtype=dtype, device="meta" if str(dtype).startswith("torch.q") else "cpu")
    placement = Layout("contiguous", 1, 4).placement
    calls = (
        lambda: context_parallel_attention(part, part, part),
        lambda: simulated_attention(part, part, part, 2),
        lambda: placed_attention(part, part, part, placement, placement),
    )
    for call in calls:
        if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert call().dtype == dtype
        else:
            with pytest.raises(InputError, match=rf"the types are {dtype}, .*; use one for all, of float64, float32"):
                call()


@pytest.mark.parametrize(
    "placed", [None, 3, (4,), Layout("contiguous", 1, 4)], ids=["none", "number", "rows", "layout"]
)
def test_what_is_no_placement_is_told_so(placed):
    part, placement = torch.zeros(1, 4, 2, 8), Layout("contiguous", 1, 4).placement
    for said, wrong in (("queries", (placed, placement)), ("keys", (placement, placed)), ("queries", (placed, placed))):
        for call in (
            lambda wrong=wrong: placed_attention(part, part, part, *wrong),
            lambda wrong=wrong: simulated_placed_attention([(part, part, part)], *wrong),
        ):
            with pytest.raises(InputError, match=f"{said} are placed by .*; give a Placement"):
                call()


def whole_as(number):
    """One number by all types that have it."""
    return [
        number,
        float(number),
        np.int32(number),
        np.uint8(number),
        np.float32(number),
        np.array(number),
        torch.tensor(number),
        torch.tensor([number]),
        torch.tensor([[number]]),
        np.array([[number]]),
        torch.tensor(number, dtype=torch.int32),
        torch.tensor(float(number)),
        torch.ones(number).sum().long(),
    ]


def documents_as(places):
    """One list of positions by all types that have it, with a function that makes it, as some can be read only once."""
    of = torch.tensor(places)
    return [
        lambda: places,
        lambda: list(places),
        lambda: of,
        lambda: of.int(),
        lambda: of.double(),
        lambda: of.numpy(),
        lambda: list(of),
        lambda: list(of.numpy()),
        lambda: [float(place) for place in places],
        lambda: iter(places),
        lambda: range(places[0], places[-1] + 1, places[1] - places[0]),
    ]


ON = [True, 1, 1.0, np.bool_(True), np.int64(1), np.array(True), torch.tensor(True), torch.tensor([1])]
OFF = [False, 0, 0.0, None, np.bool_(False), torch.tensor(False), torch.tensor(0)]
KINDS_OF = {
    "window": [lambda value=value: value for value in whole_as(3)],
    "length": [lambda value=value: value for value in whole_as(7)],
    "documents": documents_as((0, 4, 8)),
    "causal": [lambda value=value: value for value in ON],
    "check": [lambda value=value: value for value in OFF],
    "softmax_scale": [
        lambda value=value: value
        for value in (
            *(0.5, Fraction(1, 2), np.float32(0.5), np.array(0.5), np.array([0.5]), np.array([[0.5]], np.float32)),
            *(torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]), torch.tensor(0.5).bfloat16()),
        )
    ],
    "timeout_s": [
        lambda value=value: value for value in (5.0, 5, np.array([5]), np.float32(5), torch.tensor([5]), Fraction(5))
    ],
    "scheme": [lambda: "ring", lambda: np.str_("ring")],
    "layout": [lambda: "zigzag", lambda: np.str_("zigzag")],
}


@pytest.mark.parametrize("name", KINDS_OF)
def test_a_value_may_be_of_any_type_that_has_it(name):
    """With the same result, and in the same words to other ranks, which may have it by another type."""
    *leaves, _ = drawn(1, 8, 2, 2, 4)
    read = {"documents": read_documents, "length": read_length, "layout": read_layout}.get(
        name, lambda value: read_options({"causal": True, name: value})
    )
    first, *others = KINDS_OF[name]
    expected = context_parallel_attention(*leaves, **{"causal": True, name: first()})
    for made in others:
        assert torch.equal(context_parallel_attention(*leaves, **{"causal": True, name: made()}), expected), made()
        assert repr(read(made())) == repr(read(first())), made()


def test_no_flag_is_off():
    *leaves, _ = drawn(1, 8, 2, 2, 4)
    for off in OFF:
        assert torch.equal(context_parallel_attention(*leaves, causal=off), context_parallel_attention(*leaves))


# One differs early, the others behind what is told from there.
@example([(0, "b"), (400, "a"), (400, "b"), (400, "ab")], "")
@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 50, 79, 80, 159, 160, 161, 400]), st.text("ab", max_size=3)),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(["", "c" * 300]),
)
def test_what_differs_is_told_in_words_that_differ(drawn_texts, behind):
    """Wherever it differs, by whatever letters, and where another text differs before it."""
    texts = ["é" * (count // 2) + letters + behind for count, letters in drawn_texts]
    digests = [hash(text) for text in texts]
    told = told_apart([text.encode() for text in texts], digests)
    assert len(set(told)) == len(set(texts))
    assert max(map(len, told)) <= 160 + len(" (digest 0123456789abcdef)")
    if max(len(text.encode()) for text in texts) <= 160:
        assert told == texts

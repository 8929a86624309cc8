"""Partial results, how they are merged, and gradients of parts."""

import math

import pytest
import torch

from anabranch.cluster.ring import kernel
from anabranch.cluster.ring.kernel import attend, gradients, merge
from anabranch.cluster.ring.pieces import Piece
from naive_attention import drawn, naive


def partial(out: float, lse: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, 1, 1), out, dtype=torch.float64), torch.full((1, 1, 1), lse, dtype=torch.float64)


def test_a_merge_by_hand():
    # Sums of 1 and 3: a quarter of the first and three quarters of the second.
    out, lse = partial(8.0, 0.0)
    merge(out, lse, *partial(4.0, math.log(3.0)))
    assert out.item() == pytest.approx(5.0, abs=1e-15)
    assert lse.item() == pytest.approx(math.log(4.0), abs=1e-15)


@pytest.mark.parametrize("first", [0.0, -1e4, 1e4])
def test_what_saw_nothing_changes_nothing(first):
    nothing = -math.inf
    out, lse = partial(2.5, first)
    merge(out, lse, *partial(0.0, nothing))
    assert (out.item(), lse.item()) == (2.5, first)
    out, lse = partial(0.0, nothing)
    merge(out, lse, *partial(2.5, first))
    assert (out.item(), lse.item()) == (2.5, first)
    out, lse = partial(0.0, nothing)
    merge(out, lse, *partial(0.0, nothing))
    assert (out.item(), lse.item()) == (0.0, nothing)


def test_scores_of_ten_thousand_do_not_overflow():
    out, lse = partial(1.0, 1e4)
    merge(out, lse, *partial(3.0, 1e4))
    assert out.item() == pytest.approx(2.0)
    assert lse.item() == pytest.approx(1e4 + math.log(2))


def test_the_order_of_merges_does_not_matter_beyond_rounding():
    generator = torch.Generator().manual_seed(1)
    parts = [
        (torch.randn(2, 3, 5, 4, generator=generator), 4 * torch.randn(2, 3, 5, generator=generator)) for _ in range(4)
    ]
    found = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        out, lse = torch.zeros(2, 3, 5, 4), torch.full((2, 3, 5), -torch.inf)
        for number in order:
            merge(out, lse, *parts[number])
        found.append((out, lse))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


PIECES = {
    "full": (Piece((0, 9), (0, 7)),),
    "causal": (Piece((2, 7), (1, 6), "causal"),),
    # Query 0 sees nothing of it.
    "window": (Piece((0, 9), (0, 7), "window", range(0, 9), range(1, 8), 3),),
    "two": (Piece((0, 9), (0, 2)), Piece((3, 8), (2, 7), "causal")),
}


def seen_of(pieces) -> torch.Tensor:
    seen = torch.zeros(9, 7, dtype=torch.bool)
    for piece in pieces:
        part = seen[slice(*piece.rows), slice(*piece.keys)]
        part |= {
            "full": lambda part=part: torch.ones_like(part),
            "causal": lambda part=part: torch.ones_like(part).tril(),
            "window": piece.seen,
        }[piece.kind]()
    return seen


def check_parts(kind, heads, groups, scale):
    pieces, seen = PIECES[kind], seen_of(PIECES[kind])
    generator = torch.Generator().manual_seed(2)
    q, dout = (torch.randn(2, heads, 9, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, groups, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [part.clone().requires_grad_() for part in (q, k, v)]
    wide = [part.repeat_interleave(heads // groups, 1) for part in leaves[1:]]
    some = seen.any(-1)
    score = (leaves[0] @ wide[0].mT * scale).masked_fill(~seen & some[:, None], -torch.inf)
    expected = (score.softmax(-1) * seen) @ wide[1]
    lse = score.logsumexp(-1).masked_fill(~some, -torch.inf)

    out, found = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    attend(q, k, v, pieces, out, found, scale=scale)
    torch.testing.assert_close(out, expected.detach(), atol=1e-13, rtol=0)
    torch.testing.assert_close(found, lse.detach(), atol=1e-13, rtol=0)

    (expected * dout).sum().backward()
    into = tuple(torch.zeros_like(part) for part in (q, k, v))
    delta = (dout * out).sum(-1)
    gradients(q, k, v, dout, found, delta, pieces, into, scale=scale)
    for part, leaf in zip(into, leaves, strict=True):
        torch.testing.assert_close(part, leaf.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tile", [None, 40])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", PIECES)
def test_parts_and_their_gradients_are_those_of_a_softmax(kind, heads, groups, flash, tile, monkeypatch):
    """With and without torch's kernel, in one tile and in many."""
    if not flash:
        monkeypatch.setattr(kernel, "_FLASH", None)
    if tile is not None:
        monkeypatch.setattr(kernel, "TILE", tile)
    check_parts(kind, heads, groups, 0.3)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.4, -3.0, 1e-9])
@pytest.mark.parametrize("kind", PIECES)
def test_scales_of_any_sign(kind, scale, flash, monkeypatch):
    """What is masked stays so, though a kernel scales it too."""
    if not flash:
        monkeypatch.setattr(kernel, "_FLASH", None)
    check_parts(kind, 4, 2, scale)


def test_rows_and_keys_are_counted_from_where_blocks_begin():
    q, k, v, _ = (part.detach().transpose(1, 2) for part in drawn(1, 12, 2, 2, 4))
    pieces = (Piece((4, 8), (6, 10)),)
    out, lse = torch.zeros(1, 2, 5, 4, dtype=q.dtype), torch.full((1, 2, 5), -torch.inf, dtype=q.dtype)
    attend(q[:, :, 4:9], k[:, :, 5:], v[:, :, 5:], pieces, out, lse, scale=0.5, row=4, key=5)
    expected = naive(*(part.transpose(1, 2) for part in (q[:, :, 4:8], k[:, :, 6:10], v[:, :, 6:10])))
    torch.testing.assert_close(out[:, :, :4], expected.transpose(1, 2), atol=1e-14, rtol=0)
    assert out[:, :, 4].abs().sum() == 0


def test_half_types_are_kept_in_float32():
    q, k, v, _ = (part.detach().transpose(1, 2) for part in drawn(1, 32, 2, 1, 16, torch.bfloat16))
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:3], -torch.inf)
    attend(q, k, v, (Piece((0, 32), (0, 32)),), out, lse, scale=0.25)
    expected = naive(*(part.transpose(1, 2).double() for part in (q, k, v))).transpose(1, 2)
    # Rounded to bfloat16 it would be off by 4e-3.
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)

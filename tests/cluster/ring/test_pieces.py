"""What queries see of keys, as rectangles and triangles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.ring import Layout, Run
from anabranch.cluster.ring.pieces import Mask, Piece, hull, pieces_between
from anabranch.errors import InputError
from naive_attention import is_seen


def covered(pieces, queries: int, keys: int) -> torch.Tensor:
    """How often each pair is in a piece."""
    count = torch.zeros(queries, keys, dtype=torch.int64)
    for piece in pieces:
        part = count[slice(*piece.rows), slice(*piece.keys)]
        if piece.kind == "full":
            part += 1
        elif piece.kind == "causal":
            assert part.shape[0] == part.shape[1]
            part += torch.ones_like(part).tril()
        else:
            part += piece.seen()
    return count


def test_a_chunk_sees_the_one_before_wholly_itself_by_a_triangle_and_the_next_not():
    runs = [Run(0, range(4 * chunk, 4 * chunk + 4)) for chunk in range(3)]
    mask = Mask(causal=True)
    assert pieces_between([runs[1]], [runs[0]], mask) == (Piece((0, 4), (0, 4)),)
    assert pieces_between([runs[1]], [runs[1]], mask) == (Piece((0, 4), (0, 4), "causal"),)
    assert pieces_between([runs[1]], [runs[2]], mask) == ()


def test_stripes_see_each_other_by_triangles():
    even, odd = Run(0, range(0, 8, 2)), Run(0, range(1, 9, 2))
    assert pieces_between([odd], [even], Mask(causal=True)) == (Piece((0, 4), (0, 4), "causal"),)
    # 0 sees nothing of 1, 3, 5, 7; 2 sees 1.
    assert pieces_between([even], [odd], Mask(causal=True)) == (Piece((1, 4), (0, 3), "causal"),)


def test_zigzag_needs_two_products():
    """The paper's schedule: all queries of j > r meet the first chunk of r, the second half of those of j < r all that r has."""
    runs = Layout("zigzag", 4, 80).placement.runs
    assert pieces_between(runs[3], runs[1], Mask(causal=True)) == (Piece((0, 20), (0, 10)),)
    assert pieces_between(runs[1], runs[3], Mask(causal=True)) == (Piece((10, 20), (0, 20)),)


@given(
    st.sampled_from(("contiguous", "zigzag", "stripe")),
    st.sampled_from(("contiguous", "zigzag", "stripe")),
    st.integers(1, 4),
    st.integers(0, 24),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 12)),
    st.randoms(),
)
def test_pieces_are_what_is_seen_and_no_pair_twice(of_queries, of_keys, world, length, causal, window, draw):
    """Also where queries and keys are placed by different layouts."""
    inner = sorted(draw.choices(range(length + 1), k=draw.randrange(3)))
    documents = (0, *inner, length)
    window = window if causal else None
    queries, keys = (Layout(kind, world, length, documents) for kind in (of_queries, of_keys))
    for one in range(world):
        for other in range(world):
            pieces = pieces_between(queries.placement.runs[one], keys.placement.runs[other], Mask(causal, window))
            count = covered(pieces, queries.rows, keys.rows)
            expected = torch.tensor(
                [
                    [
                        max(query, key) < length and is_seen(query, key, causal, window, documents)
                        for key in keys.places(other).tolist()
                    ]
                    for query in queries.places(one).tolist()
                ]
            ).reshape(count.shape)
            assert torch.equal(count, expected.long())
            assert sum(piece.pairs for piece in pieces) == expected.sum()


def test_hull():
    assert hull([(3, 5), (1, 2)]) == (1, 5)
    assert hull([]) is None


@pytest.mark.parametrize("values", [{"causal": True, "window": 0}, {"causal": False, "window": 3}])
def test_a_window_is_of_causal_attention(values):
    with pytest.raises(InputError, match=f"window is {values['window']}"):
        Mask(**values)

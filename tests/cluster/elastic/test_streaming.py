"""Which chunk travels when: everything once, in order, in as many steps as are told."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic import Grid, Layout
from anabranch.cluster.elastic.layout import steps_of
from anabranch.cluster.elastic.streaming import Stream


@given(st.data())
def test_every_number_of_a_move_goes_once(data):
    layers = data.draw(st.integers(2, 5))
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=layers, max_size=layers))
    grid = Grid.full(replicas=data.draw(st.integers(1, 3)), stages=2)
    at = data.draw(st.tuples(st.integers(1, layers - 1), st.integers(1, layers - 1)))
    before, after = Layout(grid, at[:1], layers), Layout(grid.with_rank(99), at[1:], layers)
    chunk, start = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 5))
    stream = Stream(before, after, sizes, chunk, start, 0, updater=None)
    assert stream.end == start + steps_of(before, after, sizes, chunk)
    for move in stream.moves:
        went = [n for version in range(start, stream.end) for n in range(*stream._due(move, version))]
        assert went == list(range(move.first, move.end))
        assert not stream.has(move, stream.end - 1)
        assert stream.has(move, stream.end)
        # Nothing is left to go, and gradients are of everything.
        assert stream._due(move, stream.end + 3) == (move.end, move.end)

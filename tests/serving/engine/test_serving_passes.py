"""The chunks of a step that are computed alike go through the model at once."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.passes import Variant, passes_of


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=8))
def test_there_is_one_pass_for_each_kind(shapes):
    chunks, kinds, start = [], {}, 0
    for number, (kind, length) in enumerate(shapes):
        tokens = tuple(range(start, start + length))
        chunks.append(Chunk(id=str(number), tokens=tokens, start=0, blocks=(), samples=True))
        kinds[str(number)], start = Variant(num_streams=kind + 1), start + length
    passes = passes_of(chunks, list(range(100, 100 + start)), lambda chunk: kinds[chunk.id])
    order = list(dict.fromkeys(kinds.values()))
    assert len(passes) == len(order)
    for kind, found in zip(order, passes, strict=True):
        assert found.chunks == [chunk for chunk in chunks if kinds[chunk.id] == kind]
        rows = [row for chunk in found.chunks for row in chunk.tokens]
        assert found.place == {row: at for at, row in enumerate(rows)}
        assert found.tokens == [100 + row for row in rows]

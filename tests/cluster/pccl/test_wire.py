"""Control frames: what is written is read, however it is cut, and what is none is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.pccl.wire import HEADER, MOST_BODY, Frame, Kind, Reader, WireError, number, packed, word

BODIES = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8), st.lists, max_leaves=5
    ),
    max_size=4,
)


@given(
    frames=st.lists(st.builds(Frame, st.sampled_from(list(Kind)), BODIES, st.integers(0, 2**63 - 1)), max_size=5),
    cuts=st.lists(st.integers(1, 40), min_size=1),
)
def test_frames_come_as_they_went_however_they_are_cut(frames, cuts):
    data = b"".join(packed(frame.kind, frame.body, frame.epoch) for frame in frames)
    reader, found, place = Reader(), [], 0
    while place < len(data):
        size = cuts[len(found) % len(cuts)]
        found += reader.feed(data[place : place + size])
        place += size
    assert found == frames


@given(data=st.binary(max_size=200), most=st.integers(0, 100))
def test_no_bytes_do_harm(data, most):
    reader = Reader(most)
    try:
        for start in range(0, len(data), 7):
            reader.feed(data[start : start + 7])
            assert len(reader._held) <= HEADER.size + most + 7
    except WireError:
        pass


@given(body=BODIES)
def test_fields_are_what_they_should_be_or_told(body):
    for name in (*body, "none"):
        try:
            assert 0 <= number(body, name, 100) <= 100
        except WireError:
            assert type(body.get(name)) is not int or not 0 <= body[name] <= 100
        try:
            assert len(word(body, name, 4)) <= 4
        except WireError:
            assert not isinstance(body.get(name), str) or len(body[name]) > 4


def test_what_is_too_large_is_not_sent():
    with pytest.raises(WireError, match="at most"):
        packed(Kind.VOTE, {"x": "y" * MOST_BODY})

"""Which layout holds, and how another becomes the one that does."""

import pytest

from elastic_room import Room, slices


def test_training_begins_when_all_are_there_and_ready():
    room = Room()
    for _ in range(3):
        room.come()
    assert room.made.layout is None
    assert room.lines[0].kinds() == ["welcome"]
    room.come()
    assert room.lines[0].kinds() == ["welcome", "epoch"]
    assert all(line.is_admitted for line in room.lines.values())
    for rank in range(4):
        assert room.made.layout is None
        room.tell(rank, "ready")
    assert room.made.layout.grid.stages == ((0, 1), (2, 3))
    assert room.lines[3].kinds() == ["welcome", "epoch", "go"]


def test_a_loss_takes_the_step_back_and_says_how_long_it_was_not_heard():
    room = Room().begin()
    room.vote(0, 1, 2)
    room.made.members[1].heard -= 7
    room.made.lose([1], "gone")
    said = room.lines[0].said[-1]
    assert (said["kind"], said["epoch"], said["version"], said["holders"]) == ("epoch", 2, 0, {"1": [0]})
    assert said["detect_s"] == pytest.approx(7, abs=2)
    assert said["plan"]["stages"][0]["ranks"] == [0]
    room.ready()
    room.made.members[0].vote = None
    room.vote()
    assert room.made.version == 1
    commit = next(said for said in reversed(room.lines[0].said) if said["kind"] == "commit")
    assert (commit["step"], commit["loss"]) == (0, {"": (2.0).hex()})


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_newcomer_comes_in_after_a_step(chunk):
    room = Room(2, 1, chunk=chunk).begin(2)
    line = room.come()
    assert line.kinds() == ["welcome"]
    room.vote()
    if chunk is not None:
        assert "live" in line.said[-1]
        while room.made._stream is not None:
            room.tell(2, "vote", step=room.made.version, loss=[])
            room.vote()
    assert line.kinds()[-1] == "epoch"
    room.ready()
    assert room.made.layout.grid.stages == ((0, 1, 2),)


def test_who_comes_by_a_stream_that_a_loss_ends_comes_later():
    """What is announced then is no commit, and the newcomer is still one who waits."""
    room = Room(3, 1, chunk=1).begin(3)
    line = room.come()
    room.vote()
    assert room.made._stream is not None
    room.tell(3, "vote", step=1, loss=[])
    room.vote(0, 2)
    room.made.lose([1], "gone")
    assert line.kinds()[-1] == "epoch"
    assert 3 not in room.made._target.grid.ranks
    for rank in (0, 2):
        room.tell(rank, "ready")
    room.vote()
    assert room.made._stream is not None
    assert 3 in room.made._stream[0].grid.ranks


@pytest.mark.parametrize("chunk", [None, 4])
def test_who_comes_in_after_a_step_has_no_part_in_what_all_do_after_it(chunk):
    """The others waited for its part, and it for the next step."""
    room = Room(2, 1, chunk=chunk).begin(2)
    held = room.made.epoch
    room.come()
    room.vote()
    while room.made._stream is not None:
        room.tell(2, "vote", step=room.made.version, loss=[])
        room.vote()
    assert room.made._target.grid.ranks == (0, 1, 2)
    assert room.lines[0].said[-1]["is_growth"]
    # A stuck one is found here as ever.
    room.beat(0, {"round": "weights"}, epoch=held)
    assert room.made.members[0].standing.waits == {"round": "weights"}
    for rank in (0, 1):
        slices(room, rank, epoch=held)
    assert room.lines[0].said[-1]["kind"] == "manifest"
    room.tell(0, "manifest", epoch=held, version=room.made.version, folder="kept", why=None)
    assert [room.lines[rank].said[-1]["kind"] for rank in (0, 1)] == ["saved", "saved"]
    room.ready()
    assert room.made.layout.grid.ranks == (0, 1, 2)
    # From then on the older epoch is over.
    slices(room, 0, epoch=held)
    assert room.made._rounds.missing("slices of step 1", (0, 1, 2)) == [0]


def test_a_loss_ends_what_was_begun_before_growth():
    room = Room(3, 1).begin(3)
    held = room.made.epoch
    room.come()
    room.vote()
    slices(room, 0, epoch=held)
    room.made.lose([2], "gone")
    assert not room.lines[0].said[-1]["is_growth"]
    for rank in (0, 1):
        slices(room, rank, epoch=held)
    assert room.lines[0].said[-1]["kind"] == "epoch"

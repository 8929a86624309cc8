"""What a coordinator decides, without sockets: words of ranks go in, words to ranks come out."""

import time

import pytest

from anabranch.cluster.elastic.planner import Policy
from elastic_room import HELLO, SIGNATURE, Room, slices


def test_a_step_is_committed_by_the_last_vote_with_the_loss_of_all():
    room = Room().begin()
    room.vote(0, 1, 2)
    # Of another step, or another epoch, a vote is nothing.
    room.vote(3, step=7)
    room.tell(3, "vote", epoch=0, step=0, loss=[], blocks=2)
    assert room.made.version == 0
    room.vote(3)
    assert room.made.version == 1
    assert room.lines[0].said[-1] == {"kind": "commit", "epoch": 1, "step": 0, "loss": {"": (2.0).hex()}}


# The door


def test_the_first_hello_is_no_law_when_it_has_gone():
    room = Room(1, 1)
    room.signature = SIGNATURE | {"seed": 99}
    Room(1, 1)
    two = Room(2, 1)
    two.come(signature=SIGNATURE | {"seed": 99})
    assert two.come().said == [{"kind": "refuse", "why": "its seed is 5, and those here have 99"}]
    two.made.lose([0], "gone")
    assert two.come().kinds() == ["welcome"]
    assert two.come().kinds()[0] == "welcome"
    assert two.made.plans.signature == SIGNATURE


def test_a_hello_that_makes_no_sense_leaves_nothing():
    room = Room(2, 1)
    line = room.come(signature={name: value for name, value in SIGNATURE.items() if name != "copies"} | {"seed": 1})
    assert line.said == [{"kind": "refuse", "why": "its hello has no sound copies"}]
    assert line.is_closed
    assert not line.is_admitted
    assert room.made.members == {}
    assert [room.come().kinds()[0] for _ in range(2)] == ["welcome", "welcome"]


def test_a_connection_has_one_seat():
    room = Room(2, 1)
    line = room.come()
    with pytest.raises(ValueError, match="a second hello"):
        room.made.hello(line, HELLO)
    assert list(room.made.members) == [0]


def test_a_policy_is_that_of_the_ranks_where_the_coordinator_has_none():
    told = {"threshold": 0.5, "schedule_names": ["1f1b"]}
    room = Room(1, 1, policy=None)
    room.signature |= {"policy": told}
    room.come()
    assert room.made.plans.policy == Policy(threshold=0.5, schedule_names=("1f1b",))
    for wrong in ({"threshold": 7}, {"threshold": "x"}, {"nothing": 1}, {"schedule_names": ["x"]}, 3):
        room = Room(1, 1)
        room.signature |= {"policy": wrong}
        assert room.come().said[0]["why"].startswith("its policy makes no sense")
    room = Room(1, 1, policy=Policy(threshold=0.1))
    room.signature |= {"policy": told}
    assert "and the coordinator has Policy(threshold=0.1" in room.come().said[0]["why"]
    assert room.made.plans.policy == Policy(threshold=0.1)


# What is told of an older epoch


def test_what_was_saved_of_an_older_layout_is_no_part_of_a_checkpoint():
    room = Room().begin()
    room.vote()
    for rank in (0, 1, 2):
        slices(room, rank)
    room.made.lose([3], "gone")
    room.ready()
    # The answer of the old epoch comes late, and is dropped too.
    slices(room, 1, epoch=1)
    slices(room, 0)
    assert "manifest" not in room.lines[0].kinds()
    slices(room, 1)
    slices(room, 2)
    assert room.lines[0].kinds()[-1] == "manifest"
    room.tell(0, "manifest", version=1, folder="kept", why=None)
    assert [line.said[-1] for rank, line in room.lines.items() if rank != 3] == [{"kind": "saved", "why": None}] * 3
    assert ("saved", {"version": 1, "why": None}) in room.history


def test_a_checkpoint_whose_writer_is_lost_before_its_manifest_is_none():
    room = Room().begin()
    room.vote()
    for rank in range(4):
        slices(room, rank)
    room.made.lose([0], "gone")
    room.ready()
    assert room.made._rounds.newest is None
    for rank in (1, 2, 3):
        slices(room, rank)
    assert room.lines[1].kinds()[-1] == "manifest"


def test_who_has_done_its_part_does_it_again_where_one_is_lost():
    room = Room().begin()
    for rank in (0, 1, 3):
        room.tell(rank, "done", what="weights")
    room.made.lose([2], "gone")
    room.ready()
    room.tell(0, "done", what="weights")
    room.tell(1, "done", what="weights", epoch=1)
    assert room.lines[0].kinds()[-1] == "go"
    room.tell(1, "done", what="weights")
    room.tell(3, "done", what="weights")
    assert [room.lines[rank].kinds()[-1] for rank in (0, 1, 3)] == ["done"] * 3


def test_what_all_have_done_is_told_before_a_loss_that_comes_after():
    room = Room().begin()
    for rank in range(4):
        room.tell(rank, "done", what="weights")
    room.made.lose([2], "gone")
    assert room.lines[0].kinds()[-2:] == ["done", "epoch"]


def test_training_has_not_ended_by_the_word_of_an_older_epoch():
    room = Room().begin()
    room.made.lose([3], "gone")
    room.tell(0, "wrote", where="kept", version=0, is_last=True, epoch=1)
    assert not room.made.is_ending
    room.ready()
    room.tell(0, "wrote", where="kept", version=0, is_last=True)
    assert room.made.is_ending
    assert room.lines[1].said[-1] == {"kind": "finished", "where": "kept"}


def test_a_checkpoint_is_told_of_once():
    """The last one is written as any other, and then as the end of training."""
    room = Room().begin()
    room.tell(0, "wrote", where="kept", version=0, is_last=False)
    room.tell(0, "wrote", where="kept", version=0, is_last=True)
    assert room.made.is_ending
    room.tell(0, "wrote", where="kept", version=1, is_last=False)
    assert [told["version"] for what, told in room.history if what == "wrote"] == [0, 1]


# Who holds up others


def test_the_rank_that_all_wait_for_is_cast_out_and_not_those_who_wait():
    room = Room(3, 1).begin(3)
    room.vote(0, 2)
    for rank in (0, 2):
        room.beat(rank, {"what": "commit"}, is_long=True)
    room.beat(1, is_long=True)
    room.look(1)
    assert room.why_lost() == {}
    room.look()
    assert room.why_lost() == {1: "it is stuck: rank 0 has waited too long for it"}
    # It hears why when it wakes.
    assert room.lines[1].is_closed
    assert room.lines[1].said[-1] == {
        "kind": "stop",
        "why": "the coordinator has cast this rank out: it is stuck: rank 0 has waited too long for it",
    }
    assert room.lines[0].kinds()[-1] == "epoch"
    assert room.lines[0].said[-1]["lost"] == {"1": "it is stuck: rank 0 has waited too long for it"}
    # Beats of the older epoch accuse nobody in the new one.
    room.beat(0, {"ranks": [2]}, is_long=True, epoch=1)
    room.beat(2, is_long=False, epoch=1)
    room.look()
    assert len(room.why_lost()) == 1


def test_one_that_is_not_ready_for_another_layout_is_cast_out():
    room = Room(3, 1).begin(3)
    room.made._begin_epoch()
    for rank in (0, 2):
        room.tell(rank, "ready")
        room.beat(rank, {"what": "go"}, is_long=True)
    # It has not even seen that there is another.
    room.beat(1, is_long=True, epoch=1)
    room.look()
    assert list(room.why_lost()) == [1]


def test_one_that_cannot_be_missed_is_waited_for():
    room = Room(2, 1, copies=0).begin(2)
    room.beat(0, {"ranks": [1]}, is_long=True)
    room.beat(1, is_long=True)
    for _ in range(3):
        room.look()
    assert room.why_lost() == {}
    assert room.made.stopped is None
    noted = [more for what, more in room.history if what == "stuck"]
    assert noted == [
        {"rank": 1, "why": "it is stuck: rank 0 has waited too long for it; nobody has a copy of what it has"}
    ]


def test_a_newcomer_that_waits_for_its_turn_accuses_nobody():
    room = Room(2, 1).begin(2)
    room.come()
    room.beat(2, {"ranks": [1]}, is_long=True)
    room.beat(1, is_long=True)
    room.look()
    assert room.why_lost() == {}


def test_ranks_that_wait_for_each_other_begin_anew_and_in_the_end_it_is_said():
    room = Room(2, 1).begin(2)
    for epoch in range(1, 5):
        assert room.made.epoch == epoch
        room.beat(0, {"ranks": [1]}, is_long=True)
        room.beat(1, {"round": "weights"}, is_long=True)
        room.tell(1, "done", what="weights")
        room.look()
        if epoch < 4:
            room.ready()
    assert room.why_lost() == {}
    assert "again and again ranks wait for each other: rank 0 for {'ranks': [1]}" in room.made.stopped


def test_who_waits_for_those_who_have_left_is_sent_home():
    room = Room(2, 1).begin(2)
    room.tell(0, "leave")
    room.beat(1, {"ranks": [0]}, is_long=True)
    room.look()
    assert room.lines[1].said[-1]["kind"] == "stop"
    assert "training has ended" in room.lines[1].said[-1]["why"]


def test_a_beat_is_answered():
    room = Room(1, 1).begin(1)
    room.beat(0)
    assert room.lines[0].said[-1] == {"kind": "beat"}
    with pytest.raises(ValueError, match="a wait for"):
        room.beat(0, waits=["x"])


def test_a_link_may_break_now_and_then():
    """Both ends tell of each break; what carried a step since is sound."""
    room = Room().begin()
    for _ in range(6):
        epoch = room.made.epoch
        room.tell(0, "suspect", rank=1)
        room.tell(1, "suspect", rank=0)
        room.look()
        assert room.made.epoch == epoch + 1
        room.ready()
        room.vote()
    assert room.why_lost() == {}


def test_a_newcomer_that_does_not_reach_the_others_costs_nobody_a_seat():
    """A firewall, another network, a wrong route: it says of each that it does not reach it, in each layout that it comes to."""
    room = Room(3, 1, patience_s=60.0).begin(3)
    line = room.come()
    for _ in range(4):
        room.vote()
        room.ready_but(3)
        for other in (0, 1, 2):
            if 3 in room.made.members:
                room.tell(3, "suspect", rank=other)
        room.look()
        assert room.made.layout.grid.stages == ((0, 1, 2),)
        room.ready_but(3)
    assert list(room.why_lost()) == [3]
    assert line.said[-1]["why"] == "the coordinator has cast this rank out: ranks 3 and 0 do not reach each other"
    assert room.made.stopped is None


def test_who_has_no_part_yet_takes_nobody_from_a_step():
    room = Room(2, 1).begin(2)
    room.come()
    room.tell(2, "suspect", rank=0)
    room.tell(0, "suspect", rank=2)
    epoch = room.made.epoch
    room.look()
    assert room.made.epoch == epoch
    room.made._begin_epoch()
    # Nor does anybody wait for a link to it.
    assert list(room.lines[0].said[-1]["members"]) == ["0", "1"]


def test_of_two_that_do_not_reach_each_other_one_goes_that_can_be_missed():
    room = Room(2, 1, copies=0).begin(2)
    for _ in range(6):
        room.tell(0, "suspect", rank=1)
        room.look()
        room.ready()
    assert room.why_lost() == {}
    assert [more["why"] for what, more in room.history if what == "stuck"] == [
        "ranks 0 and 1 do not reach each other; nobody has a copy of what it has"
    ]


def test_a_link_that_cannot_be_opened_at_the_beginning_is_tried_again():
    room = Room(2, 1)
    for _ in range(2):
        room.come()
    room.tell(1, "suspect", rank=0)
    room.look()
    assert room.lines[0].kinds()[-2:] == ["epoch", "epoch"]
    room.ready()
    assert room.made.layout is not None


def test_a_coordinator_that_stood_still_has_heard_nobody():
    room = Room(2, 1).begin(2)
    now = time.monotonic()
    heard = room.made.members[0].heard
    room.made.has_stood_still(40.0, now + 40.5)
    assert room.made.members[0].heard == heard + 40
    room.made.has_stood_still(40.0, now + 41.0)
    assert room.made.members[0].heard == now + 41


# Errors


def test_an_error_of_the_same_step_ends_training_and_a_wait_that_ended_does_not():
    room = Room(4, 1).begin(4)
    for rank in (1, 3):
        room.tell(rank, "fail", step=0, why="PeerError: the coordinator has said nothing for 60 s")
        room.ready()
    assert list(room.why_lost()) == [1, 3]
    assert room.made.stopped is None
    room = Room(4, 1).begin(4)
    room.tell(1, "fail", step=0, why="ZeroDivisionError: division by zero")
    room.ready()
    room.tell(2, "fail", step=0, why="ZeroDivisionError: division by zero")
    assert "step 0 ends one rank after another: rank 2 failed: ZeroDivisionError" in room.made.stopped


def test_a_loss_of_some_samples_alone_is_the_fault_of_no_rank():
    room = Room(2, 1).begin(2)
    one = ["z", 0, 0, (1.0).hex()]
    room.vote(0, loss=[["", 0, 0, (1.0).hex()], one])
    room.vote(1)
    assert room.made.stopped.startswith("step 0 cannot be made: the term 'z' is told of some samples alone")
    assert room.why_lost() == {}
    assert room.lines[0].said[-1]["kind"] == "stop"


def test_one_with_another_batch_is_lost_and_where_nobody_knows_which_is_right_it_is_said():
    """Other losses in all ranks, and nobody said a word."""
    room = Room(3, 1).begin(3)
    room.vote(0, 2, batch="ab")
    room.vote(1, batch="cd")
    assert room.why_lost() == {1: "its batch of step 0 is not that of rank 0"}
    assert room.made.version == 0
    room = Room(2, 1).begin(2)
    room.vote(0, batch="ab")
    room.vote(1, batch="cd")
    assert room.why_lost() == {}
    assert "ranks have unlike batches" in room.made.stopped
    # A newcomer's word is less than that of one who has made steps.
    room = Room(1, 1).begin(1)
    room.vote(batch="ab")
    room.come()
    room.vote(batch="ab")
    room.ready()
    room.vote(0, batch="ab")
    room.vote(1, batch="cd")
    assert list(room.why_lost()) == [1]
    assert room.made.stopped is None


def test_training_ends_also_for_one_that_was_on_its_way_in():
    room = Room(2, 1).begin(2)
    line = room.come()
    room.vote()
    room.tell(0, "leave")
    assert line.said[-1] == {"kind": "stop", "why": "training has ended"}


def test_one_that_begins_elsewhere_is_refused_alone():
    """It stopped all, also those who were right."""
    room = Room(2, 1)
    room.come()
    for name, value, told in (
        ("weights", "cd", "other weights than rank 0"),
        ("moments", "cd", "other state of the optimizer than rank 0"),
        ("version", 3, "begins at step 3, and rank 0 at 0"),
    ):
        line = room.come(**{name: value})
        assert line.said[-1]["kind"] == "refuse"
        assert told in line.said[-1]["why"]
    assert room.made.stopped is None
    room.come()
    room.ready()
    # Who comes later is given all of it.
    assert room.come(weights="cd", version=7).kinds() == ["welcome"]

"""What recorders are told: each position once, and nothing of a step that failed."""

from anabranch.routing.sequences import WHEN_DONE
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.recorders import Told


def chunk(id, start, count):
    return Chunk(id=id, tokens=(5,) * count, start=start, blocks=(0,), samples=False)


def test_a_position_that_is_computed_again_is_marked_in_every_stream():
    told, first = Told(), [chunk("a", 0, 2), chunk("b", 0, 1)]
    assert "repeated_N" not in told.state(first, 2)
    told.end(first)
    again = [chunk("a", 1, 2), chunk("c", 0, 1)]
    assert told.state(again, 2)["repeated_N"].tolist() == [True, False, False, True, False, False]
    # A shorter piece takes nothing back.
    told.end([chunk("a", 0, 1)])
    assert told.state([chunk("a", 1, 1)], 1)["repeated_N"].tolist() == [True]
    told.forget("a")
    assert "repeated_N" not in told.state([chunk("a", 1, 1)], 1)


def test_what_a_failed_step_recorded_is_dropped():
    told, heard, chunks = Told(), [], [chunk("a", 0, 1)]
    told.state(chunks, 1)[WHEN_DONE].append(lambda: heard.append("failed"))
    told.begin()
    told.state(chunks, 1)[WHEN_DONE].append(lambda: heard.append("done"))
    told.end(chunks)
    told.end(chunks)
    assert heard == ["done"]


def test_names_are_of_requests_and_not_of_ids():
    told = Told()
    one, two, other = told.names([chunk("a", 0, 2), chunk("b", 0, 1)])
    assert one is two
    assert other is not one
    assert told.names([chunk("a", 2, 1)])[0] is one
    told.forget("a")
    assert told.names([chunk("a", 0, 1)])[0] is not one


def test_what_is_hidden_counts_as_seen():
    told = Told()
    told.hide("a", 2)
    assert told.state([chunk("a", 0, 3)], 1)["repeated_N"].tolist() == [True, True, False]

"""Where keys share an engine: what is expected for one that others make room for."""

import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admission_gate import gate, refused, serve
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.overload import OverloadError
from anabranch.serving.core.pace import Line
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.core.scheduler import SchedulerConfig


def seated(admission, key, count):
    tickets = [admission.admit(10, key) for _ in range(count)]
    for ticket in tickets:
        ticket.started()
    return tickets


def test_a_key_that_others_make_room_for_is_not_told_of_their_standstill():
    admission, clock = gate(is_shared=True)
    serve(admission, clock, seconds=1.0, count=30)
    own = seated(admission, "a", 16)
    for _ in range(4):
        admission.admit(10, "a")
    clock.now += 300
    assert admission.expected_first_token_s(10, "a") > 600
    # Nobody was owed a seat of late, so nothing is known.
    assert admission.expected_first_token_s(10, "b") is None
    with admission.admit(10, "b", deadline_s=1.0) as ticket:
        clock.now += 3.0
        assert admission.expected_first_token_s(10, "c") > 1.0
        ticket.started()
        assert 0 < admission.expected_first_token_s(10, "c") < 6.0
        # With as many seats as others have, it waits as they do; before that nothing is known of those that have eight.
        more = seated(admission, "b", 7)
        assert admission.expected_first_token_s(10, "b") is None
        seated(admission, "b", 7)
        clock.now += 300
        assert admission.expected_first_token_s(10, "b") > 600
    for ticket in own + more:
        ticket.close()


def test_those_that_are_owed_seats_tell_of_a_standstill_of_their_own():
    admission, clock = gate(is_shared=True)
    serve(admission, clock, seconds=1.0, count=30)
    seated(admission, "a", 16)
    waits = admission.admit(10, "b")
    clock.now += 300
    refused(admission, "deadline", 10, "c", deadline_s=600.0)
    waits.close()
    admission.admit(10, "c", deadline_s=600.0)


def test_no_more_of_a_key_are_owed_seats_than_the_other_has_over():
    admission, _ = gate(is_shared=True)
    seated(admission, "a", 16)
    # With eight, a has as many.
    assert [admission.admit(10, "b").owed is not None for _ in range(10)] == [True] * 8 + [False] * 2


@pytest.mark.parametrize("is_shared", [True, False])
def test_who_waits_for_adapters_or_a_grammar_is_no_standstill_for_others(is_shared):
    """A request that waited for memory for its adapters had others refused, whatever they asked for."""
    admission, clock = gate(is_shared=is_shared)
    serve(admission, clock, seconds=0.05, count=30)
    open_now = seated(admission, "a", 4)
    waits = admission.admit(10, "b")
    waits.prepared(False)
    for _ in range(29):
        clock.now += 1.0
        admission.admit(10, "c", deadline_s=1.0).close()
        with admission.admit(10, "d", deadline_s=1.0) as ticket:
            # Of one that had its own at once nothing was told, or both.
            for is_prepared in (None, False, True):
                ticket.prepared(is_prepared)
            clock.now += 0.05
            ticket.started()
    assert (admission.queued, admission.queued_tokens) == (1, 10)
    waits.close()
    # One that waits for the engine alone is one for all.
    stands = admission.admit(10, "b")
    clock.now += 29.0
    refused(admission, "deadline", 10, "c", deadline_s=1.0)
    for ticket in [*open_now, stands]:
        ticket.close()


@pytest.mark.parametrize("deadline_s", [2.0, 10.0])
@pytest.mark.parametrize("every", [1, 5, 10, 20, 28])
def test_what_others_wait_for_without_end_is_no_reason_to_refuse(every, deadline_s):
    """Where all asked for adapters or a grammar, each was told of what another waited for, 30 s again and again."""
    admission, clock = gate(is_shared=True)
    serve(admission, clock, seconds=0.05, count=5)
    waits = None
    for second in range(200):
        clock.now += 1.0
        if second % 30 == 0:
            if waits is not None:
                waits.close()
            waits = admission.admit(10, "b")
            waits.prepared(False)
        if second % every == every - 1:
            with admission.admit(10, "c", deadline_s=deadline_s) as ticket:
                clock.now += 0.05
                ticket.started()


def test_who_lines_up_again_waits_for_the_engine_from_then_on():
    admission, clock = gate()
    serve(admission, clock, seconds=1.0, count=30)
    ticket = admission.admit(10)
    ticket.prepared(False)
    clock.now += 300.0
    assert admission.expected_first_token_s(10) is None
    ticket.prepared(True)
    clock.now += 1.0
    assert admission.expected_first_token_s(10) == pytest.approx(2.0, rel=0.1)
    ticket.started()
    # What came before is not told of the engine's pace, nor what comes too late.
    assert admission.expected_first_token_s(10) == pytest.approx(1.0, rel=0.1)
    ticket.prepared(False)
    ticket.prepared(True)
    ticket.close()
    ticket.prepared(True)
    assert not admission._line.waiting
    clock.now += 20.0
    late = admission.admit(10, deadline_s=1.5)
    clock.now += 60.0
    assert admission.expected_first_token_s(10) > 20
    late.prepared(False)
    # Who stands aside tells of no standstill, and of no pace where its first token comes without another word.
    assert admission.expected_first_token_s(10) == pytest.approx(1.0, rel=0.1)
    late.started()
    late.close()
    assert admission.expected_first_token_s(10) == pytest.approx(1.0, rel=0.1)


def test_prompts_that_stand_aside_do_not_slow_the_others_nor_speed_them_up():
    admission, clock = gate(max_queued_tokens=100)
    serve(admission, clock, seconds=1.0, count=30)
    aside = admission.admit(10)
    aside.prepared(False)
    clock.now += 300.0
    admission.admit(80)
    # Of ten tokens a second as before.
    assert refused(admission, "queued_tokens", 30).retry_after_s == 8
    aside.started()
    assert refused(admission, "queued_tokens", 30).retry_after_s == 8
    admission, clock = gate(max_queued_tokens=100)
    serve(admission, clock, seconds=1.0, count=30)
    aside = admission.admit(5000)
    aside.prepared(False)
    aside.started()
    admission.admit(80)
    assert refused(admission, "queued_tokens", 30).retry_after_s == 8


@dataclass(eq=False)
class Prompt:
    key: str
    num_tokens: int


@pytest.mark.parametrize(("length", "tells"), [(10, True), (100, True), (200, False)])
def test_prompts_no_longer_than_those_served_tell_a_short_one_of_a_standstill(length, tells):
    line, now = Line(30.0, is_passed=True), 0.0
    for _ in range(20):
        served = Prompt("a", 100)
        line.join(served, now)
        now += 1.0
        line.leave(served, now, is_served=True)
    line.join(Prompt("b", length), now)
    assert (line.expected_s("c", 10, now + 60.0) > 2.0) is tells


class Served:
    """A gate before a scheduler whose steps take a second."""

    def __init__(self, **config):
        self.admission, self.clock = gate(is_shared=True, max_in_flight=100)
        config = {"num_blocks": 4000, "max_positions": 4000, "min_run": 8, "max_seqs": 4, **config}
        self.scheduler, self.tickets, self.began = SchedulerConfig(**config).build(), {}, {}

    def add(self, id, new, deadline_s=600.0, prompt=4):
        """One more of the key that ``id`` begins with."""
        self.tickets[id] = self.admission.admit(prompt, id[0], deadline_s)
        self.submit(id, new, prompt)

    def submit(self, id, new, prompt=4):
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        self.scheduler.add(Request(id=id, prompt=tuple(range(prompt)), key=id[0], sampling=sampling))

    def run(self, steps):
        for _ in range(steps):
            self.step()

    def step(self):
        self.clock.now += 1.0
        batch = self.scheduler.schedule()
        if batch is None:
            return
        sampled = [Sampled(id=each.id, token=7) for each in batch.chunks if each.samples]
        for output in self.scheduler.update(batch, sampled):
            self.began.setdefault(output.id, self.clock.now)
            ticket = self.tickets.get(output.id)
            if ticket is not None:
                ticket.started()
                if output.finish is not None:
                    ticket.close()

    def seconds_to_first(self, id):
        before = self.clock.now
        while id not in self.began:
            self.step()
        return self.clock.now - before


@pytest.mark.parametrize("waited", [30, 120, 1000])
def test_where_the_scheduler_gives_a_seat_admission_lets_in(waited):
    served = Served()
    for number in range(8):
        served.add(f"a{number}", 3000)
    served.run(waited)
    for turn in range(3):
        for number in range(2):
            served.add(f"b{turn}{number}", 2, 60.0)
        before = served.clock.now
        while any(served.tickets[f"b{turn}{number}"]._is_open for number in range(2)):
            served.step()
        assert served.clock.now - before <= 2 * 8 + 2


@pytest.mark.parametrize("waited", [30, 120, 1000])
def test_what_keys_with_many_wait_for_is_not_held_against_those_with_none_or_one(waited):
    served = Served(max_seqs=6)
    for number in range(8):
        served.add(f"a{number}", 3000)
    served.run(20)
    for number in range(5):
        served.add(f"b{number}", 3000)
        served.run(12)
    served.run(waited)
    # Of b some wait that came as those for which a makes room.
    waiting = [ticket for id, ticket in served.tickets.items() if id not in served.began]
    assert any(ticket.key == "b" and ticket.owed is not None for ticket in waiting)
    refused(served.admission, "deadline", 4, "a", 60.0)
    for number in range(3):
        served.add(f"c{number}", 1, 20.0)
        assert served.seconds_to_first(f"c{number}") <= 20
    served.add("d0", 3000, 20.0)
    assert served.seconds_to_first("d0") <= 20
    served.add("d1", 1, 20.0)
    assert served.seconds_to_first("d1") <= 20


@pytest.mark.parametrize("waited", [60, 300])
def test_a_long_prompt_of_another_key_is_no_reason_to_refuse_a_short_one(waited):
    served = Served(max_batched_tokens=8)
    for number in range(20):
        served.add(f"c{number}", 1)
        served.run(3)
    served.add("a0", 3000)
    served.run(2)
    served.add("b0", 1, prompt=3900)
    served.run(waited)
    assert "b0" not in served.began
    for number in range(20, 23):
        served.add(f"c{number}", 1, 20.0)
        assert served.seconds_to_first(f"c{number}") <= 20
        served.run(100)
    served.seconds_to_first("b0")
    # What b waited for tells nothing of a short one either.
    served.add("c", 1, 20.0)


def test_one_that_is_owed_a_seat_is_expected_no_later_than_if_it_were_not():
    admission, clock = gate(is_shared=True)
    with admission.admit(10, "b") as ticket:
        clock.now += 20.0
        ticket.started()
    own = seated(admission, "a", 1)
    # Nobody owes these anything, and they begin at once.
    for _ in range(30):
        ticket = admission.admit(10, "a")
        clock.now += 0.5
        ticket.started()
        own.append(ticket)
    assert admission.expected_first_token_s(10, "a") < 2.0
    assert admission.expected_first_token_s(10, "c") == admission.expected_first_token_s(10, "a")


KEYS = st.sampled_from("abcd")


@given(
    st.lists(st.tuples(KEYS, st.integers(1, 6), st.sampled_from((1, 20, 700)), st.integers(0, 60)), max_size=12),
    st.sampled_from((30, 200)),
)
@settings(max_examples=60, deadline=None)
def test_a_key_without_any_is_never_refused_what_the_scheduler_gives_it_soon(asks, waited):
    served = Served(max_seqs=6)
    for turn, (key, count, new, steps) in enumerate(asks):
        for number in range(count):
            with contextlib.suppress(OverloadError):
                served.add(f"{key}{turn}.{number}", new, 60.0)
        served.run(steps)
    served.run(waited)
    # Not let in, to see when it would have got its token.
    expected_s = served.admission.expected_first_token_s(4, "e")
    served.submit("e", 1)
    assert served.seconds_to_first("e") <= 2 * 8 + 5
    assert expected_s is None or expected_s <= 60

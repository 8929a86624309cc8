"""The circuit breaker: its graph by hand, and by a machine that tries everything."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anabranch.gateway.dispatch.breaker import Breaker, BreakerRules, admit, record, would_admit

RULES = BreakerRules()
GRAPH = {("closed", "open"), ("open", "half_open"), ("half_open", "open"), ("half_open", "closed")}


def ended(state, outcome, now, ticket=None, retry_after_s=None):
    return record(state, RULES, state.ticket if ticket is None else ticket, outcome, now, retry_after_s)


def opened(now=0.0):
    state = Breaker()
    for _ in range(5):
        state = ended(state, "failure", now)
    return state


def test_five_failures_of_which_half_fail_open_it():
    state = Breaker()
    for _ in range(4):
        state = ended(state, "failure", 1.0)
    assert state.phase == "closed"
    state = ended(state, "failure", 1.0)
    assert (state.phase, state.until) == ("open", 6.0)


def test_fewer_than_half_do_not():
    state = Breaker()
    for _ in range(6):
        state = ended(state, "success", 0.0)
    for _ in range(5):
        state = ended(state, "failure", 0.0)
    assert state.phase == "closed"  # 5 of 11
    assert ended(state, "failure", 0.0).phase == "open"  # 6 of 12


def test_failures_are_forgotten_after_the_window():
    state = Breaker()
    for at in range(4):
        state = ended(state, "failure", float(at))
    assert ended(state, "failure", 35.0).phase == "closed"


def test_a_refused_key_opens_it_at_once():
    assert ended(Breaker(), "fatal", 0.0).phase == "open"


def test_each_opening_in_a_row_is_twice_as_long_up_to_five_minutes():
    state, now, waits = opened(), 0.0, []
    for _ in range(8):
        waits.append(state.until - now)
        now = state.until
        state, ticket = admit(state, RULES, now)
        state = ended(state, "failure", now, ticket)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]


def test_the_upstreams_own_wish_takes_the_place_of_the_rules():
    state = Breaker()
    for _ in range(5):
        state = ended(state, "failure", 0.0, retry_after_s=17.0)
    assert state.until == 17.0


def test_one_probe_at_a_time_and_two_successes_close_it():
    state = opened()
    assert admit(state, RULES, 4.9) == (state, None)
    state, first = admit(state, RULES, 5.0)
    assert state.phase == "half_open"
    assert admit(state, RULES, 5.0)[1] is None
    state = ended(state, "success", 5.1, first)
    assert state.phase == "half_open"
    state, second = admit(state, RULES, 5.2)
    state = ended(state, "success", 5.3, second)
    assert (state.phase, state.times) == ("closed", 0)


def test_what_began_in_an_earlier_phase_says_nothing_of_the_present_one():
    old = Breaker().ticket
    state, _ = admit(opened(), RULES, 5.0)
    assert ended(state, "failure", 5.0, old) == state
    assert ended(state, "success", 5.0, old) == state


def test_a_cancelled_probe_gives_its_place_back():
    state, ticket = admit(opened(), RULES, 5.0)
    state = ended(state, "ignored", 5.0, ticket)
    assert would_admit(state, RULES, 5.0)


class Machine(RuleBasedStateMachine):
    """Any order of requests, endings and waits."""

    def __init__(self):
        super().__init__()
        self.state, self.now, self.under_way = Breaker(), 0.0, []

    def to(self, state):
        if state.phase != self.state.phase:
            assert (self.state.phase, state.phase) in GRAPH
        self.state = state

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def begin(self):
        expected = would_admit(self.state, RULES, self.now)
        state, ticket = admit(self.state, RULES, self.now)
        assert (ticket is not None) == expected
        self.to(state)
        if ticket is not None:
            self.under_way.append(ticket)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), outcome=st.sampled_from(["success", "failure", "fatal", "ignored"]))
    def end(self, data, outcome):
        ticket = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.to(record(self.state, RULES, ticket, outcome, self.now))

    @invariant()
    def is_sound(self):
        assert 0 <= self.state.probing <= RULES.probes
        assert self.state.passed < RULES.successes
        if self.state.phase == "open":
            assert self.state.until - self.state.since <= RULES.max_open_s + 1e-9
        assert len(self.state.counts) <= 32


TestMachine = Machine.TestCase

"""The end of an attempt: what it is charged, what it says of its deployment, and what is read on."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Attempt, Deployment, Dispatcher, DispatchRules, Group, Plan, Report
from anabranch.gateway.dispatch.attempt_ends import AttemptEnds, stops
from anabranch.gateway.dispatch.billed import FEW
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import Answer, Failure, HttpCall, UpstreamRequest, Usage
from anabranch.routers.money import Price

# 1,000 nano-dollars a token of the prompt, 2,000 of the answer.
PRICE = Price(input=1_000_000_000, output=2_000_000_000)
MOST = Usage(10, 50, 0, True)
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


class Case:
    """One deployment, and the ends of a request's attempts at it."""

    def __init__(self, *, stream=False, sender="ann", rules=None, asked=None, **deployment):
        self.now_s = 100.0
        provider = Mock.Config(model="m")
        group = Group(name="m", deployments=(Deployment(name="d", provider=provider, **deployment),), price=PRICE)
        self.dispatcher = Dispatcher([group], rules or DispatchRules(), http=object(), clock=lambda: self.now_s)
        [self.live] = self.dispatcher.lives()
        self.late = []
        plan = Plan(candidates=("m",), deadline=1e6, sender=sender, late=lambda *told: self.late.append(told))
        self.request = UpstreamRequest("chat", {"messages": [], "stream": stream, **(asked or {})}, prompt_tokens=7)
        self.report = Report()
        self.ends = AttemptEnds(self.dispatcher, plan, self.request, self.report, self.now_s)

    def attempt(self, *, is_sent=True, most=MOST, **fields):
        call = HttpCall("http://nowhere", {}, b"{}", is_sent=is_sent)
        ticket = self.live.begin(self.now_s, self.ends.tokens, self.ends.plan.sender)
        made = Attempt(model="m", deployment="d", start_s=0.0, ticket=ticket, call=call, most=most, **fields)
        self.report.attempts.append(made)
        return made


def failed(kind, status=None, message="no"):
    return Failure(kind=kind, message=message, status=status)


def test_who_wins_is_charged_what_was_told_and_says_that_all_is_well():
    case = Case(tpm=1000)
    attempt = case.attempt(seen=4)
    case.now_s += 2.0
    case.ends.won(case.live, attempt, Usage(3, 5))
    assert (attempt.status, attempt.total_s, attempt.call) == ("ok", 2.0, None)
    assert (attempt.cost, attempt.is_guess) == (3 * 1000 + 5 * 2000, False)
    assert (case.report.model, case.report.deployment) == ("m", "d")
    assert (case.live.in_flight, case.live.waiting, case.live.latency_s) == (0, 0, 2.0)
    # Counted against the deployment's limit are the prompt as the upstream told it, not the 7 tokens of before, and what came.
    assert case.live.tokens.at(case.now_s) == 3 + 4
    assert case.dispatcher.groups["m"].hedge_whole._seen[-1] == 2.0


@pytest.mark.parametrize("ends", ["won", "lost", "left"])
def test_an_answer_that_is_here_has_left_its_deployment_once(ends):
    """Also in the counts of all processes; and one that was given up, and read on, has left already when it comes."""
    case, left = Case(max_in_flight=2), []
    case.dispatcher.rooms = SimpleNamespace(
        leave=lambda *given: left.append(given), spent=lambda *given: None, corrected=lambda *given: None
    )
    attempt = case.attempt(place="7")
    if ends == "left":
        case.ends.lost(case.live, attempt, failed("timeout"))
    case.ends.has_come(case.live, attempt)
    for _ in range(2):
        assert (case.live.in_flight, case.live.waiting, case.live._parts._counts, left) == (0, 0, {}, [("d", "7")])
        if ends == "won":
            case.ends.won(case.live, attempt, Usage(3, 5))
        elif ends == "lost":
            case.ends.lost(case.live, attempt, failed("garbage"))
        ends = ""
    # Nobody waits for what is read.
    assert not case.live.is_silent(case.now_s + 1e6)


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_deployment_is_learned_to_take_is_its_own(stream):
    """An answer that waited here for room, or for its turn to be read, made its deployment slow."""
    case = Case(stream=stream)
    attempt = case.attempt(first_token_s=1.5 if stream else None)
    if stream:
        case.live.heard(case.now_s)
    case.now_s += 2.0
    attempt.time._held_s = 1.25
    case.ends.won(case.live, attempt, Usage(3, 5))
    assert (attempt.total_s, case.live.latency_s, case.live.first_token_s) == (2.0, 0.75, 0.25 if stream else None)
    assert stream or case.dispatcher.groups["m"].hedge_whole._seen[-1] == 0.75


@pytest.mark.parametrize(("held_s", "outcome"), [(0.0, "failure"), (4.0, "failure"), (6.0, "ignored")])
def test_who_had_no_time_for_it_here_has_not_failed(held_s, outcome):
    case = Case(timeout_s=10.0)
    attempt = case.attempt()
    attempt.total_s = 10.0
    attempt.time._held_s = held_s
    assert case.ends._outcome(case.live, attempt, failed("deadline")) == outcome


def test_what_the_winner_did_not_tell_is_a_guess():
    case = Case()
    attempt = case.attempt(first_token_s=0.5)
    case.live.heard(case.now_s)
    case.ends.won(case.live, attempt, Usage(3, 5, 0, True))
    assert attempt.is_guess
    assert case.live.waiting == 0
    # A stream's time says nothing of whole answers.
    assert not case.dispatcher.groups["m"].hedge_whole._seen


@pytest.mark.parametrize(
    ("failure", "fields", "cost"),
    [
        # It never went out, or was refused: nothing.
        (failed("timeout"), {"is_sent": False}, 0),
        (failed("rate_limit", 429), {"http_status": 429}, 0),
        # A whole answer is made to its end.
        (failed("timeout"), {"is_whole": True}, 10 * 1000 + 50 * 2000),
        (None, {"is_whole": True}, 10 * 1000 + 50 * 2000),
        # It may be made to its end.
        (failed("cut"), {"has_begun": True}, 10 * 1000 + 50 * 2000),
    ],
)
def test_what_is_lost_is_charged_the_most_that_may_be_billed(failure, fields, cost):
    case = Case()
    attempt = case.attempt(**fields)
    case.ends.lost(case.live, attempt, failure)
    assert attempt.cost == cost
    assert attempt.is_guess is bool(cost)


def test_a_stream_that_was_cut_off_here_is_charged_the_time_it_had():
    case = Case(stream=True, rules=DispatchRules(margin_s=1.0), output_speed=2.0)
    attempt = case.attempt()
    case.now_s += 3.0
    case.ends.lost(case.live, attempt, failed("first_token"))
    assert attempt.usage.completion == FEW + 2 * (3 + 1)
    # One that broke off by itself may have been made to its end.
    attempt = case.attempt(has_begun=True)
    case.ends.lost(case.live, attempt, failed("cut"))
    assert attempt.usage.completion == MOST.completion


def test_of_sound_the_time_says_nothing():
    case = Case(stream=True, output_speed=2.0, asked={"modalities": ["audio", "text"]})
    attempt = case.attempt()
    case.now_s += 3.0
    case.ends.lost(case.live, attempt, None)
    assert attempt.usage.completion == MOST.completion


@pytest.mark.parametrize(("thinks", "made"), [(True, 2 * 3), (False, 2 + 1)])
def test_a_whole_answer_that_did_not_tell_may_have_been_thought_about_all_its_time(thinks, made):
    case = Case(output_speed=2.0, thinks=thinks)
    attempt = case.attempt()
    # It is not the request's first.
    case.now_s, attempt.start_s = case.now_s + 5.0, 2.0
    said = {**ANSWER, "usage": None}
    assert case.ends.usage_of(case.live, attempt, Answer(said, None, Usage(3, 1, 0, True))).completion == made + FEW
    assert case.ends.usage_of(case.live, attempt, Answer(said, None, Usage(3, 1))).completion == 1


def test_of_several_that_were_made_and_did_not_tell_each_is_charged_all_its_time():
    case = Case(output_speed=2.0, asked={"n": 3})
    attempt = case.attempt()
    case.now_s += 5.0
    said = {**ANSWER, "usage": None}
    told = case.ends.usage_of(case.live, attempt, Answer(said, None, Usage(3, 1, 0, True)))
    assert told.completion == 3 * 2 * 5 + FEW


@pytest.mark.parametrize(
    ("failure", "stops", "by_time"),
    [
        (failed("first_token"), None, True),
        (failed("first_token"), False, False),
        (None, None, True),
        (None, True, True),
        (None, False, False),
    ],
)
def test_a_stream_that_was_left_is_charged_the_most_where_its_provider_does_not_stop(failure, stops, by_time):
    case = Case(stream=True, output_speed=2.0, stops_when_closed=stops)
    attempt = case.attempt()
    case.now_s += 3.0
    case.ends.lost(case.live, attempt, failure)
    assert attempt.usage.completion == (FEW + 2 * (3 + 1) if by_time else MOST.completion)


@pytest.mark.parametrize(
    ("says", "failure", "ends"),
    [
        (True, None, True),
        (True, failed("cut"), True),
        (False, None, False),
        (False, failed("cut"), False),
        # Its upstream said that it is over.
        (False, failed("server", 500), True),
        # A proxy before it gave up waiting.
        (False, failed("server", 504), False),
    ],
)
def test_which_streams_are_made_no_further(says, failure, ends):
    assert stops(Case(stops_when_closed=says).live, failure) is ends


def test_each_answer_that_is_made_is_charged_the_time():
    case = Case(stream=True, output_speed=2.0, asked={"n": 3})
    attempt = case.attempt()
    case.now_s += 1.0
    case.ends.lost(case.live, attempt, None)
    assert attempt.usage.completion == 3 * (FEW + 2 * (1 + 1))


def test_a_whole_answer_is_made_to_its_end_however_short_it_was_waited_for():
    case = Case()
    attempt = case.attempt(is_whole=True)
    case.ends.lost(case.live, attempt, failed("timeout"))
    assert attempt.usage.completion == MOST.completion


def test_where_nobody_keeps_accounts_what_is_lost_costs_its_prompt():
    case = Case()
    attempt = case.attempt(most=None)
    case.ends.lost(case.live, attempt, None)
    assert (attempt.usage, attempt.cost) == (Usage(7, 0, 0, True), 7000)


def test_who_is_cancelled_says_nothing_of_the_deployment_and_does_not_avoid_it():
    case = Case()
    attempt = case.attempt()
    case.ends.lost(case.live, attempt, None)
    assert (attempt.status, attempt.call) == ("cancelled", None)
    assert case.ends.avoid == set()
    assert (case.live.in_flight, case.live.failing, case.live.breaker.counts) == (0, 0.0, ())


def test_who_fails_is_avoided_and_its_failure_is_told():
    case = Case()
    attempt = case.attempt(http_status=200)
    case.ends.lost(case.live, attempt, failed("server", 503, "busy"))
    assert (attempt.status, attempt.message, attempt.http_status) == ("server", "busy", 503)
    assert case.ends.avoid == {"d"}
    assert case.live.failing > 0
    attempt = case.attempt(http_status=200)
    case.ends.lost(case.live, attempt, failed("garbage"))
    assert attempt.http_status == 200


@pytest.mark.parametrize("kind", ["request", "context", "conflict", "unsupported", "excess"])
def test_what_a_request_brings_about_is_not_held_against_the_deployment(kind):
    case = Case()
    for _ in range(20):
        case.ends.lost(case.live, case.attempt(), failed(kind, 400))
    assert (case.live.breaker.phase, case.live.failing) == ("closed", 0.0)


def test_a_key_that_is_not_accepted_shuts_the_deployment_at_once():
    case = Case()
    case.ends.lost(case.live, case.attempt(), failed("auth", 401))
    assert case.live.breaker.phase == "open"


def test_a_refusal_is_the_deployments_own_once_three_senders_in_a_row_met_it():
    case = Case(sender="ann")
    for _ in range(5):
        case.ends.lost(case.live, case.attempt(), failed("forbidden", 403))
    assert case.live.breaker.phase == "closed"
    for sender in ("bob", "cay"):
        case.ends = AttemptEnds(
            case.dispatcher, Plan(candidates=("m",), deadline=1e6, sender=sender), case.request, case.report, case.now_s
        )
        case.ends.lost(case.live, case.attempt(), failed("forbidden", 403))
    assert case.live.breaker.phase == "open"


def test_a_refusal_casts_doubt_until_somebody_is_served():
    case = Case()
    case.ends.lost(case.live, case.attempt(), failed("missing", 404))
    assert case.live.is_doubted
    case.ends.won(case.live, case.attempt(), Usage(1, 1))
    assert not case.live.is_doubted


@pytest.mark.parametrize(
    ("stream", "took_s", "counts"),
    [(False, 4.0, False), (False, 6.0, True), (True, 0.9, False), (True, 1.1, True)],
)
def test_the_end_of_a_requests_time_counts_if_the_deployment_had_half_of_its_own(stream, took_s, counts):
    case = Case(stream=stream, timeout_s=10.0, first_token_timeout_s=2.0)
    attempt = case.attempt()
    case.now_s += took_s
    case.ends.lost(case.live, attempt, failed("deadline"))
    assert (case.live.failing > 0) is counts


def test_a_stream_that_had_begun_when_the_time_was_up_is_no_failure():
    case = Case(stream=True, timeout_s=10.0, first_token_timeout_s=2.0)
    attempt = case.attempt(first_token_s=0.5)
    case.live.heard(case.now_s)
    case.now_s += 9.0
    case.ends.lost(case.live, attempt, failed("deadline"))
    assert (case.live.failing, case.live.waiting) == (0.0, 0)


def body(**usage):
    made = ANSWER if usage is None else {**ANSWER, **usage}
    return 200, {}, json.dumps(made).encode(), None


async def exchanged(gate, result):
    await gate.wait()
    if isinstance(result, Exception):
        raise result
    return result


@pytest.mark.parametrize(
    ("result", "cost", "is_guess"),
    [
        (body(), 3 * 1000 + 2 * 2000, False),
        ((503, {}, b"{}", None), 0, False),
        # What cannot be read may be billed all the same.
        ((200, {}, b"{", None), 10 * 1000 + 50 * 2000, True),
    ],
)
def test_what_was_sent_is_read_on_for_what_it_costs(result, cost, is_guess):
    async def main():
        case, gate, known = Case(), asyncio.Event(), []
        attempt = case.attempt(is_whole=True)
        exchange = asyncio.ensure_future(exchanged(gate, result))
        case.ends.leave(case.live, case.request, attempt, exchange)
        assert attempt.is_late
        case.ends.lost(case.live, attempt, failed("timeout"))
        case.report.when_known(lambda: known.append(attempt.cost))
        # Until it is known, the most that it may be.
        assert (attempt.cost, attempt.is_guess, known) == (10 * 1000 + 50 * 2000, True, [])
        gate.set()
        await case.dispatcher.late.settled()
        assert (attempt.cost, attempt.is_guess, known) == (cost, is_guess, [cost])
        assert (attempt.is_late, attempt.call) == (False, None)
        assert [answer.text for _, answer in case.late] == (["hi"] if result == body() else [])

    asyncio.run(main())


def test_what_is_read_on_counts_as_all_that_is_held_of_it_whole_or_not(monkeypatch):
    """Of what was asked its bytes are held, what they were written from, and what that was read from; a whole answer counted once."""

    async def main():
        case, taken = Case(), []
        monkeypatch.setattr(case.dispatcher.late, "take", lambda reading, size, *_, **__: taken.append(size))
        attempt = case.attempt(is_whole=True)
        attempt.call.body = b"x" * 1000
        exchange = asyncio.ensure_future(exchanged(asyncio.Event(), body()))
        case.ends.leave(case.live, case.request, attempt, exchange)
        assert taken == [attempt.held_bytes] == [3000]
        attempt.call = None
        assert attempt.held_bytes == 0
        await asyncio.wait([exchange])

    asyncio.run(main())


def test_what_is_read_on_and_given_up_stays_charged_the_most():
    async def main():
        case, gate = Case(), asyncio.Event()
        attempt = case.attempt(is_whole=True)
        exchange = asyncio.ensure_future(exchanged(gate, body()))
        case.ends.leave(case.live, case.request, attempt, exchange)
        case.ends.lost(case.live, attempt, None)
        await case.dispatcher.late.close()
        assert exchange.cancelled()
        assert (attempt.cost, attempt.is_guess, case.late) == (10 * 1000 + 50 * 2000, True, [])

    asyncio.run(main())


@pytest.mark.parametrize(("most", "is_sent"), [(None, True), (Usage(0, 0, 0, True), True), (MOST, False)])
def test_what_cannot_be_billed_is_not_read_on(most, is_sent):
    async def main():
        case, gate = Case(), asyncio.Event()
        attempt = case.attempt(is_whole=True, most=most, is_sent=is_sent)
        exchange = asyncio.ensure_future(exchanged(gate, body()))
        await asyncio.sleep(0)
        case.ends.leave(case.live, case.request, attempt, exchange)
        # Of one that has not gone out, its end is waited for: until then it still may.
        assert attempt.is_late is (not is_sent)
        await asyncio.wait([exchange])
        assert exchange.cancelled()
        assert attempt.cost == 0

    asyncio.run(main())


ENDS = st.sampled_from(["won", "cancelled", "server", "timeout", "rate_limit", "request", "cut", "deadline"])


@given(st.lists(st.tuples(ENDS, st.booleans(), st.floats(0, 5)), max_size=30))
def test_every_attempt_that_ends_is_counted_out_and_never_costs_less_than_was_told(ends):
    case = Case()
    for what, is_sent, seconds in ends:
        attempt = case.attempt(is_sent=is_sent, is_whole=True, told=Usage(10, 20))
        case.now_s += seconds
        if what == "won":
            case.ends.won(case.live, attempt, Usage(10, 20))
        else:
            case.ends.lost(case.live, attempt, None if what == "cancelled" else failed(what))
        assert attempt.status != "open"
        assert attempt.cost >= (10 * 1000 + 20 * 2000 if is_sent or what == "won" else 0)
        # A new one next time: this is about attempts, not about breakers.
        case.live.breaker = type(case.live.breaker)()
        case.live.rests_until = 0.0
    assert (case.live.in_flight, case.live.waiting) == (0, 0)

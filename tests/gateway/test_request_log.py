"""Everybody who wants to know of a request is told once that it is over, and once what it cost."""

from collections import deque
from types import SimpleNamespace

from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.dispatch import Attempt
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.request_log import RequestLog
from anabranch.gateway.store import LedgerRow
from anabranch.routers.contract.query import Outcome, Query


class Notes:
    """Stands for whoever is told; keeps what is said."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *values, **more: self.told.append((name, *values, *more.items()))


class Case:
    def __init__(self, most=8):
        self.recent, self.metrics = deque(maxlen=most), Metrics()
        self.observers, self.overview, self.teaching = Notes(), Notes(), Notes()
        self.log = RequestLog(self.recent, self.metrics, self.observers, self.overview, self.teaching)

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


def row(id="r1", **fields):
    fields = {"model": "m", "strategy": "s", "latency_us": 2_000_000, "overhead_us": 500, **fields}
    return LedgerRow(request_id=id, **fields)


def call(**fields):
    return row("r1.1", parent_id="r1", purpose="judge", requested="j", **fields)


def done(**fields):
    fields = {"row": row(), "time_s": 5.0, "endpoint": "chat", "key": "ann", "http_status": 200, **fields}
    return Finished(**fields)


def outcome(**fields):
    return Outcome(query=Query(text="q"), model="m", **fields)


def test_a_request_that_is_over_is_counted_with_its_calls_and_attempts():
    case = Case()
    attempts = [Attempt(model="m", deployment="d", start_s=0.0, status=status) for status in ("server", "ok")]
    asked = Attempt(model="j", deployment="e", start_s=0.0, status="ok")
    finished = done(attempts=tuple(attempts), asked_attempts=(asked,), calls=(call(),), first_s=0.25)
    case.log.finished(finished)
    assert case.value("anabranch_requests_total", endpoint="chat", model="m", strategy="s", status="200") == 1
    assert case.value("anabranch_request_seconds_sum", endpoint="chat", model="m") == 2.0
    assert case.value("anabranch_first_token_seconds_sum", model="m") == 0.25
    assert case.value("anabranch_overhead_seconds_sum") == 0.0005
    assert case.value("anabranch_strategy_calls_total", purpose="judge", model="j", status="ok") == 1
    told = [("d", "server"), ("d", "ok"), ("e", "ok")]
    assert [case.value("anabranch_attempts_total", deployment=one, outcome=status) for one, status in told] == [1] * 3
    assert case.observers.told == [("finished", finished)]
    assert [seen.request_id for seen in case.recent] == ["r1"]
    # What it cost is not counted before it is known.
    assert case.value("anabranch_spend_nano_dollars_total", model="m", strategy="s") is None
    assert (case.overview.told, case.teaching.told) == ([], [])


def test_a_strategy_hears_of_an_outcome_if_there_is_one():
    case, came = Case(), outcome()
    case.log.finished(done(outcome=came))
    assert case.teaching.told == [("ended", "s", row(), came)]
    case.log.priced(Priced(row=row(cost_nano=9)))
    assert len(case.teaching.told) == 1
    paid = outcome(cost=9e-9)
    case.log.priced(Priced(row=row(cost_nano=9), outcome=paid))
    assert case.teaching.told[1:] == [("priced", "s", row(cost_nano=9), paid)]


def test_what_it_cost_is_counted_and_shown_once_it_is_known():
    case = Case()
    for id in ("r0", "r1", "r2"):
        case.log.finished(done(row=row(id)))
    priced = Priced(row=row(cost_nano=70, prompt_tokens=3, completion_tokens=4), calls=(call(cost_nano=30),))
    case.log.priced(priced)
    assert case.value("anabranch_spend_nano_dollars_total", model="m", strategy="s") == 70
    assert case.value("anabranch_spend_nano_dollars_total", model="j", strategy="s") == 30
    assert [(seen.request_id, seen.nano) for seen in case.recent] == [("r0", 0), ("r1", 100), ("r2", 0)]
    seen = case.recent[1]
    assert (seen.prompt_tokens, seen.completion_tokens) == (3, 4)
    assert case.overview.told == [("ended", seen)]
    assert case.observers.told[-1] == ("priced", priced)


def test_one_that_the_page_no_longer_shows_is_counted_all_the_same():
    case = Case(most=1)
    case.log.finished(done())
    case.log.finished(done(row=row("r2")))
    case.log.priced(Priced(row=row(cost_nano=70)))
    assert case.value("anabranch_spend_nano_dollars_total", model="m", strategy="s") == 70
    assert case.overview.told == []
    assert [(seen.request_id, seen.nano) for seen in case.recent] == [("r2", 0)]


def test_one_that_was_refused_is_told_to_observers_alone():
    case = Case()
    state = SimpleNamespace(
        shown_as="chat", id="r1", tenant="k1", trace=None, time_s=5.0, elapsed=lambda: 0.25, endpoint="never told"
    )
    case.log.refused(state, 429, "rate_limit_exceeded")
    assert case.observers.told == [
        (
            "refused",
            "chat",
            429,
            ("code", "rate_limit_exceeded"),
            ("id", "r1"),
            ("key_id", "k1"),
            ("trace", None),
            ("time_s", 5.0),
            ("latency_s", 0.25),
        )
    ]
    assert (len(case.recent), case.overview.told, case.teaching.told) == (0, [], [])

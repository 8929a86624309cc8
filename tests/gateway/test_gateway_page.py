"""The page as a pure function of what is going on: figures, pictures, and nothing that a name could smuggle in."""

import math
import re

import pytest

from anabranch.gateway.metrics import Ended, Metrics, Moment, totals
from anabranch.gateway.store import LedgerRow
from anabranch.gateway.ui import DeploymentFact, Point, Seen, Snapshot, Spend, render
from anabranch.gateway.ui.charts import frontier, histogram, pareto, timeline
from anabranch.gateway.ui.frame import CSP
from anabranch.gateway.ui.page import asset
from anabranch.gateway.ui.snapshot import quantile
from page_html import NASTY, Parsed


def busy(name="small"):
    return Snapshot(
        now_s=7200.0,
        uptime_s=3700,
        version="1",
        requests=10,
        errors=1,
        hits={"exact": 3},
        misses=1,
        spend={"model": [Spend(name, 2_500_000_000, 8)], "key": [Spend(name, 1, 1)] * 12},
        latency=[(0.1, 4), (0.2, 4), (math.inf, 2)],
        timeline=[Moment(7100, 5, 1), Moment(10, 99)],
        deployments=[DeploymentFact(name=name, model=name, state="open", latency_s=0.25)],
        points=[
            Point(name=name, kind="model", cost=0.001, quality=0.5),
            Point(name="all", kind="live", cost=0.002, quality=0.6),
        ],
        recent=[
            Seen(
                request_id="req_1",
                time_s=7190,
                chosen=name,
                asked=name,
                reason=name,
                bypassed=name,
                key=name,
                details={name: name},
                candidates=[{"model": name, "score": 1.0, "quality": None, "cost": 0.00002}],
                attempts=[{"deployment": name, "outcome": "ok", "seconds": 0.5}],
            )
        ],
    )


@pytest.mark.parametrize("snapshot", [Snapshot(now_s=0.0), busy()])
def test_the_page_is_whole_html_without_inline_styles_or_scripts(snapshot):
    parsed = Parsed(render(snapshot))
    names = [name for name, _ in parsed.attributes]
    assert "style" not in names  # the policy would drop them
    assert not [name for name in names if name.startswith("on")]
    assert parsed.tags.count("script") == 1
    outside = [value for name, value in parsed.attributes if name in ("src", "href") and not value.startswith("/ui/")]
    assert outside == []
    assert "default-src 'none'" in CSP


def test_names_are_shown_and_never_run():
    text = render(busy(NASTY))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    Parsed(text)


def test_the_figures_are_right():
    text = render(busy())
    assert "<b>90.0%</b>" in text  # 9 of 10 were answered
    assert "<b>75.0%</b>" in text  # 3 hits, 1 miss
    assert "$2.50" in text
    assert "1 h 1 min" in text
    assert "and 4 more" in text  # 12 keys, 8 shown
    assert "$0.000020" in text
    assert "10 s ago" in text


def test_a_dollar_figure_has_numerator_and_denominator_of_one_day():
    """The store knows the day; this process may have begun a minute ago."""
    spend = {"model": [Spend("small", 900_000_000, 180), Spend("large", 0, 20)]}
    text = render(Snapshot(now_s=9.0, requests=1, spend=spend))
    assert "Spend, last day</span><b>$0.90</b><small>$0.0045 an answer" in text
    assert "Spend, last day</span><b>$0</b><small>nothing yet" in render(Snapshot(now_s=9.0, requests=1))


def test_the_page_says_whether_prompts_are_kept():
    assert "no prompt is kept" in render(Snapshot(now_s=0.0))
    text = render(Snapshot(now_s=0.0, keeps_texts=True))
    assert "no prompt is kept" not in text
    assert "prompts are kept in the store" in text
    # The page where people judge them opens with a key that a browser is asked for, or not at all.
    assert "/ui/label" not in text
    assert "/ui/label" in render(Snapshot(now_s=0.0, keeps_texts=True, can_label=True))


def test_refusals_are_counted_and_hits_have_a_denominator():
    text = render(Snapshot(now_s=0.0, requests=4, refused=3, hits={"exact": 3}, misses=9))
    assert "0 under way, 3 refused" in text
    assert "3 exact of 12" in text


def test_why_a_model_was_chosen_needs_no_click():
    text = render(Snapshot(now_s=0.0, recent=[Seen(request_id="r", time_s=0.0, reason="the cheapest that is up")]))
    assert "the cheapest that is up" in text.partition("<summary>")[2].partition("</summary>")[0]
    assert text.count("the cheapest that is up") == 1


def test_the_axis_of_shares_ends_where_shares_do():
    def shown(*qualities):
        points = [
            Point(name=f"m{at}", kind="model", cost=0.1 + at, quality=quality) for at, quality in enumerate(qualities)
        ]
        return re.findall(r'text-anchor="end">([-\d.]+)</text>', pareto(points))

    assert shown(0.6, 0.99)[-1] == "1.00"
    assert shown(1.0)[-1] == "1.00"
    assert shown(0.0, 0.4)[0] == "0.00"
    assert shown(0.0)[0] == "0.00"
    assert float(shown(7.0, 9.0)[-1]) > 9
    assert float(shown(-2.0, 0.5)[0]) < -2


def test_what_a_strategy_asked_is_shown_with_its_request_alike_calls_together():
    def call(outcome="ok", nano=1_000_000, model=NASTY):
        return {"purpose": "judge", "model": model, "outcome": outcome, "nano": nano}

    calls = [call(), call("error", 0), call(), call(model="large", nano=0)]
    text = render(Snapshot(now_s=0.0, recent=[Seen(request_id="r", time_s=0.0, calls=calls)]))
    Parsed(text)
    assert "<script>alert" not in text
    assert ": 3 times, 1 without an answer, $0.0020</li>" in text
    assert "<li>judge by large: $0</li>" in text
    assert "asked models itself" not in render(busy())


def test_the_assets_fetch_nothing_from_elsewhere():
    for name in ("page.css", "page.js"):
        assert b"//" not in asset(name).replace(b"// Puts", b"")
        assert b"http" not in asset(name)


def test_quantiles_lie_on_straight_lines_within_buckets():
    buckets = [(1.0, 4), (2.0, 4), (math.inf, 2)]
    assert quantile(buckets, 0.2) == pytest.approx(0.5)  # 2 of the 4 below 1
    assert quantile(buckets, 0.5) == pytest.approx(1.25)  # the 5th is the first of 4 between 1 and 2
    assert quantile(buckets, 0.95) == 2.0
    assert quantile([], 0.5) is None
    assert quantile([(1.0, 0)], 0.5) is None


def test_the_frontier_is_what_nothing_beats():
    points = [
        Point(name=name, kind="model", cost=cost, quality=quality)
        for name, cost, quality in (("a", 1, 0.5), ("b", 2, 0.4), ("c", 3, 0.9), ("d", 1, 0.3))
    ]
    assert [point.name for point in frontier([*points, Point(name="live", kind="live", cost=0, quality=1)])] == [
        "a",
        "c",
    ]


@pytest.mark.parametrize(
    "points",
    [
        [Point(name="a", kind="model", cost=0, quality=0)],
        [Point(name="a", kind="model", cost=1e-9, quality=1), Point(name="b", kind="strategy", cost=9.0, quality=1)],
    ],
)
def test_odd_points_can_be_drawn(points):
    assert "NaN" not in pareto(points)
    assert "nan" not in pareto(points)


def test_the_timeline_drops_what_is_older_than_an_hour_and_marks_open_breakers():
    text = timeline([Moment(0, 5), Moment(7190, 3, 1, opened={"eu": 1})], 7200.0)
    assert text.count('class="column"') == 1
    assert text.count('class="error"') == 1
    assert "opened: eu" in text


def test_an_empty_histogram_says_so():
    assert "Nothing measured yet" in histogram([(1.0, 0)], "latency")


# What is counted


def test_requests_are_counted_by_model_and_in_time():
    now = [100.0]
    metrics = Metrics(lambda: now[0])
    metrics.ended(
        Ended(
            endpoint="chat",
            model="m",
            strategy="s",
            latency_s=0.2,
            ttft_s=0.1,
        )
    )
    metrics.priced(
        LedgerRow(request_id="r", model="m", strategy="s", prompt_tokens=3, completion_tokens=2, cost_nano=7)
    )
    metrics.ended(Ended(endpoint="chat", model="m", strategy="s", status=503))
    now[0] = 111.0
    metrics.ended(Ended(endpoint="chat", model="m", cache="exact", status=200))
    metrics.breakers({"d": True})
    metrics.breakers({"d": True})
    assert [(moment.start, moment.requests, moment.errors, moment.hits, moment.nano) for moment in metrics.history] == [
        (100, 2, 1, 0, 7),
        (110, 1, 0, 1, 0),
    ]
    assert metrics.history[-1].opened == {"d": 1}
    found = {tuple(labels.values()): value for labels, value in totals(metrics.requests)}
    assert found["chat", "m", "s", "200"] == 1
    text = metrics.text().decode()
    assert 'anabranch_tokens_total{direction="prompt",model="m"} 3.0' in text
    assert 'anabranch_spend_nano_dollars_total{model="m",strategy="s"} 7.0' in text
    assert 'anabranch_breaker_open{deployment="d"} 1.0' in text


def test_of_deployments_that_are_no_more_nothing_is_said():
    """A reload that renamed one left its breaker and its speed as they were (R20c)."""
    metrics = Metrics(lambda: 100.0)
    for names in (("old", "kept"), ("kept", "new"), ("kept", "new")):
        metrics.breakers(dict.fromkeys(names, True))
        metrics.speeds(dict.fromkeys(names, 700.0))
    text = metrics.text().decode()
    for name in ("anabranch_breaker_open", "anabranch_output_speed_exceeded"):
        assert [line.partition("{")[2] for line in text.splitlines() if line.startswith(f"{name}{{")] == [
            'deployment="kept"} ' + ("1.0" if "breaker" in name else "700.0"),
            'deployment="new"} ' + ("1.0" if "breaker" in name else "700.0"),
        ]


def test_calls_of_strategies_are_counted_apart_from_requests():
    metrics = Metrics(lambda: 100.0)
    fields = {"requested": "m", "strategy": "s", "purpose": "judge", "parent_id": "r"}
    call = LedgerRow(request_id="r.1", prompt_tokens=3, completion_tokens=2, cost_nano=7, **fields)
    metrics.called(call)
    metrics.priced(call)
    metrics.called(LedgerRow(request_id="r.2", status="error", **fields))
    [moment] = metrics.history
    assert (moment.requests, moment.errors, moment.nano) == (0, 0, 7)
    text = metrics.text().decode()
    assert 'anabranch_strategy_calls_total{model="m",purpose="judge",status="ok"} 1.0' in text
    assert 'anabranch_strategy_calls_total{model="m",purpose="judge",status="error"} 1.0' in text
    assert 'anabranch_tokens_total{direction="prompt",model="m"} 3.0' in text
    assert 'anabranch_spend_nano_dollars_total{model="m",strategy="s"} 7.0' in text
    assert "anabranch_requests_total{" not in text

"""HTML of the page, whole or only its parts (what the script puts in place every few seconds). A pure function of a `Snapshot`."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from anabranch.gateway.store import Calibration
from anabranch.gateway.ui.charts import bar, histogram, pareto, timeline
from anabranch.gateway.ui.frame import framed
from anabranch.gateway.ui.snapshot import DeploymentFact, Seen, Snapshot, Spend, quantile
from anabranch.gateway.ui.stops import stops_card, stops_of
from anabranch.routers.money import dollars

MOST_SPENDERS = 8
MOST_WEEKS = 24  # rows
FILTER = "filter: a model, strategy, key, status or request id"
NOT_KEPT, KEPT = "no prompt is kept", "prompts are kept in the store, and not shown here"
NONE = "\u2013"
AB_LINK = '<a href="/ui/ab">A/B tests</a> \u00b7 '
LABEL_LINK = '<a href="/ui/label">label answers</a> \u00b7 '
NO_SCRIPT = '<noscript><p class="none">Without its script the page shows the moment it was loaded at.</p></noscript>\n'


@cache
def asset(name: str) -> bytes:
    """``page.css`` or ``page.js``."""
    return files(__package__).joinpath(name).read_bytes()


def render(now: Snapshot) -> str:
    """The whole page."""
    tests = AB_LINK if now.has_tests else ""
    label = LABEL_LINK if now.can_label else ""
    status = f'{tests}{label}up {_span(now.uptime_s)} · {escape(now.version)} · <span id="live">live</span>'
    return framed("gateway", status, render_parts(now), script="page.js", after=NO_SCRIPT)


def render_parts(now: Snapshot) -> str:
    """What changes."""
    stops = stops_of(now.recent)
    return "\n".join(
        (
            _tiles(now),
            _card("spend", "Spend", _spend(now.spend), "last day"),
            _card("pareto", "Quality against cost", pareto(now.points) + _legend(now), "dollars per 1,000 requests"),
            _card("latency", "Latency", _latency(now)),
            _card("errors", "Requests, errors and breakers", _health(now), "last hour"),
            *(
                [_card("calibration", "Expected and scored", _calibration(now.calibration), "by week")]
                if now.calibration
                else []
            ),
            *([_card("stops", "How many answers pay", stops_card(stops), "share solved, by answers")] if stops else []),
            _card("why", "Why this model", _inspector(now), f"newest first; {KEPT if now.keeps_texts else NOT_KEPT}"),
        )
    )


def _card(id: str, title: str, body: str, note: str = "") -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    return f'<section id="{id}" aria-labelledby="{id}-title"><h2 id="{id}-title">{escape(title)}{small}</h2>{body}</section>'


def _tiles(now: Snapshot) -> str:
    hits = sum(now.hits.values())
    looks = hits + now.misses
    by_model = now.spend.get("model", ())
    # Both of the store, of the same day: this process may have begun a minute ago.
    spent, answers = sum(row.nano for row in by_model), sum(row.requests for row in by_model)
    good = 1 - now.errors / now.requests if now.requests else None
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in now.hits.items() if count)
    refused = f", {now.refused:,} refused" if now.refused else ""
    tiles = (
        ("Requests", f"{now.requests:,}", f"{now.in_flight} under way{refused}"),
        ("Answered", _percent(good), f"{now.errors:,} errors"),
        ("Spend, last day", _money(spent), f"{_money(spent / answers, 4)} an answer" if answers else "nothing yet"),
        ("Latency p50", _time(quantile(now.latency, 0.5)), f"p95 {_time(quantile(now.latency, 0.95))}"),
        ("Our overhead p50", _time(quantile(now.overhead, 0.5)), f"p95 {_time(quantile(now.overhead, 0.95))}"),
        (
            "Cache hits",
            _percent(hits / looks if looks else None),
            f"{kinds or 'none'} of {looks:,}" if looks else "not asked yet",
        ),
    )
    items = "".join(f"<li><span>{name}</span><b>{value}</b><small>{note}</small></li>" for name, value, note in tiles)
    return f'<ul id="tiles" aria-label="in short">{items}</ul>'


def _spend(spend: Mapping[str, Sequence[Spend]]) -> str:
    parts = []
    for by in ("model", "strategy", "key", "team"):
        rows = spend.get(by, ())
        total = sum(row.nano for row in rows)
        body = "".join(
            f'<tr><th scope="row">{escape(row.name)}</th><td class="wide">{bar(row.nano / total if total else 0)}</td>'
            f'<td class="number">{_money(row.nano)}</td><td class="number quiet">{row.requests:,}</td></tr>'
            for row in rows[:MOST_SPENDERS]
        )
        rest = (
            f'<tr><td class="quiet" colspan="4">and {len(rows) - MOST_SPENDERS} more</td></tr>'
            if len(rows) > MOST_SPENDERS
            else ""
        )
        empty = '<tr><td class="quiet" colspan="4">nothing yet</td></tr>'
        parts.append(f"<table><caption>by {by}</caption><tbody>{body + rest or empty}</tbody></table>")
    return f'<div class="several">{"".join(parts)}</div>'


def _latency(now: Snapshot) -> str:
    shown = (
        ("to the end of the answer", now.latency),
        ("to the first token", now.ttft),
        ("the gateway's own", now.overhead),
    )
    return "".join(f"<h3>{name}</h3>{histogram(buckets, name)}" for name, buckets in shown)


def _health(now: Snapshot) -> str:
    return timeline(now.timeline, now.now_s) + _deployments(now.deployments)


def _deployments(deployments: Sequence[DeploymentFact]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(at.name)}</th><td>{_state(at.state)}</td>'
        f'<td class="number minor">{at.in_flight}</td><td class="number">{at.requests:,}</td><td class="number">{at.failures:,}</td>'
        f'<td class="number">{_time(at.latency_s)}</td></tr>'
        for at in deployments
    )
    return (
        '<div class="scroll"><table class="lines"><thead><tr><th scope="col">deployment</th><th scope="col">breaker</th>'
        '<th scope="col" class="number minor">under way</th>'
        '<th scope="col" class="number">calls</th><th scope="col" class="number">failed</th>'
        f'<th scope="col" class="number">latency</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _calibration(weeks: Sequence[Calibration]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(one.week)}</th><td>{escape(one.strategy)}</td><td class="number minor">{one.count:,}</td>'
        f'<td class="number">{number_text(one.expected)}</td><td class="number">{number_text(one.scored)}</td>'
        f'<td class="number">{one.bias:+.2g}</td><td class="number minor">{number_text(one.error)}</td></tr>'
        for one in weeks[:MOST_WEEKS]
    )
    return (
        '<div class="scroll"><table class="lines"><thead><tr><th scope="col">week of</th><th scope="col">strategy</th>'
        '<th scope="col" class="number minor">scored answers</th><th scope="col" class="number">expected</th>'
        '<th scope="col" class="number">scored</th><th scope="col" class="number">too much by</th>'
        f'<th scope="col" class="number minor">mean distance</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _state(state: str) -> str:
    return f'<span class="state {escape(state)}">{escape(state.replace("_", " "))}</span>'


def _legend(now: Snapshot) -> str:
    kinds = [kind for kind in ("model", "strategy", "live") if any(point.kind == kind for point in now.points)]
    names = {"model": "one model", "strategy": "a strategy", "live": "all traffic, now"}
    items = "".join(
        f'<span><svg width="12" height="12" aria-hidden="true"><circle class="{kind}" cx="6" cy="6" r="5"/></svg> {names[kind]}</span>'
        for kind in kinds
    )
    return f'<p class="legend">{items}</p>' if items else ""


def _inspector(now: Snapshot) -> str:
    if not now.recent:
        return '<p class="none">No request yet. The first one will be explained here.</p>'
    search = f'<p><input id="filter" type="search" placeholder="{FILTER}" aria-label="filter the requests"></p>'
    return search + f'<div id="decisions">{"".join(_decision(seen, now.now_s) for seen in now.recent)}</div>'


def _decision(seen: Seen, now_s: float) -> str:
    kind = "bad" if seen.status >= 400 else "hit" if seen.cache else "good"
    why = f'<span class="reason">{escape(seen.reason)}</span>' if seen.reason else ""
    head = (
        f'<span class="dot {kind}" title="status {seen.status}"></span><b>{escape(seen.chosen or "no model")}</b>'
        f'<span class="asked">{escape(seen.asked)}</span>'
        f'<span class="facts">{_money(seen.nano, 4)} · {_time(seen.latency_s)} · {_ago(now_s - seen.time_s)}</span>{why}'
    )
    bypassed = f'<p class="warn">The strategy was bypassed: {escape(seen.bypassed)}.</p>' if seen.bypassed else ""
    cached = (
        f'<p class="note">Answered from the {escape(seen.cache)} cache; no model was asked.</p>' if seen.cache else ""
    )
    sure = f" · confidence {seen.confidence:.2f}" if seen.confidence is not None else ""
    facts = (
        f"request {seen.request_id} · status {seen.status} · key {seen.key or 'none'} · "
        f"{seen.prompt_tokens:,} prompt and {seen.completion_tokens:,} completion tokens · overhead {_time(seen.overhead_s)}{sure}"
    )
    more = (
        f"<pre>{escape(json.dumps(dict(seen.details), indent=1, ensure_ascii=False, default=str)[:4000])}</pre>"
        if seen.details
        else ""
    )
    return (
        f'<details id="r-{escape(seen.request_id)}"><summary>{head}</summary>{bypassed}{cached}{_candidates(seen)}'
        f'{_attempts(seen)}{_calls(seen)}{more}<p class="quiet">{escape(facts)}</p></details>'
    )


def _candidates(seen: Seen) -> str:
    if not seen.candidates:
        return ""
    scores = [row.get("score") or 0.0 for row in seen.candidates]
    low, high = min(0.0, *scores), max(scores)
    span = (high - low) or 1.0
    rows = "".join(
        f'<tr{" class=chosen" if row.get("model") == seen.chosen else ""}><th scope="row">{escape(str(row.get("model")))}</th>'
        f'<td class="wide">{bar(((row.get("score") or 0.0) - low) / span)}</td><td class="number">{number_text(row.get("score"))}</td>'
        f'<td class="number">{number_text(row.get("quality"))}</td><td class="number">{_cost(row.get("cost"))}</td></tr>'
        for row in seen.candidates
    )
    return (
        '<div class="scroll"><table class="lines"><thead><tr><th scope="col">candidate</th><th></th>'
        '<th scope="col" class="number">score</th>'
        '<th scope="col" class="number">quality</th><th scope="col" class="number">cost</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _attempts(seen: Seen) -> str:
    items = "".join(
        f"<li>{escape(str(row.get('deployment')))}: {escape(str(row.get('outcome')))} after {_time(row.get('seconds'))}</li>"
        for row in seen.attempts
    )
    return f'<ol class="attempts">{items}</ol>' if items else ""


def _calls(seen: Seen) -> str:
    """What the strategy asked, alike calls together."""
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for call in seen.calls:
        alike.setdefault((str(call["purpose"]), str(call["model"])), []).append(call)
    items = "".join(_called(purpose, model, calls) for (purpose, model), calls in alike.items())
    return f'<p class="quiet">The strategy asked models itself:</p><ul class="attempts">{items}</ul>' if items else ""


def _called(purpose: str, model: str, calls: Sequence[Mapping[str, Any]]) -> str:
    failed = sum(call["outcome"] != "ok" for call in calls)
    times = f"{len(calls)} times, " if len(calls) > 1 else ""
    missed = f"{failed} without an answer, " if failed else ""
    return f"<li>{escape(purpose)} by {escape(model)}: {times}{missed}{_money(sum(call['nano'] for call in calls), 4)}</li>"


def _money(nano: float, digits: int = 2) -> str:
    return dollar_text(dollars(round(nano)), digits)


def _cost(cost: Any) -> str:
    return NONE if cost is None else dollar_text(cost, 4)


def dollar_text(value: float, digits: int) -> str:
    """With so many digits, or, where that would show nothing, with two that count."""
    if value == 0:
        return "$0"
    if value >= 10**-digits:
        return f"${value:,.{digits}f}"
    return f"${value:.{1 - math.floor(math.log10(value))}f}"


def number_text(value: Any) -> str:
    """Four digits that count; a dash for none."""
    return NONE if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}%" if share < 0.9995 else "100%"


def _time(seconds: Any) -> str:
    if seconds is None:
        return NONE
    return (
        f"{seconds * 1000:.2f} ms"
        if seconds < 0.001
        else f"{seconds * 1000:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )


def _span(seconds: float) -> str:
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours // 24} d {hours % 24} h"
        if hours >= 24
        else f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min"
        if minutes
        else f"{int(seconds)} s"
    )


def _ago(seconds: float) -> str:
    return "now" if seconds < 2 else f"{_span(seconds)} ago"


def icon() -> bytes:
    """Of the tab."""
    return (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 24"><path fill="none" stroke="#0f766e" stroke-width="3" '
        b'd="M1 12h9c6 0 5-9 12-9h7c5 0 4 9 10 9M10 12c6 0 5 9 12 9h7c5 0 4-9 10-9M10 12h29"/></svg>'
    )

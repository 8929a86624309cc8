"""Does a request get its answer while an upstream is down, slow, over its limits, out of credit, or breaks its streams?

Two scripted upstreams. One of them fails for a minute and a half in the way that a row names, the other stays well. In rows that end
in "deployment" they are two deployments of one model; in those that end in "fallback" two models, of which the failing one is the first
choice. Requests come at random, 20 a second, every second one streamed, under the default rules. Time is simulated: the same seed gives
the same day, on any machine.

``ours`` is the share of requests begun during the outage that got their answer, in percent; ``peer`` what the same requests get with one
attempt each, at a deployment drawn at random, or at the first choice. Every row has its bars: at least 99.5% answered, at most 1.2
attempts a request during the outage, the 99th percentile within the deadline, and the failing upstream in use again within two of its
breaker's periods after it is well (``recovered_s``: its breaker is closed, and it has answered a request begun since). ``openings`` says
how often that breaker opened at all; where it did not, the period is that of a first opening. The worst of the seeds is what a row shows.
``tells`` is whether the row could fail: one attempt passes not every bar of answers and time. In the brown-outs it does.

    python benchmarks/gateway_game_day.py --json benchmarks/results/gateway_game_day.json
"""

import argparse
import asyncio
import platform
import random
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _machine import here
from _records import write_record
from anabranch.gateway.dispatch import BreakerRules, Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.virtual_time import run_virtual, virtual_clock
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest

RATE, BEFORE_S, OUTAGE_S, AFTER_S, DEADLINE_S = 20.0, 40.0, 90.0, 100.0, 10.0
WELL = Mock.Config(model="m", latency_s=0.1, tokens=8, tokens_per_s=100.0)
DEFAULT = DispatchRules()
LIMITS = {"timeout_s": 5.0, "first_token_timeout_s": 2.0}
SINGLE = DispatchRules(retries=0, breaker=BreakerRules(failures=10**9))  # one attempt, and nothing is left alone
BARS = {"answered": 99.5, "attempts": 1.2, "p99": DEADLINE_S, "periods": 2.0}


@dataclass(frozen=True)
class Outage:
    """How the failing upstream fails, and the rules if they are not the default ones."""

    name: str
    failing: dict[str, Any]
    rules: DispatchRules = DEFAULT


OUTAGES = (
    Outage("hard down (connections break)", {"fails": 1.0, "fail_with": "reset"}),
    Outage("hard down (500)", {"fails": 1.0, "fail_with": "500"}),
    Outage("30% of calls fail (500)", {"fails": 0.3, "fail_with": "500"}),
    Outage("silent (never answers)", {"fails": 1.0, "fail_with": "hang"}),
    Outage("brown-out (ten times as slow)", {"latency_s": 1.0, "tokens_per_s": 10.0}),
    Outage("brown-out, hedged", {"latency_s": 1.0, "tokens_per_s": 10.0}, DispatchRules(hedge=True)),
    Outage("over its limit (429, Retry-After 10)", {"fails": 1.0, "fail_with": "429:10"}),
    Outage("out of credit (402)", {"fails": 1.0, "fail_with": "402"}),
    Outage("streams break before the first token", {"fails": 1.0, "fail_with": "cut:0"}),
    Outage(
        "streams break in the middle, continued",
        {"fails": 1.0, "fail_with": "cut:5"},
        DispatchRules(mid_stream="continue"),
    ),
    Outage("HTML instead of an answer", {"fails": 1.0, "fail_with": "html"}),
)


@dataclass
class Seen:
    """What came of the requests that were begun during the outage."""

    requests: int = 0
    answered: int = 0
    attempts: int = 0
    latency_s: list[float] = field(default_factory=list)
    recovered_s: float | None = None
    openings: int = 0
    period_s: float = 0.0

    @property
    def answered_percent(self) -> float:
        return 100 * self.answered / self.requests

    @property
    def attempts_per_request(self) -> float:
        return self.attempts / self.requests

    @property
    def p99_s(self) -> float:
        return sorted(self.latency_s)[int(0.99 * len(self.latency_s))]


def dispatcher_of(layout: str, rules: DispatchRules, is_single: bool, seed: int) -> Dispatcher:
    """The failing upstream is ``shaky``, the other ``steady``. For single attempts they always are two models."""
    shaky, steady = (Deployment(name=name, provider=WELL, **LIMITS) for name in ("shaky", "steady"))
    if layout == "deployment" and not is_single:
        groups = [Group(name="m", deployments=(shaky, steady))]
    else:
        groups = [Group(name="first", deployments=(shaky,)), Group(name="second", deployments=(steady,))]
    return Dispatcher(groups, rules, clock=virtual_clock, seed=seed)


async def day(outage: Outage, layout: str, seed: int, is_single: bool, scale: float) -> Seen:
    """One day: well, failing, well again."""
    rules, rng = SINGLE if is_single else outage.rules, random.Random(seed)
    dispatcher, seen = dispatcher_of(layout, rules, is_single, seed), Seen()
    shaky = next(live for group in dispatcher.groups.values() for live in group.lives if live.name == "shaky")
    names = tuple(dispatcher.groups)
    fails_at, well_at = BEFORE_S * scale, (BEFORE_S + OUTAGE_S) * scale
    ends_at = well_at if is_single else well_at + AFTER_S  # where only single attempts are made, nothing has to recover

    async def one(number: int) -> None:
        began = dispatcher.now()
        streams = number % 2 == 0
        body = {"model": "m", "messages": [{"role": "user", "content": str(number)}], "stream": streams}
        chosen = names if not is_single else (rng.choice(names),) if layout == "deployment" else names[:1]
        plan, request = Plan(candidates=chosen, deadline=began + DEADLINE_S), UpstreamRequest("chat", body)
        try:
            if streams:
                stream = await dispatcher.stream(plan, request)
                async for _ in stream:
                    pass
                report, is_answered = stream.report, stream.failure is None
            else:
                report, is_answered = (await dispatcher.complete(plan, request)).report, True
        except UpstreamError as error:
            report, is_answered = error.report, False
        if fails_at <= began < well_at:
            seen.requests += 1
            seen.answered += is_answered
            seen.attempts += len(report.attempts)
            seen.latency_s.append(dispatcher.now() - began)
        if seen.recovered_s is None and began >= well_at and shaky.breaker.phase == "closed":
            if any(attempt.deployment == "shaky" and attempt.status == "ok" for attempt in report.attempts):
                seen.recovered_s = dispatcher.now() - well_at

    def becomes(config: Any) -> None:
        shaky.provider.behaviour.config = config

    loop, tasks, number = asyncio.get_running_loop(), [], 0
    loop.call_at(fails_at, becomes, WELL.replace(**outage.failing, seed=seed))
    loop.call_at(well_at, becomes, WELL)
    while dispatcher.now() < ends_at:
        tasks.append(asyncio.ensure_future(one(number)))
        number += 1
        await asyncio.sleep(rng.expovariate(RATE))
    await asyncio.gather(*tasks)
    opened = [change for change in dispatcher.changes if change["to"] == "open" and change["deployment"] == "shaky"]
    seen.openings = len(opened)
    seen.period_s = min(rules.breaker.open_s * 2 ** max(len(opened) - 1, 0), rules.breaker.max_open_s)
    return seen


def row_of(outage: Outage, layout: str, seeds: range, scale: float) -> dict[str, Any]:
    """A row: the worst of the seeds in each respect."""
    ours = [run_virtual(lambda seed=seed: day(outage, layout, seed, False, scale)) for seed in seeds]
    peers = [run_virtual(lambda seed=seed: day(outage, layout, seed, True, scale)) for seed in seeds]
    answered, peer = min(one.answered_percent for one in ours), min(one.answered_percent for one in peers)
    attempts, p99_s = max(one.attempts_per_request for one in ours), max(one.p99_s for one in ours)
    late = max(ours, key=lambda one: float("inf") if one.recovered_s is None else one.recovered_s / one.period_s)
    holds = {
        "answered": answered >= BARS["answered"],
        "attempts": attempts <= BARS["attempts"],
        "p99": p99_s <= BARS["p99"],
        "recovered": late.recovered_s is not None and late.recovered_s <= BARS["periods"] * late.period_s,
    }
    peer_p99_s = max(one.p99_s for one in peers)
    tells = peer < BARS["answered"] or peer_p99_s > BARS["p99"]
    return {
        "case": f"{outage.name}: {layout}",
        "ours": round(answered, 3),
        "peer": round(peer, 3),
        "peer_name": "one attempt",
        "ratio": round(answered / peer, 3) if peer else None,
        "spread": None,
        "unit": "% answered",
        "requests": sum(one.requests for one in ours),
        "attempts_per_request": round(attempts, 4),
        "p99_s": round(p99_s, 3),
        "peer_p99_s": round(peer_p99_s, 3),
        "openings": max(one.openings for one in ours),
        "recovered_s": None if late.recovered_s is None else round(late.recovered_s, 2),
        "period_s": late.period_s,
        "holds": holds,
        "tells": tells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="one seed and a short outage: does it run at all?")
    parser.add_argument("--seeds", type=int, default=3, help="days per row (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    options = parser.parse_args()
    rows = []
    for outage in OUTAGES:
        for layout in ("deployment", "fallback"):
            if options.only not in f"{outage.name}: {layout}":
                continue
            began = time.process_time()
            seeds, scale = (range(1), 0.25) if options.quick else (range(options.seeds), 1.0)
            row = row_of(outage, layout, seeds, scale)
            rows.append(row)
            say(row, time.process_time() - began)
    if options.json:
        versions = {name: version(name) for name in ("aiohttp", "anabranch")}
        result = {
            "name": "gateway_game_day",
            "device": "any machine: time is simulated",
            "rows": rows,
            "bars": BARS,
            "versions": {"python": platform.python_version(), **versions},
            **{name: here()[name] for name in ("commit", "date", "command")},
        }
        write_record(options.json, result)


def say(row: dict[str, Any], cpu_s: float) -> None:
    missed = [name for name, is_held in row["holds"].items() if not is_held]
    print(
        f"{row['case']:<52} answered {row['ours']:7.3f}% (one attempt {row['peer']:7.3f}%)"
        f"  attempts {row['attempts_per_request']:.3f}  p99 {row['p99_s']:6.3f} s  opened {row['openings']:2} times,"
        f" back after {row['recovered_s']} s of {2 * row['period_s']:g}"
        f"  {'missed: ' + ', '.join(missed) if missed else 'holds' if row['tells'] else 'holds, and could not fail'}  [{cpu_s:.0f} s]",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()

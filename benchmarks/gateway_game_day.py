"""Does a request get its answer while an upstream is down, slow, over its limits, out of credit or breaks its streams?

Two deployments of one model, scripted, in process; one fails for a third of the time in the way that the row names, the other stays well.
Requests arrive evenly, every second one is streamed. ``ours`` is the share of requests that got their answer, in percent (bar 99.5);
``peer`` what a random choice between the two without retries would have got on the same arrivals, which is worked out, not run. A row also
has ``attempts_per_request`` (bar 1.2), ``p99_s`` (bar: the deadline), ``recovered_s``, seconds until the failing deployment's
breaker is closed after it is well, and ``recovered_bar_s``, twice the last time that breaker was open.

    python benchmarks/gateway_game_day.py --json benchmarks/results/gateway_game_day.json
"""

import asyncio
import time
from typing import Any

import numpy as np

from _harness import arguments, finish, start
from anabranch.gateway.dispatch import BreakerRules, Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest

DEADLINE_S, RATE = 2.0, 150
WELL = Mock.Config(model="m", latency_s=0.01)
FAILURES: dict[str, dict[str, Any]] = {
    "hard down (500)": {"fails": 1.0},
    "30% of calls fail (500)": {"fails": 0.3},
    "slow: first token after 5 s": {"fails": 1.0, "fail_with": "slow:5"},
    "over its limit (429, Retry-After 1)": {"fails": 1.0, "fail_with": "429:1"},
    "streams break before the first token": {"fails": 1.0, "fail_with": "cut:0"},
    "out of credit (402)": {"fails": 1.0, "fail_with": "402"},
    "connections are reset": {"fails": 1.0, "fail_with": "reset"},
    "HTML instead of an answer": {"fails": 1.0, "fail_with": "html"},
}


async def game(failing: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One outage, streamed and whole requests in turn."""
    rules = DispatchRules(hedge=True, backoff_s=0.02, breaker=BreakerRules(open_s=0.5, window_s=5.0), window_s=5.0)
    limits = {"timeout_s": 0.8, "first_token_timeout_s": 0.5}
    two = tuple(Deployment(name=name, provider=WELL, **limits) for name in ("shaky", "steady"))
    dispatcher = Dispatcher([Group(name="m", deployments=two)], rules, seed=0)
    shaky = dispatcher.groups["m"].lives[0]
    latencies: list[float] = []
    seen = {"requests": 0, "answered": 0, "attempts": 0, "in_outage": 0}

    async def one(number: int) -> None:
        began, report, answered = time.monotonic(), None, False
        body = {"model": "m", "messages": [{"role": "user", "content": str(number)}], "stream": number % 2 == 0}
        plan = Plan(candidates=("m",), deadline=began + DEADLINE_S)
        try:
            if body["stream"]:
                stream = await dispatcher.stream(plan, UpstreamRequest("chat", body))
                async for _ in stream:
                    pass
                report, answered = stream.report, stream.failure is None
            else:
                report, answered = (await dispatcher.complete(plan, UpstreamRequest("chat", body))).report, True
        except UpstreamError as error:
            report = error.report
        latencies.append(time.monotonic() - began)
        seen["requests"] += 1
        seen["answered"] += answered
        seen["attempts"] += len(report.attempts)

    began, tasks, recovered_at, well_at, bar_s = time.monotonic(), [], None, None, 0.0
    for number in range(int(RATE * seconds)):
        await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
        share = number / (RATE * seconds)
        shaky.provider.behaviour.config = WELL.replace(**failing) if 1 / 3 <= share < 2 / 3 else WELL
        seen["in_outage"] += 1 / 3 <= share < 2 / 3
        if share >= 2 / 3 and well_at is None:
            well_at = time.monotonic()
            bar_s = 2 * max(0.5, shaky.breaker.until - shaky.breaker.since)
        if well_at is not None and recovered_at is None and shaky.breaker.phase == "closed":
            recovered_at = time.monotonic()
        tasks.append(asyncio.ensure_future(one(number)))
    await asyncio.gather(*tasks)
    chance = 1 - 0.5 * failing["fails"] * seen["in_outage"] / seen["requests"]
    return {
        "ours": round(100 * seen["answered"] / seen["requests"], 3), "peer": round(100 * chance, 3),
        "ratio": round(seen["answered"] / seen["requests"] / chance, 3), "spread": None, "unit": "%",
        "requests": seen["requests"], "attempts_per_request": round(seen["attempts"] / seen["requests"], 4),
        "p99_s": round(float(np.quantile(latencies, 0.99)), 4), "deadline_s": DEADLINE_S,
        "recovered_s": None if recovered_at is None or well_at is None else round(recovered_at - well_at, 3),
        "recovered_bar_s": round(bar_s, 3),
    }  # fmt: skip


def main() -> None:
    options = arguments(__doc__.split("\n")[0]).parse_args()
    start(options)
    rows = []
    for name, failing in FAILURES.items():
        if options.only not in name:
            continue
        row = {
            "case": name,
            **asyncio.run(game(failing, 3.0 if options.quick else 15.0)),
            "peer_name": "random, no retries",
        }
        rows.append(row)
        print(
            f"{name:40} answered {row['ours']:7.3f}%  attempts {row['attempts_per_request']:.3f} a request  p99 {row['p99_s']:.3f} s"
            f"  back after {row['recovered_s']} s (bar {row['recovered_bar_s']} s)"
        )
    finish("gateway_game_day", rows, options, ("numpy", "aiohttp", "anabranch"))


if __name__ == "__main__":
    main()

"""Does the gateway hold on to anything? 200,000 mixed requests: half streamed, 1 in 10 failing upstream, 1 in 20 cut off by the client.

Resident memory is read after a warm-up of a tenth and along the way; sockets and asyncio tasks of the server before and after.
Bars: growth after warm-up below 5 MiB; sockets and tasks back where they were.

    python benchmarks/gateway_memory.py --json benchmarks/results/gateway_memory.json
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from _gateway import Contestant, Link, free_port, machine, running, upstream_command
from _machine import version_in
from _records import write_record
from gateway_overhead import litellm, ours

FAIL_EVERY, CONCURRENCY = 10, 16

# MiB.
MOST_GROWTH = 5.0

# Longer than any connection is kept for the next request: as many of them may be kept as there were requests at once, or none.
IDLE_S = 20.0


async def mixed(contestant: Contestant, count: int, seed: int) -> dict[str, int]:
    """The load; how often each status came, ``cut`` for those the client left."""
    loop, draw, statuses = asyncio.get_running_loop(), random.Random(seed), dict[str, int]()
    left = count

    async def client() -> None:
        nonlocal left
        link: Link | None = None
        while left > 0:
            left -= 1
            if link is None or link.lost:
                _, link = await loop.create_connection(Link, "127.0.0.1", contestant.port)
            is_cut, stream = draw.random() < 0.05, draw.random() < 0.5
            request = contestant.request(stream, f"question {draw.random()} " * draw.randint(1, 40))
            try:
                status = str(await asyncio.wait_for(link.ask(request), 0.002 if is_cut else 60))
            except TimeoutError:
                status = "cut"
                link.transport.abort()
                link = None
            statuses[status] = statuses.get(status, 0) + 1
        if link is not None:
            link.transport.close()

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return statuses


def sockets(contestant: Contestant) -> int:
    assert contestant.process is not None
    return len(contestant.process.net_connections())


def tasks(contestant: Contestant) -> int | None:
    """asyncio tasks of ours, as its metrics say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{contestant.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next((round(float(line.split()[1])) for line in lines if line.startswith("anabranch_tasks ")), None)


def run(contestant: Contestant, count: int, parts: int = 10) -> dict[str, Any]:
    statuses: dict[str, int] = {}
    asyncio.run(mixed(contestant, count // parts, 0))  # warm
    time.sleep(IDLE_S)
    before = {"rss_mib": contestant.rss_mib(), "sockets": sockets(contestant)}
    if contestant.name == "ours":
        before["tasks"] = tasks(contestant) or 0
    along, begin = [], time.perf_counter()
    for part in range(1, parts):
        for status, times in asyncio.run(mixed(contestant, count // parts, part)).items():
            statuses[status] = statuses.get(status, 0) + times
        along.append(round(contestant.rss_mib(), 2))
        print(f"{contestant.name}: {part * count // parts:,} requests, {along[-1]} MiB", file=sys.stderr)
    seconds = time.perf_counter() - begin
    time.sleep(IDLE_S)
    after = {"rss_mib": contestant.rss_mib(), "sockets": sockets(contestant)}
    if contestant.name == "ours":
        after["tasks"] = tasks(contestant) or 0
    return {
        "contestant": contestant.name,
        "requests": sum(statuses.values()),
        "warm": count // parts,
        "seconds": round(seconds, 1),
        "statuses": statuses,
        "before": before,
        "after": after,
        "along_mib": along,
        "growth_mib": round(after["rss_mib"] - before["rss_mib"], 2),
    }


def table(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is claimed: growth, and what is left open; of the peer, which had a tenth of the requests, its growth."""
    ours, *others = measured

    def grown(one: dict[str, Any]) -> str:
        return f"growth of resident memory over {one['requests']:,} requests, after {one['warm']:,}"

    rows = [bounded(grown(ours), ours["growth_mib"], MOST_GROWTH, "MiB")]
    for what in ("sockets", "tasks"):
        left = ours["after"][what] - ours["before"][what]
        rows.append(bounded(f"{what} open afterwards, less those before", left, 0, what))
    found = [
        {"case": grown(one), "ours": None, "peer": one["growth_mib"], "peer_name": one["contestant"], "unit": "MiB"}
        for one in others
    ]
    return [{"peer": None, "peer_name": None, "ratio": None, "spread": None, **row} for row in (*rows, *found)]


def bounded(case: str, ours: float, most: float, unit: str) -> dict[str, Any]:
    """A row of ours against the most that it may be. Of a bar of 0 the ratio is 1 where it is kept, else 0."""
    ratio = float(ours <= 0) if not most else round(most / max(ours, 0.01), 3)
    return {"case": case, "ours": ours, "peer": most, "peer_name": "the bar", "ratio": ratio, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--litellm", metavar="PATH", help="LiteLLM's program, measured over a tenth of the requests")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--quick", action="store_true", help="2,000 requests")
    options = parser.parse_args()
    count = 2_000 if options.quick else options.requests
    rows = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, port = Path(name), free_port()
        stack.enter_context(running(upstream_command(port, FAIL_EVERY), port, "/", log=folder / "upstream.log"))
        rows.append(run(ours(folder, port, stack), count))
        if options.litellm:
            rows.append(run(litellm(options.litellm, folder, port, stack), count // 10))
    result = {"name": "gateway_memory", "rows": table(rows), "measured": rows, **machine()}
    if options.litellm:
        result["versions"] = {"litellm": version_in(str(Path(options.litellm).parent / "python"), "litellm")}
    for row in result["rows"]:
        print(
            f"{row['case']}: {row['ours']} {row['unit']}"
            + (f", {row['peer_name']} {row['peer']}" if row["peer_name"] else "")
        )
    if options.json:
        write_record(options.json, result)


if __name__ == "__main__":
    main()

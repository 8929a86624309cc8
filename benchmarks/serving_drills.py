"""Does a server lose what it has accepted? Signals under load, engines that are killed, and a soak.

sigterm   SIGTERM at a random moment under load: every request sent before it ends whole or with a told error, none is cut; exit code 0
kill      kill -9 of the engine's process under load: every request under way ends whole or with a told error, and the server serves
          again; kill -9 of the server itself: its engine's process ends too
soak      load with cancellations for minutes: no error, and memory that does not grow

A part that is left out (0) keeps what the file given by --json has of it, also when, by which commit and by which command it was measured.

    python benchmarks/serving_drills.py --sigterm 200 --kill 50 --soak 600 --json benchmarks/results/serving_drills.json
"""

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from _gateway import machine
from _records import write_record
from _serving_http import Result, Server, ask, ours, resident_bytes, save_small_moe

NAME = "small-moe"


def body(rng: random.Random) -> dict[str, Any]:
    """A request of some length."""
    prompt = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 200)))
    return {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": rng.randint(1, 120),
        "ignore_eos": True,
        "stream": rng.random() < 0.5,
    }


async def _clients(url: str, count: int, seed: int, stop: asyncio.Event) -> list[Result]:
    """So many clients that ask one after the other until told to stop."""
    results: list[Result] = []

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        rng = random.Random(seed * 1000 + number)
        while not stop.is_set():
            result = await ask(session, url, body(rng))
            results.append(result)
            if result.outcome == "refused":
                return
            if result.status == 503:
                await asyncio.sleep(0.02)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number, session) for number in range(count)))
    return results


async def sigterm(server: Server, clients: int, seed: int) -> dict[str, Any]:
    """One trial."""
    rng, stop = random.Random(seed), asyncio.Event()
    load = asyncio.create_task(_clients(server.url, clients, seed, stop))
    await asyncio.sleep(rng.uniform(0.05, 1.0))
    at = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(server.end, is_told=True)
    drained_s = time.monotonic() - at
    stop.set()
    results = await load
    before = Counter(result.outcome for result in results if result.sent < at)
    after = Counter(f"{result.outcome} {result.status}" for result in results if result.sent >= at)
    accepted = [result for result in results if result.status == 200]
    lost = sum(result.outcome != "whole" for result in accepted)
    lost += sum(result.status == 0 for result in results if result.sent < at)  # sent in time, and no answer
    return {
        "code": code,
        "drained_s": round(drained_s, 3),
        "lost": lost,
        "accepted": len(accepted),
        "before": dict(before),
        "after": dict(after),
    }


async def kill(server: Server, clients: int, seed: int) -> dict[str, Any]:
    """One death of the engine."""
    rng, stop = random.Random(seed), asyncio.Event()
    load = asyncio.create_task(_clients(server.url, clients, seed, stop))
    await asyncio.sleep(rng.uniform(0.05, 0.6))
    [engine] = server.children()
    at = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    async with aiohttp.ClientSession() as session:
        while True:
            answer = await ask(session, server.url, {"model": NAME, "prompt": "x", "max_tokens": 1})
            if answer.outcome == "whole" and server.children() != [engine]:
                break
            await asyncio.sleep(0.02)
            if time.monotonic() - at > 120:
                raise SystemExit("the engine did not come back")
    back_s = time.monotonic() - at
    stop.set()
    results = await load
    return {"back_s": round(back_s, 3), **ended(results, at)}


def ended(results: list[Result], at: float) -> dict[str, Any]:
    """What became of the requests that were under way ``at`` the kill: ``accepted`` of them ended whole, were told an error, or were lost.

    ``outcomes`` counts them by outcome and status, ``lost_later`` those sent afterwards that ended neither whole nor with an error.
    """
    under_way = [result for result in results if result.sent < at <= result.sent + result.total_s]
    count = Counter({"whole": "whole", "error": "told"}.get(result.outcome, "lost") for result in under_way)
    later = sum(result.sent >= at and result.outcome not in ("whole", "error") for result in results)
    outcomes = Counter(f"{result.outcome} {result.status}" for result in under_way)
    return {
        "accepted": len(under_way),
        "whole": count["whole"],
        "told": count["told"],
        "lost": count["lost"],
        "lost_later": later,
        "outcomes": dict(outcomes),
    }


def orphan(model: str) -> bool:
    """Whether the engine outlives a server that is killed."""
    server = ours(model)
    engines = server.children()
    server.process.kill()
    server.end()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in engines):
            return False
        time.sleep(0.05)
    return True


async def soak(server: Server, seconds: float, clients: int) -> dict[str, Any]:
    """Load, a tenth of it cancelled, with memory looked at every second."""
    outcomes: Counter[str] = Counter()
    rows: list[tuple[float, int]] = []
    begin = time.monotonic()

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        rng = random.Random(number)
        while time.monotonic() - begin < seconds:
            if rng.random() < 0.1:
                try:
                    async with asyncio.timeout(rng.uniform(0.01, 0.2)):
                        await ask(session, server.url, {**body(rng), "max_tokens": 1000})
                except TimeoutError:
                    pass
                outcomes["cancelled"] += 1
                continue
            result = await ask(session, server.url, body(rng))
            outcomes[f"{result.outcome} {result.status}"] += 1

    async def watch() -> None:
        pids = [server.process.pid, *server.children()]
        while time.monotonic() - begin < seconds:
            rows.append((time.monotonic() - begin, sum(map(resident_bytes, pids))))
            await asyncio.sleep(1)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(watch(), *(client(number, session) for number in range(clients)))
    steady = [row for row in rows if row[0] > seconds / 3]
    return {
        "seconds": seconds,
        "outcomes": dict(outcomes),
        "slope_kib_per_minute": round(_slope(steady) * 60 / 1024, 1),
        "first_mib": round(steady[0][1] / 2**20, 1),
        "last_mib": round(steady[-1][1] / 2**20, 1),
    }


def _slope(rows: list[tuple[float, int]]) -> float:
    """Bytes per second, by least squares."""
    mean_s, mean_bytes = (sum(values) / len(rows) for values in zip(*rows, strict=True))
    spread = sum((at - mean_s) ** 2 for at, _ in rows)
    return sum((at - mean_s) * (size - mean_bytes) for at, size in rows) / spread if spread else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sigterm", type=int, default=3, metavar="TRIALS")
    parser.add_argument("--kill", type=int, default=3, metavar="TRIALS")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", help="default: a small mixture of experts of random weights")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    where, report = machine(), {"clients": given.clients}
    measured = {name: where[name] for name in ("device", "commit", "date", "command")}
    if given.json is not None and given.json.exists():
        report = json.loads(given.json.read_text()) | report
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or save_small_moe(Path(folder))
        common = ["--set", f"engine.name={NAME}", "--set", "engine.kv_memory=64MiB"]
        trials = []
        for seed in range(given.sigterm):
            trials.append(asyncio.run(sigterm(ours(model, *common), given.clients, seed)))
            print(f"sigterm {seed + 1}/{given.sigterm}: {trials[-1]}", flush=True)
        if trials:
            codes = dict(Counter(str(trial["code"]) for trial in trials))
            report["sigterm"] = _summary(trials, "drained_s") | {"codes": codes} | measured
        if given.kill:
            server, trials = ours(model, *common, "--set", "http.restarts=100000"), []
            for seed in range(given.kill):
                trials.append(asyncio.run(kill(server, given.clients, seed)))
                print(f"kill {seed + 1}/{given.kill}: {trials[-1]}", flush=True)
            report["kill"] = {**_summary(trials, "back_s"), **deaths(trials), "exit": server.end(), **measured}
            report["orphans"] = sum(orphan(model) for _ in range(min(5, given.kill)))
        if given.soak:
            server = ours(model, *common)
            report["soak"] = asyncio.run(soak(server, given.soak, given.clients)) | {"exit": server.end()} | measured
    report |= {"name": "serving_drills", "rows": rows(report), "note": note(report), **where}
    print(json.dumps(report, indent=1))
    if given.json is not None:
        write_record(given.json, report)


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was found, as rows of `_harness`, which have no peer here."""
    found: list[tuple[str, Any]] = []
    if term := report.get("sigterm"):
        found.append(
            (f"requests lost, of {term['accepted']:,} accepted in {term['trials']} times SIGTERM", term["lost"])
        )
        found.append(("exit codes other than 0", sum(count for code, count in term["codes"].items() if code != "0")))
        found.append(("longest drain, s", term["largest_drained_s"]))
    if kill := report.get("kill"):
        found += [(f"requests {what}, {_kills(kill)}", value) for what, value in _fates(kill)]
        found.append(("longest until it serves again, s", kill["largest_back_s"]))
        found.append(("engines that outlived their server", report["orphans"]))
    if soak := report.get("soak"):
        asked = sum(soak["outcomes"].values())
        found.append(
            (
                f"growth of memory in {soak['seconds']:g} s and {asked:,} requests, KiB a minute",
                soak["slope_kib_per_minute"],
            )
        )
    return [{"case": case, "ours": value} for case, value in found]


def _kills(kill: dict[str, Any]) -> str:
    """The denominator; a record of before has none."""
    times = f"{kill['trials']} times kill -9"
    return f"of {kill['accepted']:,} under way in {times}" if kill.get("accepted") else times


def _fates(kill: dict[str, Any]) -> list[tuple[str, int]]:
    found = [("that ended neither whole nor with an error", kill["lost"] + kill.get("lost_later", 0))]
    return [("told an error", kill["told"]), *found] if "told" in kill else found


def note(report: dict[str, Any]) -> str:
    """When and by which commit each part was measured: a record may have parts of several runs."""
    said = []
    for name in ("sigterm", "kill", "soak"):
        if part := report.get(name):
            known = f"{part['date']}, at commit {part['commit']}" if "commit" in part else "date and commit not kept"
            said.append(f"{name}: {known}")
    return f"Parts of the record: {'; '.join(said)}."


def deaths(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all kills: how many requests under way ended whole and were told an error, and how many were lost later."""
    outcomes: Counter[str] = Counter()
    for trial in trials:
        outcomes.update(trial["outcomes"])
    sums = {name: sum(trial[name] for trial in trials) for name in ("whole", "told", "lost_later")}
    return {**sums, "outcomes": dict(outcomes)}


def _summary(trials: list[dict[str, Any]], time_name: str) -> dict[str, Any]:
    times = sorted(trial[time_name] for trial in trials)
    return {
        "trials": len(trials),
        "lost": sum(trial["lost"] for trial in trials),
        "accepted": sum(trial["accepted"] for trial in trials),
        f"median_{time_name}": times[len(times) // 2],
        f"largest_{time_name}": times[-1],
    }


if __name__ == "__main__":
    main()

"""Does goodput stay flat when more is asked for than can be done? Open-loop load at 0.5 to 5 times what saturates a server.

Goodput is requests per second that end whole within the objective (the client waits no longer), counted until the last answer: what
comes while a queue drains takes time as well. Contestants, in turns within each round: ours with its limits, told each request's
deadline; ours without limits; vLLM's CPU server where --vllm gives the Python of an environment that has it, compiled, as its
documentation says to run it (`_vllm`), with as many sequences in a step as ours: as it comes, and with limits like ours on what waits
and on a step's tokens. With --zen both have AMD's zentorch, and its name. Prompts and answers have random lengths, and are others at
each load and in each round, so that no cache of prefixes helps.

Each contestant is saturated by a few clients that wait for their answers; loads are times the best contestant's saturation, so that all
are offered the same requests at the same times. What is kept is the least goodput from the load of the best one up to 5 times, over that
best. At the end clients that wait as long as it takes (ten minutes at most), and
tell no deadline, ask for ``--patient`` seconds at 3 times: a server that takes everything lets them wait the longer the longer that lasts.
A contestant that does not start, or answers nothing for five minutes, is out, and the record says so.

Bars: ours with limits keeps at least 90%; its P99 to the first token at 3 times is at most a third of vLLM's as it comes, and only
counts where ours answers as many in time as vLLM: who refuses most answers the rest soon. Rows say what share had no first token.

    python benchmarks/serving_goodput.py --seconds 30 --json benchmarks/results/serving_goodput.json
    python benchmarks/serving_goodput.py --model HF_FOLDER --vllm VENV/bin/python --json benchmarks/results/serving_goodput_vllm.json
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from _bars import is_met, with_bars
from _gateway import free_port, machine
from _harness import kernels
from _records import write_record
from _serving_http import Result, Server, ask, ours, save_small_moe
from _system_info import last_error_told, vllm_instructions, without_paths
from _vllm import SPIN_S, environment, platform_of, told_preloads

Made = TypeVar("Made")
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
NAME = "model"
READY_S = 300.0  # that a server may take to answer again, or vLLM to start
PATIENCE_S = 600.0  # of clients that wait as long as it takes: a server that hangs ends its turn
KEPT = 0.9  # of the best goodput: the bar
UNLIMITED = [
    "http.admission.max_in_flight=none",
    "http.admission.max_queued=none",
    "http.admission.max_queued_tokens=none",
]


def body(rng: random.Random) -> dict[str, Any]:
    """A request."""
    prompt = " ".join(rng.choices(["river", "weir", "bank", "ford", "reed"], k=rng.randint(5, 60)))
    return {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": rng.randint(8, 48),
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }


async def capacity(url: str, streams: int, seconds: float) -> tuple[float, float]:
    """Requests per second with so many clients that never pause, and the median time of one."""
    done: list[Result] = []
    end = time.monotonic() + seconds

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        rng = random.Random(f"capacity {number}")
        while time.monotonic() < end:
            done.append(await ask(session, url, body(rng)))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number, session) for number in range(streams)))
    # Those that were under way at the end took their time as well.
    took = max(seconds, max(result.sent + result.total_s for result in done) - (end - seconds))
    return len(done) / took, statistics.median(result.total_s for result in done)


async def load(
    url: str, rate: float, seconds: float, slo_s: float, seed: str, tells_deadline: bool, patience_s: float
) -> dict[str, Any]:
    """Poisson arrivals at ``rate`` per second; a client leaves after ``patience_s``."""
    rng, results = random.Random(seed), []
    headers = {"x-deadline-ms": str(round(slo_s * 1000))} if tells_deadline else None
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(wanted: dict[str, Any]) -> None:
            results.append(await ask(session, url, wanted, headers, patience_s))

        tasks, begin, at = [], time.monotonic(), 0.0
        while at < seconds:
            await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
            tasks.append(asyncio.create_task(one(body(rng))))
            at += rng.expovariate(rate)
        await asyncio.gather(*tasks)
    good = [result for result in results if result.outcome == "whole" and result.total_s <= slo_s]
    took = max(seconds, time.monotonic() - begin)
    firsts = sorted(result.ttft_s for result in results if result.ttft_s is not None)
    return {
        "rate": round(rate, 2),
        "sent": len(results),
        "answered": len(firsts),
        "goodput": round(len(good) / took, 3),
        "took_s": round(took, 3),
        "rejected": sum(result.status in (429, 503) for result in results),
        "late": sum(result.outcome in ("late",) for result in results),
        "ttft_p50_s": _quantile(firsts, 0.5),
        "ttft_p99_s": _quantile(firsts, 0.99),
    }


def _quantile(values: list[float], share: float) -> float | None:
    return round(values[min(len(values) - 1, int(share * len(values)))], 4) if values else None


def vllm(python: str, model: str, options: argparse.Namespace, *, has_limits: bool) -> Server:
    """vLLM's server on the processor, as its documentation says to run it. Raises SystemExit if it does not start."""
    port = free_port()
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        NAME,
        "--port",
        str(port),
        "--dtype",
        "auto",
        "--max-num-seqs",
        str(options.streams),
        *(vllm_limits(options.streams) if has_limits else ()),
    ]
    bind = f"0-{options.threads - 1}" if options.threads > 1 else "0"
    variables = {"OMP_NUM_THREADS": str(options.threads), **environment(python, bind, zen=options.zen)}
    server = Server(command, f"http://127.0.0.1:{port}", variables)
    if not asyncio.run(_is_ready(server.url, server)):
        told = last_error_told(server.logged()) or "it did not start"
        server.end()
        raise SystemExit(told)
    return server


def vllm_limits(streams: int) -> list[str]:
    """Of vLLM: as many sequences under way and waiting, and as many tokens in a step, as ours takes."""
    return [
        "--max-num-queued-reqs",
        str(3 * streams),
        "--max-num-batched-tokens",
        "512",
        "--max-model-len",
        "2048",
    ]


async def _is_ready(url: str, server: Server, limit_s: float = READY_S) -> bool:
    """Whether it answers within that time; not once its process has ended."""
    end = time.monotonic() + limit_s
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and server.process.poll() is None:
            answer = await ask(session, url, {"model": NAME, "prompt": "x", "max_tokens": 1}, timeout_s=60.0)
            if answer.outcome == "whole":
                return True
            await asyncio.sleep(0.5)
    return False


BUSY = 2  # clients for each sequence of a step while the saturating load is found: with fewer the server waits, more it refuses


@dataclass
class Contestant:
    """One of those compared, and what became of it.

    Attributes:
        start: makes its server.
        tells_deadline: whether requests carry one.
        capacity: requests a second at saturation, and a request's median seconds there.
        rows: a load each.
        patient: the load of clients that wait.
        failed: why it is out.
    """

    start: Callable[[], Server]
    tells_deadline: bool = False
    server: Server | None = None
    capacity: tuple[float, float] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    patient: dict[str, Any] | None = None
    failed: str = ""

    def turn(self, work: Callable[[str], Coroutine[Any, Any, Made]]) -> Made | None:
        """What ``work``, given the server's address, comes to; None, and out, where the server does not answer before or after it."""
        if self.failed:
            return None
        # What the one before it still spins is not to fall into its time.
        time.sleep(SPIN_S)
        try:
            if self.server is None:
                self.server = self.start()
            made = asyncio.run(work(self.server.url))
            if asyncio.run(_is_ready(self.server.url, self.server)):
                return made
            self.failed = last_error_told(self.server.logged()) or f"it did not answer for {READY_S:g} s after a load"
        except (SystemExit, OSError, ValueError) as error:
            self.failed = without_paths(str(error))[-300:] or type(error).__name__
        print(f"FAILED: {self.failed}", flush=True)
        return None

    def told(self) -> dict[str, Any]:
        """For the record."""
        best = max((row["goodput"] for row in self.rows), default=0.0)
        peak = next((row["times"] for row in self.rows if row["goodput"] == best), 0.0)
        over = [row["goodput"] for row in self.rows if row["times"] >= peak]
        return {
            "capacity": round(self.capacity[0], 3) if self.capacity else None,
            "kept": round(min(over) / best, 3) if best else 0.0,
            "rows": self.rows,
            **({"patient": self.patient} if self.patient else {}),
            **({"failed": self.failed} if self.failed else {}),
        }


def table(contestants: dict[str, Any]) -> list[dict[str, Any]]:
    """Goodput of ours beside each other one's, load by load, and what is kept of the best, as rows of `_harness`."""
    ours = contestants["ours"]
    most = max((row["times"] for one in contestants.values() for row in one["rows"]), default=0.0)
    kept = f"least from the best load to {most:g} times, share of the best"
    rows = [_row(kept, "share", ours, {}, "the bar", ours["kept"], KEPT)]
    for name, other in contestants.items():
        if name == "ours":
            continue
        if "patient" in ours or "patient" in other:
            loads = [[one["patient"]] if "patient" in one else [] for one in (ours, other)]
            rows.append(_first_row("clients wait as long as it takes", ours, other, name, *loads))
        for times in sorted({row["times"] for one in (ours, other) for row in one["rows"]}):
            mine, theirs = (_median(_at(one, times), "goodput") for one in (ours, other))
            case = f"requests/s in time at {times:g} times the saturating load"
            rows.append(_row(case, "1/s", ours, other, name, mine, theirs))
        loads = [_at(one, 3.0) for one in (ours, other)]
        rows.append(_first_row("clients leave at the objective", ours, other, name, *loads))
        rows.append(_row(kept, "share", ours, other, name, ours["kept"], other["kept"]))
    return rows


def _row(
    case: str,
    unit: str,
    ours: dict[str, Any],
    other: dict[str, Any],
    peer: str,
    mine: float | None,
    theirs: float | None,
) -> dict[str, Any]:
    """More is better. Of a contestant that is out it says so; bars are missed where that is ours."""
    failed = next(
        (f"{name}: {one['failed']}" for name, one in (("ours", ours), (peer, other)) if one.get("failed")), None
    )
    return {
        "case": case,
        "ours": mine,
        "peer": theirs,
        "ratio": mine / theirs if mine is not None and theirs else None,
        "spread": None,
        "unit": unit,
        "peer_name": peer,
        **({"failed": failed} if failed else {}),
    }


def _first_row(
    clients: str,
    ours: dict[str, Any],
    other: dict[str, Any],
    peer: str,
    my_loads: list[dict[str, Any]],
    their_loads: list[dict[str, Any]],
) -> dict[str, Any]:
    """P99 to the first token of those that were answered, with the share that was not: who is refused has no first token."""
    case = f"P99 to the first token at 3 times the saturating load, {clients}"
    mine, theirs = (_median(loads, "ttft_p99_s") for loads in (my_loads, their_loads))
    row = _row(case, "s", ours, other, peer, mine, theirs)
    row["ratio"] = theirs / mine if mine and theirs else None
    for side, loads in (("ours", my_loads), ("peer", their_loads)):
        sent = sum(load["sent"] for load in loads)
        row[f"not_answered_{side}"] = round(1 - sum(load["answered"] for load in loads) / sent, 3) if sent else None
        row[f"refused_{side}"] = round(sum(load["rejected"] for load in loads) / sent, 3) if sent else None
    my_goodput, their_goodput = (_median(loads, "goodput") for loads in (my_loads, their_loads))
    if mine is None:
        row["missed"] = "ours answered nobody"
    elif my_goodput is not None and their_goodput is not None and my_goodput < their_goodput:
        row["missed"] = f"ours answers {my_goodput:g} a second in time, {peer} {their_goodput:g}"
    return row


def _at(contestant: dict[str, Any], times: float) -> list[dict[str, Any]]:
    return [row for row in contestant["rows"] if row["times"] == times]


def _median(loads: list[dict[str, Any]], key: str) -> float | None:
    found = [load[key] for load in loads if load[key] is not None]
    return statistics.median(found) if found else None


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--patient", type=float, default=20.0, help="seconds of the load that waits; 0 for none")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="times the saturating load")
    parser.add_argument("--streams", type=int, default=8, help="sequences in a step (engine.max_seqs)")
    parser.add_argument(
        "--slo", type=float, help="seconds a request may take; default: four times the median at saturation"
    )
    parser.add_argument(
        "--model", help="a model's folder (vLLM needs a Hugging Face one); default: small, of random weights"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument(
        "--zen", type=Path, metavar="FOLDER", help="with zentorch, which vLLM takes on AMD's processors"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each server's computing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="seconds of few loads: does it run at all?")
    given = parser.parse_args(words)
    if given.quick:
        given.seconds, given.patient, given.loads = 2.0, 2.0, (1.0, 3.0)
    return given


def contestants_of(given: argparse.Namespace, model: str) -> dict[str, Contestant]:
    """Those compared, by name; none has begun."""
    base = [f"engine.max_seqs={given.streams}", f"engine.name={NAME}", "engine.kv_memory=256MiB"]
    queued = [f"http.admission.max_queued={2 * given.streams}"]

    def start(settings: Sequence[str]) -> Callable[[], Server]:
        words = [word for setting in (*base, *settings) for word in ("--set", setting)]
        return lambda: ours(model, *words, threads=given.threads)

    found = {
        "ours": Contestant(start(queued), tells_deadline=True),
        "ours without limits": Contestant(start(UNLIMITED)),
    }
    if given.vllm:
        name = "vllm zentorch" if given.zen else "vllm"
        found[name] = Contestant(lambda: vllm(given.vllm, model, given, has_limits=False))
        found[f"{name} with limits"] = Contestant(lambda: vllm(given.vllm, model, given, has_limits=True))
    return found


def measure(given: argparse.Namespace, contestants: dict[str, Contestant]) -> dict[str, Any]:
    """Saturation of each, the loads in rounds, and the load of clients that wait."""
    for name, one in contestants.items():
        one.capacity = one.turn(lambda url: capacity(url, BUSY * given.streams, given.seconds))
        if one.capacity:
            print(f"{name}: {one.capacity[0]:.2f} requests/s at saturation, median {one.capacity[1]:.2f} s", flush=True)
    capacities = {name: one.capacity for name, one in contestants.items() if one.capacity}
    if not capacities:
        raise SystemExit("no server could be measured: " + "; ".join(one.failed for one in contestants.values()))
    offered = max(rate for rate, _ in capacities.values())
    slo_s = given.slo or 4 * capacities.get("ours", next(iter(capacities.values())))[1]
    for number in range(given.rounds):
        for times in given.loads:
            for name, one in contestants.items():
                seed, tells = f"{number} {times}", one.tells_deadline
                row = one.turn(
                    lambda url: load(url, times * offered, given.seconds, slo_s, seed, tells, slo_s)  # noqa: B023
                )
                if row is not None:
                    one.rows.append({"times": times, **row})
                    print(f"{name} {times}x: {row}", flush=True)
    for name, one in contestants.items():
        if given.patient:
            row = one.turn(lambda url: load(url, 3 * offered, given.patient, slo_s, "patient", False, PATIENCE_S))
            if row is not None:
                one.patient = {"seconds": given.patient, **row}
                print(f"{name}, clients that wait: {row}", flush=True)
    return {"saturating_1_s": round(offered, 3), "slo_s": round(slo_s, 3)}


def instructions(name: str, one: Contestant, given: argparse.Namespace) -> Any:
    """What a contestant computes with, as it says itself."""
    if not name.startswith("vllm"):
        return kernels()
    platform = platform_of(given.vllm, environment(given.vllm, "0", zen=given.zen)) or "unknown"
    return [f"platform {platform}", *(vllm_instructions(one.server.logged()) if one.server else [])]


def main() -> None:
    given = arguments()
    if given.vllm:
        print(f"preloaded for vllm: {', '.join(told_preloads(given.vllm))}")
    with tempfile.TemporaryDirectory() as folder:
        contestants = contestants_of(given, given.model or save_small_moe(Path(folder)))
        try:
            report: dict[str, Any] = {
                "seconds": given.seconds,
                "streams": given.streams,
                "threads": given.threads,
                "rounds": given.rounds,
                **measure(given, contestants),
                "contestants": {},
            }
            for name, one in contestants.items():
                report["contestants"][name] = {**one.told(), "instructions": instructions(name, one, given)}
        finally:
            exits = {name: one.server.end() for name, one in contestants.items() if one.server}
    for name, code in exits.items():
        report["contestants"][name]["exit"] = code
    rows = with_bars("serving_goodput", table(report["contestants"]))
    print(json.dumps({name: {"kept": row["kept"]} for name, row in report["contestants"].items()}))
    for row in rows:
        if "bar" in row:
            why = f" ({row['missed']})" if row.get("missed") else ""
            print(
                f"{row['case']} / {row['peer_name']}: {row['ratio']}; bar {row['bar']:g}: {'met' if is_met(row) else 'MISSED'}{why}"
            )
    if given.json is not None:
        preloaded = told_preloads(given.vllm) if given.vllm else []
        result = {"name": "serving_goodput", "rows": rows, **report, "preloaded": preloaded, **machine()}
        write_record(given.json, result)


if __name__ == "__main__":
    main()

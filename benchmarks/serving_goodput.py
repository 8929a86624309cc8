"""Does goodput stay flat when more is asked for than can be done? Open-loop load at 0.5 to 5 times what saturates a server.

Goodput is requests per second that end whole within the objective (the client waits no longer), counted until the last answer: what
comes while a queue drains takes time as well. Contestants, in turns within each round: ours with its limits, told each request's
deadline; ours without limits; vLLM's CPU server where --vllm gives the Python of an environment that has it, compiled, its threads
bound to cores, with the allocator its documentation asks for. Prompts and answers have random lengths.

Each contestant is saturated by a few clients that wait for their answers; loads are times the best contestant's saturation, so that all
are offered the same requests at the same times. What is kept is the least goodput from the load of the best one up to 5 times, over that
best. At the end clients that wait as long as it takes, and
tell no deadline, ask for ``--patient`` seconds at 3 times: a server that takes everything lets them wait the longer the longer that lasts.
Bars: ours with limits keeps at least 90%; its P99 to the first token at 3 times is at most a third of vLLM's.

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
from pathlib import Path
from typing import Any

import aiohttp

from _bars import with_bars
from _gateway import machine
from _harness import kernels
from _serving import vllm_environment
from _serving_http import Result, Server, ask, ours, save_small_moe
from _system_info import vllm_instructions

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
NAME, VLLM_PORT = "model", 18123
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
        rng = random.Random(number)
        while time.monotonic() < end:
            done.append(await ask(session, url, body(rng)))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number, session) for number in range(streams)))
    # Those that were under way at the end took their time as well.
    took = max(seconds, max(result.sent + result.total_s for result in done) - (end - seconds))
    return len(done) / took, statistics.median(result.total_s for result in done)


async def load(
    url: str, rate: float, seconds: float, slo_s: float, seed: int, tells_deadline: bool, patience_s: float
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
        "rate": round(rate, 2), "sent": len(results), "goodput": round(len(good) / took, 3), "took_s": round(took, 3),
        "rejected": sum(result.status in (429, 503) for result in results), "late": sum(result.outcome in ("late",) for result in results),
        "ttft_p50_s": _quantile(firsts, 0.5), "ttft_p99_s": _quantile(firsts, 0.99),
    }  # fmt: skip


def _quantile(values: list[float], share: float) -> float | None:
    return round(values[min(len(values) - 1, int(share * len(values)))], 4) if values else None


def vllm(python: str, model: str, threads: int) -> Server:
    """vLLM's server on the processor, as its documentation says to run it."""
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        NAME,
        "--port",
        str(VLLM_PORT),
    ]
    environment = vllm_environment(f"0-{threads - 1}" if threads > 1 else "0")
    server = Server([*command, "--dtype", "auto"], f"http://127.0.0.1:{VLLM_PORT}", environment)
    asyncio.run(_until_ready(server.url))
    return server


async def _until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(1200):
            answer = await ask(session, url, {"model": NAME, "prompt": "x", "max_tokens": 1})
            if answer.outcome == "whole":
                return
            await asyncio.sleep(0.5)
    raise SystemExit("vLLM did not start")


BUSY = 2  # clients for each sequence of a step while the saturating load is found: with fewer the server waits, more it refuses


def table(contestants: dict[str, Any]) -> list[dict[str, Any]]:
    """Goodput of ours beside each other one's, load by load, and what is kept of the best, as rows of `_harness`."""
    ours = contestants["ours"]
    rows: list[dict[str, Any]] = []
    for name, other in contestants.items():
        if name == "ours":
            continue
        if "patient" in other:
            rows.append(
                _first_row(
                    ours["patient"]["ttft_p99_s"],
                    other["patient"]["ttft_p99_s"],
                    "clients wait as long as it takes",
                    name,
                )
            )
        for times in sorted({row["times"] for row in other["rows"]}):
            mine, theirs = (
                statistics.median(row["goodput"] for row in one["rows"] if row["times"] == times)
                for one in (ours, other)
            )
            rows.append({"case": f"requests/s in time at {times:g} times the saturating load", "ours": mine, "peer": theirs,
                         "ratio": mine / theirs if theirs else None, "spread": None, "unit": "1/s", "peer_name": name})  # fmt: skip
        mine, theirs = (_first_p99(one["rows"], 3.0) for one in (ours, other))
        rows.append(_first_row(mine, theirs, "clients leave at the objective", name))
        most = max(row["times"] for row in other["rows"])
        shared = {"spread": None, "unit": "share", "peer_name": name}
        kept = ours["kept"] / other["kept"] if other["kept"] else None
        rows.append(
            {"case": f"least from the best load to {most:g} times, share of the best", "ours": ours["kept"], "peer": other["kept"],
             "ratio": kept, **shared}
        )  # fmt: skip
    return rows


def _first_row(mine: float | None, theirs: float | None, clients: str, name: str) -> dict[str, Any]:
    return {"case": f"P99 to the first token at 3 times the saturating load, {clients}", "ours": mine, "peer": theirs,
            "ratio": theirs / mine if mine and theirs else None, "spread": None, "unit": "s", "peer_name": name}  # fmt: skip


def _first_p99(rows: list[dict[str, Any]], times: float) -> float | None:
    """Of those that were answered; who was refused has no first token."""
    found = [row["ttft_p99_s"] for row in rows if row["times"] == times and row["ttft_p99_s"] is not None]
    return statistics.median(found) if found else None


def main() -> None:
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
    parser.add_argument("--threads", type=int, default=1, help="of each server's computing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="seconds of few loads: does it run at all?")
    given = parser.parse_args()
    if given.quick:
        given.seconds, given.patient, given.loads = 2.0, 2.0, (1.0, 3.0)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or save_small_moe(Path(folder))
        base = [
            "--set",
            f"engine.name={NAME}",
            "--set",
            f"engine.max_seqs={given.streams}",
            "--set",
            "engine.kv_memory=256MiB",
        ]
        queued = ["--set", f"http.admission.max_queued={2 * given.streams}"]
        contestants = {"ours": (ours(model, *base, *queued, threads=given.threads), True)}
        contestants["ours without limits"] = (
            ours(model, *base, *(word for item in UNLIMITED for word in ("--set", item)), threads=given.threads),
            False,
        )
        if given.vllm:
            contestants["vllm"] = (vllm(given.vllm, model, given.threads), False)
        report: dict[str, Any] = {
            "seconds": given.seconds,
            "streams": given.streams,
            "threads": given.threads,
            "contestants": {},
        }
        limits = {}
        for name, (server, _) in contestants.items():
            limits[name] = asyncio.run(capacity(server.url, BUSY * given.streams, given.seconds))
            print(f"{name}: {limits[name][0]:.2f} requests/s at saturation, median {limits[name][1]:.2f} s", flush=True)
        offered = max(rate for rate, _ in limits.values())
        report["saturating_1_s"] = round(offered, 3)
        slo_s = given.slo or 4 * limits["ours"][1]
        report["slo_s"] = round(slo_s, 3)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        for round_number in range(given.rounds):
            for times in given.loads:
                for name, (server, tells) in contestants.items():
                    row = asyncio.run(
                        load(server.url, times * offered, given.seconds, slo_s, round_number, tells, slo_s)
                    )
                    rows[name].append({"times": times, **row})
                    print(f"{name} {times}x: {row}", flush=True)
                    asyncio.run(_until_ready(server.url))
        patient: dict[str, dict[str, Any]] = {}
        for name, (server, _) in contestants.items():
            if given.patient:
                found = asyncio.run(load(server.url, 3 * offered, given.patient, slo_s, 0, False, 3600.0))
                patient[name] = {"patient": {"seconds": given.patient, **found}}
                print(f"{name}, clients that wait: {found}", flush=True)
        for name, (server, _) in contestants.items():
            best = max(row["goodput"] for row in rows[name])
            peak = next(row["times"] for row in rows[name] if row["goodput"] == best)
            over = [row["goodput"] for row in rows[name] if row["times"] >= peak]
            kept = round(min(over) / best, 3) if best else 0.0
            report["contestants"][name] = {
                "capacity": round(limits[name][0], 3),
                "kept": kept,
                "rows": rows[name],
                **patient.get(name, {}),
                "instructions": vllm_instructions(server.logged()) if name == "vllm" else kernels(),
                "exit": server.end(),
            }
    print(json.dumps({name: {"kept": row["kept"]} for name, row in report["contestants"].items()}))
    if given.json is not None:
        result = {
            "name": "serving_goodput",
            "rows": with_bars("serving_goodput", table(report["contestants"])),
            **report,
            **machine(),
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

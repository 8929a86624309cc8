"""What does the gateway add to a request, against a bare relay, LiteLLM's proxy and Portkey's?

One mock upstream, one client for all, everything on loopback, contestants in turns within each round. Ours runs with all on: a key is
checked, a budget reserved and settled, a ledger row written, a rule strategy asked. The relay is the least that Python and aiohttp can
do. LiteLLM runs as its documentation says, without a database (which its keys and budgets need), so it does less than ours.

Bars: p50 added at most 1/3 of LiteLLM's and at most twice the relay's; requests per processor second at least 6 times LiteLLM's; streamed
at least 8 times. Processor time of the server is measured beside wall time, since client, upstream and server share the machine.

    python benchmarks/gateway_overhead.py --litellm PEERS/litellm/bin/litellm --json benchmarks/results/gateway_overhead.json
"""

import argparse
import asyncio
import contextlib
import json
import secrets
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _bars import with_bars
from _gateway import CHUNKS, Contestant, free_port, load, machine, relay_command, running, upstream_command
from anabranch.gateway.store import open_store
from anabranch.routers.money import nano_dollars

CONFIG = """
store = "{store}"
require_key = true
default_strategy = "rules"
fallbacks = {{ mock = ["spare"] }}
[strategies.rules]
kind = "rules"
rules = [
  {{ name = "tools", has_tools = true, size = "large" }},
  {{ name = "long", min_tokens = 2000, size = "medium" }},
  {{ name = "short", max_tokens = 60, size = "small" }},
]
otherwise = "small"
[cache]
exact = false
[[models]]
name = "mock"
price = {{ input_usd = 0.15, output_usd = 0.6 }}
deployments = [{{ provider = {{ kind = "openai", base_url = "http://127.0.0.1:{port}/v1", model = "mock" }} }}]
[[models]]
name = "spare"
price = {{ input_usd = 2.5, output_usd = 10 }}
deployments = [{{ provider = {{ kind = "openai", base_url = "http://127.0.0.1:{port}/v1", model = "mock" }} }}]
"""

LITELLM = """
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_base: "http://127.0.0.1:{port}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
general_settings: {{master_key: {key}}}
"""


def ours(folder: Path, upstream_port: int, stack: contextlib.ExitStack) -> Contestant:
    config, store, port = folder / "gateway.toml", folder / "gateway.db", free_port()
    config.write_text(CONFIG.format(store=store, port=upstream_port))
    key = make_key(store)
    command = [
        sys.executable,
        "-m",
        "anabranch.cli.main",
        "gateway",
        "serve",
        "--config",
        str(config),
        "--port",
        str(port),
    ]
    environment = {"OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    process, ready = stack.enter_context(running(command, port, "/ready", environment, folder / "ours.log"))
    return Contestant("ours", port, key=key, model="auto/rules", process=process, ready_s=ready)


def make_key(store: Path) -> str:
    """A key with a budget that is never reached."""

    async def make() -> str:
        async with open_store(str(store), serves=False) as opened:
            secret, record = await opened.create_key("bench")
            await opened.set_budget(f"key:{record.id}", nano_dollars(1_000_000))
            return secret

    return asyncio.run(make())


def relay(folder: Path, upstream_port: int, stack: contextlib.ExitStack) -> Contestant:
    port = free_port()
    process, ready = stack.enter_context(
        running(relay_command(port, upstream_port), port, "/ready", log=folder / "relay.log")
    )
    return Contestant("relay", port, process=process, ready_s=ready)


def litellm(program: str, folder: Path, upstream_port: int, stack: contextlib.ExitStack) -> Contestant:
    config, port = folder / "litellm.yaml", free_port()
    key = f"sk-{secrets.token_hex(24)}"
    config.write_text(LITELLM.format(port=upstream_port, key=key))
    command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process, ready = stack.enter_context(
        running(command, port, "/health/liveliness", environment, folder / "litellm.log")
    )
    return Contestant("litellm", port, key=key, process=process, ready_s=ready)


def portkey(program: str, folder: Path, upstream_port: int, stack: contextlib.ExitStack) -> Contestant:
    """Portkey's gateway takes provider and host from headers; it listens on all interfaces, so run this in a network namespace."""
    port = free_port()
    process, ready = stack.enter_context(running([program, f"--port={port}"], port, "/", log=folder / "portkey.log"))
    found = Contestant("portkey", port, process=process, ready_s=ready)
    extra = f"x-portkey-provider: openai\r\nx-portkey-custom-host: http://127.0.0.1:{upstream_port}/v1\r\n".encode()
    plain = found.request
    found.request = lambda *args, **kwargs: plain(*args, **kwargs).replace(
        b"content-length", extra + b"content-length", 1
    )  # type: ignore[method-assign]
    return found


async def measure(contestants: list[Contestant], options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for stream in (False, True):
        for concurrency in options.concurrency:
            count = options.requests if concurrency > 1 else max(options.requests // 4, 50)
            runs: dict[str, list[dict[str, float]]] = {one.name: [] for one in contestants}
            for one in contestants:
                await load(one, max(count // 10, concurrency), concurrency, stream)  # warm
            for turn in range(options.rounds):
                for one in contestants if turn % 2 else contestants[::-1]:
                    few = count if one.name in ("direct", "relay", "ours") else max(count // 8, concurrency)
                    runs[one.name].append((await load(one, few, concurrency, stream)).row())
            for name, found in runs.items():
                row = {"contestant": name, "concurrency": concurrency, "stream": stream}
                for field in found[0]:
                    values = [each.get(field, float("nan")) for each in found]
                    row[field] = round(statistics.median(values), 4)
                    row[f"{field}_range"] = [min(values), max(values)]
                rows.append(row)
                print(
                    "  ".join(f"{key} {value}" for key, value in row.items() if not key.endswith("_range")),
                    file=sys.stderr,
                )
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the relay and LiteLLM: p50 added to a direct call, and requests a second, as rows of `_harness`."""
    by = {(row["contestant"], row["concurrency"], row["stream"]): row for row in rows}
    found = []
    for (name, concurrency, stream), ours in by.items():
        if name != "ours":
            continue
        direct = by["direct", concurrency, stream]["p50_ms"]
        for peer in ("relay", "litellm", "portkey"):
            other = by.get((peer, concurrency, stream))
            if other is None or "p50_ms" not in other:  # not measured, or it answered none (its `failed` says so)
                continue
            case = f"{concurrency} at once{', streamed' if stream else ''}"
            added, theirs = ours["p50_ms"] - direct, other["p50_ms"] - direct
            shared = {"spread": None, "peer_name": peer}
            found += [
                {"case": f"p50 added, {case}", "ours": added, "peer": theirs, "ratio": theirs / added, "unit": "ms", **shared},
                {
                    "case": f"requests a second, {case}", "ours": ours["requests_s"], "peer": other["requests_s"],
                    "ratio": ours["requests_s"] / other["requests_s"], "unit": "1/s", **shared,
                },
            ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--litellm", metavar="PATH", help="LiteLLM's program, in an environment of its own")
    parser.add_argument("--portkey", metavar="PATH", help="Portkey's program")
    parser.add_argument("--requests", type=int, default=2000, help="of a turn (an eighth for the slow ones)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--quick", action="store_true", help="does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.rounds = 200, 1
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, upstream_port = Path(name), free_port()
        stack.enter_context(running(upstream_command(upstream_port), upstream_port, "/", log=folder / "upstream.log"))
        contestants = [
            Contestant("direct", upstream_port),
            relay(folder, upstream_port, stack),
            ours(folder, upstream_port, stack),
        ]
        if options.litellm:
            contestants.append(litellm(options.litellm, folder, upstream_port, stack))
        if options.portkey:
            contestants.append(portkey(options.portkey, folder, upstream_port, stack))
        idle = {one.name: round(one.rss_mib(), 1) for one in contestants if one.process}
        rows = asyncio.run(measure(contestants, options))
        result = {
            "name": "gateway_overhead", "rows": with_bars("gateway_overhead", ratios(rows)),
            "measured": rows, "chunks": CHUNKS, "idle_rss_mib": idle,
            "rss_after_mib": {one.name: round(one.rss_mib(), 1) for one in contestants if one.process},
            "ready_s": {one.name: round(one.ready_s, 2) for one in contestants if one.process}, **machine(),
        }  # fmt: skip
    print(json.dumps({name: result[name] for name in ("idle_rss_mib", "rss_after_mib", "ready_s")}), file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

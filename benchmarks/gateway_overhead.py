"""What does the gateway add to a request, against a bare relay, nginx, LiteLLM's proxy, Portkey's gateway and TensorZero's?

One mock upstream, one client for all, everything on loopback, contestants in turns within each round. Ours runs with all on: a key is
checked, a budget reserved and settled, a ledger row written, a rule strategy asked. The others do less: the relay is the least that
Python and aiohttp can do, nginx the least that a native proxy can; LiteLLM runs as its documentation says, without a database (which its
keys and budgets need); Portkey without keys; TensorZero, a native gateway that its Python package brings, without its own store.

What is added to a request is measured in an open loop, at a rate that all can bear: requests leave when they are due, and latency counts
from then. What a server can do is measured in a closed loop of 16 and 128 connections, by requests a second of wall time and of its own
processor time (client, upstream and server share the machine, so the second is the one to compare).

Bars: p50 added at most 1/3 of LiteLLM's and at most twice the relay's; requests per processor second at least 6 times LiteLLM's; streamed
at least 8 times; aimed at were 1/12, 25 and 40 times. It takes requests within 1.5 s of its start, and idle it holds at most 120 MiB.
Against native gateways there is no bar: the ratio is told.

    python benchmarks/gateway_overhead.py --litellm PEERS/litellm/bin/litellm --portkey PEERS/portkey/node_modules/.bin/gateway \
        --tensorzero PEERS/tz/bin/python --nginx nginx --json benchmarks/results/gateway_overhead.json
"""

import argparse
import asyncio
import contextlib
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from _gateway import CHUNKS, Contestant, Load, free_port, load, machine, paced, relay_command, running, upstream_command
from _records import write_record
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

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxied;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 10000000;
    location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""

TENSORZERO = """
[gateway]
observability.enabled = false
[models.mock]
routing = ["up"]
[models.mock.providers.up]
type = "openai"
model_name = "mock"
api_base = "http://127.0.0.1:{port}/v1/"
api_key_location = "none"
"""

# Its package starts the gateway itself on a free port; told is where.
TENSORZERO_START = """
import sys, time, warnings
warnings.simplefilter("ignore")
import openai, tensorzero
client = openai.OpenAI(api_key="none", base_url="http://localhost")
client = tensorzero.patch_openai_client(client, config_file=sys.argv[1], async_setup=False)
with open(sys.argv[2], "w") as out:
    out.write(str(client.base_url.port))
time.sleep(10**9)
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


def nginx(program: str, folder: Path, upstream_port: int, stack: contextlib.ExitStack) -> Contestant:
    config, port = folder / "nginx.conf", free_port()
    config.write_text(NGINX.format(folder=folder, port=port, upstream=upstream_port))
    command = [program, "-c", str(config), "-p", str(folder)]
    process, ready = stack.enter_context(running(command, port, "/", log=folder / "nginx.log"))
    return Contestant("nginx", port, process=process, ready_s=ready)


def tensorzero(python: str, folder: Path, upstream_port: int, stack: contextlib.ExitStack) -> Contestant:
    config, told = folder / "tensorzero.toml", folder / "tensorzero.port"
    config.write_text(TENSORZERO.format(port=upstream_port))
    begin = time.perf_counter()
    child = subprocess.Popen(
        [python, "-c", TENSORZERO_START, str(config), str(told)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(child.wait)
    stack.callback(child.kill)
    while not (told.exists() and told.read_text()):
        if child.poll() is not None or time.perf_counter() - begin > 60:
            raise SystemExit("TensorZero's gateway did not start")
        time.sleep(0.01)
    return Contestant(
        "tensorzero",
        int(told.read_text()),
        path="/openai/v1/chat/completions",
        model="tensorzero::model_name::mock",
        process=psutil.Process(child.pid),
        ready_s=time.perf_counter() - begin,
    )


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of the peers, as they tell them."""

    def of_python(python: Path, package: str) -> str:
        script = f"from importlib.metadata import version; print(version({package!r}))"
        return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    found = {}
    if options.litellm:
        found["litellm"] = of_python(Path(options.litellm).parent / "python", "litellm")
    if options.tensorzero:
        found["tensorzero"] = of_python(Path(options.tensorzero), "tensorzero")
    if options.portkey:
        package = Path(options.portkey).parents[1] / "@portkey-ai" / "gateway" / "package.json"
        found["portkey"] = json.loads(package.read_text())["version"]
    if options.nginx:
        said = subprocess.run([options.nginx, "-v"], capture_output=True, text=True, check=True).stderr
        found["nginx"] = said.strip().rpartition("/")[2]
    return found


FAST = ("direct", "relay", "ours", "nginx", "tensorzero")


async def measure(contestants: list[Contestant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows by contestant: in the open loop at each rate, in the closed loop at each number of connections."""
    rows = []
    ways = [("rate", rate) for rate in options.rates] + [("connections", number) for number in options.concurrency]
    for stream in (False, True):
        for way, size in ways:
            rows += await _in_turns(contestants, options, way, size, stream)
    return rows


async def _in_turns(
    contestants: list[Contestant], options: argparse.Namespace, way: str, size: int, stream: bool
) -> list[dict[str, Any]]:
    async def once(one: Contestant, share: float = 1.0) -> Load:
        if way == "rate":
            return await paced(one, max(20, round(size * options.seconds * share)), size, stream)
        few = options.requests if one.name in FAST else options.requests // 8
        return await load(one, max(round(few * share), size), size, stream)

    runs: dict[str, list[dict[str, float]]] = {one.name: [] for one in contestants}
    for one in contestants:
        await once(one, 0.1)  # warm
    for turn in range(options.rounds):
        for one in contestants if turn % 2 else contestants[::-1]:
            runs[one.name].append((await once(one)).row())
    rows = []
    for name, found in runs.items():
        row: dict[str, Any] = {"contestant": name, way: size, "stream": stream}
        for field in found[0]:
            values = [each.get(field, float("nan")) for each in found]
            row |= {field: round(statistics.median(values), 4), f"{field}_range": [min(values), max(values)]}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if not key.endswith("_range")), file=sys.stderr)
    return rows


READY_S, IDLE_MIB = 1.5, 120.0
PEERS = ("relay", "nginx", "litellm", "portkey", "tensorzero")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against each peer as rows of `_harness`: p50 added to a direct call in the open loop, requests per second in the closed one."""
    found = []
    for ours in rows:
        if ours["contestant"] != "ours":
            continue
        way, size = next((way, ours[way]) for way in ("rate", "connections") if way in ours)
        beside = {
            row["contestant"]: row
            for row in rows
            if row.get(way) == size and row["stream"] == ours["stream"] and row.get("p50_ms") is not None
        }
        told = f"{size} a second" if way == "rate" else f"{size} connections"
        case = told + (", streamed" if ours["stream"] else "")
        for peer in PEERS:
            if peer in beside:
                found += (
                    [_added(ours, beside[peer], beside["direct"]["p50_ms"], case)]
                    if way == "rate"
                    else [_served(ours, beside[peer], case), _of_cpu(ours, beside[peer], case)]
                )
    return found


def limits(ready_s: float, idle_mib: float) -> list[dict[str, Any]]:
    """Rows of what ours may take at most: seconds from its start to the first request, and memory before any."""
    return [
        {"case": case, "ours": ours, "peer": most, "peer_name": "the bar", "ratio": round(most / ours, 3), "unit": unit}
        for case, ours, most, unit in (
            ("seconds until it takes requests", ready_s, READY_S, "s"),
            ("resident memory, idle", idle_mib, IDLE_MIB, "MiB"),
        )
    ]


def _added(ours: dict[str, Any], peer: dict[str, Any], direct: float, case: str) -> dict[str, Any]:
    mine, theirs = ours["p50_ms"] - direct, peer["p50_ms"] - direct
    low, high = (value - direct for value in ours["p50_ms_range"])
    spread = [round(theirs / high, 3), round(theirs / low, 3)]
    return {
        "case": f"p50 added, {case}",
        "ours": round(mine, 4),
        "peer": round(theirs, 4),
        "ratio": theirs / mine,
        "unit": "ms",
        "spread": spread,
        "peer_name": peer["contestant"],
    }


def _served(ours: dict[str, Any], peer: dict[str, Any], case: str) -> dict[str, Any]:
    low, high = (value / peer["requests_s"] for value in ours["requests_s_range"])
    return {
        "case": f"requests a second, {case}",
        "ours": ours["requests_s"],
        "peer": peer["requests_s"],
        "ratio": ours["requests_s"] / peer["requests_s"],
        "unit": "1/s",
        "spread": [round(low, 3), round(high, 3)],
        "peer_name": peer["contestant"],
    }


def _of_cpu(ours: dict[str, Any], peer: dict[str, Any], case: str) -> dict[str, Any]:
    mine, theirs = (1e3 / max(row["cpu_ms"], 1e-3) for row in (ours, peer))
    low, high = (peer["cpu_ms"] / max(value, 1e-3) for value in ours["cpu_ms_range"][::-1])
    return {
        "case": f"requests a processor second, {case}",
        "ours": round(mine, 1),
        "peer": round(theirs, 1),
        "ratio": mine / theirs,
        "unit": "1/s",
        "spread": [round(low, 3), round(high, 3)],
        "peer_name": peer["contestant"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--litellm", metavar="PATH", help="LiteLLM's program, in an environment of its own")
    parser.add_argument("--portkey", metavar="PATH", help="Portkey's program")
    parser.add_argument("--tensorzero", metavar="PATH", help="a Python with tensorzero and openai")
    parser.add_argument("--nginx", metavar="PATH")
    parser.add_argument("--requests", type=int, default=2000, help="of a turn (an eighth for the slow ones)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rates", type=int, nargs="+", default=[10, 25], help="requests a second of the open loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn of the open loop")
    parser.add_argument("--quick", action="store_true", help="does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.rounds, options.seconds = 200, 1, 2.0
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, upstream_port = Path(name), free_port()
        stack.enter_context(running(upstream_command(upstream_port), upstream_port, "/", log=folder / "upstream.log"))
        contestants = [
            Contestant("direct", upstream_port),
            relay(folder, upstream_port, stack),
            ours(folder, upstream_port, stack),
        ]
        for start, program in (
            (nginx, options.nginx),
            (litellm, options.litellm),
            (portkey, options.portkey),
            (tensorzero, options.tensorzero),
        ):
            if program:
                contestants.append(start(program, folder, upstream_port, stack))
        idle = {one.name: round(one.rss_mib(), 1) for one in contestants if one.process}
        rows = asyncio.run(measure(contestants, options))
        ready = {one.name: round(one.ready_s, 2) for one in contestants if one.process}
        result = {
            "name": "gateway_overhead",
            "rows": [*ratios(rows), *limits(ready["ours"], idle["ours"])],
            "measured": rows,
            "chunks": CHUNKS,
            "idle_rss_mib": idle,
            "rss_after_mib": {one.name: round(one.rss_mib(), 1) for one in contestants if one.process},
            "ready_s": ready,
            "versions": versions(options),
            **machine(),
        }
    print(json.dumps({name: result[name] for name in ("idle_rss_mib", "rss_after_mib", "ready_s")}), file=sys.stderr)
    if options.json:
        write_record(options.json, result)


if __name__ == "__main__":
    main()

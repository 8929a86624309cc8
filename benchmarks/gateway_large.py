"""How long does one large request hold up all others? Bodies and answers of ten megabytes, and what they cost the gateway's event loop.

The gateway runs in this process, on the loop and with the settings of ``anabranch gateway serve``; who asks, and the upstream, are
processes of their own. Beside it a task wakes every millisecond: by how much it wakes late is how long the loop was held. Of each case:

held        the longest that the loop was held while one such request was answered, milliseconds (wall clock; the median of the rounds)
processor   the processor's time of the loop's thread for it, less that of the task when nothing is asked, milliseconds

The bar is 5 ms of each. ``idle`` is the longest that a loop which is asked nothing is held in as much time: below that nothing can be
told. A machine that does other work besides holds every loop up.

    python benchmarks/gateway_large.py --json benchmarks/results/gateway_large.json
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from _gateway import free_port, machine
from _records import write_record
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.http.run import SWITCH_S
from anabranch.gateway.providers.openai import OpenAI
from anabranch.web.server import runner

TICK_S = 1e-3
BAR_MS = 5.0
ROW = json.dumps({"id": 17, "name": 'naïve \\ "quoted"', "values": [1.5, 2, None]}, ensure_ascii=False) + "\n"


def _chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "small", "max_tokens": 16, "messages": [{"role": "user", "content": text}], **fields}


def bodies(megabytes: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """By the name of the case: path and body."""
    size = megabytes * 10**6
    turns = [
        {"role": ("user", "assistant")[at % 2], "content": "a turn of the talk " * 100}
        for at in range(size // 1950 | 1)
    ]
    return {
        f"{megabytes} MB of text": ("chat/completions", _chat("plain words " * (size // 12))),
        f"{megabytes} MB of pasted JSON": ("chat/completions", _chat(ROW * (size // len(json.dumps(ROW))))),
        f"{megabytes} MB of many messages": ("chat/completions", {**_chat(""), "messages": turns}),
        f"tokens counted of {megabytes} MB": ("messages/count_tokens", _chat(ROW * (size // len(json.dumps(ROW))))),
        f"{megabytes} MB of vectors as numbers": ("embeddings", {"model": "small", "input": ["x"] * (size // 30_000)}),
    }


def _vectors(count: int) -> bytes:
    one = [place / 7919 - 0.5 for place in range(1536)]
    data = [{"object": "embedding", "index": index, "embedding": one} for index in range(count)]
    return json.dumps(
        {"object": "list", "data": data, "usage": {"prompt_tokens": count, "total_tokens": count}}
    ).encode()


def serve_upstream(port: int) -> None:
    """The upstream: short answers to chats, and a vector for each text."""
    message = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    short = json.dumps({"choices": [message], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
    made: dict[int, bytes] = {}

    async def answer(request: web.Request) -> web.Response:
        raw = await request.read()
        if not request.path.endswith("embeddings"):
            return web.Response(body=short, content_type="application/json")
        count = len(json.loads(raw)["input"])
        made.setdefault(count, _vectors(count))
        return web.Response(body=made[count], content_type="application/json")

    app = web.Application(client_max_size=1 << 28)
    app.router.add_post("/v1/{rest:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def send(url: str, path: str) -> None:
    """Who asks: the body of a file, once a line comes, for each line; says the status."""
    raw = Path(path).read_bytes()
    for _ in sys.stdin:
        asked = urllib.request.Request(url, raw, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                answer.read()
                print(answer.status, flush=True)
        except urllib.error.HTTPError as error:
            print(error.code, error.read()[:300], flush=True)


class Watch:
    """Wakes every millisecond, and notes how late; for the loop it runs on."""

    def __init__(self) -> None:
        self.latest_s = 0.0

    async def run(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.latest_s = max(self.latest_s, time.perf_counter() - due)

    async def during(self, work: Any) -> tuple[float, float, float]:
        """The longest hold and the processor's time of this thread while ``work`` runs, and how long that took: ms, ms, s."""
        await asyncio.sleep(0.05)
        self.latest_s, began, used = 0.0, time.perf_counter(), time.thread_time()
        await work
        return self.latest_s * 1e3, (time.thread_time() - used) * 1e3, time.perf_counter() - began


@contextlib.asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """This file in a process of its own."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def measured(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All cases, in turns."""
    sys.setswitchinterval(SWITCH_S)
    port = free_port()
    provider = OpenAI.Config(model="m", base_url=f"http://127.0.0.1:{port}/v1", key_env=None)
    config = GatewayConfig(
        models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=provider),)),),
        require_key=False,
        store=str(folder / "g.db"),
    )
    watch, rounds = Watch(), dict[str, list[tuple[float, float, float]]]()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(child("upstream", str(port)))
        gateway = await stack.enter_async_context(Gateway(config))
        server = App(gateway).server()
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
        senders = {}
        for at, (case, (path, body)) in enumerate(bodies(options.megabytes).items()):
            file = folder / f"{at}.json"
            file.write_text(json.dumps(body))
            senders[case] = await stack.enter_async_context(child("send", f"{url}/{path}", str(file)))
        ticking = asyncio.ensure_future(watch.run())
        for turn in range(-1, options.rounds):
            for case, sender in senders.items():
                found = await watch.during(_asked(sender))
                if turn >= 0:
                    idle = await watch.during(asyncio.sleep(found[2]))
                    rounds.setdefault(case, []).append((found[0], max(0.0, found[1] - idle[1]), idle[0]))
        ticking.cancel()
        listener.close()
        await server.shutdown(0.1)
    return [row for case, each in rounds.items() for row in _rows(case, each)]


async def _asked(sender: asyncio.subprocess.Process) -> None:
    assert sender.stdin is not None
    assert sender.stdout is not None
    sender.stdin.write(b"go\n")
    status = (await sender.stdout.readline()).strip()
    if status != b"200":
        raise SystemExit(f"a request was not answered: {status!r}")


def _rows(case: str, each: list[tuple[float, float, float]]) -> list[dict[str, Any]]:
    held, used, idle = ([round(one[place], 2) for one in each] for place in range(3))
    return [
        {
            "case": f"{case}: {what}",
            "ours": statistics.median(values),
            "unit": "ms",
            "peer": BAR_MS,
            "peer_name": "bar",
            "ratio": round(BAR_MS / max(statistics.median(values), 0.01), 2),
            "spread": [min(values), max(values)],
            "idle_ms": statistics.median(idle),
        }
        for what, values in (("held", held), ("processor", used))
    ]


def main() -> None:
    if sys.argv[1:2] == ["upstream"]:
        return serve_upstream(int(sys.argv[2]))
    if sys.argv[1:2] == ["send"]:
        return send(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a megabyte, two rounds: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.megabytes = 2, 1
    with tempfile.TemporaryDirectory() as folder:
        rows = runner()(measured(options, Path(folder)))
    for row in rows:
        print(f"{row['case']}: {row['ours']} ms ({row['spread'][0]} to {row['spread'][1]}; idle {row['idle_ms']})")
    if options.json:
        write_record(options.json, {"name": "gateway_large", "rows": rows, "rounds": options.rounds, **machine()})
    return None


if __name__ == "__main__":
    main()

"""The guide's pictures of the gateway's pages: the real server, made-up traffic, a real browser at 1280 and at 390 pixels.

    python docs/gateway_pictures.py FOLDER      (needs chromium)

Run it after a change of a page, look at what it wrote, and keep those in docs/images that the guide shows.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from anabranch.gateway.store import open_store

DESKTOP, PHONE = (1280, 1), (390, 2)
SEED, REQUESTS = 5, 260

# How good the answers of each model are held to be.
QUALITY = {"small": 0.56, "medium": 0.74, "large": 0.92}
MODELS = {"small": (0.1, 0.4, 400, 0.02), "medium": (0.5, 1.5, 200, 0.05), "large": (3.0, 15.0, 100, 0.15)}
KEYS = {"web": "shop", "assistant": "support", "nightly": "research"}
QUESTIONS = (
    "Summarise: a channel leaves a river and joins it again.",
    "Write a function that sorts a list.",
    "What is 12 * 34?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Prove that the square root of 2 is irrational.",
)
ADMIN = {"TEST_ADMIN_KEY": "key of the pictures"}
TOP = """store = "{folder}/gateway.db"
admin = {{ key = "env:TEST_ADMIN_KEY" }}
[log]
prompts = true
[cache]
exact = true
[strategies.rules]
kind = "rules"
[strategies.cheapest]
kind = "cheapest"
[strategies.try]
kind = "random"
[strategies.agree]
kind = "consistency"
models = ["small", "large"]
[ab.rules-or-cheapest]
a = "rules"
b = "cheapest"
answers = 1
"""
MODEL = """[[models]]
name = "{name}"
price = {{ input_usd = {prompt}, output_usd = {completion} }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", latency_s = {latency}, tokens_per_s = {speed}, tokens = 24 }} }}]
"""
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
)


async def main(folder: Path) -> None:
    """Serve, send, look."""
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "gateway.toml"
        models = "".join(
            MODEL.format(name=name, prompt=prompt, completion=completion, speed=speed, latency=latency)
            for name, (prompt, completion, speed, latency) in MODELS.items()
        )
        config.write_text(TOP.format(folder=place) + models)
        async with open_store(f"{place}/gateway.db", serves=False) as store:
            secrets = {name: (await store.create_key(name, team=team))[0] for name, team in KEYS.items()}
        async with serving(config) as url, browser(place) as page:
            await send(url, secrets)
            await collect(config, place)
            await asyncio.sleep(4)
            await page.picture(f"{url}/ui", folder / "gateway.png", DESKTOP, 1620)
            await page.picture(f"{url}/ui", folder / "gateway-phone.png", PHONE, 1640)
            for name in ("ab", "label"):
                await page.picture(f"{url}/ui/{name}", folder / f"gateway-{name}.png", DESKTOP)
                await page.picture(f"{url}/ui/{name}", folder / f"gateway-{name}-phone.png", PHONE)


@contextlib.asynccontextmanager
async def serving(config: Path) -> AsyncIterator[str]:
    """``anabranch gateway serve``, until the end of the block."""
    command = [
        sys.executable,
        "-m",
        "anabranch.cli.main",
        "gateway",
        "serve",
        "--config",
        str(config),
        "--port",
        "0",
        "--json",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, **ADMIN}
    )
    assert process.stdout is not None
    try:
        said = b""
        while not said.endswith(b"\n}\n"):
            line = await process.stdout.readline()
            if not line:
                raise SystemExit("the gateway did not start; see its message above")
            said += line
        yield json.loads(said)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def send(url: str, secrets: dict[str, str]) -> None:
    """A few minutes of three apps: strategies, models by name, the same again, a name that is not there; and what answers were worth."""
    draw = random.Random(SEED)
    models = (
        "auto/rules",
        "auto/cheapest",
        "auto/try",
        "auto/agree",
        "auto/rules-or-cheapest",
        "large",
        "medium",
        "small",
        "gpt-9",
    )
    turns = asyncio.Semaphore(2)

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        key = draw.choices(list(KEYS), (6, 3, 2))[0]
        model = draw.choices(models, (9, 3, 4, 2, 4, 3, 2, 2, 0.4))[0]
        text = f"{draw.choice(QUESTIONS)} ({draw.randrange(14)})"
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "user": f"user {number % 40}",
        }
        body |= {"temperature": 0} if draw.random() < 0.6 else {}
        body |= {"stream": True} if draw.random() < 0.3 else {}
        headers = {"authorization": f"Bearer {secrets[key]}"}
        async with turns, session.post("/v1/chat/completions", json=body, headers=headers) as reply:
            await reply.read()
            id, answered = reply.headers.get("x-request-id"), reply.headers.get("x-route-model", "")
        if reply.status == 200 and answered in QUALITY and draw.random() < 0.8:
            score = min(1.0, max(0.0, draw.gauss(QUALITY[answered], 0.15)))
            async with session.post("/v1/feedback", json={"request_id": id, "score": score}, headers=headers) as reply:
                await reply.read()

    async with aiohttp.ClientSession(url) as session:
        await asyncio.gather(*(one(session, number) for number in range(REQUESTS)))


async def collect(config: Path, place: str) -> None:
    """Pairs of answers for the page where people judge."""
    command = [
        sys.executable,
        "-m",
        "anabranch.cli.main",
        "gateway",
        "collect",
        "-c",
        str(config),
        "--judge",
        "human",
        "--anchor",
        "large",
        "--model",
        "small",
        "--model",
        "large",
        "--limit",
        "6",
        "--share",
        "0.04",
        "--rate",
        "6000",
        "--out",
        f"{place}/outcomes.jsonl",
        "--quiet",
    ]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **ADMIN})
    await process.wait()


class Page:
    """A tab of the browser, told what to do by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._count = socket, 0

    async def tell(self, method: str, **arguments: Any) -> dict[str, Any]:
        """What a command gives."""
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": arguments})
        while True:
            found = await self._socket.receive_json()
            if found.get("id") == self._count:
                if "error" in found:
                    raise SystemExit(f"{method}: {found['error']}")
                return dict(found["result"])

    async def picture(self, url: str, path: Path, screen: tuple[int, int], most: int = 4000) -> None:
        """A page from its top, at most so many pixels of it."""
        width, scale = screen
        is_phone = width < 600
        await self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=scale, mobile=is_phone
        )
        await self.tell("Network.enable")
        await self.tell("Network.setExtraHTTPHeaders", headers={"Authorization": f"Bearer {ADMIN['TEST_ADMIN_KEY']}"})
        await self.tell("Page.navigate", url=url)
        await asyncio.sleep(1.5)
        script = "[document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
        found = await self.tell("Runtime.evaluate", expression=script, returnByValue=True)
        height, wide = found["result"]["value"]
        if wide > width:
            raise SystemExit(f"{url} is {wide} pixels wide on a screen of {width}")
        # A phone's picture is shown small.
        await self.picture_of(path, width, min(height, most), 0.62 if is_phone else 1)

    async def picture_of(self, path: Path, width: int, height: int, scale: float = 1) -> None:
        """The page that is there, from its top."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
        made = await self.tell("Page.captureScreenshot", clip=clip, captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(made["data"]))
        print(f"{path}: {width} x {height}", file=sys.stderr)


@contextlib.asynccontextmanager
async def browser(place: str) -> AsyncIterator[Page]:
    """A tab, until the end of the block."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("the pictures need chromium")
    process = await asyncio.create_subprocess_exec(
        chromium,
        *FLAGS,
        f"--user-data-dir={place}/profile",
        "about:blank",
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": place},
    )
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = (await process.stderr.readline()).decode("utf-8", "replace")
            if not line:
                raise SystemExit("chromium did not start")
            found = re.search(r"DevTools listening on ws://([^/]+)/", line)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{found[1]}/json/list") as reply:
                [tab, *_] = [one for one in json.loads(await reply.text()) if one["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))

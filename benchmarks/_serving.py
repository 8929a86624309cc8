"""What the benchmark of serving engines is made of: servers and workers that answer, a light client, lengths of real requests.

Requests carry token ids, so that everyone reads the same prompt, and ask for an exact number of tokens (``ignore_eos``). A stream is a
client that sends its next request when the last one has ended. No prompt is used twice, so that no prefix cache helps.
"""

import asyncio
import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Work = list[list[tuple[list[int], int]]]  # of each stream its requests: prompt, number of tokens to make


def lengths(trace: Path, scale: float, longest: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(prompt, output) tokens of a trace's requests, both divided by ``scale`` and cut to at least 8 and at most ``longest``."""
    if not trace.is_file():
        raise SystemExit(f"no trace at {trace}; give the path of azure_llm_2023_conv.csv.gz with --trace")
    with gzip.open(trace, "rt") as file:
        for row in csv.DictReader(file):
            given = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            yield tuple(min(max(round(one / scale), 8), most) for one, most in zip(given, longest, strict=True))  # type: ignore[misc]


class Prompts:
    """Pieces of real text, each given once: the standard library's source, in tokens."""

    def __init__(self, tokenizer: Any, sizes: Iterator[tuple[int, int]]) -> None:
        self.tokenizer, self.sizes = tokenizer, sizes
        self.files = iter(sorted(Path(json.__file__).parents[1].glob("*.py")))
        self.left: list[int] = []

    def work(self, streams: int, each: int) -> Work:
        """The next requests."""
        return [[self._next() for _ in range(each)] for _ in range(streams)]

    def _next(self) -> tuple[list[int], int]:
        prompt, output = next(self.sizes)
        while len(self.left) < prompt:
            self.left += self.tokenizer.encode(next(self.files).read_text())
        taken, self.left = self.left[:prompt], self.left[prompt:]
        return taken, output


@dataclass
class Answer:
    """One request: when it was sent, when each of its tokens came, and what they say (ids where the peer tells them)."""

    sent: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)


@dataclass
class Server:
    """A peer behind HTTP. ``kind`` is its dialect: ``openai`` or ``llama``."""

    name: str
    command: list[str]
    port: int
    health: str
    kind: str = "openai"
    model: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    log: Path | None = None

    async def run(self, work: Work) -> list[Answer]:
        """All requests, each stream's one after the other."""
        answers = await asyncio.gather(*(self._stream(requests) for requests in work))
        return [answer for part in answers for answer in part]

    async def _stream(self, requests: Sequence[tuple[list[int], int]]) -> list[Answer]:
        return [await self._ask(prompt, count) for prompt, count in requests]

    async def _ask(self, prompt: list[int], count: int) -> Answer:
        common = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True}
        if self.kind == "llama":
            path, fields = (
                "/completion",
                {
                    "n_predict": count,
                    "return_tokens": True,
                    "cache_prompt": False,
                    "samplers": ["temperature"],
                },
            )
        else:
            path, fields = "/v1/completions", {"model": self.model, "max_tokens": count}
        body = json.dumps({**common, **fields}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        answer, lines = Answer(time.perf_counter()), []
        writer.write(head.encode() + body)
        status = await reader.readline()
        while (
            line := await reader.readline()
        ):  # parsed when all is over, so that the client takes little of the machine
            if line.startswith(b"data: "):
                lines.append((time.perf_counter(), line[6:]))
                if line.startswith(b"data: [DONE]") or (self.kind == "llama" and b'"stop":true' in line):
                    break
        writer.close()
        if b" 200 " not in status:
            raise ConnectionError(f"{self.name} answered {status.decode().strip()}; see {self.log}")
        self._read(answer, lines, count)
        return answer

    def _read(self, answer: Answer, lines: Sequence[tuple[float, bytes]], count: int) -> None:
        pending = 0
        for when, line in lines:
            if line.startswith(b"[DONE]"):
                continue
            event = json.loads(line)
            if self.kind == "llama":
                piece, made = event["content"], len(event.get("tokens", ()))
                answer.ids += event.get("tokens", ())
            else:
                choices = event.get("choices") or [{"text": ""}]
                piece, made = choices[0].get("text") or "", 1
            answer.text += piece
            if made and (piece or answer.ids):
                answer.times += [when] * made
            pending += 1
        # a token that ends inside a character brings no event of its own in the dialect of OpenAI
        answer.times += [answer.times[-1]] * (count - len(answer.times)) if answer.times else []


class Worker:
    """A peer without a server: a process that is spoken to through pipes.

    Its first line on stdout says that it is ready, and is kept as ``said``; then each line of JSON with work gets a line of answers.
    """

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.name = name
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        self.said = self._line()

    @classmethod
    def transformers(cls, folder: Path, threads: int, most: int, log: Path) -> "Worker":
        """transformers' continuous batching: this file as a process."""
        return cls("transformers", [sys.executable, __file__, str(folder), str(threads), str(most)], log)

    async def run(self, work: Work) -> list[Answer]:
        """As `Server.run`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        line = await asyncio.get_running_loop().run_in_executor(None, self._line)
        return [Answer(**answer) for answer in json.loads(line)]

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            # Not SystemExit, which would end the loop that waits for this.
            raise ConnectionError(f"{self.name} ended; see its log")
        return line

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def summary(answers: Sequence[Answer], work: Work) -> dict[str, float]:
    """Tokens a second, time to the first token, gaps between tokens (ms); raises SystemExit for an answer of another length."""
    wanted = [count for requests in work for _, count in requests]
    if [len(answer.times) for answer in answers] != wanted:
        raise SystemExit(f"{[len(answer.times) for answer in answers]} tokens came, {wanted} were asked for")
    wall = max(answer.times[-1] for answer in answers) - min(answer.sent for answer in answers)
    first = [1e3 * (answer.times[0] - answer.sent) for answer in answers]
    gaps = [1e3 * (b - a) for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
    return {
        "tokens_s": sum(wanted) / wall,
        "ttft_ms": statistics.median(first),
        "ttft_p99_ms": _quantile(first, 99),
        "gap_ms": statistics.median(gaps),
        "gap_p99_ms": _quantile(gaps, 99),
    }


def _quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Mean share of an answer's text up to where the two first differ. Types and roundings differ, so greedy texts part sooner or later."""
    shares = []
    for one, other in zip(ours, theirs, strict=True):
        length = max(len(one.text), len(other.text), 1)
        same = next((n for n, (a, b) in enumerate(zip(one.text, other.text, strict=False)) if a != b), None)
        shares.append(
            1.0 if one.text == other.text else (min(len(one.text), len(other.text)) if same is None else same) / length
        )
    return statistics.fmean(shares)


def serve_transformers(folder: str, threads: int, most: int) -> None:
    """The worker: a line of JSON with work in, a line with answers out."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=4096)
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=16 * most, max_batch_tokens=512, max_requests_per_batch=most, allow_block_sharing=False
    )
    manager = model.init_continuous_batching(generation, continuous_batching_config=config)
    manager.start()
    print("ready", flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        answers = [[Answer(0.0) for _ in requests] for requests in work]

        def send(stream: int, place: int, work: Work = work, answers: list[list[Answer]] = answers) -> None:
            prompt, count = work[stream][place]
            answers[stream][place].sent = time.perf_counter()
            manager.add_request(prompt, f"{stream}/{place}", max_new_tokens=count, streaming=True)

        for stream in range(len(work)):
            send(stream, 0)
        left = sum(map(len, work))
        while left:
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise SystemExit(f"transformers failed: {result and result.error}")
            stream, place = map(int, result.request_id.split("/"))
            answer = answers[stream][place]
            new = len(result.generated_tokens) - len(answer.times)
            answer.times += [time.perf_counter()] * new
            if result.is_finished():
                answer.ids, answer.text = list(result.generated_tokens), tokenizer.decode(result.generated_tokens)
                left -= 1
                if place + 1 < len(work[stream]):
                    send(stream, place + 1)
        print(json.dumps([vars(answer) for part in answers for answer in part]), flush=True)
    manager.stop()


if __name__ == "__main__":
    serve_transformers(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

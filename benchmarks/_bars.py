"""The bars: what ratio was asked of each case before it was measured, as the first lines of each benchmark have them.

They are written into records, row by row, and pages and README say beside each ratio whether it is reached. Bars that are not of a
ratio (bytes that may be left, milliseconds without a peer) stay with their benchmarks; where a row's peer is itself the bar, 1 is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """``ratio`` is asked of the cases that ``case`` matches in full, against the peers that ``peer`` does."""

    ratio: float
    case: str = ".*"
    peer: str = ".*"


# The first that fits counts.
BARS: dict[str, tuple[Bar, ...]] = {
    "adapter_batch": (
        Bar(1.5, "mixed, .*", "peft adapter_names.*"),
        Bar(4, "mixed, .*", "peft by swapping.*"),
        # At most 1.15 times as long.
        Bar(0.87, "served, .*", "the base alone"),
    ),
    "adapter_dispatch": (
        Bar(8, "arrow, 8 experts, .*", "peft Arrow.*"),
        Bar(30, "arrow, 32 experts, .*", "peft Arrow.*"),
        Bar(2, "hybrid, 8 experts, .*", "dense loop"),
        Bar(5, "hybrid, 32 experts, .*", "dense loop"),
    ),
    "adapter_passes": (
        # At most 3% more; and at most 1.9 times as long.
        Bar(0.97, "global, .*", "by tokens alone"),
        Bar(0.526, "generate, .*", "without"),
    ),
    # At most 1.3 times as long.
    "adapter_routing": (Bar(0.77, "forward, .*", "one LoRA"),),
    "adapter_steps": (
        Bar(2, "poly, .*", "peft Poly"),
        Bar(1.0, "select, .* from its vector", "the bar"),
        Bar(1.0, "rewire, .*"),
    ),
    "adapter_training": (
        # At most half; and at most a tenth more.
        Bar(2.0, "lst, .*", "lora"),
        Bar(1 / 1.1, "mezo, .*", "inference"),
    ),
    "coe": (Bar(1.0, peer="the bar"), Bar(1.0, "the same with embedding.*", "semantic-router.*")),
    "consistency": (Bar(20, "SRP.*", "numpy, window by window"), Bar(50, "SCH.*", "Python, size by size")),
    "designs": (Bar(0.87, ".*, training .*"), Bar(0.91, ".*, decoding.*")),
    "duo_llm": (Bar(1.67, ".* 25% big d=(192|[2-9][0-9][0-9]|[0-9]{4,}) .*"),),
    "elaswave": (
        # Half of its time, and 0.3 of it.
        Bar(2.0, "recovery, .*", "torchft"),
        Bar(1 / 0.3, "edit, .*", "gloo groups"),
        Bar(1.0, "a step after .*", "ReCycle|TorchFT"),
    ),
    "elasticmoe": (Bar(5, "one device more.*"),),
    "expertflow": (Bar(1.5, peer="LRU per layer"), Bar(1.0, ".* 25% .*", "transformers")),
    "fastrp": (
        Bar(3, peer="published.*"),
        Bar(1.0, "(?!tuned).* columns, .*", r"fastrp \(pip\)"),
        Bar(100, "tuned, .*", "DeepWalk.*"),
    ),
    "fabric": (Bar(20, "max-min.*", "plain loop"), Bar(20, "max-min.*", "networkx")),
    "fully_ppr": (
        Bar(10, "dblp, (decompose|exact), .* at equal error"),
        Bar(3, "(ppi|blogcatalog), (decompose|exact), .* at equal error"),
    ),
    # Of each of its rows, by `parts`.
    "gateway_game_day": tuple(
        Bar(1.0, peer=f".*{what}.*") for what in ("answered", "attempts", "percentile", "in use again")
    ),
    "gateway_large": (Bar(1.0, peer="bar"),),
    "glider_matching": (Bar(1.0, peer="the bar"),),
    "gateway_memory": (
        Bar(1.0, "growth .*", "the bar"),
        Bar(1.0, "sockets .*", "the bar"),
        Bar(1.0, "tasks .*", "the bar"),
    ),
    "gateway_overhead": (
        Bar(1.0, "seconds .*", "the bar"),
        Bar(1.0, "resident memory, idle", "the bar"),
        Bar(3, "p50 added.*", "litellm"),
        Bar(0.5, "p50 added.*", "relay"),
        Bar(8, "requests a processor second.*, streamed", "litellm"),
        Bar(6, "requests a processor second.*", "litellm"),
        Bar(8, "requests a second.*, streamed", "litellm"),
        Bar(6, "requests a second.*", "litellm"),
    ),
    # At most 1.05 times as long, and, where both recompute, 0.75 of the bytes.
    "gpipe": (Bar(0.95, "step, .*"), Bar(1.5, "speed-up, .*"), Bar(1.33, "saved, .*"), Bar(1.0, "local, .*")),
    "graphrouter": (Bar(1.0, peer="bar"), Bar(100, peer="llmrouter-lib")),
    "graphvite": (Bar(2, peer=r"PecanPy \+ gensim"), Bar(1.6, "two threads.*")),
    "hnsw": (
        Bar(1.0, peer="bar"),
        Bar(1.0, ".*, float32, build", "hnswlib"),
        # Against every peer of a class of what is kept of a vector: the fastest decides.
        Bar(1.0, ".* x .*, (float32|int8.*|int4.*|codes.*), (batch|one at a time)"),
        Bar(1.0, "filter, .*"),
        Bar(1.7, "two threads.*"),
    ),
    "hnsw_disk": (Bar(1.0, "(memory|queries).*", "the bar"), Bar(1.0, "(cold|warm) queries, .*")),
    "hnsw_live": (Bar(0.5, "p(50|99) of a search, .*", "at rest"), Bar(1.0, "searches beside flat out")),
    "ic_cache": (Bar(1.0, peer="bar of .*"),),
    "moe_layer": (
        Bar(1.2, "T=1 .* forward"),
        Bar(3.0, "T=16 .* training"),
        Bar(1.0, ".* E=8 .* training"),
        Bar(1.3, ".* E=64 .* training"),
    ),
    # Within 15%: what is above that says so itself.
    "ns3_referee": (Bar(0.85),),
    "parscale": (Bar(0.5, "decode 1 sequence, P = 4 against P = 1"),),
    "pccl": (
        Bar(2.0, "all-reduce, 2 processes, 64 MiB", "pypccl"),
        Bar(1.3, "all-reduce, .*, (16|64|256) MiB", "pypccl"),
        Bar(0.5, "all-reduce, .*, (16|64|256) MiB", "gloo"),
        Bar(0.6, "ceiling, .*, (16|64|256) MiB"),
        Bar(1.0, "recovery, .*", "pypccl"),
    ),
    "ppr": (
        Bar(1.0, ".*: the first source, .*, L1 error .*"),
        Bar(10, ".*: the hundredth source, .*"),
        # Ours are approximate there, the peers exact: rows say how far ours are off.
        Bar(30, ".*: top 50 from an index, T = 2 .*"),
        Bar(8, ".*: top 50 from an index, T = 4 .*"),
        Bar(1.5, ".* queries in a batch, T = 2", "one by one"),
    ),
    "prefill": (Bar(0.7, ".* bfloat16"),),
    "reuse": (
        Bar(0.99, ".*memory .*"),
        Bar(1.3, ".* hand-tied transformers"),
        Bar(0.95, "(training|decode) .* against reuse 1"),
    ),
    "ring_attention": (Bar(1.54, "link-bound, .*"), Bar(0.91, "crossover, .*"), Bar(3.33, "pass-Q, .*")),
    "rl": (Bar(50, "world"), Bar(1.5, "ppo")),
    "rl_tokens": (Bar(1.0, "grpo, .*", "TRL.*"), Bar(2.0, "replay, an engine in bfloat16", "without replay")),
    "routed_heads": (
        Bar(0.91, "(served, )?all on, .*"),
        Bar(1.18, "(half|head) off, .*"),
        Bar(1.0, "served, a third off, .*"),
    ),
    "routing_decisions": (Bar(1.0, peer="bar of .*"),),
    "scale": (Bar(1.0, peer="bar of .*"),),
    "serving_engine": (
        Bar(1.5, "16 streams, ours bfloat16", "transformers"),
        # Of each vLLM that is compiled: what counts is the faster, and one row that misses is seen.
        Bar(1.5, "16 streams, ours bfloat16", "vllm( zentorch)?"),
        Bar(1.0, "1 stream, ours int4", "llama.cpp Q4_0"),
        Bar(1.0, "1 stream, ours bfloat16", "llama.cpp BF16"),
        Bar(1.0, "first token after 256 prompt tokens, ours bfloat16", "vllm( zentorch)?"),
        Bar(3.0, "seconds until ready, cold, bfloat16", "vllm( zentorch)?"),
        Bar(3.0, "seconds until ready, warm, bfloat16", "vllm( zentorch)?"),
    ),
    "serving_goodput": (
        Bar(3.0, "P99 to the first token at 3 times.*, clients leave at the objective", "vllm( zentorch)?"),
        Bar(3.0, "P99 to the first token at 3 times.*, clients wait as long as it takes", "vllm( zentorch)?"),
        Bar(1.0, "least from the best load.*, share of the best", "the bar"),
    ),
    "serving_latency": (Bar(3.0),),
    "serving_moe_memory": (
        Bar(1.5, ".*, 25% of experts, [0-9]+ streams?", "llama.cpp mmap"),
        Bar(1.5, ".*, 100% of experts, 16 streams", "llama.cpp.*"),
        Bar(1.0, ".*, 100% of experts, 1 stream", "llama.cpp.*"),
    ),
    "served_depth": (
        Bar(1 / 0.77, "decode 1, 18 of 24 blocks", "all blocks"),
        Bar(1 / 0.52, "decode 1, 12 of 24 blocks", "all blocks"),
        Bar(2, "decode 16, .*", "in turns"),
        Bar(0.99, "prompt .*, routed", "the same path, not routed"),
    ),
    "train_lm": (Bar(1.5),),
    "ttspm": (Bar(1.0, peer="bar of .*"),),
    "versatile": (Bar(1.3, peer="all loops"), Bar(1.2, peer="4 loops")),
}


# What was aimed at beyond a bar, before anything was measured. The table of bars has these too.
AIMS: dict[str, tuple[Bar, ...]] = {
    "gateway_overhead": (
        Bar(12, "p50 added.*", "litellm"),
        Bar(40, "requests a processor second.*, streamed", "litellm"),
        Bar(25, "requests a processor second.*", "litellm"),
    ),
}


# Bars of which no record has a row yet: asked since the benchmark last ran. They leave with the record that has them.
AWAITED: dict[str, frozenset[Bar]] = {
    # One step takes minutes.
    "rl": frozenset(bar for bar in BARS["rl"] if bar.case == "ppo"),
    "rl_tokens": frozenset(BARS["rl_tokens"]),
    # Whose rows compared processes made ready with a cold start.
    "elasticmoe": frozenset(BARS["elasticmoe"]),
}


def parts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record, one that keeps several bars (``holds``) as a row for each of them, whose ratio is to that bar.

    Such a record has in ``bars`` what is asked of all of its rows.
    """
    return [part for row in record["rows"] for part in (_of_outage(row, record["bars"]) if "holds" in row else [row])]


def _of_outage(row: Mapping[str, Any], asked: Mapping[str, float]) -> list[dict[str, Any]]:
    """The four bars of a row of `gateway_game_day`."""
    back = row["recovered_s"]
    of = {
        f"at least {asked['answered']:g}% answered": row["ours"] / asked["answered"],
        f"at most {asked['attempts']:g} attempts a request": asked["attempts"] / row["attempts_per_request"],
        f"99th percentile within {asked['p99']:g} s": asked["p99"] / row["p99_s"],
        f"in use again within {asked['periods']:g} periods": None
        if back is None
        else asked["periods"] * row["period_s"] / back,
    }
    missed = {"missed": "never in use again"}
    return [
        {"case": row["case"], "peer_name": words, "ratio": ratio, **({} if ratio is not None else missed)}
        for words, ratio in of.items()
    ]


def asked_of(name: str, row: dict[str, Any], asked: Mapping[str, tuple[Bar, ...]] = BARS) -> Bar | None:
    """The bar of a row of benchmark ``name``, or the aim with `AIMS`; None where nothing was asked, and where a peer that failed leaves
    nothing to compare."""
    if row.get("ratio") is None and why_missed(row) is None:
        return None
    fits = (
        bar
        for bar in asked.get(name, ())
        if re.fullmatch(bar.case, row["case"]) and re.fullmatch(bar.peer, str(row.get("peer_name")))
    )
    return next(fits, None)


def bar_of(name: str, row: dict[str, Any]) -> float | None:
    """The ratio asked of a row, by `asked_of`."""
    bar = asked_of(name, row)
    return None if bar is None else bar.ratio


def why_missed(row: dict[str, Any]) -> str | None:
    """Why a row misses its bar whatever its ratio; None where its ratio decides.

    That is its ``missed``, where the benchmark says so, or that ours failed: in all of it (``failed`` is "ours: ..."), or in some
    rounds (``failed_rounds`` has a number for ours).
    """
    if row.get("missed"):
        return str(row["missed"])
    if str(row.get("failed") or "").startswith("ours:"):
        return "ours failed"
    rounds = (row.get("failed_rounds") or {}).get("ours", 0)
    return f"ours failed in {rounds} round{'s' * (rounds > 1)}" if rounds else None


def is_met(row: dict[str, Any]) -> bool:
    """Whether a row with a bar reaches it."""
    return why_missed(row) is None and row["ratio"] >= row["bar"]


def with_bars(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with what was asked of each as ``bar``, where something was, and as ``missed`` why one is missed whatever its ratio."""
    made = []
    for row in rows:
        bar, missed = bar_of(name, row), why_missed(row)
        made.append(row if bar is None else {**row, "bar": bar, **({"missed": missed} if missed else {})})
    return made

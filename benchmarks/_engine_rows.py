"""What rounds of serving engines come to: medians, ratios round by round, rows of `_harness`. A failed turn is ``{"failed": why}``."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from _bars import is_met

Turn = dict[str, Any]  # of `_serving.summary`, with "agreement", or {"failed": why}
FIRST = 256  # prompt tokens of the requests whose first token is timed


@dataclass
class Measured:
    """What completed rounds gave.

    Attributes:
        streams: {streams: {contestant: a turn per round}}.
        first: {contestant: a turn per round, with ``ttft_ms`` of `FIRST` prompt tokens, one request at a time}.
        rounds: completed.
    """

    streams: dict[int, dict[str, list[Turn]]]
    first: dict[str, list[Turn]]
    rounds: int = 0


@dataclass
class Starts:
    """Seconds until ready, as ``{"ready_s": seconds}`` or ``{"failed": why}``.

    Attributes:
        cold: with caches that are empty, of the contestants that this was tried with.
        warm: with what an earlier start has left there; of contestants that keep nothing, their only start.
        failed: {contestant that did not start: its last error}.
    """

    cold: dict[str, Turn] = field(default_factory=dict)
    warm: dict[str, Turn] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, middle, high


def row(
    case: str, ours: Sequence[Turn], theirs: Sequence[Turn], peer: str, key: str, unit: str, *, is_more_better: bool
) -> dict[str, Any]:
    """One row: medians, and the median of rounds' ratios, of the rounds in which neither failed; how many each failed."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) if key in a and key in b]
    made: dict[str, Any] = {
        "case": case,
        "ours": None,
        "peer": None,
        "ratio": None,
        "spread": None,
        "unit": unit,
        "peer_name": peer,
    }
    failures = {
        side: [turn["failed"] for turn in turns if "failed" in turn]
        for side, turns in (("ours", ours), ("peer", theirs))
    }
    if any(failures.values()):
        made["failed_rounds"] = {side: len(told) for side, told in failures.items()}
    if pairs:
        low, middle, high = quartiles([a / b if is_more_better else b / a for a, b in pairs])
        mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        return {**made, "ours": mine, "peer": other, "ratio": middle, "spread": [low, high] if len(pairs) > 1 else None}
    told = next(
        (f"{'ours' if side == 'ours' else peer}: {all_[0]}" for side, all_ in failures.items() if all_), "no round"
    )
    return {**made, "failed": told}


def table(measured: Measured, starts: Starts) -> list[dict[str, Any]]:
    """Rows of `_harness`: tokens a second, milliseconds to the first token, seconds until ready."""
    rows = []
    for streams, each in measured.streams.items():
        for ours, theirs in _pairs(each):
            case = f"{streams} stream{'s' * (streams > 1)}, {ours}"
            rows.append(row(case, each[ours], each[theirs], theirs, "tokens_s", "tokens/s", is_more_better=True))
    for ours, theirs in _pairs(name for name, turns in measured.first.items() if turns):
        case = f"first token after {FIRST} prompt tokens, {ours}"
        rows.append(
            row(case, measured.first[ours], measured.first[theirs], theirs, "ttft_ms", "ms", is_more_better=False)
        )
    # Without cold starts nobody knows what the caches held: what is called warm then is whatever start there was.
    for state, ready in (("cold", starts.cold), ("warm", starts.warm if starts.cold else {})):
        for ours, theirs in _pairs(ready):
            if ours == "ours bfloat16":
                case = f"seconds until ready, {state}, bfloat16"
                rows.append(row(case, [ready[ours]], [ready[theirs]], theirs, "ready_s", "s", is_more_better=False))
    return rows


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    names = list(names)
    return [(a, b) for a in names if a.startswith("ours") for b in names if not b.startswith("ours")]


def medians(turns: Sequence[Turn]) -> dict[str, float]:
    """Of each number, over the rounds that did not fail; empty where all did."""
    good = [turn for turn in turns if "failed" not in turn]
    return {
        key: statistics.median(turn[key] for turn in good if turn[key] is not None)
        for key in (good[0] if good else ())
        if any(turn[key] is not None for turn in good)
    }


def streams_told(measured: Measured) -> dict[str, Any]:
    """For the record: each number of streams, each contestant, its medians and its rounds."""
    return {
        str(streams): {name: {"median": medians(turns), "rounds": turns} for name, turns in each.items()}
        for streams, each in measured.streams.items()
    }


def show(measured: Measured, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables, the ratios, and what became of the bars."""
    keys = ("tokens_s", "ttft_ms", "ttft_p99_ms", "gap_ms", "gap_p99_ms", "agreement")
    for streams, each in measured.streams.items():
        heads = ("tokens/s", "first ms", "p99", "gap ms", "p99", "same text")
        print(f"\n{f'{streams} streams':<18}" + "".join(f"{head:>11}" for head in heads))
        for name, turns in each.items():
            middle = medians(turns)
            print(f"{name:<18}" + "".join(f"{middle[key]:>11.2f}" if key in middle else f"{'-':>11}" for key in keys))
    print()
    for one in rows:
        ratio = "failed" if one["ratio"] is None else f"{one['ratio']:.2f}"
        told = f"; bar {one['bar']:g}: {'met' if is_met(dict(one)) else 'MISSED'}" if "bar" in one else ""
        why = one.get("missed") or one.get("failed")
        print(f"{one['case']} / {one['peer_name']}: {ratio}{told}{f' ({why})' if why else ''}")

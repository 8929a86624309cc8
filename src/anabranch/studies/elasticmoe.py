"""ElasticMoE (Singh et al. 2025, arXiv 2510.02613): how long a change of devices takes, what stops meanwhile, and what it costs in memory.

The paper, on 2 to 16 Ascend 910C and models of 16 to 671 billion parameters: latency of scaling up about 0.11x the best baseline's, no
downtime, 2-3% more peak memory than a cold restart and 35-40% less than the extravagant way; taking its parts away one after the other
makes scaling slower each time; throughput while scaling 0.66x of before, with a cold restart 0.34x; service levels held at higher rates.

Here: devices are processes with caches of their own on one host, one thread each; a mixture-of-experts model with random weights, from
safetensors on disk. In ``throughput`` and ``slo`` devices are *paced*: a step takes at least a fixed time, while the computation is
real, so that more devices are more throughput though the machine has few cores. All contestants run our own server.

Arms: E1 ``latency-WAY`` (1->2, 2->3, 2->4, 4->2 devices under light load; ours shares weights between the devices of the host,
``latency-own`` is ours with weights of its own for each device, copied between them, as the paper has it); E2 ``parts-N`` (N = 0 whole,
then without the shared arena, also without peer copies, also without processes made ready, also without attaching: a cold restart;
weights are each device's own); E3 ``throughput-WAY``; E4 ``slo-WAY`` replays arrival times and lengths of the public Azure trace
(``traces/`` in the folder that ANABRANCH_DATA names; a made one without).

Rules, fixed before the runs, each over the 95% interval of paired differences:
latency: ours < 0.2x cold; downtime: none of ours, some of cold; memory: peak of ours < 1.10x cold and < 0.75x extravagant; parts: each
step slower than the one before; throughput during: ours > 0.8x before and > cold; after > before; slo: attainment per device-second of
ours above cold and above the best static number of devices.
"""

import csv
import gzip
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.places import data_folder
from anabranch.serving.core.request import Output, Request, Sampling
from anabranch.studies.elasticmoe_ways import WAYS, PeakMemory, Server, load_closed
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, every_seed, paired_difference, verdict_below
from anabranch.studies.reading import TRACE, of_files

CHANGES = ((1, 2), (2, 3), (2, 4), (4, 2))
STATIC = ("static-1", "static-2", "static-3")
PARTS = (
    "whole",
    "- shared arena: weights are copied into each instance",
    "- peer copies: what is new is read from disk",
    "- processes made ready: interpreters start on command",
    "- attaching: a cold restart",
)


@configclass
class Case(Config):
    """One arm.

    Attributes:
        kind: ``latency``, ``parts``, ``throughput`` or ``slo``.
        way: of `WAYS`; for ``slo`` also ``static-N``.
        weights: of `ElasticConfig`.
        without: for ``parts``, how many are taken away.
        layers, experts, dim, hidden: of the model.
        num_blocks: of the cache of each device.
        repeats: changes of each kind.
        pace_s: least time of a step of a paced device.
        clients: requests under way at once, for ``throughput``.
        window_s: seconds before, during (from the command on) and after.
        trace_s, squeeze, shrink: for ``slo``: seconds to replay, how many times faster than recorded, how many times shorter prompts are.
        thin: for ``slo``: of so many recorded requests one is sent, so that hours pass quickly without more load.
        most: devices of ``slo`` at most.
    """

    kind: str
    way: str = "ours"
    weights: str = "shared"
    without: int = 0
    layers: int = Field(default=8, ge=1)
    experts: int = Field(default=16, ge=2)
    dim: int = 512
    hidden: int = 512
    num_blocks: int = 128
    repeats: int = Field(default=1, ge=1)
    pace_s: float = 0.03
    clients: int = 24
    window_s: float = 8.0
    trace_s: float = 60.0
    squeeze: float = 4.0
    shrink: float = 16.0
    thin: int = Field(default=1, ge=1)
    most: int = 3


# A device of the full size then answers some 3 requests a second, so slow that two cores can be three of them; the trace brings 4 to 8.
SLO = {"pace_s": 0.2, "squeeze": 20.0, "thin": 20}


def tiny() -> dict[str, Any]:
    """What makes an arm run in seconds: 8 MB of experts."""
    model = {"layers": 2, "experts": 12, "dim": 128, "hidden": 192, "num_blocks": 64}
    return {**model, "window_s": 1.5, "clients": 12, "trace_s": 10.0}


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Case`. Full: 400 MB of experts."""
    size = (({} if full else tiny()) | changes) or {}
    made = arms(size, SLO if full else {})
    return Study(
        name="elasticmoe",
        title="ElasticMoE: changing the devices of a running server",
        settings={"size": "full" if full else "smoke", **to_dict(Case(kind="latency", **size))},
        arms=made,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        revision=2,
        inputs=read_by,
    )


def arms(size: dict[str, Any], slo: dict[str, Any]) -> list[Arm]:
    """All contestants, from one size; ``slo`` is of the arms that replay a trace."""
    made = [Arm(f"latency-{way}", f"four changes, {way}", Case(kind="latency", way=way, **size)) for way in WAYS]
    own = Case(kind="latency", weights="own", **size)
    made.insert(1, Arm("latency-own", "four changes, ours, each device with weights of its own", own))
    for number, about in enumerate(PARTS):
        way = "cold" if number == len(PARTS) - 1 else "ours"
        made.append(Arm(f"parts-{number}", about, Case(kind="parts", way=way, weights="own", without=number, **size)))
    paced = [("throughput", way) for way in ("ours", "cold", "extravagant")] + [
        ("slo", way) for way in ("ours", "cold", *STATIC)
    ]
    abouts = {"throughput": "1 -> 2 paced devices", "slo": "a trace on paced devices"}
    return [
        *made,
        *(
            Arm(
                f"{kind}-{way}",
                f"{abouts[kind]}, {way}",
                Case(kind=kind, way=way, **size | (slo if kind == "slo" else {})),
            )
            for kind, way in paced
        ),
    ]


def run(case: Case, seed: int, progress: Progress) -> Metrics:
    """One arm."""
    kinds: dict[str, Callable[[Case, int, Path, Progress], Metrics]] = {
        "latency": _latency,
        "parts": _parts,
        "throughput": _throughput,
        "slo": _slo,
    }
    with tempfile.TemporaryDirectory() as name:
        progress("writing the model")
        folder = written(case, seed, Path(name) / "model")
        return kinds[case.kind](case, seed, folder, progress)


def written(case: Case, seed: int, folder: Path) -> Path:
    """A model folder with random weights."""
    from anabranch.lm import Decoder, save_model
    from anabranch.nn.attention import SelfAttention
    from anabranch.nn.moe import MoE

    config = Decoder.Config(
        vocab_size=512,
        dim=case.dim,
        num_layers=case.layers,
        attention=SelfAttention.Config(num_heads=8, num_kv_heads=4),
        feed_forward=MoE.Config(num_experts=case.experts, hidden_dim=case.hidden),
        max_positions=1024,
    )
    save_model(folder, config.build(seed=seed))
    return folder


def _settings(case: Case, folder: Path, **changes: Any) -> Any:
    from anabranch.serving.elasticmoe.config import ElasticConfig
    from anabranch.serving.elasticmoe.policy import Policy

    values = {
        "model": str(folder),
        "num_blocks": case.num_blocks,
        "policy": Policy(max_devices=8),
        "max_seqs": 8,
        "weights": case.weights,
    }
    return ElasticConfig(**{**values, **changes})


def _request(number: int, prompt_tokens: int = 24, new_tokens: int = 24) -> Request:
    draw = random.Random(number)
    prompt = tuple(draw.randrange(512) for _ in range(prompt_tokens))
    return Request(id=f"r{number}", prompt=prompt, sampling=Sampling(max_tokens=new_tokens, temperature=0.0))


def _nothing(output: Output) -> None:
    """Load whose answers nobody reads."""


def _latency(case: Case, seed: int, folder: Path, progress: Progress) -> Metrics:
    """E1: seconds, downtime and peak memory of each change."""
    found: Metrics = {}
    for old, new in CHANGES:
        progress(f"{old} -> {new} devices")
        # What a horizontal way has whole numbers of.
        replica = min(old, 2)
        server = Server(_settings(case, folder, devices=replica if case.way == "horizontal" else old), case.way)
        try:
            server.start()
            if case.way == "horizontal" and old > replica:
                server.change(old)
            server.settle()
            stop = load_closed(server, 2, _request, _nothing)
            with PeakMemory(server) as peak:
                seconds = server.change(new)
            stop()
        finally:
            server.close()
        change = f"{old}_{new}"
        found |= {
            f"seconds_{change}": seconds,
            f"downtime_{change}": server.downtime_s,
            f"peak_mb_{change}": peak.bytes / 1e6,
            f"peak_arenas_mb_{change}": peak.arenas / 1e6,
            f"errors_{change}": server.errors,
        }
    for name in ("seconds", "downtime", "peak_mb", "peak_arenas_mb", "errors"):
        found[name] = sum(found[f"{name}_{old}_{new}"] for old, new in CHANGES) / len(CHANGES)
    return found


def _parts(case: Case, seed: int, folder: Path, progress: Progress) -> Metrics:
    """E2: seconds of 2 -> 3 and 3 -> 2 with fewer and fewer parts."""
    ways: dict[str, Any] = {}
    if case.without >= 1:
        ways |= {"mapped": False}
    if case.without >= 2:
        ways |= {"p2p": False}
    if case.without >= 3:
        ways |= {"standby": 0, "forks": False}
    server = Server(_settings(case, folder, devices=2, **ways), case.way)
    try:
        server.start()
        server.settle()
        stop = load_closed(server, 2, _request, _nothing)
        progress("2 -> 3")
        up = server.change(3)
        server.settle()
        progress("3 -> 2")
        down = server.change(2)
        stop()
    finally:
        server.close()
    return {"up_seconds": up, "down_seconds": down, "seconds": (up + down) / 2, "downtime": server.downtime_s}


def _throughput(case: Case, seed: int, folder: Path, progress: Progress) -> Metrics:
    """E3: tokens per second before, during and after 1 -> 2 paced devices under full load."""
    times: list[float] = []

    def take(output: Output) -> None:
        times.extend([time.monotonic()] * len(output.tokens))

    server = Server(_settings(case, folder, pace_s=case.pace_s), case.way)
    try:
        server.start()
        server.settle()
        stop = load_closed(server, case.clients, lambda number: _request(number + 1000 * seed), take)
        # The first prompts.
        time.sleep(case.window_s / 2)
        begin = time.monotonic()
        time.sleep(case.window_s)
        command = time.monotonic()
        seconds = server.change(2)
        ready = time.monotonic()
        time.sleep(max(0.0, command + case.window_s - ready))
        settled = time.monotonic() + case.window_s / 2
        time.sleep(1.5 * case.window_s)
        end = time.monotonic()
        stop()
    finally:
        server.close()

    def rate(first: float, last: float) -> float:
        return sum(first <= at < last for at in list(times)) / (last - first)

    gaps = [later - sooner for sooner, later in itertools.pairwise(times) if command <= later <= ready + 1]
    before = rate(begin, command)
    return {
        "before": before,
        "during": rate(command, max(ready, command + case.window_s)),
        "after": rate(settled, end),
        "during_ratio": rate(command, max(ready, command + case.window_s)) / before,
        "seconds": seconds,
        "silence_s": max(gaps, default=0.0),
        "errors": server.errors,
    }


def _slo(case: Case, seed: int, folder: Path, progress: Progress) -> Metrics:
    """E4: share of requests that met their targets, and device-seconds, while a trace is replayed."""
    from anabranch.serving.elasticmoe.policy import Autoscaler, Load, Policy

    arrivals = trace(case, seed)
    static = int(case.way.removeprefix("static-")) if case.way.startswith("static-") else None
    policy = Policy(
        by="slo",
        max_devices=case.most,
        ttft_s=1.0,
        tpot_s=4 * case.pace_s,
        window_s=4.0,
        cool_down_s=3.0,
        patience_s=4.0,
    )
    server = Server(_settings(case, folder, devices=static or 1, pace_s=case.pace_s), "ours" if static else case.way)
    left, device_seconds, changes = threading.Semaphore(0), 0.0, 0

    def take(output: Output) -> None:
        if output.finish is not None:
            left.release()

    try:
        server.start()
        server.settle()
        scaler, seen = Autoscaler(policy), 0
        sender = threading.Thread(target=_replay, args=(server, arrivals, take), daemon=True)
        sender.start()
        begin = last = time.monotonic()
        while sender.is_alive() or any(group.ledger.live for group in server.groups):
            time.sleep(0.2)
            now = time.monotonic()
            device_seconds, last = device_seconds + server.devices * (now - last), now
            for at, ttft_s, tpot_s in server.served[seen:]:
                scaler.served(at, ttft_s, tpot_s)
                seen += 1
            waiting = sum(group.ledger.num_waiting for group in server.groups)
            live = sum(len(group.ledger.live) for group in server.groups)
            wanted = scaler.decide(now, Load(server.devices, live - waiting, waiting, 8))
            if static is None and wanted != server.devices:
                progress(f"{server.devices} -> {wanted} devices")
                before = server.devices
                server.change(wanted)
                scaler.changed(time.monotonic())
                changes += 1
                now = time.monotonic()
                device_seconds, last = device_seconds + max(before, wanted) * (now - last), now
        for _ in arrivals:
            left.acquire(timeout=60)
    finally:
        server.close()
    met = sum(ttft_s <= policy.ttft_s and tpot_s <= policy.tpot_s for _, ttft_s, tpot_s in server.served)
    attainment = met / len(arrivals)
    return {
        "attainment": attainment,
        "device_seconds": device_seconds,
        "attainment_per_device_minute": 60 * attainment / device_seconds,
        "devices_mean": device_seconds / (last - begin),
        "changes": changes,
        "requests": len(arrivals),
        "errors": server.errors,
    }


def _replay(server: Server, arrivals: list[tuple[float, int, int]], take: Callable[[Output], None]) -> None:
    begin = time.monotonic()
    for number, (at, prompt, new) in enumerate(arrivals):
        time.sleep(max(0.0, begin + at - time.monotonic()))
        server.submit(_request(number, prompt, new), take)


def read_by(case: Case) -> str | None:
    """Digest of the trace that is replayed, which may be one made up."""
    if case.kind != "slo":
        return None
    path = _trace_file()
    return "made up" if path is None else of_files([path])


def _trace_file() -> Path | None:
    """Of the recorded trace; None where it is not here."""
    folder = data_folder()
    path = folder / TRACE if folder else None
    return path if path is not None and path.is_file() else None


def trace(case: Case, seed: int) -> list[tuple[float, int, int]]:
    """(seconds, prompt tokens, new tokens): a piece of the Azure trace of conversations, squeezed and shrunk; made up where it is not."""
    path = _trace_file()
    if path is not None:
        return _recorded(case, seed, path)
    made: list[tuple[float, int, int]] = []
    draw, at = random.Random(seed), 0.0
    while True:
        busy = 1 + 7 * (case.trace_s / 3 < at < 2 * case.trace_s / 3)
        at += draw.expovariate(busy)
        if at >= case.trace_s:
            return made
        made.append((at, draw.randint(4, 60), draw.randint(4, 24)))


def _recorded(case: Case, seed: int, path: Path) -> list[tuple[float, int, int]]:
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    seconds = [_clock(row["TIMESTAMP"]) for row in rows]
    start = seconds[0] + (0.1 + 0.15 * seed) * (seconds[-1] - seconds[0])
    piece = []
    for at, row in itertools.islice(zip(seconds, rows, strict=True), None, None, case.thin):
        if 0 <= at - start < case.trace_s * case.squeeze:
            prompt, new = (max(1, round(int(row[name]) / case.shrink)) for name in ("ContextTokens", "GeneratedTokens"))
            piece.append(((at - start) / case.squeeze, prompt, new))
    return [(at, min(prompt, 480), min(new, 480)) for at, prompt, new in piece]


def _clock(text: str) -> float:
    day, clock = text.split(" ")
    hours, minutes, seconds = clock.split(":")
    return 86400 * int(day.rsplit("-", 1)[1]) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)


COLUMNS = (
    Column("seconds", "latency s", ".3f"),
    Column("downtime", "down s", ".2f"),
    Column("peak_mb", "peak MB", ".0f"),
    Column("peak_arenas_mb", "of it arenas", ".0f"),
    Column("before", "tokens/s before", ".1f"),
    Column("during", "during", ".1f"),
    Column("after", "after", ".1f"),
    Column("attainment", "SLO met", ".3f"),
    Column("device_seconds", "device-s", ".0f"),
    Column("errors", "errors", ".0f"),
)


def judge(results: Results) -> list[Claim]:
    """The rules of the docstring."""
    ours, cold, dear = "latency-ours", "latency-cold", "latency-extravagant"
    claims = [
        _bound(results, "seconds", ours, cold, 0.2, "a change takes less than 0.2x a cold restart", "0.11x the best"),
        _none(results, "downtime", ours, cold, "nothing stops; a cold restart does", "0 against 67.4 s"),
        _bound(results, "peak_mb", ours, cold, 1.10, "peak memory is below 1.10x a cold restart's", "1.02-1.03x"),
        _bound(results, "peak_mb", ours, dear, 0.75, "peak memory is below 0.75x the extravagant way's", "0.60-0.65x"),
    ]
    own = "latency-own"
    claims += [
        _bound(
            results, "seconds", own, cold, 0.2, "so with weights of its own for each device: latency", "0.11x the best"
        ),
        _bound(
            results, "peak_mb", own, cold, 1.10, "so with weights of its own for each device: peak memory", "1.02-1.03x"
        ),
    ]
    for number, about in enumerate(PARTS[1:]):
        steps = (f"parts-{number}", f"parts-{number + 1}")
        paper = "2.43, 3.14, 10.42, 62.78, 67.40 s"
        claims.append(_bound(results, "seconds", *steps, 1.0, f"without it a change is slower: {about}", paper))
    busy = ("throughput-ours", "throughput-cold")
    claims += [
        _within(results, "during", "before", 0.8, "throughput during a change is above 0.8x before", "0.66x"),
        _above(results, "during", *busy, "throughput during a change is above a cold restart's", "0.66x, 0.34x"),
        _within(results, "after", "before", 1.0, "two devices do more than one", "7.82 against 6.00 requests/s"),
    ]
    for other in ("cold", *STATIC):
        claim = f"attainment per device-second is above that of {other}"
        paper = "SLO held to 8.7 requests/s"
        claims.append(_above(results, "attainment_per_device_minute", "slo-ours", f"slo-{other}", claim, paper))
    return claims


def _bound(results: Results, metric: str, ours: str, baseline: str, factor: float, claim: str, paper: str) -> Claim:
    """Whether ``ours`` is below ``factor`` times ``baseline``."""
    mine, theirs = results.values(ours, metric), results.values(baseline, metric)
    return _claim(mine, theirs, paired_difference(mine, _scaled(theirs, factor)), claim, paper, factor)


def _above(results: Results, metric: str, ours: str, baseline: str, claim: str, paper: str) -> Claim:
    """Whether ``ours`` is above ``baseline``."""
    mine, theirs = results.values(ours, metric), results.values(baseline, metric)
    return _claim(mine, theirs, paired_difference(theirs, mine), claim, paper)


def _within(results: Results, metric: str, other: str, factor: float, claim: str, paper: str) -> Claim:
    """Whether one number of throughput-ours is above ``factor`` times another."""
    mine, theirs = (results.values("throughput-ours", name) for name in (metric, other))
    return _claim(mine, theirs, paired_difference(_scaled(theirs, factor), mine), claim, paper, factor)


def _scaled(values: dict[int, float], factor: float) -> dict[int, float]:
    return {seed: factor * value for seed, value in values.items()}


def _claim(
    mine: dict[int, float], theirs: dict[int, float], below: Estimate, claim: str, paper: str, factor: float = 1.0
) -> Claim:
    """``below``: of what the verdict is about; ``factor``: times the baseline, which itself stands in the claim, is the limit."""
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        return Claim.not_run(claim, paper)
    ours, baseline = (sum(each[seed] for seed in common) / len(common) for each in (mine, theirs))
    shown = paired_difference(mine, theirs)
    limit = None if factor == 1 else factor * baseline
    return Claim(claim, paper, baseline, ours, shown.mean, shown.interval, verdict_below(below), limit=limit)


def _none(results: Results, metric: str, ours: str, baseline: str, claim: str, paper: str) -> Claim:
    mine, theirs = results.values(ours, metric), results.values(baseline, metric)
    common = sorted(mine.keys() & theirs.keys())
    made = _claim(mine, theirs, paired_difference(mine, theirs), claim, paper)
    if not common:
        return made
    verdict = every_seed([mine[seed] == 0 < theirs[seed] for seed in common])
    return Claim(made.claim, made.paper, made.baseline, made.ours, made.difference, made.interval, verdict)


def draw(results: Results, path: Path) -> None:
    """Latency and peak memory of each way, and the parts."""
    from anabranch.report.style import INK, SERIES, figure, horizontal_grid, to_png, to_svg
    from anabranch.studies.picture import _write

    ways = ["latency-ours", "latency-own", *(f"latency-{way}" for way in WAYS[1:])]
    wanted = (
        ("seconds to change", "seconds", ways),
        ("peak memory, MB", "peak_mb", ways),
        ("seconds, parts taken away", "seconds", [f"parts-{n}" for n in range(len(PARTS))]),
    )
    shown = [
        (label, metric, there)
        for label, metric, arms_ in wanted
        if (there := [arm for arm in arms_ if results.values(arm, metric)])
    ]
    if not shown:
        return
    with figure(0.6 + 3.5 * len(shown), 3.6, ncols=len(shown), squeeze=False) as (made, panels):
        made.suptitle("ElasticMoE: changing devices", x=0.01, ha="left", fontweight="bold", color=INK)
        for axes, (label, metric, there) in zip(panels.flat, shown, strict=True):
            bars = axes.bar(range(len(there)), [results.mean(arm, metric).mean for arm in there], color=SERIES[0])
            axes.bar_label(bars, fmt="%.2f" if metric == "seconds" else "%.0f", color=INK, padding=2)
            axes.set_xticks(range(len(there)), [arm.split("-", 1)[1] for arm in there], rotation=30, ha="right")
            axes.set_title(label)
            axes.margins(y=0.12)
            horizontal_grid(axes)
        png, svg = to_png(made), to_svg(made)
    _write(path, png, svg)

"""Do rankings from gossiped click logs converge, withstand polluters, and serve users of different tastes?

"G-Rank: Unsupervised Continuous Learn-to-Rank for Edge Devices in a P2P Network", Gold and Pouwelse, 2023, arXiv 2301.12530: 100
nodes, 10,000 ticks, 256 items with 39 tags; attackers join at 2,500 and attack at 5,000. The paper gives figures and no tables.

Two distances to the global ranking by honest clicks (`anabranch.graph.rank.evaluation`): of plain clicks in the local log, which
the paper's figures show and which measures how complete a log is; and of R, by which G-Rank ranks. With F = 0 the second stays
higher by design: lists are personal.

Arms, each the paper's peer (no caps) unless it says otherwise:

    base-F1, base-F0                 1. no attackers
    sybil-F1, sybil-F0               2, 4. 10 sybils, 100 clicks each on the last results of one term
    inflation-F1, epic-F1            2. 10 sybils, 1,000 random clicks each; 300 sybils beside 100 honest nodes
    push-F1                          3. sybils, rows are pushed
    forged-F1, defended-F1           5. sybils who write in the names of honest nodes, without and with cap and signatures
    cap-F1, cap1-F1, log-F1,         5. one defence each against sybils in their own names: min(C, 3), min(C, 1), log(1 + C),
    common-F0, quota-F1                 similarity lowered below 10 common clicks, 20 rows of an origin in a message
    tastes-F0, tastes-F1             6. no attackers, two groups of users with opposite tastes
    offline-F1                       7. a tenth of the nodes lose their connection half way and go on searching
    churn-F1                         a node leaves every 20 ticks and comes back after 500
    loopback                         20 processes over TCP

"Rise" is the ranked distance of the attacked term, mean over evaluations after the attack, less its value at the attack.

The rule, fixed before any recorded run. "In every seed" claims hold if they are so in every one of at least two seeds, do not hold
if in none, and are not resolved otherwise: 1 plain distance falls by 90%, ranked (F = 1) by 80%, coverage ends at 100%; 2 both
distances stay below 60% of the start at every evaluation after the attack, coverage ends at 100%; 5 the rise is halved; 7 the
ranked distance of the offline nodes to the ranking at the time they left changes by less than 5% of its start. Paired over seeds
with 95% t-intervals: 3 push needs fewer messages to 90% coverage, its plain distance after a quarter of the ticks is smaller, and
its mean rise in the first tenth of the run after the attack is larger; 4 the rise is smaller with F = 0; 6 NDCG@5 is higher by 0.1.

Trial runs at this size came before: they showed that push covers later though it completes logs sooner, so both are judged, and
that a cap of 3 does little against sybils in their own names, so that forged rows and a cap of 1 got arms of their own.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_file, atomic_write_text
from anabranch.graph.rank import Attack, Defences, Network, run_swarm
from anabranch.report.style import GRID, INK, MUTED, SERIES, figure, horizontal_grid, to_png, to_svg
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, estimate, every_seed, verdict_below

PAPER = "figure, no number"
FALL, RANKED_FALL, KEPT, HALVED, CHANGED, BETTER = 0.9, 0.8, 0.6, 0.5, 0.05, 0.1
COVERED = 0.9

# Ticks between evaluations, at least.
EVERY = 40

COLUMNS = (
    Column("distance_end", "distance,\nplain", ".1f"),
    Column("ranked_end", "distance,\nranked", ".1f"),
    Column("coverage_end", "knows top\nitem", ".0%"),
    Column("messages_to_cover", "messages\nto 90%", ",.0f"),
    Column("rise", "rise", ".1f"),
    Column("worst", "worst after\n/ start", ".2f"),
    Column("ndcg", "NDCG@5", ".3f"),
    Column("bytes_per_row", "bytes\na row", ".0f"),
    Column("largest_kilobytes", "largest\nmessage, kB", ",.0f"),
    Column("log_kilobytes", "log, kB", ",.0f"),
)


@configclass
class World(Config):
    """One simulated network."""

    F: float
    num_nodes: int
    ticks: int
    gossip: str = "pull"
    attack: str | None = None
    attackers: int = 0
    queries: int = 0
    forge: bool = False
    saturation: str | None = None
    click_cap: int = 3
    min_common: int = 0
    reply_rows_per_origin: int = 10_000
    signed: bool = False
    groups: int = 1
    offline: float = 0.0
    churn: float = 0.0


@configclass
class Swarm(Config):
    """Processes over loopback."""

    num_peers: int
    clicks: int


@configclass
class Size(Config):
    """What is the same for all arms. Attackers join after a quarter of the ticks and attack after a half."""

    num_nodes: int = Field(default=100, ge=10)
    ticks: int = Field(default=10_000, ge=40)
    processes: int = Field(default=20, ge=2)


SMOKE = Size(num_nodes=40, ticks=1_600, processes=4)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    size = (Size() if full else SMOKE).replace(**changes)
    return Study(
        name="g_rank",
        title="rankings from gossiped click logs: convergence, polluters, tastes",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=list(arms(size).values()),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms."""

    def world(name: str, about: str, F: float, **fields: Any) -> Arm:
        return Arm(name, about, World(F=F, num_nodes=size.num_nodes, ticks=size.ticks, **fields))

    few = max(1, size.num_nodes // 10)
    sybil = {"attack": "sybil", "attackers": few, "queries": 100}
    made = [
        world("base-F1", "1: no attackers, F = 1", 1.0),
        world("base-F0", "1: no attackers, F = 0", 0.0),
        world("sybil-F1", "2, 4: sybils, F = 1", 1.0, **sybil),
        world("sybil-F0", "2, 4: sybils, F = 0", 0.0, **sybil),
        world("inflation-F1", "2: random clicks in great number", 1.0, attack="inflation", attackers=few, queries=1000),
        world("epic-F1", "2: three sybils for each honest node", 1.0, **{**sybil, "attackers": 3 * size.num_nodes}),
        world("push-F1", "3: sybils, rows are pushed", 1.0, gossip="push", **sybil),
        world("forged-F1", "5: sybils in the names of others", 1.0, forge=True, **sybil),
        world(
            "defended-F1", "5: the same, cap 3 and signatures", 1.0, forge=True, signed=True, saturation="cap", **sybil
        ),
        world("cap-F1", "5: sybils, min(C, 3)", 1.0, saturation="cap", **sybil),
        world("cap1-F1", "5: sybils, min(C, 1)", 1.0, saturation="cap", click_cap=1, **sybil),
        world("log-F1", "5: sybils, log(1 + C)", 1.0, saturation="log", **sybil),
        world("common-F0", "5: sybils, F = 0, at least 10 common clicks", 0.0, min_common=10, **sybil),
        world("quota-F1", "5: sybils, 20 rows of an origin in a message", 1.0, reply_rows_per_origin=20, **sybil),
        world("tastes-F0", "6: two groups of users, F = 0", 0.0, groups=2),
        world("tastes-F1", "6: two groups of users, F = 1", 1.0, groups=2),
        world("offline-F1", "7: a tenth loses its connection half way", 1.0, offline=0.1),
        world("churn-F1", "nodes leave and come back", 1.0, churn=0.05),
        Arm("loopback", f"{size.processes} processes over TCP", Swarm(num_peers=size.processes, clicks=10)),
    ]
    return {arm.name: arm for arm in made}


def run(config: World | Swarm, seed: int, progress: Progress) -> Metrics:
    """One arm."""
    if isinstance(config, Swarm):
        found = run_swarm(config.num_peers, config.clicks, seed=seed)
        return {**found, "agreed": float(found["agreed"]), "log_kilobytes": found["largest_log_bytes"] / 1e3}
    return run_world(config, seed, progress)


def build(config: World, seed: int) -> Network:
    """The network of an arm."""
    defences = Defences(
        saturation=config.saturation,  # type: ignore[arg-type]
        click_cap=config.click_cap,
        min_common=config.min_common,
        pull_only=config.gossip == "pull",
        rows_per_origin=None,
        reply_rows=10**9,
        reply_rows_per_origin=config.reply_rows_per_origin,
        signed=config.signed,
    )
    attack = None
    if config.attack is not None:
        attack = Attack(
            kind=config.attack,  # type: ignore[arg-type]
            attackers=config.attackers,
            queries=config.queries,
            join_at=config.ticks // 4,
            attack_at=config.ticks // 2,
            forge=config.forge,
        )
    return Network(
        num_nodes=config.num_nodes,
        F=config.F,
        gossip=config.gossip,  # type: ignore[arg-type]
        defences=defences,
        attack=attack,
        groups=config.groups,
        churn=config.churn,
        seed=seed,
    )


def run_world(config: World, seed: int, progress: Progress) -> Metrics:
    """One network: distances and coverage at the start and the end, what an attack did, sizes, and ``curve`` by evaluation."""
    network, half, every = build(config, seed), config.ticks // 2, max(config.ticks // 100, EVERY)
    network.run(half, every)
    progress(f"half of {config.ticks:,} ticks")
    gone = range(int(config.offline * config.num_nodes))
    reference, before = network.global_clicks(), None
    if gone:
        before = network.evaluate(gone, reference)
        network.disconnect(gone)
    history = network.run(config.ticks - half, every)
    first, last = history[0], history[-1]
    after = [found for found in history if found["tick"] > half]
    quarter = next(found for found in history if found["tick"] >= config.ticks // 4)
    covered = next((found["messages"] for found in history if found["coverage"] >= COVERED), None)
    found: Metrics = {
        "distance_start": first["distance"],
        "distance_end": last["distance"],
        "fall": 1 - last["distance"] / first["distance"],
        "ranked_end": last["ranked_distance"],
        "ranked_fall": 1 - last["ranked_distance"] / first["ranked_distance"],
        "coverage_end": last["coverage"],
        "messages_to_cover": covered,
        "distance_quarter": quarter["distance"],
        "worst_plain": max(entry["distance"] for entry in after) / first["distance"],
        "worst": max(entry["ranked_distance"] for entry in after) / first["ranked_distance"],
        "bytes_per_row": network.bytes_sent / max(network.rows_sent, 1),
        "largest_kilobytes": network.largest_bytes / 1e3,
        "log_kilobytes": last["log_bytes"] / 1e3,
        "curve": [[entry["tick"], entry["distance"], entry["ranked_distance"]] for entry in history],
    }
    if config.attack == "sybil":
        found |= rises(history, half, max(config.ticks // 10, every))
    if config.groups > 1:
        found |= {name: last[name] for name in ("ndcg", "ndcg_global", "ndcg_local")}
    if before is not None:
        now = network.evaluate(gone, reference)
        found["offline_change"] = (now["ranked_distance"] - before["ranked_distance"]) / first["ranked_distance"]
    return found


def rises(history: list[dict[str, Any]], attack_at: int, early: int) -> Metrics:
    """How the ranked distance of the attacked term grew after the attack: on average, at most, and in the first ``early`` ticks."""
    at = [found["attacked_distance"] for found in history if found["tick"] <= attack_at][-1]
    after = [(found["tick"], found["attacked_distance"] - at) for found in history if found["tick"] > attack_at]
    return {
        "attacked_before": at,
        "rise": float(np.mean([rise for _, rise in after])),
        "rise_most": max(rise for _, rise in after),
        "rise_early": float(np.mean([rise for tick, rise in after if tick <= attack_at + early])),
    }


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def always(arm: str, metric: str, limit: float, claim: str, *, above: bool = True, exact: bool = False) -> Claim:
        holds = (lambda value: value >= limit) if above else (lambda value: value < limit)
        return _every(results.values(arm, metric), limit, claim, holds, exact=exact)

    claims = [
        always("base-F1", "fall", FALL, "1: plain distance falls by 90%, F = 1"),
        always("base-F0", "fall", FALL, "1: the same, F = 0"),
        always("base-F1", "ranked_fall", RANKED_FALL, "1: ranked distance falls by 80%, F = 1"),
        *[always(f"base-F{F}", "coverage_end", 1.0, f"1: all know the top item, F = {F}") for F in (1, 0)],
    ]
    for arm in ("sybil-F1", "sybil-F0", "inflation-F1", "epic-F1"):
        claims += [
            always(arm, "worst_plain", KEPT, f"2: {arm}: plain distance stays below 60% of the start", above=False),
            always(arm, "worst", KEPT, f"2: {arm}: so does the ranked one", above=False),
            always(arm, "coverage_end", 1.0, f"2: {arm}: all know the top item"),
        ]
    claims += [
        _pair(results, "messages_to_cover", "push-F1", "sybil-F1", "3: push covers 90% with fewer messages", sign=-1),
        _pair(
            results,
            "distance_quarter",
            "push-F1",
            "sybil-F1",
            "3: push is nearer after a quarter of the ticks",
            sign=-1,
        ),
        _pair(results, "rise_early", "push-F1", "sybil-F1", "3: push is polluted faster"),
        _pair(results, "rise", "sybil-F0", "sybil-F1", "4: with F = 0 the rise is smaller", sign=-1),
        _halves(results, "defended-F1", "forged-F1", "5: cap and signatures halve the rise of forged rows"),
        _halves(results, "cap-F1", "sybil-F1", "5: a cap of 3 alone halves that of sybils in their own names"),
        _halves(results, "cap1-F1", "sybil-F1", "5: a cap of 1 does"),
        _halves(results, "log-F1", "sybil-F1", "5: log(1 + C) does"),
        _halves(results, "common-F0", "sybil-F0", "5: at least 10 common clicks do, F = 0"),
        _halves(results, "quota-F1", "sybil-F1", "5: a quota of 20 rows does"),
        _pair(results, "ndcg", "tastes-F0", "tastes-F1", "6: with F = 0 own tastes rank higher by 0.1", by=BETTER),
        _over_global(results),
        always("offline-F1", "offline_change", CHANGED, "7: an offline node keeps the quality it had", above=False),
        always("loopback", "agreed", 1.0, "processes over TCP end with the same log", exact=True),
    ]
    return claims


def _every(
    values: dict[int, float], limit: float, claim: str, holds: Callable[[float], bool], *, exact: bool = False
) -> Claim:
    if not values:
        return Claim.not_run(claim, PAPER)
    mean = estimate(list(values.values()))
    verdict = every_seed([holds(value) for value in values.values()])
    return Claim.against(limit, claim, PAPER, mean.mean, verdict, mean.interval, exact=exact, count=mean.count)


def _above(difference: Estimate, by: float = 0.0) -> Verdict:
    return verdict_below(Estimate(by - difference.mean, difference.half_width, difference.count))


def _pair(
    results: Results, metric: str, ours: str, baseline: str, claim: str, *, sign: int = 1, by: float = 0.0
) -> Claim:
    """Paired: ours above the baseline by more than ``by``, or below it with ``sign`` -1."""

    def verdict(difference: Estimate) -> Verdict:
        return _above(difference, by) if sign > 0 else verdict_below(difference, -by)

    return results.claim(
        metric,
        ours=ours,
        baseline=baseline,
        claim=claim,
        paper=PAPER,
        verdict=verdict,
        limit=(lambda mean: mean + sign * by) if by else None,
    )


def _halves(results: Results, ours: str, baseline: str, claim: str) -> Claim:
    """In every seed: the rise of ours is at most half of the baseline's, where that rises at all."""
    defended, open_ = results.values(ours, "rise"), results.values(baseline, "rise")
    seen = [
        defended[seed] <= HALVED * open_[seed] for seed in sorted(defended.keys() & open_.keys()) if open_[seed] > 0
    ]
    paper = "not in the paper"
    return results.claim(
        "rise",
        ours=ours,
        baseline=baseline,
        claim=claim,
        paper=paper,
        verdict=lambda _: every_seed(seen),
        limit=lambda rise: HALVED * rise,
    )


def _over_global(results: Results) -> Claim:
    ours, base = (results.values("tastes-F0", metric) for metric in ("ndcg", "ndcg_global"))
    both = {"ours": {seed: {"v": v} for seed, v in ours.items()}, "base": {seed: {"v": v} for seed, v in base.items()}}
    claim = "6: and than global popularity ranks them, by 0.1"
    paper = "not in the paper"
    return Results(both).claim(
        "v",
        ours="ours",
        baseline="base",
        claim=claim,
        paper=paper,
        verdict=lambda d: _above(d, BETTER),
        limit=lambda mean: mean + BETTER,
    )


def draw(results: Results, path: Path) -> None:
    """Left, distances over the ticks without and with an attack; right, the rise of the attacked term by arm, with its seeds."""
    shown: list[str] = [
        arm for arm in ("base-F1", "base-F0", "sybil-F1", "push-F1", "inflation-F1", "epic-F1") if arm in results.runs
    ]
    rising = [arm for arm in results.runs if results.values(arm, "rise")]
    with figure(11, max(3.6, 1.4 + 0.34 * len(rising)), ncols=2) as (made, (left, right)):
        made.suptitle(
            "G-Rank: nearness to the global ranking, and what polluters change",
            x=0.01,
            ha="left",
            fontweight="bold",
            color=INK,
        )
        for number, arm in enumerate(shown):
            curves = np.mean([run["curve"] for run in results.runs[arm].values()], axis=0)
            colour = SERIES[number % len(SERIES)]
            left.plot(curves[:, 0], curves[:, 2], color=colour, label=arm)
            left.plot(curves[:, 0], curves[:, 1], color=colour, linestyle=":", linewidth=1)
        left.set_xlabel("tick")
        left.set_ylabel("distance to the global ranking\n(solid: as ranked; dotted: plain clicks)")
        left.set_ylim(0)
        horizontal_grid(left)
        if shown:
            left.legend(ncols=2)
        for row, arm in enumerate(rising):
            values = list(results.values(arm, "rise").values())
            right.plot(values, [row] * len(values), "o", color=MUTED, markersize=3.5, alpha=0.6)
            right.plot(math.fsum(values) / len(values), row, "D", color=SERIES[0], markersize=5)
        right.axvline(0, color=MUTED, linewidth=1)
        right.set_yticks(range(len(rising)), rising)
        right.set_ylim(max(len(rising), 1) - 0.5, -0.5)
        right.grid(axis="x", color=GRID)
        right.set_xlabel("rise of the attacked term's distance (left is better)")
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)

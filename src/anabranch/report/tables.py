"""The tables of a report, which the terminal and the page show alike; the page has room for more columns."""

import math
from dataclasses import dataclass

from anabranch.report.audit import LayerAudit
from anabranch.report.caching import MAIN
from anabranch.report.summary import SEGMENT, LayerFacts, Summary
from anabranch.report.windows import WindowFacts

UNKNOWN = "-"
# In the order of the columns, with their headings. Only the fixed set is there before a sequence begins.
POLICIES = {
    "segment": "SCH",
    "plec": "PLEC",
    "lru": "LRU",
    "lfu": "LFU",
    "fixed": "prefilled\nfixed",
    "belady": "Belady",
}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: one line or two.
        cells: one for each row.
        is_text: whether cells stand on the left on the page.
        on_terminal: whether a terminal has it too.
    """

    heading: str
    cells: list[str]
    is_text: bool = False
    on_terminal: bool = True


@dataclass(frozen=True)
class Table:
    """One table, with what its columns mean."""

    heading: str
    note: str
    columns: list[Column]

    @property
    def on_terminal(self) -> list[Column]:
        """The columns that a terminal shows; empty where it does without the table."""
        return [column for column in self.columns if column.on_terminal]


def tables(summary: Summary) -> list[Table]:
    """Those that have something to say."""
    found = [
        of_layers(summary),
        of_pools(summary),
        of_passes(summary),
        of_details(summary),
        of_windows(summary.windows),
        of_audits(summary.balance_audit),
    ]
    return [table for table in found if table is not None]


def of_layers(summary: Summary) -> Table:
    """Balance, reuse and specialisation by layer."""
    layers, srp = summary.layers, summary.caches.srp_by_layer if summary.caches else {}

    def more(heading: str, cells: list[str], *, is_text: bool = False) -> Column:
        return Column(heading, cells, is_text=is_text, on_terminal=False)

    columns = [
        Column("layer", [str(layer.layer) for layer in layers]),
        more("router", [layer.name for layer in layers], is_text=True),
        more("decisions", [f"{layer.decisions:,}" for layer in layers]),
        Column("experts", [str(layer.num_destinations) for layer in layers]),
        Column("active", [str(layer.top_k) for layer in layers]),
        Column("MaxVio", [_number(layer.max_violation, 2) for layer in layers]),
        more("by luck", [_number(layer.noise, 2) for layer in layers]),
        more("CV", [_number(layer.coefficient_of_variation, 2) for layer in layers]),
        Column("idle", [str(layer.idle) for layer in layers]),
        Column("entropy\n(bits)", [_number(layer.load_entropy_bits, 2) for layer in layers]),
        more("at even load (bits)", [_number(layer.max_entropy_bits, 2) for layer in layers]),
        more("weight entropy (bits)", [_number(layer.weight_entropy_bits, 2) for layer in layers]),
        more("unused places", [_share(layer.drop_ratio) for layer in layers]),
        more("as token before", [_beside(layer.consecutive_reuse, layer.consecutive_chance) for layer in layers]),
        more(f"within {SEGMENT} tokens", [_beside(layer.segment_reuse, layer.segment_chance) for layer in layers]),
    ]
    if srp:
        columns.append(more(f"SRP, {MAIN} tokens", [_share(srp.get(layer.layer, math.nan)) for layer in layers]))
    if summary.pools:
        columns.append(more("as layer before", [_as_before(layer) for layer in layers]))
        columns.append(more("of other layers", [_beside(one.foreign_share, one.foreign_chance) for one in layers]))
    if summary.domains and any(layer.domain_distance for layer in layers):
        told = [_number(layer.domain_information_bits, 3) for layer in layers]
        columns.append(more("I(domain; expert) (bits)", told))
        columns.append(more("by luck (bits)", [_number(layer.domain_noise_bits, 3) for layer in layers]))
    note = (
        "MaxVio is the load of the busiest expert over the mean, minus 1 (arXiv 2408.15664), beside what an even router would show "
        "by luck; CV is the standard deviation of the load over its mean; idle experts get under a tenth of the mean; entropy is that of "
        "the load. In parentheses: by chance."
    )
    return Table("Every layer", note, columns)


def _as_before(layer: LayerFacts) -> str:
    return _beside(layer.layer_reuse, layer.layer_reuse_chance) if layer.previous_layer is not None else ""


def of_pools(summary: Summary) -> Table | None:
    """Loads of pools that several layers share."""
    pools = summary.pools
    if not pools:
        return None
    columns = [
        Column("pool", [pool.name for pool in pools], is_text=True),
        Column("layers", [", ".join(map(str, pool.layers)) for pool in pools], is_text=True),
        Column("experts", [str(pool.size) for pool in pools]),
        Column("MaxVio, layers\nadded up", [_number(pool.max_violation, 2) for pool in pools]),
        Column("MaxVio,\nworst layer", [_number(pool.max_violation_layer, 2) for pool in pools]),
        Column("idle", [str(pool.idle) for pool in pools]),
    ]
    return Table("Shared pools", "What each physical expert carries, over all layers that use it.", columns)


def of_passes(summary: Summary) -> Table | None:
    """How passes follow each other, in models whose layers route several times."""
    passes = summary.passes
    if not passes:
        return None
    columns = [
        Column("passes", [f"{facts.first_layer} to {facts.second_layer}" for facts in passes]),
        Column("pass", [facts.first for facts in passes], is_text=True, on_terminal=False),
        Column("next", [facts.second for facts in passes], is_text=True, on_terminal=False),
        Column("same expert\nagain", [_share(facts.reuse) for facts in passes]),
        Column("by chance", [_share(facts.chance) for facts in passes]),
        Column("combinations", [f"{facts.combinations_seen:,}" for facts in passes]),
        Column("told of the\nnext (bits)", [_number(facts.information_bits, 3) for facts in passes]),
        Column("by luck", [_number(facts.noise_bits, 3) for facts in passes]),
    ]
    note = (
        "What the same tokens chose in two passes of one layer that follow each other. Combinations are the different pairs of sets of "
        "experts that tokens took; told of the next is I(pass; next)."
    )
    return Table("Between passes", note, columns)


def of_details(summary: Summary) -> Table | None:
    """Entropy of scores, and specialisation by the token read, the one that follows, and the one predicted; where a trace says it."""
    layers = summary.layers
    if all(
        math.isnan(layer.score_entropy_bits) and math.isnan(layer.predicted_token_specialization) for layer in layers
    ):
        return None
    columns = [
        Column("layer", [str(layer.layer) for layer in layers]),
        Column("entropy of\nscores (bits)", [_number(layer.score_entropy_bits, 3) for layer in layers]),
        Column("by the\ntoken read", [_number(layer.vocabulary_specialization, 3) for layer in layers]),
        Column("by the\nnext one", [_number(layer.next_token_specialization, 3) for layer in layers]),
        Column("by the one\npredicted", [_number(layer.predicted_token_specialization, 3) for layer in layers]),
    ]
    note = (
        "The entropy of the scores of all experts, and what share of a frequent token's occurrences goes to one expert, mean over experts "
        "(arXiv 2505.16056): by the token that is routed, the one that follows it, and the one that the model expects there."
    )
    return Table("Scores and tokens", note, columns)


def of_windows(found: list[WindowFacts]) -> Table | None:
    """SRP of the model, and mean hits of each cache by both rules for first accesses."""
    if not found:
        return None
    rows = [
        (facts, at, first, hits)
        for facts in found
        for at in range(len(facts.caches))
        for first, hits in (("miss", facts.hits), ("free", facts.hits_free))
    ]
    columns = [
        Column("window", [str(facts.window) for facts, *_ in rows]),
        Column("SRP", [_number(facts.srp, 3) for facts, *_ in rows]),
        Column("95%", [_interval(facts.srp_interval) for facts, *_ in rows]),
        Column("cache", [f"{facts.caches[at]:g}" for facts, at, *_ in rows]),
        Column("first\naccess", [first for _, _, first, _ in rows]),
        *(Column(name, [_number(hits[policy][at], 3) for _, at, _, hits in rows]) for policy, name in POLICIES.items()),
    ]
    note = (
        "Windows are in tokens, caches in active experts; layers that share experts have one cache. SRP and SCH: arXiv 2505.16056. "
        "First accesses are misses, as a real system sees them, or free while there is room (the paper's rule). SCH and PLEC know the "
        "window ahead, Belady the whole sequence; fixed holds the experts that each sequence uses most, and is filled before it begins: it "
        "pays for no first access, and may stand above Belady, which loads on demand."
    )
    return Table("Windows and caches", note, columns)


def of_audits(audits: list[LayerAudit]) -> Table | None:
    """Balance and score beside the optimum, by layer."""
    if not audits:
        return None
    columns = [
        Column("layer", [str(facts.layer) for facts in audits]),
        Column("tokens", [f"{facts.tokens:,}" for facts in audits]),
        Column("MaxVio", [_number(facts.max_violation, 3) for facts in audits]),
        Column("MinVio", [_number(facts.min_violation, 3) for facts in audits]),
        Column("MaxVio of the\nworst domain", [_worst_domain(facts) for facts in audits]),
        Column("MaxVio with\nno bias", [_number(facts.unbiased_max_violation, 3) for facts in audits]),
        Column("score over\noptimum", [_number(facts.achieved_share, 4) for facts in audits]),
        Column("gap of\nthe bias", [_number(facts.duality_gap if facts.has_bias else None, 4) for facts in audits]),
        Column("correlation\nwith prices", [_number(facts.correlation, 3) for facts in audits]),
        Column("broken\npreferences", [_count(facts.preference_violations) for facts in audits]),
    ]
    note = (
        "The choices beside the best balanced ones of the same scores (arXiv 2512.03915). A score over 1 is bought with imbalance; a gap "
        "of 0 is an optimal bias; prices are what a bias should be. A preference is broken by a token that drops one of its best scores "
        "for an expert of a lower bias: something else than score and bias chose there (groups, closed experts, an override)."
    )
    return Table("Balance beside the optimum", note, columns)


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _worst_domain(facts: LayerAudit) -> str:
    known = [(value, name) for name, value in facts.domain_max_violation.items() if value is not None]
    return f"{max(known)[0]:.3f} {max(known)[1]}" if known else UNKNOWN


def _interval(interval: tuple[float, float] | None) -> str:
    return UNKNOWN if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None, decimals: int) -> str:
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def _share(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.1%}"


def _beside(value: float, chance: float) -> str:
    return f"{_share(value)} ({_share(chance)})"

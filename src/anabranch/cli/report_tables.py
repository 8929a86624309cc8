"""The tables that ``anabranch report`` prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from anabranch.cli.output import fact, table

GROUPED = 16

if TYPE_CHECKING:
    from anabranch.report import Summary
    from anabranch.report.audit import LayerAudit
    from anabranch.report.windows import WindowFacts


def print_audits(audits: list[LayerAudit]) -> None:
    """Balance and score beside the optimum, by layer."""
    if not audits:
        return
    rows = [
        [
            f"{facts.layer}",
            f"{facts.tokens:,}",
            f"{facts.max_violation:.3f}",
            f"{facts.min_violation:.3f}",
            _worst_domain(facts),
            f"{facts.unbiased_max_violation:.3f}",
            f"{facts.achieved / facts.optimum:.4f}",
            f"{facts.duality_gap:.4f}" if facts.has_bias else "-",
            "-" if facts.correlation is None else f"{facts.correlation:.3f}",
        ]
        for facts in audits
    ]
    columns = [
        "layer",
        "tokens",
        "MaxVio",
        "MinVio",
        "MaxVio of the\nworst domain",
        "MaxVio with-\nout a bias",
        "score over\noptimum",
        "gap of\nthe bias",
        "correlation\nwith prices",
    ]
    table(columns, rows, text_columns=0)


def _worst_domain(facts: LayerAudit) -> str:
    known = [(value, name) for name, value in facts.domain_max_violation.items() if value is not None]
    return f"{max(known)[0]:.3f} {max(known)[1]}" if known else "-"


def print_windows(found: list[WindowFacts]) -> None:
    """SRP of the model, mean hits over layers of each cache by both rules for first accesses, and what follows from them."""
    if not found:
        return
    shown = ("segment", "plec", "lru", "lfu", "fixed", "belady")
    rows = [
        [
            f"{facts.window}",
            f"{facts.srp:.3f}",
            _interval(facts.srp_interval),
            f"{cache:g}",
            first,
            *(f"{hits[policy][at]:.3f}" for policy in shown),
        ]
        for facts in found
        for at, cache in enumerate(facts.caches)
        for first, hits in (("miss", facts.hits), ("free", facts.hits_free))
    ]
    columns = ["window", "SRP", "95%", "cache", "first\naccess", "SCH", "PLEC", "LRU", "LFU", "fixed", "Belady"]
    table(columns, rows, text_columns=0)
    for facts in found:
        # The bounds of the groups are those of 16 tokens.
        group = f"consistency of group {facts.group} of 4; " if facts.window == GROUPED else ""
        fact("", f"window of {facts.window} tokens: {group}{_near(facts)}")
        if facts.domains:
            fact("", f"SRP of experts between domains: {_correlations(facts)}")


def _near(facts: WindowFacts) -> str:
    free = "none" if facts.near_belady_free is None else f"{facts.near_belady_free:g}"
    if facts.near_belady is None:
        return f"SCH stays below 90% of Belady at every size (free first accesses: {free})"
    return (
        f"SCH is 90% of Belady from a cache of {facts.near_belady:g} times the active experts on (free first accesses: {free}), "
        f"where LRU hits {facts.lru_there:.1%}"
    )


def _correlations(facts: WindowFacts) -> str:
    names, values = facts.domains, facts.domain_correlation
    pairs = [(values[one][two], f"{names[one]} and {names[two]}") for two in range(len(names)) for one in range(two)]
    known = sorted((value, pair) for value, pair in pairs if value is not None)
    if not known:
        return "no correlation can be told"
    (least, apart), (most, alike) = known[0], known[-1]
    ends = f"correlated by {least:.2f} ({apart})"
    return ends if len(known) == 1 else f"{ends} to {most:.2f} ({alike})"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def print_details(summary: Summary) -> None:
    """Entropy of scores, and specialisation by the token read, the one that follows, and the one predicted; where a trace says it."""
    layers = summary.layers
    if all(
        math.isnan(value)
        for layer in layers
        for value in (layer.score_entropy_bits, layer.predicted_token_specialization)
    ):
        return
    rows = [
        [
            str(layer.layer),
            *(
                "-" if math.isnan(value) else f"{value:.3f}"
                for value in (
                    layer.score_entropy_bits,
                    layer.vocabulary_specialization,
                    layer.next_token_specialization,
                    layer.predicted_token_specialization,
                )
            ),
        ]
        for layer in layers
    ]
    columns = ["layer", "entropy of\nscores (bits)", "by the\ntoken read", "by the\nnext one", "by the one\npredicted"]
    table(columns, rows, text_columns=0)


def print_passes(summary: Summary) -> None:
    """How passes follow each other, in models whose layers route several times."""
    if not summary.passes:
        return
    rows = [
        [
            f"{facts.first_layer} to {facts.second_layer}",
            *("-" if math.isnan(share) else f"{share:.1%}" for share in (facts.reuse, facts.chance)),
            f"{facts.combinations_seen:,}",
            *("-" if math.isnan(bits) else f"{bits:.3f}" for bits in (facts.information_bits, facts.noise_bits)),
        ]
        for facts in summary.passes
    ]
    columns = ["passes", "same expert\nagain", "by chance", "combinations", "told of the\nnext (bits)", "by luck"]
    table(columns, rows, text_columns=0)


def print_layers(summary: Summary) -> None:
    """Balance by layer."""
    rows = [
        [
            str(layer.layer),
            f"{layer.num_destinations}",
            f"{layer.top_k}",
            f"{layer.max_violation:.2f}",
            f"{layer.idle}",
            f"{layer.load_entropy_bits:.2f}",
        ]
        for layer in summary.layers
    ]
    table(["layer", "experts", "active", "MaxVio", "idle", "entropy\n(bits)"], rows, text_columns=0)

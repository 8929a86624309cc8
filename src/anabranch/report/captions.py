"""How to read each picture of a report: words about what is drawn there, and about nothing else."""

from anabranch.report.caching import MAIN
from anabranch.report.pictures import MOST_LAYERS
from anabranch.report.summary import Summary


def load(summary: Summary) -> str:
    """Of bars for one layer, of colours for several."""
    how = "How many choices each expert gets, in multiples of its fair share"
    if len(summary.layers) == 1:
        return f"{how}; the line is the fair share."
    return f"{how}: orange is overloaded, blue nearly idle, and no colour is fair."


def entropy(summary: Summary) -> str:
    """Of both sides."""
    return (
        "Left: how evenly a layer uses its experts; the dashed line is an even load. Right: how evenly a decision spreads its weight over "
        "what it chose; near the dashed line all choices count alike, near 0 the first decides."
    )


def coactivation(summary: Summary) -> str:
    """Of the layers that are drawn."""
    able = [layer for layer in summary.layers if layer.top_k > 1 and layer.num_destinations > 1]
    some = " Of more than four layers, the first, the middle and the last." if len(able) > MOST_LAYERS else ""
    return (
        "Pairs chosen for the same token, more (orange) or less often (blue) than the loads of the two explain. Orange blocks are teams; "
        f"pairs seen a few times only stay pale; grey is the diagonal, and experts that were never chosen.{some}"
    )


def passes(summary: Summary) -> str:
    """Of the pairs that are drawn."""
    return (
        "Layers that route several times: which expert of the next pass (across) the tokens of an expert (down) go to, more (orange) or "
        "less often (blue) than the loads of the two explain; grey where one of them was never chosen. The diagonal is the same expert "
        "again. Of many pairs of passes, four from the first to the last; the table has all."
    )


def specialisation(summary: Summary) -> str:
    """Of distances where there are several layers, and of the layer whose preferences are drawn."""
    best = summary.most_special
    where = "" if best is None else f" in layer {best.layer}"
    prefers = f"which experts a domain prefers (orange) or avoids (blue){where}"
    if sum(bool(layer.domain_distance) for layer in summary.layers) <= 1:
        return prefers[0].upper() + prefers[1:] + "."
    return (
        "How far the experts used for each domain are from those used overall (total variation: the share of choices that would have to go "
        f"elsewhere), and {prefers}, where the expert tells most about the domain."
    )


def reuse(summary: Summary) -> str:
    """Of rates and of chance."""
    return (
        "How often a choice repeats an earlier one, beside what even and independent choices would give (by chance). High reuse is what "
        "expert caches and offloading live on."
    )


def caches(summary: Summary) -> str:
    """Of the recommended size where one is."""
    facts = summary.caches
    line = "" if facts is None or facts.is_everything else "; beyond the dashed line a larger cache buys little"
    return (
        f"Left: the best a router could do that may switch experts on and off for {MAIN} tokens at a time only (SRP, arXiv 2505.16056); "
        "near the line, it could as well keep all on. Right: how often a cache of that size, in each layer or, where layers share experts, "
        f"in each pool, holds the expert that is asked for{line}."
    )


def windows(summary: Summary) -> str:
    """Of intervals where there are some."""
    interval = any(facts.srp_interval is not None for facts in summary.windows)
    return (
        f"Left: SRP at each window{', with its 95% interval over sequences' * interval}. Beside it: what caches of so many times the "
        "active experts hit, first accesses being misses. SCH and PLEC know the window ahead, the others do not depend on it. Fixed is "
        "filled before a sequence begins."
    )

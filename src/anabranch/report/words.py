"""What the facts say, in plain words: the paragraph a reader should be able to check against the pictures."""

import math

import numpy as np

from anabranch.report.caching import MAIN, CacheFacts
from anabranch.report.summary import SEGMENT, LayerFacts, Summary
from anabranch.report.windows import WindowFacts


def explain(summary: Summary) -> list[str]:
    """Sentences, one topic each: balance, shared pools, passes, domains, reuse, and how far the numbers can be trusted."""
    if all(layer.is_constant for layer in summary.layers):
        return [_constant(summary)]
    topics = [
        _constant(summary),
        _balance(summary),
        _pools(summary),
        _passes(summary),
        _domains(summary),
        _reuse(summary),
        _caches(summary),
        *(_window(facts) for facts in summary.windows),
        *(_between_domains(facts) for facts in summary.windows),
        _dropped(summary),
        _caution(summary),
    ]
    return [topic for topic in topics if topic]


def _constant(summary: Summary) -> str:
    layers = [layer for layer in summary.layers if layer.is_constant]
    if not layers:
        return ""
    which = (
        "every layer" if len(layers) == len(summary.layers) else f"layer {', '.join(str(one.layer) for one in layers)}"
    )
    taken = sorted({one.busiest for one in layers if one.destinations_used == 1})
    same = f"the same expert ({taken[0]})" if len(taken) == 1 and layers[0].top_k == 1 else "the same experts"
    return (
        f"In {which} every token takes {same}, so nothing is chosen there. A layer does so whose route is given from outside and "
        "that takes its default where none is, in evaluation; or one that has collapsed."
    )


def _balance(summary: Summary) -> str:
    worst, typical = summary.worst, summary.typical("max_violation")
    if math.isnan(worst.max_violation):
        return "No item was sent anywhere: every place of every decision is unused."
    if worst.num_destinations == 1:
        return "There is a single destination, so there is nothing to balance."
    idle = (
        f"{worst.idle} of its {worst.num_destinations} experts {'gets' if worst.idle == 1 else 'get'} less than a tenth of "
        f"{'its' if worst.idle == 1 else 'their'} fair share"
    )
    if worst.idle == 0:
        idle = "every expert gets at least a tenth of its fair share"
    if worst.max_violation < max(0.25, 2 * worst.noise):
        return (
            f"The load is even: the busiest expert of any layer takes {times(worst.max_violation + 1)} its fair share "
            f"(layer {worst.layer}, expert {worst.busiest}), and {idle}."
        )
    rest = "" if len(summary.layers) == 1 else f" In a typical layer the busiest takes {times(typical + 1)}."
    return (
        f"The load is uneven: in layer {worst.layer}, the worst, expert {worst.busiest} takes {times(worst.max_violation + 1)} "
        f"its fair share, {'but' if worst.idle == 0 else 'and'} {idle}.{rest}"
    )


def _pools(summary: Summary) -> str:
    # A pool that only the passes of one layer use is no one else's.
    owned = {layer.pool for layer in summary.layers if layer.foreign_chance > 0}
    shared = [pool for pool in summary.pools if pool.name in owned]
    if not shared:
        return ""
    pool = max(shared, key=lambda pool: pool.max_violation)
    foreign, chance = summary.typical("foreign_share"), summary.typical("foreign_chance")
    again, again_chance = summary.typical("layer_reuse"), summary.typical("layer_reuse_chance")
    text = (
        f"Layers share experts: {percent(foreign)} of choices fall on experts that another layer owns ({percent(chance)} if all were "
        f"chosen evenly). Added up over the layers of a pool, the busiest expert takes at most {times(pool.max_violation + 1)} its fair "
        f"share ({pool.name})."
    )
    if math.isnan(again):
        return text
    again_text = f"{percent(again)} of choices ({percent(again_chance)} by chance)"
    return f"{text} A layer picks an expert that the layer before it also picked in {again_text}."


def _passes(summary: Summary) -> str:
    known = [facts for facts in summary.passes if not math.isnan(facts.reuse)]
    if not known:
        return ""
    reuse, chance, seen, told = (
        float(np.median([getattr(facts, name) for facts in known]))
        for name in ("reuse", "chance", "combinations_seen", "information_bits")
    )
    luck = all(facts.information_bits < 2 * facts.noise_bits for facts in known)
    tells = "no more than luck would show" if luck else f"{told:.2g} bits"
    return (
        f"Layers route in passes: {percent(reuse)} of a pass's choices were choices of the pass before ({percent(chance)} by chance). "
        f"Knowing one choice tells {tells} about one of the next pass. In a typical layer tokens take {seen:,.0f} different combinations "
        f"of experts in two passes."
    )


def _domains(summary: Summary) -> str:
    layers, best = [layer for layer in summary.layers if layer.domain_distance], summary.most_special
    if best is None:
        return ""
    most = max(max(layer.domain_distance.values()) for layer in layers)
    if most < 0.05:
        return f"Experts do not specialise by domain: the loads of no domain differ by more than {percent(most)} from those of all."
    name, distance = max(best.domain_distance.items(), key=lambda pair: pair[1])
    if all(layer.domain_information_bits < 2 * layer.domain_noise_bits for layer in layers):
        return "No specialisation by domain can be told from chance in so few decisions."
    degree = "strongly" if distance > 0.3 else "clearly" if distance > 0.15 else "slightly"
    return (
        f"Experts specialise {degree} by domain: in layer {best.layer}{', where they do so most' * (len(layers) > 1)}, {percent(distance)} "
        f"of the choices made for '{name}' would have to go to other experts to look like the average text."
    )


def _reuse(summary: Summary) -> str:
    rate, chance = summary.typical("consecutive_reuse"), summary.typical("consecutive_chance")
    if math.isnan(rate) or chance >= 1:
        return ""
    degrees = [(3, "far more than"), (1.2, "more than"), (0.8, "about as much as"), (0, "less than")]
    degree = next(words for factor, words in degrees if rate >= factor * chance)
    text = (
        f"A token shares {percent(rate)} of its experts with the token before it, {degree} chance ({percent(chance)})."
    )
    segment = summary.typical("segment_reuse")
    if math.isnan(segment):
        return text
    return (
        text
        + f" Within {SEGMENT} tokens {percent(segment)} of expert uses repeat an earlier one, which is what a cache could save."
    )


def _caches(summary: Summary) -> str:
    facts = summary.caches
    if facts is None:
        return ""
    degree = ("strongly", "fairly", "weakly", "hardly")[facts.group - 1]
    caution = ", though partly because few experts do most of the work" if facts.activation_spread > 10 else ""
    return (
        f"Routing is {degree} consistent from token to token (SRP {percent(facts.srp[MAIN])} over {MAIN} tokens, where keeping all "
        f"experts on gives {percent(facts.always_on)}){caution}. {_recommended(facts)}"
    )


def _recommended(facts: CacheFacts) -> str:
    layers = set(facts.srp_by_layer)
    shared = {layer for numbers in facts.shared.values() for layer in numbers}
    owner = "each layer" if not shared else "each pool that layers share" if shared == layers else "each pool or layer"
    if facts.is_everything:
        return (
            f"No cache smaller than all experts of {owner} hits 90% of what one that knows the future does, so no size is recommended "
            "for running it with experts offloaded."
        )
    sizes = sorted(set(facts.recommended_capacity.values()))
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    size = f"{size} expert{'s' * (sizes[-1] > 1)}"
    of_all = " of all its layers" if shared else ""
    return (
        f"To run it with experts offloaded, cache {size} of {owner}, {facts.recommended_ratio:.3g} times the active "
        f"ones{of_all}: that hits {percent(facts.lru)} of accesses with LRU and {percent(facts.sch)} if the next {MAIN} tokens are known."
    )


def _window(facts: WindowFacts) -> str:
    # The bounds of the groups are those of 16 tokens.
    group = ""
    if facts.window == MAIN:
        meaning = ("experts are reused a lot", "fairly often", "seldom", "hardly")[facts.group - 1]
        group = f"consistency of group {facts.group} of 4 ({meaning}; groups are those of {MAIN} tokens); "
    free = "none" if facts.near_belady_free is None else f"{facts.near_belady_free:.3g}"
    near = (
        f"SCH stays below 90% of Belady at every size (free first accesses: {free})"
        if facts.near_belady is None
        else f"SCH is 90% of Belady from a cache of {facts.near_belady:.3g} times the active experts on (free first accesses: {free}), "
        f"where LRU hits {facts.lru_there:.1%}"
    )
    return f"A window of {facts.window} tokens: {group}{near}."


def _between_domains(facts: WindowFacts) -> str:
    names, values = facts.domains, facts.domain_correlation
    if not names:
        return ""
    pairs = [(values[one][two], f"{names[one]} and {names[two]}") for two in range(len(names)) for one in range(two)]
    known = sorted((value, pair) for value, pair in pairs if value is not None)
    if not known:
        return f"Over {facts.window} tokens no correlation of the SRP of experts between domains can be told."
    (least, apart), (most, alike) = known[0], known[-1]
    ends = f"{least:.2f} ({apart})" + ("" if len(known) == 1 else f" to {most:.2f} ({alike})")
    return f"Over {facts.window} tokens the SRP of experts is correlated between domains by {ends}."


def _dropped(summary: Summary) -> str:
    worst: LayerFacts = max(summary.layers, key=lambda layer: 0.0 if math.isnan(layer.drop_ratio) else layer.drop_ratio)
    if not worst.drop_ratio > 0:
        return ""
    return (
        f"Up to {percent(worst.drop_ratio)} of places are unused (layer {worst.layer}): dropped for want of capacity, or not wanted "
        f"by the router."
    )


def _caution(summary: Summary) -> str:
    noise = summary.typical("noise")
    if math.isnan(noise) or noise < 0.25:
        return ""
    return (
        f"The recording is short: with so few decisions, even a perfectly fair router would seem to load its busiest expert "
        f"{times(noise + 1)} its share. Record more before drawing conclusions."
    )


def times(value: float) -> str:
    """As in 3.2 times."""
    return f"{value:.3g} times" if value < 99.5 else f"{value:.0f} times"


def percent(share: float) -> str:
    """As in 12%; one decimal below 10."""
    return f"{share:.1%}" if abs(share) < 0.0995 else f"{share:.0%}"

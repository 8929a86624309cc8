"""The facts of a routing trace: one plain, JSON-ready value, and what they say in words."""
# Shapes: N decisions, K choices per item, E destinations, M domains

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.report.audit import LayerAudit, audit_trace
from anabranch.report.caching import MAIN, CacheFacts, cache_facts
from anabranch.report.windows import WindowFacts, window_facts
from anabranch.routing import measure
from anabranch.routing.passes import PassFacts, between_passes
from anabranch.routing.trace import Decisions, RoutingTrace
from anabranch.routing.trace_schema import TraceLayer

SEGMENT = 16  # tokens, the length arXiv 2505.16056 reports by default
NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What is known about one layer; nan where the trace does not say. Definitions: `anabranch.routing.measure`.

    Attributes:
        layer, name, num_destinations, top_k, pool: as in the trace.
        decisions: N.
        places_used: mean places used per decision.
        busiest: the destination with the highest load. ``destinations_used``: how many have any.
        noise: the ``max_violation`` that even chances would show by luck in so few decisions.
        weight_entropy_bits: mean over decisions of the entropy of the weights within one.
        consecutive_reuse, segment_reuse: between tokens; the ``_chance`` of each is that of even, independent choices.
        previous_layer: the layer before it in its pool, or None; ``layer_reuse`` is the rate of picking the same again.
        foreign_share: choices that fall on what other layers own; ``foreign_chance`` is their share of the pool.
        domain_distance: total variation between a domain's load and that of all, by domain.
        domain_information_bits: I(domain; destination); ``domain_noise_bits`` is what luck would show.
        vocabulary_specialization: mean over destinations, of the token that is routed; ``next_token_specialization`` of the one that
            follows it, ``predicted_token_specialization`` of the one that the model expects there.
        score_entropy_bits: mean over decisions of the entropy of the scores of all destinations; where the trace has scores.
    """

    layer: int
    name: str
    num_destinations: int
    top_k: int
    pool: str
    decisions: int
    places_used: float
    busiest: int
    max_violation: float
    noise: float
    coefficient_of_variation: float
    idle: int
    load_entropy_bits: float
    max_entropy_bits: float
    weight_entropy_bits: float
    drop_ratio: float
    consecutive_reuse: float
    consecutive_chance: float
    segment_reuse: float
    segment_chance: float
    previous_layer: int | None
    layer_reuse: float
    layer_reuse_chance: float
    foreign_share: float
    foreign_chance: float
    domain_distance: dict[str, float]
    domain_information_bits: float
    domain_noise_bits: float
    vocabulary_specialization: float
    next_token_specialization: float = NAN
    predicted_token_specialization: float = NAN
    score_entropy_bits: float = NAN
    destinations_used: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether there are several destinations and every decision takes the same, so that nothing is chosen."""
        return 0 < self.destinations_used <= min(self.top_k, self.num_destinations - 1)

    @property
    def idle_fraction(self) -> float:
        """Of the destinations."""
        return self.idle / self.num_destinations


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """Loads of a pool that several layers share, summed over them.

    Attributes:
        max_violation: MaxVio_pool; ``max_violation_layer`` is the worst of its layers (MaxVio_layer).
    """

    name: str
    layers: list[int]
    size: int
    max_violation: float
    max_violation_layer: float
    idle: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The facts of a trace.

    Attributes:
        rows: choices.
        items: sequences or requests.
        domains: names.
        layers: every layer of the trace.
        pools: those that several layers share.
        passes: how one pass follows another, where layers of the model route several times.
        caches: what caches of experts would hit; None where tokens have no order, and where every token takes the same experts.
        windows: the same at windows and caches that were asked for.
        balance_audit: choices beside the best balanced ones of the same scores, by layer, where that was asked for.
    """

    rows: int
    items: int
    domains: list[str]
    layers: list[LayerFacts]
    pools: list[PoolFacts] = field(default_factory=list)
    passes: list[PassFacts] = field(default_factory=list)
    caches: CacheFacts | None = None
    windows: list[WindowFacts] = field(default_factory=list)
    balance_audit: list[LayerAudit] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form; nan becomes None."""
        # A copy of the passes would hold their tables as numbers of Python's.
        rest = asdict(replace(self, passes=[]))
        return _plain(rest | {"passes": [facts.to_dict() for facts in self.passes]})

    @property
    def worst(self) -> LayerFacts:
        """The layer with the most uneven load."""
        return max(self.layers, key=lambda layer: -1.0 if math.isnan(layer.max_violation) else layer.max_violation)

    @property
    def most_special(self) -> LayerFacts | None:
        """The layer whose experts tell most about the domain, in bits; None where the trace has no domains."""
        layers = [layer for layer in self.layers if layer.domain_distance]
        return max(layers, key=lambda layer: layer.domain_information_bits, default=None)

    def typical(self, name: str) -> float:
        """The median of a measure over the layers that have it."""
        values = [value for layer in self.layers if not math.isnan(value := getattr(layer, name))]
        return float(np.median(values)) if values else NAN


def summarize(
    trace: RoutingTrace,
    *,
    windows: Sequence[int] = (),
    caches: Sequence[float] = (),
    balance_audit: bool = False,
    bias: Mapping[int, np.ndarray] | None = None,
) -> Summary:
    """Measure a trace. One layer is in memory at a time, all of a pool where layers share it.

    Args:
        trace: what to measure.
        windows, caches: tokens and multiples of the active experts at which to measure what `window_facts` does; if only one of the two is
            given, the other is 16 tokens or twice the active experts.
        balance_audit: compare the choices with the best balanced ones, see `audit_trace`, with ``bias`` of the layers that have one.

    Raises DataError if the trace is empty, and what `window_facts` and `audit_trace` do where they are asked for.
    """
    if not len(trace):
        raise DataError("the trace has no rows, so there is nothing to report; was the model run while recording?")
    layers: list[LayerFacts] = []
    before: dict[str, tuple[int, Decisions]] = {}  # the last layer of each shared pool
    for layer, decisions in trace:
        layers.append(_layer_facts(trace, layer, decisions, before.get(layer.pool)))
        if len(trace.pools[layer.pool]) > 1:
            before[layer.pool] = layer.layer, decisions
    pools = [_pool_facts(trace, name, layers) for name, members in trace.pools.items() if len(members) > 1]
    items = len(np.unique(trace.table["item"].to_numpy()))
    asked = window_facts(trace, windows or [MAIN], caches or [2.0]) if windows or caches else []
    return Summary(
        rows=len(trace),
        items=items,
        domains=trace.domains,
        layers=layers,
        pools=pools,
        passes=between_passes(trace),
        caches=None if all(layer.is_constant for layer in layers) else cache_facts(trace),
        windows=asked,
        balance_audit=audit_trace(trace, bias) if balance_audit else [],
    )


def _layer_facts(
    trace: RoutingTrace, layer: TraceLayer, decisions: Decisions, before: tuple[int, Decisions] | None
) -> LayerFacts:
    index_NK, load_E = decisions.index_NK, trace.load_E(layer.layer)
    num_destinations, total = layer.num_destinations, int(load_E.sum())
    places = total / len(index_NK) if len(index_NK) else NAN
    load_ME = measure.domain_load(trace, layer.layer)
    by_token = partial(measure.vocabulary_specialization, index_NK=index_NK, num_destinations=num_destinations)
    predicted_N, score_NE = decisions.predicted_N, decisions.score_NE
    idle = measure.idle_fraction(load_E) * num_destinations
    has_domains = len(load_ME) > 1 and load_ME.sum() > 0
    return LayerFacts(
        layer=layer.layer,
        name=layer.name,
        num_destinations=num_destinations,
        top_k=layer.top_k,
        pool=layer.pool,
        decisions=len(index_NK),
        places_used=places,
        busiest=int(load_E.argmax()),
        destinations_used=int((load_E > 0).sum()),
        max_violation=float(measure.max_violation(load_E)),
        # The largest of E near-normal counts of mean m stands about sqrt(2 ln E) standard deviations sqrt(m) above m.
        noise=math.sqrt(2 * math.log(num_destinations) * num_destinations / total) if total else NAN,
        coefficient_of_variation=float(measure.coefficient_of_variation(load_E)),
        idle=0 if np.isnan(idle) else round(float(idle)),
        load_entropy_bits=float(measure.load_entropy(load_E)),
        max_entropy_bits=math.log2(num_destinations),
        weight_entropy_bits=_mean(measure.routing_entropy(np.abs(decisions.weight_NK))),
        drop_ratio=measure.drop_ratio(index_NK),
        consecutive_reuse=measure.consecutive_reuse(decisions),
        consecutive_chance=measure.chance_reuse(places, num_destinations),
        segment_reuse=measure.segment_reuse(decisions, SEGMENT),
        segment_chance=measure.chance_reuse(places, num_destinations, SEGMENT, segment=True) if places else NAN,
        previous_layer=before[0] if before else None,
        layer_reuse=measure.reuse_rate(*reversed(measure.aligned(before[1], decisions))) if before else NAN,
        layer_reuse_chance=measure.chance_reuse(places, layer.pool_size) if before else NAN,
        foreign_share=measure.foreign_share(trace, layer.layer),
        foreign_chance=1 - len(trace.own_slots(layer.layer)) / layer.pool_size,
        domain_distance=dict(zip(trace.domains, measure.domain_distance(load_ME).tolist(), strict=True))
        if has_domains
        else {},
        domain_information_bits=measure.mutual_information(load_ME) if has_domains else NAN,
        domain_noise_bits=measure.mutual_information_bias(load_ME) if has_domains else NAN,
        vocabulary_specialization=_mean(by_token(decisions.token_N)),
        next_token_specialization=_mean(by_token(measure.next_tokens(decisions))),
        predicted_token_specialization=NAN if predicted_N is None else _mean(by_token(predicted_N)),
        score_entropy_bits=NAN if score_NE is None else _mean(measure.routing_entropy(score_NE)),
    )


def _pool_facts(trace: RoutingTrace, name: str, layers: list[LayerFacts]) -> PoolFacts:
    load = measure.pool_load(trace, name)
    members = [layer for layer in layers if layer.pool == name]
    idle = measure.idle_fraction(load) * len(load)
    return PoolFacts(
        name=name,
        layers=[layer.layer for layer in members],
        size=len(load),
        max_violation=float(measure.max_violation(load)),
        max_violation_layer=max(layer.max_violation for layer in members),
        idle=0 if np.isnan(idle) else round(float(idle)),
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else NAN


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value

"""`combine`: one adapter out of several, by rules that say what is lost.

    exact    sum_i w_i scale_i B_i A_i, by putting ranks side by side: nothing is lost, ranks add up (peft calls it ``cat``)
    svd      the best adapter of a given rank for that sum, by its singular values (Eckart-Young)
    linear   A = sum_i c_i A_i and B = sum_i |c_i| B_i with c_i = sign(w_i scale_i) sqrt |w_i scale_i|: ranks stay, and the products of
             halves of different adapters, which are in no sum, come in
    mean     A and B each the mean of theirs (AdapterSoup, arXiv 2302.07027): weights count by their share of all of them, and products of
             halves of different adapters come in, each times both of their shares
    ties     halves as in ``linear``, each by TIES: trimmed to its greatest numbers, signs elected, mean of those that have them
    dare     halves as in ``linear``, of each of which random numbers are dropped and the others rescaled; also called ``dare_linear``
    dare_ties, magnitude_prune
             dropped, and signs elected; trimmed, and no election
    ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
             the same of what adapters add, matrix by matrix, and the best adapter of a given rank for that; ranks may differ

Each but ``exact``, ``mean`` and ``dare`` has the name that the package peft gives it in ``add_weighted_adapter``, and makes what peft
makes, but for four things: one adapter alone goes through the rule, where peft takes ``linear``; a density has a usual value; what is
dropped depends on the seed, the layer and the place of the adapter among those that have it, not on what drew before; and where no rank
is given, that of a layer is the greatest that the adapters have there, where peft takes the greatest of all their layers.

Each result is one plain LoRA adapter, which every program reads that reads peft's. How far it is from the exact sum is told.
"""
# Shapes: C inputs, O outputs, R rank

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anabranch.adapters.base_name import BASE, is_one_base
from anabranch.adapters.copies import common_copies
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.peft_folder import Adapter, described
from anabranch.adapters.thinning import RULES, Majority, Rule, merged
from anabranch.bounds import MOST_SEED, shown
from anabranch.errors import ConfigError

__all__ = ["METHODS", "Combined", "Method", "combine", "shares"]

log = logging.getLogger(__name__)

Method = Literal[
    "exact",
    "svd",
    "linear",
    "mean",
    "ties",
    "dare",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
METHODS: tuple[Method, ...] = get_args(Method)
_SVD = "_svd"
# What a config says of how an adapter was trained or made, which the sum was not.
_OF_TRAINING = (
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "revision",
    "rank_pattern",
    "alpha_pattern",
)


@dataclass(frozen=True)
class Combined:
    """What `combine` made.

    Attributes:
        adapter: it.
        error: the Frobenius norm of its difference to the exact sum, over that of the sum, of all layers together; 0 where that is exact.
        cut_off: likewise what a rank could not hold, over what it was to hold: the sum, or what a rule made of it; 0 where none was cut.
    """

    adapter: Adapter
    error: float
    cut_off: float = 0.0


@dataclass(frozen=True)
class _Way:
    """How layers are combined: the arguments of `combine`, checked."""

    method: str
    rank: int | None
    density: float
    seed: int
    majority: Majority

    @property
    def rule(self) -> Rule | None:
        """The rule of halves, or of matrices where the method ends so; None for sums."""
        return RULES.get(self.method.removesuffix(_SVD))

    def generator(self, module: str, half: str, number: int) -> torch.Generator:
        """What drops numbers of one tensor: the same whichever layers and adapters are beside it."""
        told = hashlib.sha256(f"{self.seed} {module} {half} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(told[:7], "big"))


@dataclass(frozen=True)
class _Layer:
    """What one layer became, and squared norms: of what it lacks of the sum, of the sum, of what a rank cut off, and of what from."""

    pair: Pair
    missed: float = 0.0
    total: float = 0.0
    cut: float = 0.0
    whole: float = 0.0


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method = "exact",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    majority: Majority | None = None,
) -> Combined:
    """One adapter that adds ``sum_i weight_i delta_i``, or nearly so, or what a rule makes of them.

    Args:
        adapters: of one model; they may have other layers, ranks and scales.
        weights: of each; negative ones take away. Those of ``mean`` are divided by their sum, and none is negative.
        method: see the top of this file.
        rank: of the result of ``svd`` and of what ends so; None for the greatest that a layer has in any of them.
        density: the share of numbers that TIES, DARE and magnitude pruning keep; None for a fifth where it trims, half where it drops.
        seed: of what DARE drops; None for 0.
        majority: which sign wins where signs are elected: that of the ``"total"`` of numbers (None too), or their ``"frequency"``.

    Raises ConfigError: no adapters, another number of weights, one that is not finite, an unknown method, layers of other widths, ranks
    that differ where halves are combined, negative weights of a mean, or zeros alone, a sum that the type of the adapters cannot hold, a
    ``rank`` below 1, a ``density`` that is not above 0 and at most 1, a seed that no generator takes, any of them for a method that has no
    use for it, or adapters that bring whole tensors, which have no sum, or hold other numbers of the base than each other.
    """
    way = _way(method, rank, density, seed, majority)
    _check(adapters, weights)
    if method == "mean":
        weights = shares(weights)
    layers = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.pairs):
        parts = [
            (adapter.pairs[module], float(weight))
            for adapter, weight in zip(adapters, weights, strict=True)
            if module in adapter.pairs
        ]
        _check_sizes(module, parts, way)
        layers[module] = _layer(module, parts, way)
    pairs = {module: layer.pair for module, layer in layers.items()}
    table = {name: value for name, value in adapters[0].table.items() if name not in _OF_TRAINING}
    table[BASE] = _base_of(adapters)
    missed, total, cut, whole = (
        sum(getattr(layer, name) for layer in layers.values()) for name in ("missed", "total", "cut", "whole")
    )
    copies = common_copies(adapters)
    adapter = Adapter(described({**table, "inference_mode": True}, pairs), pairs, copies=copies)
    return Combined(adapter, _share(missed, total), _share(cut, whole))


def _base_of(adapters: Sequence[Adapter]) -> Any:
    """What they call their base, where all name one; a warning tells where they name several, or what may be."""
    bases = [adapter.table.get(BASE) for adapter in adapters]
    if not is_one_base(bases):
        named = " and ".join(dict.fromkeys(shown(base) for base in bases if base))
        log.warning("the adapters name different bases, %s; a sum is of adapters of one model", named)
        return None
    return bases[0] if all(bases) else None


def _share(part: float, whole: float) -> float:
    """The root of a part of squares over that of all."""
    return 0.0 if not part else math.inf if not whole else math.sqrt(part / whole)


def _layer(module: str, parts: Sequence[tuple[Pair, float]], way: _Way) -> _Layer:
    """One layer, of the adapters that have it."""
    exact = _finite(module, _side_by_side(parts))
    if way.method == "exact":
        return _Layer(exact)
    rank = way.rank or max(pair.rank for pair, _ in parts)
    if way.method == "svd":
        made, cut = _truncated(exact, rank)
        total = _square(exact)
        return _Layer(made, cut, total, cut, total)
    if way.method.endswith(_SVD):
        matrix_OC = _by_matrix(module, parts, way)
        made, cut = _truncated_matrix(_finite_matrix(module, matrix_OC), rank)
        whole = float(matrix_OC.double().square().sum())
    else:
        made, cut, whole = _finite(module, _by_halves(module, parts, way)), 0.0, 0.0
    missed = _square(_side_by_side([(made, 1.0), (exact, -1.0)]))
    return _Layer(made, missed, _square(exact), cut, whole)


def _way(method: str, rank: int | None, density: float | None, seed: int | None, majority: Majority | None) -> _Way:
    """The arguments of `combine` that say how. Raises ConfigError."""
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    rule = RULES.get(method.removesuffix(_SVD), Rule())
    unused = {
        "rank": (rank, method.endswith("svd"), "has none to choose; use 'svd', or leave it out"),
        "density": (density, rule.thins is not None, "keeps all numbers; use one of TIES or DARE, or leave it out"),
        "seed": (seed, rule.thins == "drop", "draws nothing; leave it out"),
        "majority": (majority, rule.elects, "elects no signs; use 'ties', or leave it out"),
    }
    for name, (value, is_used, why) in unused.items():
        if value is not None and not is_used:
            raise ConfigError(f"{name} is {value}, and method {method!r} {why}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    # A NaN is neither.
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density is {density}; it is the share of numbers that are kept, above 0 and at most 1")
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed is {seed}; it must be from 0 to {MOST_SEED}")
    if majority not in (None, *get_args(Majority)):
        raise ConfigError(f"majority is {majority!r}; use one of {', '.join(get_args(Majority))}")
    return _Way(method, rank, rule.density if density is None else density, seed or 0, majority or "total")


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"there are {len(weights)} weights for {len(adapters)} adapters; give one for each")
    wrong = [weight for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise ConfigError(f"a weight is {wrong[0]}; it must be a finite number")
    for number, adapter in enumerate(adapters):
        adapter.check_low_rank("only plain LoRA has a sum", f"adapter {number + 1}")
        if adapter.stacks:
            name = next(iter(adapter.stacks))
            raise ConfigError(
                f"adapter {number + 1} adapts {name}, experts that are stacked, which cannot be combined yet"
            )
        if adapter.saved:
            name = next(iter(adapter.saved))
            raise ConfigError(
                f"adapter {number + 1} brings {name} whole, which has no sum; merge it into its model instead"
            )


def shares(weights: Sequence[float]) -> list[float]:
    """Each of all, for a mean. Raises ConfigError for a negative one, which would take nothing away of halves, and for zeros alone."""
    if min(weights) < 0 or not any(weights) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"a mean has weights of 0 and above, of which one is not 0; they are {list(weights)}")
    # First by the greatest: a sum of great ones has an end.
    parts = [weight / max(weights) for weight in weights]
    return [part / math.fsum(parts) for part in parts]


def _check_sizes(module: str, parts: Sequence[tuple[Pair, float]], way: _Way) -> None:
    sizes = {(pair.a_RC.shape[1], pair.b_OR.shape[0]) for pair, _ in parts}
    if len(sizes) > 1:
        raise ConfigError(
            f"{module} has (inputs, outputs) {sorted(sizes)} in these adapters; they must be of one model"
        )
    ranks = {pair.rank for pair, _ in parts}
    if way.rule is not None and not way.method.endswith(_SVD) and len(ranks) > 1:
        other = {"linear": "exact", "mean": "svd", "dare": "dare_linear_svd"}.get(way.method, way.method + _SVD)
        raise ConfigError(f"{module} has ranks {sorted(ranks)}; method {way.method!r} needs one, {other!r} does not")


def _finite(module: str, pair: Pair) -> Pair:
    """The pair. Raises ConfigError where weights and scales made it too great for its type: no program would read it."""
    for half in (pair.a_RC, pair.b_OR):
        _finite_matrix(module, half)
    return pair


def _finite_matrix(module: str, matrix: Tensor) -> Tensor:
    """The same of one tensor."""
    if not matrix.isfinite().all():
        kind = str(matrix.dtype).removeprefix("torch.")
        raise ConfigError(
            f"the sum has numbers in {module} that {kind} cannot hold; give weights nearer to 0, or adapters of lesser scales"
        )
    return matrix


def _side_by_side(parts: Sequence[tuple[Pair, float]]) -> Pair:
    """The sum, of the rank of all: weights and scales are in B, and the scale is 1."""
    a_RC = torch.cat([_wide(pair.a_RC) for pair, _ in parts])
    b_OR = torch.cat([_wide(pair.b_OR) * (weight * pair.scale) for pair, weight in parts], dim=1)
    return Pair(a_RC, b_OR, float(len(a_RC)))


def _square(pair: Pair) -> float:
    """The squared Frobenius norm of what a pair adds, see `_halves`."""
    _, r_b, _, r_a = _halves(pair)
    return float((r_b @ r_a.T).square().sum())


def _halves(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """QR of both halves: what is between the orthogonal ones is small, so that no matrix of the layer's size is ever made."""
    q_b, r_b = torch.linalg.qr(pair.b_OR.double() * pair.scale)
    q_a, r_a = torch.linalg.qr(pair.a_RC.double().T)
    return q_b, r_b, q_a, r_a


def _truncated(pair: Pair, rank: int) -> tuple[Pair, float]:
    """The pair of at most this rank that is nearest, and the square of what is cut off."""
    q_b, r_b, q_a, r_a = _halves(pair)
    left, value, right = torch.linalg.svd(r_b @ r_a.T)
    made, cut = _kept(left, value, right, rank)
    halves = Pair((made.a_RC @ q_a.T).to(pair.a_RC.dtype), (q_b @ made.b_OR).to(pair.b_OR.dtype), made.alpha)
    return halves, cut


def _truncated_matrix(matrix_OC: Tensor, rank: int) -> tuple[Pair, float]:
    """The same of a matrix that is there whole, in its type."""
    left, value, right = torch.linalg.svd(matrix_OC, full_matrices=False)
    return _kept(left, value, right, rank)


def _kept(left: Tensor, value: Tensor, right: Tensor, rank: int) -> tuple[Pair, float]:
    """The first singular values as a pair, each half with their roots, and the sum of the squares of the others."""
    # What is zero is kept out, but something must stay.
    least = value[0] * (1e-12 if value.dtype == torch.float64 else 1e-7)
    rank = min(rank, max(1, int((value > least).sum())))
    root = value[:rank].sqrt()
    # Of nothing at all B is 0, as in an adapter that has learned nothing. An A of 0 is read as a layer that it has not.
    made = Pair(torch.where(root > 0, root, 1)[:, None] * right[:rank], left[:, :rank] * root, float(rank))
    return made, float(value[rank:].double().square().sum())


def _by_halves(module: str, parts: Sequence[tuple[Pair, float]], way: _Way) -> Pair:
    """A of all A and B of all B by the rule, each with the root of its weight, or its share of a mean; the sign of a weight is in A, as in
    peft.

    Of a mean A is that of the adapters that have the layer, so that the part of those that have not counts once.
    """
    if way.method == "mean":
        share = sum(weight for _, weight in parts) or 1.0
        roots = [weight * math.sqrt(abs(pair.scale)) for pair, weight in parts]
        lengths = [root / share for root in roots]
    else:
        roots = lengths = [math.sqrt(abs(weight * pair.scale)) for pair, weight in parts]
    signed = [math.copysign(length, weight * pair.scale) for length, (pair, weight) in zip(lengths, parts, strict=True)]
    a_RC = _by_rule(module, "A", [_wide(pair.a_RC) for pair, _ in parts], signed, way)
    b_OR = _by_rule(module, "B", [_wide(pair.b_OR) for pair, _ in parts], roots, way)
    return Pair(a_RC, b_OR, float(len(a_RC)))


def _by_matrix(module: str, parts: Sequence[tuple[Pair, float]], way: _Way) -> Tensor:
    """What the rule makes of what the adapters add, whole."""
    deltas = [_finite_matrix(module, pair.delta()) for pair, _ in parts]
    return _by_rule(module, "BA", deltas, [weight for _, weight in parts], way)


def _by_rule(module: str, half: str, tensors: Sequence[Tensor], weights: Sequence[float], way: _Way) -> Tensor:
    assert way.rule is not None
    generators = (way.generator(module, half, number) for number in range(len(tensors)))
    return merged(tensors, weights, way.rule, way.density, generators, way.majority)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least, in which weights and scales are multiplied in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

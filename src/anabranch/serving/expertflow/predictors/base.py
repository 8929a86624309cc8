"""`RoutePredictor`: what names the experts of layers before their routers do."""
# Shapes: T tokens of a step, L routed layers, E experts (of the widest layer), N items, K choices, D width

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from anabranch.bounds import MOST_SIZE, is_whole, shown
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.serving.expertflow.layout import Expert, Layout
from anabranch.serving.expertflow.routes import Routes

# Handed on from a router to the next.
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
# Sums of a matrix in its sketch, and the share of its norm by which those of the same matrix may differ: rounding to bfloat16 moves
# them by a thousandth.
SKETCHED, NEAR = 4, 1 / 64


@dataclass(frozen=True)
class Fingerprint:
    """What a predictor was made for.

    Attributes:
        num_experts: destinations of each routed layer.
        top_k: experts of a token in each.
        tokenizer: says which tokenizer the ids are of, see `tokenizer_fingerprint`.
        routers: of each matrix of the routers, in order, what `sketch` says; None where the weights are not known, as in files of before.
    """

    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    tokenizer: str
    routers: tuple[tuple[float, ...], ...] | None = None

    def check(self, model: "Fingerprint", name: str = "") -> None:
        """Raise CheckpointError, which says the predictor's ``name``, if this is not the ``model``'s."""
        for field, what in (
            ("num_experts", "experts by layer"),
            ("top_k", "active experts"),
            ("tokenizer", "tokenizer"),
        ):
            ours, theirs = getattr(self, field), getattr(model, field)
            if ours != theirs:
                raise CheckpointError(
                    f"the route predictor {f'{name} ' if name else ''}was made for a model of another {what} ({_short(ours)}, this one has "
                    f"{_short(theirs)}); fit one on this model's routes"
                )

    def has_other_routers(self, model: "Fingerprint") -> bool:
        """Whether the routers' weights are known not to be the ``model``'s: of one trained further, or of another seed."""
        if self.routers is None or model.routers is None:
            return False
        ours, theirs = self.routers, model.routers
        return len(ours) != len(theirs) or not all(map(_is_near, ours, theirs))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.num_experts)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        """From JSON. Raises DataError for what is none."""
        if not isinstance(table, dict):
            raise DataError(f"fingerprint is {shown(table)}; it must be a table")
        experts, top_k, tokenizer = (table.get(name) for name in ("num_experts", "top_k", "tokenizer"))
        for name, value in (("num_experts", experts), ("top_k", top_k)):
            if not isinstance(value, list) or not value or not all(_is_count(each) for each in value):
                raise DataError(
                    f"fingerprint.{name} is {shown(value)}; it must be a list of whole numbers above 0, one for each layer"
                )
        assert experts is not None
        assert top_k is not None
        if len(experts) != len(top_k) or any(chosen > size for chosen, size in zip(top_k, experts, strict=True)):
            raise DataError(f"fingerprint.top_k is {shown(top_k)}, which does not fit num_experts {shown(experts)}")
        if not isinstance(tokenizer, str):
            raise DataError(f"fingerprint.tokenizer is {shown(tokenizer)}; it must be a text")
        routers = table.get("routers")
        if routers is not None and not (isinstance(routers, list) and all(map(_is_sketch, routers))):
            raise DataError(
                f"fingerprint.routers is {shown(routers)}; it must be lists of {SKETCHED + 1} finite numbers"
            )
        return cls(tuple(experts), tuple(top_k), tokenizer, None if routers is None else tuple(map(tuple, routers)))


def sketch(weight_RC: Tensor) -> tuple[float, ...]:
    """The norm of a matrix, and its sums under fixed signs: what stays as it is, but for `NEAR`, when weights are rounded to 16 bits.

    The signs of an entry are the product of one of its row and one of its column; so another matrix of that norm differs by about the
    norm, and one that was trained further by about the norm of the change.
    """
    weight_RC = weight_RC.detach().float().cpu()
    # A stream that numpy has promised not to change.
    draw = np.random.RandomState(0)
    row_R, column_CS = (
        torch.from_numpy(draw.randint(0, 2, size).astype(np.float32) * 2 - 1)
        for size in (weight_RC.shape[0], (weight_RC.shape[1], SKETCHED))
    )
    sums_S = row_R @ (weight_RC @ column_CS)
    return tuple(float(f"{value:.7g}") for value in (float(weight_RC.norm()), *sums_S.tolist()))


def _is_near(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    least = NEAR * max(ours[0], theirs[0])
    return all(abs(one - other) <= least for one, other in zip(ours, theirs, strict=True))


def _is_count(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= MOST_SIZE


def _is_sketch(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == SKETCHED + 1
    return is_list and all(
        isinstance(each, float | int) and not isinstance(each, bool) and abs(each) < 1e37 for each in value
    )


def _short(value: Any) -> str:
    text = str(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) < 60 else text[:56] + "..."


@dataclass
class Row:
    """One sequence of a step.

    Attributes:
        key: tells sequences apart.
        ids: all its tokens so far, those of this step too.
        num_new: how many of them are this step's.
        prompt_length: how many were given, not generated.
    """

    key: Hashable
    ids: np.ndarray
    num_new: int
    prompt_length: int


def new_ids(rows: Sequence[Row]) -> np.ndarray:
    """token_T of a step, row after row."""
    return np.concatenate([row.ids[len(row.ids) - row.num_new :] for row in rows]) if rows else np.empty(0, np.int32)


class RoutePredictor:
    """Base of predictors; one that knows nothing.

    Attributes:
        kind: its name in files and options.
        fingerprint: what it was made for.
        observes: wants to be told what was routed.
        refines: predicts a layer from the one before it.
        is_calibrated: what it gives are probabilities; others only order experts.
        knows_steps: `predict` tells something of all layers before a step begins.
    """

    kind: ClassVar[str]
    observes: ClassVar[bool] = False
    refines: ClassVar[bool] = False
    is_calibrated: ClassVar[bool] = False
    knows_steps: ClassVar[bool] = True
    fingerprint: Fingerprint

    def fit(self, routes: Routes) -> Self:
        """Learn from recorded routes; those that learn nothing leave it."""
        return self

    def predict(self, token_T: np.ndarray, rows: Sequence[Row]) -> np.ndarray | None:
        """prob_TLE of the tokens of a step, row after row; None for no idea."""
        return None

    def predict_ahead(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """prob_TLE of the steps after this one, for who knows them."""
        return []

    def observe(self, layer: int, index_TK: np.ndarray, rows: Sequence[Row]) -> None:
        """Where the tokens of the step went in a layer."""

    def refine(
        self, layer: int, x_TD: Tensor, index_TK: Tensor, carry: Mapping[str, Tensor] = NOTHING
    ) -> tuple[int, np.ndarray] | None:
        """(later layer, prob_TE), when ``layer`` has routed its input ``x_TD``; ``carry`` is what its router hands on."""
        return None

    def forget(self, key: Hashable) -> None:
        """A sequence has ended."""


@dataclass(frozen=True)
class Naming:
    """Which experts of a prediction count as what a batch will want.

    Attributes:
        least: of a calibrated predictor, those that some token of the batch goes to with at least this probability. Lower loads more
            in vain, higher leaves more to be waited for.
        extra: of others, the k + ``extra`` likeliest of each token.
    """

    least: float = 0.4
    extra: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1 or self.extra < 0:
            raise ConfigError(f"least must be in (0, 1] and extra at least 0, not {self.least} and {self.extra}")

    def layer(self, prob_TE: np.ndarray, layout: Layout, layer: int, is_calibrated: bool) -> list[Expert]:
        """Of one layer, the likeliest first."""
        if is_calibrated:
            return expect(prob_TE[:, None], layout, self.least, [layer])[0]
        return choose(prob_TE, layout, layer, self.extra)

    def step(self, prob_TLE: np.ndarray, layout: Layout, is_calibrated: bool) -> list[list[Expert]]:
        """Of all layers."""
        layers = range(layout.num_layers)
        if is_calibrated:
            return expect(prob_TLE, layout, self.least, layers)
        return [choose(prob_TLE[:, layer], layout, layer, self.extra) for layer in layers]


def expect(prob_TLE: np.ndarray, layout: Layout, least: float, layers: Sequence[int]) -> list[list[Expert]]:
    """Of each of these ``layers``, the experts that at least one token goes to with probability ``least`` or more, tokens being
    independent; the likeliest first."""
    prob_LE = 1 - np.prod(1 - prob_TLE, axis=0)
    place, index = np.nonzero(prob_LE >= least)
    # Layer by layer; of equals the first, since it is stable.
    order = np.lexsort((-prob_LE[place, index], place))
    found: list[list[Expert]] = [[] for _ in layers]
    pools = [layout.experts_of_pool[layout.pool_of_layer[layer]] for layer in layers]
    for at, one in zip(place[order].tolist(), index[order].tolist(), strict=True):
        # Behind them are the columns of wider layers.
        if one < len(pools[at]):
            found[at].append(pools[at][one])
    return found


def choose(prob_TE: np.ndarray, layout: Layout, layer: int, extra: int = 1) -> list[Expert]:
    """Experts that a batch is predicted to want in a layer: of each token the k + ``extra`` likeliest, together, the likeliest first."""
    pool = layout.pool_of_layer[layer]
    prob_TE = prob_TE[:, : layout.num_experts[pool]]
    places = min(layout.top_k[layer] + extra, prob_TE.shape[1])
    index_TP = np.argpartition(prob_TE, prob_TE.shape[1] - places, axis=1)[:, prob_TE.shape[1] - places :]
    named_E = np.zeros(prob_TE.shape[1], bool)
    named_E[index_TP[np.take_along_axis(prob_TE, index_TP, 1) > 0]] = True
    index = np.flatnonzero(named_E)
    order = np.argsort(-prob_TE[:, index].sum(0), kind="stable")
    return [Expert(pool, int(one)) for one in index[order]]

"""`mixture_report`: what the routers beside matrices do with real rows, layer by layer.

report = mixture_report(model, [(token_BL, None, None)])
print(report)                                   # a line for each router: active experts, entropy, load, ...
"""
# Shapes: B rows, L positions, N = B L items, E experts, K choices per item, T tasks

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.beside import passing
from anabranch.adapters.graft import layers_of
from anabranch.adapters.routed import RoutedLowRank
from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating
from anabranch.routing import HybridEntropy, Router, Routing
from anabranch.routing.uncertainty import uncertainty

__all__ = ["LayerFacts", "MixtureReport", "mixture_report", "routed_layers"]

# Of a forward context's state: the label of each token's row.
_PLACE = "mixture_report.place"
_PADDING = -2

# (token_BL, mask_BL or None, label_B or None)
Rows = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LayerFacts:
    """One router, over the real tokens that it was given.

    Attributes:
        layers: the names of what its experts stand beside.
        tokens: how many; of a router beside an expert, those that the expert was given, maybe none.
        active: mean number of experts that a token uses.
        undecided: share of tokens whose H is above the threshold (of a `HybridEntropy`; else 0.9).
        entropy: mean H, from 0 to 1: of the kind that the select asks for, else Shannon's.
        nats: mean Shannon entropy of the scores.
        load: share of all choices that each expert has.
        weight: mean weight of each expert; all alike where there were no tokens.
        dropped: mean of what a token's weights lack to 1.
        information: I(task; expert) in nats, of tokens with a label and the experts' scores; None without labels.
        by_task: mean weight of each expert, for each label that occurs.
    """

    layers: tuple[str, ...]
    tokens: int
    active: float
    undecided: float
    entropy: float
    nats: float
    load: tuple[float, ...]
    weight: tuple[float, ...]
    dropped: float
    information: float | None = None
    by_task: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def imbalance(self) -> float:
        """The greatest load over the least; infinite where an expert has none."""
        return max(self.load) / min(self.load) if min(self.load) > 0 else float("inf")


@dataclass(frozen=True)
class MixtureReport:
    """All routers of a model, in its order."""

    routers: tuple[LayerFacts, ...]

    def mean(self, name: str) -> float:
        """The mean over routers of a number of theirs, such as ``active``; those that had no tokens have none."""
        values = [getattr(facts, name) for facts in self.routers if facts.tokens]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else float("nan")

    def weights_of(self, task: int) -> dict[str, tuple[float, ...]]:
        """The mean weights of a task's tokens by layer, for `static_mixture`; beside an expert that had none of them, those of all tokens.

        Raises InputError for a task that was not seen.
        """
        known = sorted({label for facts in self.routers for label in facts.by_task})
        if task not in known:
            there = ", ".join(map(str, known)) or "none"
            raise InputError(f"task {task} has no tokens in the report; there are {there}")
        return {layer: facts.by_task.get(task, facts.weight) for facts in self.routers for layer in facts.layers}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"routers": [asdict(facts) for facts in self.routers]}

    def __str__(self) -> str:
        lines = []
        for facts in self.routers:
            told = "" if facts.information is None else f", {facts.information:.3f} nats of the task"
            load = " ".join(f"{share:.2f}" for share in facts.load)
            lines.append(
                f"{facts.layers[0]}: {facts.active:.2f} active, H {facts.entropy:.3f}, undecided {facts.undecided:.0%}, dropped "
                f"{facts.dropped:.3f}{told}, load {load}"
            )
        return "\n".join(lines)


def routed_layers(model: nn.Module) -> dict[str, RoutedLowRank]:
    """The layers beside matrices whose adapters a router chooses, by the names of what they stand beside."""
    found: dict[str, Any] = layers_of(model)
    return {
        name: layer for name, layer in found.items() if isinstance(layer, RoutedLowRank) and layer.router is not None
    }


@torch.no_grad()
def mixture_report(model: nn.Module, rows: Iterable[Rows]) -> MixtureReport:
    """Run ``rows`` through ``model`` in evaluation mode, and tell what its routers did.

    Args:
        model: with `RoutedLowRank` layers that have routers; a `Decoder`, or a module that is called with ``input_ids``.
        rows: batches of (token_BL, mask_BL or None, label_B or None); labels are of tasks.

    Raises ConfigError for a model without such routers, InputError where there are no rows.
    """
    layers = routed_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no routers beside its matrices")
    names: dict[Router, list[str]] = {}
    for name, layer in layers.items():
        assert layer.router is not None
        names.setdefault(layer.router, []).append(name)
    sums = {router: _Sums(router) for router in names}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for router, total in sums.items():
            stack.callback(router.register_forward_hook(partial(_see, total)).remove)
        for token_BL, mask_BL, label_B in rows:
            place_BL = _places(token_BL, mask_BL, label_B)
            for total in sums.values():
                total.place_BL = place_BL
            _run(model, token_BL, mask_BL, place_BL)
    if not any(total.tokens for total in sums.values()):
        raise InputError("there are no rows to report on")
    return MixtureReport(tuple(total.facts(tuple(names[router])) for router, total in sums.items()))


def _places(token_BL: Tensor, mask_BL: Tensor | None, label_B: Tensor | None) -> Tensor:
    """int64 ``[B, L]``: the label of each token's row, -1 without one, `_PADDING` for padding."""
    label_B = torch.full((len(token_BL),), -1) if label_B is None else label_B
    place_BL = label_B.to(token_BL.device).long().clamp_min(-1).unsqueeze(1).expand(token_BL.shape)
    return place_BL if mask_BL is None else torch.where(mask_BL.bool(), place_BL, _PADDING)


def _run(model: nn.Module, token_BL: Tensor, mask_BL: Tensor | None, place_BL: Tensor) -> None:
    if isinstance(model, Decoder):
        # It goes with the tokens, also to the experts that they are given.
        model(token_BL, token_mask_BL=mask_BL, state={_PLACE: place_BL})
        return
    with passing(model, mask_BL=mask_BL, length=token_BL.shape[1]):
        options = {} if mask_BL is None else {"attention_mask": mask_BL.long()}
        model(input_ids=token_BL, **options)


def _see(total: "_Sums", router: nn.Module, args: Any, routing: Routing) -> None:
    context = args[1] if len(args) > 1 else None
    total.add(routing, None if context is None else context.state.get(_PLACE))


class _Sums:
    """Adds up what one router does."""

    def __init__(self, router: Router) -> None:
        select = router.config.select
        hybrid = select if isinstance(select, HybridEntropy.Config) else None
        self._kind: Any = "shannon" if hybrid is None else hybrid.entropy
        self._index = 1.0 if hybrid is None else hybrid.entropy_index
        self._threshold = 0.9 if hybrid is None else hybrid.entropy_threshold
        number = router.num_destinations
        self.tokens = 0
        self._number = torch.zeros(5, dtype=torch.float64)
        self._load_E, self._weight_E = torch.zeros(2, number, dtype=torch.float64)
        self._by_task: dict[int, tuple[float, Tensor, Tensor]] = {}
        self.place_BL = torch.zeros(0, 0, dtype=torch.int64)

    def add(self, routing: Routing, place: Tensor | None) -> None:
        """A decision for the tokens at these places; for all of the pass where nobody knows them."""
        place_N = (self.place_BL if place is None else place).reshape(-1).cpu()
        if len(place_N) < routing.num_items:
            # One stream after another.
            place_N = place_N.repeat(routing.num_items // len(place_N))
        real_N = place_N != _PADDING
        score_NE = routing.score_NE.double().cpu()[real_N]
        share_NE = score_NE / score_NE.sum(-1, keepdim=True).clamp_min(1e-20)
        index_NK, weight_NK = routing.index_NK.cpu()[real_N], routing.weight_NK.double().cpu()[real_N]
        used_NK = index_NK >= 0
        weight_NE = torch.zeros_like(share_NE).scatter_add(1, index_NK.clamp_min(0), weight_NK * used_NK)
        entropy_N = uncertainty(share_NE, self._kind, self._index)
        nats_N = -(share_NE * share_NE.clamp_min(1e-30).log()).sum(-1)
        self.tokens += len(share_NE)
        self._number += torch.stack(
            [
                used_NK.sum().double(),
                (entropy_N > self._threshold).sum().double(),
                entropy_N.sum(),
                nats_N.sum(),
                (1 - weight_NE.sum(-1)).sum(),
            ]
        )
        self._load_E += torch.zeros_like(share_NE).scatter_add(1, index_NK.clamp_min(0), used_NK.double()).sum(0)
        self._weight_E += weight_NE.sum(0)
        label_N = place_N[real_N]
        for label in label_N[label_N >= 0].unique().tolist():
            mine_N = label_N == label
            count, weight_E, share_E = self._by_task.get(label, (0.0, torch.zeros(()), torch.zeros(())))
            made = (count + int(mine_N.sum()), weight_E + weight_NE[mine_N].sum(0), share_E + share_NE[mine_N].sum(0))
            self._by_task[label] = made

    def facts(self, layers: tuple[str, ...]) -> LayerFacts:
        """What it comes to."""
        active, undecided, entropy, nats, dropped = (self._number / max(self.tokens, 1)).tolist()
        # Weights that sum to 1 lack nothing, whatever they were rounded to.
        dropped = max(dropped, 0.0)
        even_E = torch.full_like(self._weight_E, 1 / len(self._weight_E))
        return LayerFacts(
            layers=layers,
            tokens=self.tokens,
            active=active,
            undecided=undecided,
            entropy=entropy,
            nats=nats,
            load=tuple((self._load_E / self._load_E.sum().clamp_min(1)).tolist()),
            weight=tuple((self._weight_E / self.tokens if self.tokens else even_E).tolist()),
            dropped=dropped,
            information=_information([(count, share_E) for count, _, share_E in self._by_task.values()]),
            by_task={
                label: tuple((weight_E / count).tolist())
                for label, (count, weight_E, _) in sorted(self._by_task.items())
            },
        )


def _information(tasks: list[tuple[float, Tensor]]) -> float | None:
    """I(task; expert) in nats of (tokens, summed shares) of each task."""
    if not tasks:
        return None
    joint_TE = torch.stack([share_E for _, share_E in tasks])
    joint_TE = joint_TE / joint_TE.sum()
    even_TE = joint_TE.sum(1, keepdim=True) * joint_TE.sum(0, keepdim=True)
    return float((joint_TE * (joint_TE.clamp_min(1e-30) / even_TE.clamp_min(1e-30)).log()).sum().clamp_min(0))

"""The adapters of one forward pass: which row uses which mixture, and what a mixture adds to a part of a matrix.

A mixture adds up products of adapters' numbers, and what layers make of the rows (`anabranch.serving.engine.served_layers`): routers that
choose among a pool, and adapters that go by a task. Layers get the rows of a mixture with a forward context of these alone (`Group`).
"""
# Shapes: T tokens of a pass, N = P T items of a layer, P streams, M rows of one mixture, O outputs, K choices of a row

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from anabranch.adapters.glider.score import watching
from anabranch.errors import AnabranchError
from anabranch.nn import items
from anabranch.routing import Routing
from anabranch.routing.context import OfPass
from anabranch.serving.core.request import Route
from anabranch.serving.engine.adapter_parts import PartRows, ServedPart
from anabranch.serving.engine.explained import Tally, TokenRoute

__all__ = ["ROUTES", "Group", "Mixed", "PassAdapters", "Routes", "ServedAdapter", "Use", "of_items"]

# In a context's state: the mixture of each item, its request, and the pass's `PassAdapters`.
_INDEX, _REQUEST, _PASS = "served_adapters.index", "served_adapters.request", "served_adapters.pass"
# Likewise, of the rows of a group: its `Routes`, where somebody wants them.
ROUTES = "served_adapters.routes"
_EXPERTS = ".experts."


class Use(Protocol):
    """What adds to rows of matrices: the numbers of an adapter, or layers with what a request tells them.

    Attributes:
        parts: what there is for each part of a linear layer that it adds to, by our names (``blocks.3.attention.q``).
        version: equal where all that is added is.
        pools: names of the pools of experts that it adapts.
        key: rows whose uses have equal keys are computed together.
        has_layers: whether its parts are layers, which want a context of their rows.
    """

    @property
    def parts(self) -> Mapping[str, ServedPart]: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def pools(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def key(self) -> Hashable: ...  # noqa: D102
    @property
    def has_layers(self) -> bool: ...  # noqa: D102

    def state(self, uses: Sequence[Any], request_M: Tensor) -> dict[str, Any]:
        """What the context of rows with this key has beside; ``uses`` are of all requests of the pass."""


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter in memory, of no model in particular.

    Attributes:
        parts: what it has for each part of a linear layer that it adapts, by our names (``blocks.3.attention.q``).
        version: equal where all numbers are.
        kind: as peft calls it, in lower case.
    """

    parts: Mapping[str, ServedPart]
    version: str
    kind: str = "lora"

    @property
    def nbytes(self) -> int:
        """Of all numbers."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def told(self) -> dict[str, Any]:
        """For whoever asks what there is."""
        return {"kind": self.kind}

    @property
    def key(self) -> Hashable:
        """Itself."""
        return id(self)

    @property
    def has_layers(self) -> bool:
        """None."""
        return False

    def state(self, uses: Sequence[Any], request_M: Tensor) -> dict[str, Any]:
        """Nothing."""
        return {}

    @cached_property
    def pools(self) -> frozenset[str]:
        """Names of the pools of experts that it adapts."""
        return frozenset(f"{name.split(_EXPERTS)[0]}.experts" for name in self.parts if _EXPERTS in name)


# A request's adapters with their weights.
Mixed = tuple[tuple[Use, float], ...]


@dataclass(eq=False)
class Group:
    """Rows of a matrix that are computed together, for layers of their mixture.

    Attributes:
        item_M: int64, which of the N items that the matrix sees they are.
        request_M: int64, the number of the request of each.
    """

    item_M: Tensor
    request_M: Tensor
    _adapters: "PassAdapters"
    _context: Any
    _size: int
    # By use. Each goes on through the layers of the pass: a router may hand something on.
    _contexts: dict[Hashable, Any] = field(default_factory=dict)

    def context(self, use: Use) -> Any:
        """The forward context of these rows for a use of theirs."""
        if use.key not in self._contexts:
            own = items.of_items(self._context, self.item_M, self._size)
            asked = self._adapters.asked
            own.state |= use.state([_same(mixed, use.key) for mixed in asked], self.request_M)
            if self._adapters.routes:
                own.state |= {
                    ROUTES: OfPass(Routes(self._adapters.routes, len(self._adapters.number_T), use.key)),
                    **watching({}),
                }
            self._contexts[use.key] = own
        return self._contexts[use.key]


def _same(mixed: Mixed, key: Hashable) -> Use | None:
    """The use of a request with this key."""
    return next((use for use, _ in mixed if use.key == key), None)


class Routes:
    """Where routers beside matrices leave what they chose for tokens whose routes are wanted.

    Args:
        of_row: by the token's place in the pass, ``{matrix: adapters}`` that is filled in.
        num_tokens: T of the pass.
        key: of the use that the routers are of.
    """

    def __init__(self, of_row: Mapping[int, Route], num_tokens: int, key: Hashable = None) -> None:
        self._of_row, self._num_tokens, self._key = of_row, num_tokens, key

    def note(
        self,
        matrix: str,
        names: Sequence[str],
        item_M: Tensor,
        routing: Routing,
        local: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A decision for M items of the pass; of several streams each adapter counts once.

        Args:
            matrix: beside which it was made.
            names: of the adapters.
            item_M: the items.
            routing: what was decided.
            local: (local_ME, open_E) of a pool that compares queries: what items say of each adapter, and which the matrix has; None for
                others.
        """
        for place, (item, chosen) in enumerate(zip(item_M.tolist(), routing.index_NK.tolist(), strict=True)):
            route = self._of_row.get(item % self._num_tokens)
            if route is None:
                continue
            used = [names[number] for number in chosen if number >= 0]
            route[matrix] = tuple(dict.fromkeys((*route.get(matrix, ()), *used)))
            if local is not None and isinstance(route, TokenRoute):
                tally = route.pools.setdefault(self._key, Tally.of(len(names)))
                tally.note(local[0][place], local[1], routing, place)


@dataclass(eq=False)
class PassAdapters:
    """The adapters of one forward pass.

    Attributes:
        mixtures: those that differ.
        number_T: of each token its mixture; -1 for none.
        asked: the mixture of each request of the pass.
        request_T: of each token its request.
        routes: by token, what its routers chose, filled in; see `Routes`.
    """

    mixtures: list[Mixed] = field(default_factory=list)
    number_T: list[int] = field(default_factory=list)
    asked: list[Mixed] = field(default_factory=list)
    request_T: list[int] = field(default_factory=list)
    routes: Mapping[int, Route] = field(default_factory=dict)
    # By the index tensor that a layer was given, which is kept, so that no other takes its place in memory.
    _groups: dict[int, tuple[Tensor, list[tuple[int, Tensor | None]]]] = field(default_factory=dict)
    # By that tensor and the mixture.
    _rows: dict[tuple[int, int], Group] = field(default_factory=dict)

    @classmethod
    def of(
        cls, mixed: Sequence[Mixed], counts: Sequence[int], routes: Mapping[int, Route] | None = None
    ) -> "PassAdapters":
        """That of requests with these adapters, and so many tokens each, in order."""
        made, numbers = cls(routes=routes or {}), dict[Any, int]()
        for request, (one, count) in enumerate(zip(mixed, counts, strict=True)):
            number = -1
            if one:
                key = tuple((use.key, weight) for use, weight in one)
                number = numbers.setdefault(key, len(made.mixtures))
                if number == len(made.mixtures):
                    made.mixtures.append(one)
            made.asked.append(one)
            made.number_T += [number] * count
            made.request_T += [request] * count
        return made

    def state(self, streams: int, device: torch.device) -> dict[str, Any]:
        """For the context of the pass."""
        index_1T, request_1T = (
            torch.tensor([told], dtype=torch.int64, device=device) for told in (self.number_T, self.request_T)
        )
        told = {_INDEX: index_1T.expand(streams, -1), _PASS: OfPass(self)}
        if any(use.has_layers for mixed in self.mixtures for use, _ in mixed):
            told[_REQUEST] = request_1T.expand(streams, -1)
        return told

    def groups(self, index: Tensor) -> list[tuple[int, Tensor | None]]:
        """Each mixture with its rows, None for all; found once for all layers that see the same items."""
        kept = self._groups.get(id(index))
        if kept is None or kept[0] is not index:
            flat_N = index.reshape(-1)
            found: list[tuple[int, Tensor | None]] = []
            for number in sorted(set(flat_N.tolist())):
                if number >= 0:
                    is_own_N = flat_N == number
                    found.append((number, None if bool(is_own_N.all()) else is_own_N.nonzero().flatten()))
            kept = self._groups[id(index)] = index, found
        return kept[1]

    def rows(self, index: Tensor, number: int, row_M: Tensor | None, context: Any) -> Group | None:
        """The rows of a mixture for its layers; None where it has none.

        Args:
            index: of each item its mixture.
            number, row_M: of the mixture, as of `groups`.
            context: of the pass, as the first of the layers that see these items has it.
        """
        if not any(use.has_layers for use, _ in self.mixtures[number]):
            return None
        key = id(index), number
        if key not in self._rows:
            request_N = context.state[_REQUEST].reshape(-1)
            item_M = torch.arange(len(request_N), device=index.device) if row_M is None else row_M
            self._rows[key] = Group(item_M, request_N[item_M], self, context, len(request_N))
        return self._rows[key]

    def end(self) -> None:
        """The pass has run. Groups know its context, which knows them: without this they would lie about until somebody collects."""
        self._groups.clear()
        self._rows.clear()

    def adapts_experts(self, number: int, pool: str) -> bool:
        """Whether a mixture has parts of the experts of a pool."""
        return any(pool in adapter.pools for adapter, _ in self.mixtures[number])

    def delta(self, number: int, part: str, rows: PartRows) -> Tensor | None:
        """delta_MO: what a mixture adds to a part of a matrix, of ``rows`` that are its own, in the adapters' type; None for nothing."""
        total: Tensor | None = None
        for adapter, weight in self.mixtures[number]:
            own = adapter.parts.get(part)
            if own is None:
                continue
            own_MO = own.added(rows)
            own_MO = own_MO if weight == 1 else own_MO * weight
            total = own_MO if total is None else total + own_MO
        return total


def of_items(context: Any, num_items: int) -> tuple[PassAdapters, Tensor]:
    """(the adapters of the pass, the mixture of each item) that a layer is called with. Raises AnabranchError where nobody says."""
    state = {} if context is None else context.state
    if _PASS not in state:
        raise AnabranchError("a layer is called without the context of its pass, so nobody knows whose rows these are")
    adapters, index = state[_PASS].value, state[_INDEX]
    if index.numel() != num_items:
        raise AnabranchError(
            f"a layer sees {num_items} of the {index.numel()} items of a pass, so nobody knows whose they are"
        )
    return adapters, index

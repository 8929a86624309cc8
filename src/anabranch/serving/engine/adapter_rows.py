"""Adapters of the rows of a step: which row uses which, and the matrices that add what its adapters say.

with sites.on():
    model.hidden(tokens, context)       # context.state has what `PassAdapters.state` gives

Nothing of an adapter is in the model. While a pass with adapters runs, each matrix is called through an `Adapting`, which adds to the rows
of each mixture what its adapters make of them, and to no other row; passes without adapters run the model as it is. So a row never meets
the numbers of another's adapter, and an adapter comes and goes without the model being touched.
"""
# Shapes: T tokens of a pass, N = P T rows of a matrix, P streams, C inputs, O outputs, R rank

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters import LowRank
from anabranch.errors import AnabranchError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn import Linear
from anabranch.nn.latent_attention import LatentAttention
from anabranch.nn.linear import Added, call_linear
from anabranch.routing.context import OfPass

__all__ = ["Adapting", "Mixed", "PassAdapters", "ServedAdapter", "Sites"]

# In a context's state: the mixture of each item, and the pass's `PassAdapters`.
_INDEX, _PASS = "served_adapters.index", "served_adapters.pass"


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter in memory, of no model in particular.

    Attributes:
        parts: A ``[R, C]``, B transposed ``[R, O]``, both float32 or bfloat16, and the scale of each part of a linear layer that it
            adapts, by our names (``blocks.3.attention.q``).
        version: equal where all numbers are.
        rank: the greatest.
    """

    parts: Mapping[str, tuple[Tensor, Tensor, float]]
    version: str
    rank: int

    @property
    def nbytes(self) -> int:
        """Of all A and B."""
        return sum(half.nbytes for a_RC, b_RO, _ in self.parts.values() for half in (a_RC, b_RO))


# A request's adapters with their weights.
Mixed = tuple[tuple[ServedAdapter, float], ...]


@dataclass(eq=False)
class PassAdapters:
    """The adapters of one forward pass.

    Attributes:
        mixtures: those that differ.
        number_T: of each token its mixture; -1 for none.
    """

    mixtures: list[Mixed] = field(default_factory=list)
    number_T: list[int] = field(default_factory=list)
    # By the index tensor that a layer was given, which is kept, so that no other takes its place in memory.
    _groups: dict[int, tuple[Tensor, list[tuple[int, Tensor | None]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, mixed: Sequence[Mixed], counts: Sequence[int]) -> "PassAdapters":
        """That of requests with these adapters, and so many tokens each, in order."""
        made, numbers = cls(), dict[Any, int]()
        for one, count in zip(mixed, counts, strict=True):
            number = -1
            if one:
                key = tuple((id(adapter), weight) for adapter, weight in one)
                number = numbers.setdefault(key, len(made.mixtures))
                if number == len(made.mixtures):
                    made.mixtures.append(one)
            made.number_T += [number] * count
        return made

    def state(self, streams: int, device: torch.device) -> dict[str, Any]:
        """For the context of the pass."""
        index_1T = torch.tensor([self.number_T], dtype=torch.int64, device=device)
        return {_INDEX: index_1T.expand(streams, -1), _PASS: OfPass(self)}

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

    def delta(self, number: int, part: str, x_NC: Tensor) -> Tensor | None:
        """What a mixture adds to a part of a matrix, of rows that are its own, in the adapters' type; None for nothing."""
        total: Tensor | None = None
        for adapter, weight in self.mixtures[number]:
            pair = adapter.parts.get(part)
            if pair is None:
                continue
            a_RC, b_RO, scale = pair
            own_NO = torch.matmul(F.linear(x_NC.to(a_RC.dtype), a_RC), b_RO) * (scale * weight)
            total = own_NO if total is None else total + own_NO
        return total


class Adapting(Linear):
    """A matrix in a pass with adapters: y = W x, and what the adapters of each row add to it.

    Args:
        matrix: the layer, whatever it is.
        parts: first row and number of rows of each part, by its whole name.
    """

    def __init__(self, matrix: nn.Module, parts: Mapping[str, tuple[int, int]]) -> None:
        nn.Module.__init__(self)
        self.matrix, self.parts = matrix, dict(parts)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """y."""
        y = call_linear(self.matrix, x, context)
        state = {} if context is None else context.state
        if _PASS not in state:
            raise AnabranchError(
                "a layer is called without the context of its pass, so nobody knows whose rows these are"
            )
        adapters, index = state[_PASS].value, state[_INDEX]
        x_NC, y_NO = x.flatten(0, -2), y.reshape(-1, y.shape[-1])
        if index.numel() != len(x_NC):
            raise AnabranchError(
                f"a layer sees {len(x_NC)} of the {index.numel()} items of a pass, so nobody knows whose they are"
            )
        for number, row_M in adapters.groups(index):
            own_MC = x_NC if row_M is None else x_NC[row_M]
            for part, (start, size) in self.parts.items():
                delta_MO = adapters.delta(number, part, own_MC)
                if delta_MO is None:
                    continue
                delta_MO = delta_MO.to(y_NO.dtype)
                if row_M is None:
                    y_NO[:, start : start + size] += delta_MO
                else:
                    y_NO[:, start : start + size].index_add_(0, row_M, delta_MO)
        return y_NO.view(y.shape)


class Sites:
    """The matrices of a model that adapters may add to, other than its head.

    Attributes:
        parts: names of their parts.

    Args:
        model: as it will run: a matrix that is replaced afterwards stays what it was here.
    """

    def __init__(self, model: Decoder) -> None:
        self._places: list[tuple[dict[str, Any], str, nn.Module, Adapting]] = []
        self.parts: set[str] = set()
        for name, rows in _matrices(model.config):
            owner, _, leaf = name.rpartition(".")
            holder = model.get_submodule(owner)
            # It is computed with as a matrix, not called with rows of tokens.
            if leaf == "head" or (isinstance(holder, LatentAttention) and leaf == "kv_up"):
                continue
            prefix = f"{owner}." if owner else ""
            start, parts = 0, {}
            for part, size in rows.items():
                parts[f"{prefix}{part}"] = start, size
                start += size
            self.parts |= parts.keys()
            plain = model.get_submodule(name)
            self._places.append((holder._modules, leaf, plain, Adapting(plain, parts).eval()))

    @contextmanager
    def on(self) -> Iterator[None]:
        """The model runs with the adapters that the context of a pass names."""
        try:
            for modules, leaf, _, adapting in self._places:
                modules[leaf] = adapting
            yield
        finally:
            for modules, leaf, plain, _ in self._places:
                modules[leaf] = plain


def _matrices(config: Decoder.Config) -> Iterator[tuple[str, Mapping[str, int]]]:
    """(name, rows of its parts) of each linear layer of a model, but those within experts."""
    # What an adapter may stand beside has a layer beside it where one asks for that everywhere.
    probe = LowRank.Config(rank=1)
    try:
        built = build_empty(config.replace(linears={"*": probe}))
    except ConfigError:
        # Experts with biases have no layers of their own.
        built = build_empty(config.replace(linears={"*.attention.*": probe}))
    for name, module in built.named_modules():
        if isinstance(module, Added):
            yield name, module.rows

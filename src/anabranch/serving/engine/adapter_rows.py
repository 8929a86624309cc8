"""Adapters of the rows of a step: the matrices that add what the adapters of each row say.

with sites.on():
    model.hidden(tokens, context)       # context.state has what `PassAdapters.state` gives

Nothing of an adapter is in the model. While a pass with adapters runs, each matrix is called through an `Adapting`, which adds to the rows
of each mixture what its adapters make of them, and to no other row; passes without adapters run the model as it is. So a row never meets
the numbers of another's adapter, and an adapter comes and goes without the model being touched.
"""
# Shapes: N rows of a matrix, M rows of one mixture, C inputs, O outputs, X outputs of all parts

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from anabranch.adapters import LowRank
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn import Linear
from anabranch.nn.latent_attention import LatentAttention
from anabranch.nn.linear import Added, call_linear, numbers_of
from anabranch.serving.engine.adapter_experts import adaptable_pools
from anabranch.serving.engine.adapter_parts import PartRows
from anabranch.serving.engine.pass_adapters import of_items

__all__ = ["HEAD", "Adapting", "Sites"]

# Our name of the head, which every row that samples goes through behind the pass.
HEAD = "head"


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
        x_NC, y_NO = x.flatten(0, -2), y.reshape(-1, y.shape[-1])
        adapters, index = of_items(context, len(x_NC))
        for number, row_M in adapters.groups(index):
            own_MC = x_NC if row_M is None else x_NC[row_M]
            group = adapters.rows(index, number, row_M, context)
            for_layers = (group, None if group is None else own_MC.unsqueeze(0))
            for part, (start, size) in self.parts.items():
                part_NO = y_NO[:, start : start + size]
                delta_MO = adapters.delta(number, part, self._rows(own_MC, part_NO, row_M, start, context, for_layers))
                if delta_MO is None:
                    continue
                delta_MO = delta_MO.to(y_NO.dtype)
                if row_M is None:
                    part_NO += delta_MO
                else:
                    part_NO.index_add_(0, row_M, delta_MO)
        return y_NO.view(y.shape)

    def _rows(
        self,
        x_MC: Tensor,
        part_NO: Tensor,
        row_M: Tensor | None,
        start: int,
        context: Any,
        for_layers: tuple[Any, Tensor | None],
    ) -> PartRows:
        """Some rows at the part that begins at ``start``; ``part_NO`` is what it made of all rows, and of these still is."""
        size = part_NO.shape[1]
        return PartRows(
            x_MC,
            lambda: part_NO if row_M is None else part_NO[row_M],
            lambda x_MC: call_linear(self.matrix, x_MC, context)[:, start : start + size],
            *for_layers,
        )


class Sites:
    """The matrices of a model that adapters may add to, other than its head, and its experts.

    Attributes:
        model: whose they are.
        parts: names of their parts.

    Args:
        model: as it will run: a matrix that is replaced afterwards stays what it was here.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._rows_of: dict[str, tuple[nn.Module, int, int]] = {}
        # Where each stands, as what, and what stands there while a pass has adapters.
        self._places: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []
        self.parts: set[str] = set()
        for name, rows in _matrices(model.config):
            owner, _, leaf = name.rpartition(".")
            holder = model.get_submodule(owner)
            # It is computed with as a matrix, not called with rows of tokens.
            if leaf == "head" or (isinstance(holder, LatentAttention) and leaf == "kv_up"):
                continue
            prefix = f"{owner}." if owner else ""
            start, parts = 0, {}
            plain = model.get_submodule(name)
            for part, size in rows.items():
                parts[f"{prefix}{part}"] = start, size
                self._rows_of[f"{prefix}{part}"] = plain, start, size
                start += size
            self.parts |= parts.keys()
            self._places.append((holder._modules, leaf, plain, Adapting(plain, parts).eval()))
        for name, adapting in list(adaptable_pools(model)):
            owner, _, leaf = name.rpartition(".")
            self.parts.update(adapting.parts)
            self._places.append((model.get_submodule(owner)._modules, leaf, adapting.pool, adapting.eval()))

    def numbers(self, part: str) -> tuple[Tensor, Tensor | None]:
        """(weight_OC, bias_O) of a part of a matrix, or of the head, as they count where they are stored in few bits."""
        if part == HEAD:
            return (self.model.embedding.weight, None) if self.model.head is None else numbers_of(self.model.head)
        plain, start, size = self._rows_of[part]
        weight_XC, bias_X = numbers_of(plain)
        own = slice(start, start + size)
        return weight_XC[own], None if bias_X is None else bias_X[own]

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

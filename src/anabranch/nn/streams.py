"""Parallel streams: the interface of a design that runs one decoder several times at once and merges what comes out."""
# Shapes: B sequences, P streams, L positions, H key-value heads, M prefix entries, D head width, W model width

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, Repeats, configclass, to_dict
from anabranch.nn.context import Count
from anabranch.routing.context import RoutingContext

__all__ = ["Streams"]


class Streams(Part, nn.Module, family="streams"):
    """Interface: ``expand`` a batch to P copies of it, give each its ``prefixes``, ``merge`` the last hidden states.

    Rows are stream-major: sequence b of stream p is row p B + b, so all streams share each matrix product, and the weights are read once.
    The config's ``build(context, attention)`` makes it after everything else of the model, so the other initial weights are
    those of the plain model.
    """

    @configclass
    class Config(BaseConfig):
        """Base of stream configs. ``freezes_model`` says whether only the streams' own parameters learn."""

        num_streams: Repeats = 1
        freezes_model: ClassVar[Any] = False

        @property
        def choices(self) -> tuple[int, ...]:
            """Every P that a forward pass can have, ascending."""
            raise NotImplementedError  # abstract

        def essence(self) -> dict[str, Any]:
            """What of this config decides a trained model's function, JSON-ready."""
            return to_dict(self)

        def of_step(self, step: int) -> int | None:
            """P of a training step, after ``step`` finished ones; None where training does not change it."""
            return None

        def count(self, layers: Count, dim: int, num_layers: int, attention: Any) -> Count:
            """Sizes of ``layers``, all blocks of the model, when they run as streams, with what the streams add."""
            raise NotImplementedError  # abstract

    @property
    def num_streams(self) -> int:
        """P of a forward pass that does not say it."""
        raise NotImplementedError  # abstract

    @property
    def config_in_use(self) -> Any:
        """The config to save: that of the weights, with P as it was chosen since."""
        return self.config

    def check(self, num_streams: int) -> None:
        """Raise ConfigError for a P that no forward pass can have."""
        raise NotImplementedError  # abstract

    def num_prefix_of(self, num_streams: int) -> int:
        """M, the entries that stand in front of every sequence's keys and values where there are so many streams."""
        raise NotImplementedError  # abstract

    @property
    def num_prefix(self) -> int:
        """M of a forward pass that does not say its P."""
        return self.num_prefix_of(self.num_streams)

    @property
    def first_position(self) -> int:
        """Position of the first token of a sequence: entries in front may take those before."""
        return 0

    @property
    def prompt_MW(self) -> Tensor | None:
        """Embeddings of virtual tokens, where the prefixes are what the model's layers make of them; None where `prefixes` has them."""
        return None

    @property
    def front_gates(self) -> Callable[[int, Tensor], Tensor] | None:
        """What each query multiplies the prefixes' keys and values by, gate_BL of a layer by what goes into its attention, ``[B, L, W]``.

        None for 1. Attention of another kind than `anabranch.nn.SelfAttention` knows of none.
        """
        return None

    def prefixes(self, num_streams: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(key_PHMD, value_PHMD) of each layer; they are not rotated and take no position. Empty if M is 0."""
        raise NotImplementedError  # abstract

    def expand(self, x: Tensor, num_streams: int | None = None) -> Tensor:
        """``x`` ``[B, ...]`` once for every stream: ``[P B, ...]``; ``x`` itself for one stream."""
        num_streams = self.num_streams if num_streams is None else num_streams
        return x if num_streams == 1 else x.repeat(num_streams, *[1] * (x.dim() - 1))

    def merge(self, x_BLW: Tensor, context: RoutingContext) -> Tensor:
        """``[B, L, W]`` from the ``[P B, L, W]`` of all streams; P is ``context.num_streams``."""
        raise NotImplementedError  # abstract

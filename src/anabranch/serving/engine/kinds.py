"""`Kinds`: the layers of a model by how far back they see, what each kind keeps of a position, and how memory is shared out among them.

Layers with a window need no more than the window and what a step computes of each request, whatever its length. They have a pool of their
own, no larger than that, and the others get the rest: never fewer tokens than if all layers kept all.
"""

from dataclasses import dataclass, replace
from typing import Self

from anabranch.errors import CapacityError
from anabranch.lm.decoder import Decoder
from anabranch.serving.config import DEFAULT_KV, ServingConfig, parse_bytes
from anabranch.serving.core.kinds import most_blocks
from anabranch.serving.engine.paged import PagedShape

__all__ = ["Kinds", "LayerKind"]


@dataclass(frozen=True)
class LayerKind:
    """Layers that see equally far back.

    Attributes:
        layers: their numbers.
        window: positions that a token sees, its own among them; None for all.
        shape: what they keep of a position.
    """

    layers: tuple[int, ...]
    window: int | None
    shape: PagedShape


@dataclass(frozen=True)
class Kinds:
    """One or two kinds, the one that sees furthest back first.

    Attributes:
        kinds: they.
        config: sizes of steps and blocks.
    """

    kinds: tuple[LayerKind, ...]
    config: ServingConfig

    @classmethod
    def of(cls, model: Decoder, config: ServingConfig) -> Self:
        """Those of a decoder. One that keeps all where keys and values go to a second place, paths may visit layers again, or blocks pass
        over tokens: see ``host_kv``, ``max_depth`` and ``depth.skipper``."""
        if config.host_kv is not None or config.max_depth is not None or config.depth.skipper is not None:
            return cls.whole(model, config)
        shape = PagedShape.of(model)
        by_window: dict[int | None, list[int]] = {}
        for layer in range(model.config.num_layers):
            by_window.setdefault(getattr(model.config.attention_of(layer), "window", None), []).append(layer)
        order = sorted(by_window, key=lambda window: (window is not None, -(window or 0)))
        return cls(
            tuple(
                LayerKind(tuple(by_window[window]), window, replace(shape, layers=len(by_window[window])))
                for window in order
            ),
            config,
        )

    @classmethod
    def whole(cls, model: Decoder, config: ServingConfig) -> Self:
        """One kind, whose layers keep all that they have seen."""
        layers = tuple(range(model.config.num_layers))
        return cls((LayerKind(layers, None, PagedShape.of(model, config.max_depth)),), config)

    @property
    def windows(self) -> tuple[int | None, int | None]:
        """(of the first kind, of the second)."""
        return self.kinds[0].window, self.kinds[1].window if len(self.kinds) > 1 else None

    def blocks(self) -> int:
        """Blocks of the first kind, as the config says: of all processes that keep some. Raises CapacityError if not even one fits."""
        if self.config.num_blocks is not None:
            return self.config.num_blocks
        return self.blocks_in(parse_bytes(self.config.kv_memory or DEFAULT_KV) * (self.config.context or 1))

    def second_blocks(self, num_blocks: int) -> int | None:
        """Blocks of the second kind beside so many of the first: as many, or all that requests of a step ever need.

        None where there is no second kind.
        """
        if len(self.kinds) == 1:
            return None
        window = self.kinds[1].window
        assert window is not None, "it sees less far back than another"
        return min(num_blocks, self.config.max_seqs * self._most(window))

    def blocks_in(self, size_bytes: int) -> int:
        """Blocks of the first kind that fit, beside those of the second that go with them. Raises CapacityError if not even one does."""
        first, second = self._block_bytes
        count = size_bytes // (first + second)
        if count < 1:
            raise CapacityError(
                f"kv_memory is {self.config.kv_memory or size_bytes}; a block of {self.config.block_tokens} tokens takes "
                f"{first + second} bytes"
            )
        # A second kind that has all it needs leaves the rest to the first.
        has_all = self.second_blocks(count) == self.second_blocks(count + 1)
        return count + (size_bytes - self.bytes_of(count)) // first if has_all else count

    def bytes_of(self, num_blocks: int) -> int:
        """Memory of so many blocks of the first kind, and those of the second that go with them."""
        first, second = self._block_bytes
        return num_blocks * first + (self.second_blocks(num_blocks) or 0) * second

    def needed(self, positions: int, requests: int = 1) -> int:
        """Blocks of the first kind for so many requests of so many positions."""
        blocks, window = -(-positions // self.config.block_tokens), self.kinds[0].window
        return requests * (blocks if window is None else min(blocks, self._most(window)))

    @property
    def most_tokens(self) -> int | None:
        """Tokens that a request of any length has blocks of the first kind for while it runs; None for all it has."""
        window, size = self.kinds[0].window, self.config.block_tokens
        return None if window is None else most_blocks(window, self.config.num_new, size) * size

    @property
    def _block_bytes(self) -> tuple[int, int]:
        """(of the first kind, of the second or 0)."""
        sizes = [kind.shape.bytes_per_token * self.config.block_tokens for kind in self.kinds]
        return sizes[0], sum(sizes[1:])

    def _most(self, window: int) -> int:
        """Blocks that a request of any length needs; with a prefix cache another window, so that what it began with is found again."""
        beside = -(-window // self.config.block_tokens) if self.config.prefix_cache else 0
        return most_blocks(window, self.config.num_new, self.config.block_tokens) + beside

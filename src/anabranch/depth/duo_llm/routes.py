"""Routes as numbers, which of them a budget allows, and the depth-first walk that runs many of them at the cost of few.

A route says what each duo layer does. Its code holds one digit per layer, the lowest bits for the first: the place of the layer's option
in ``options``. The walk keeps the state after layer l for all routes that agree up to l, so all routes of 2 options cost
sum_l 2^l layer passes where one forward pass per route costs L 2^L.
"""
# Shapes: B sequences, L positions, Y duo layers, D width, R routes

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anabranch.depth.duo_llm.layer import BIG, OPTIONS, DuoFFN, duo_layers
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.block import PreNorm
from anabranch.nn.context import ForwardContext

MAX_EXACT_LAYERS = 20

# (depth, code of the prefix of that many layers).
Allowed = Callable[[int, int], bool]


@dataclass(frozen=True)
class RouteSpace:
    """All routes of ``num_layers`` layers over ``options`` (numbers in `OPTIONS`), and the budgets asked for.

    Attributes:
        num_layers: Y.
        options: what a layer may do, e.g. (0, 1).
        budgets: exact numbers of big layers; None for routes of any number.
    """

    num_layers: int
    options: tuple[int, ...] = (0, 1)
    budgets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.options) not in (2, 3) or len(set(self.options)) != len(self.options) or BIG not in self.options:
            raise ConfigError(f"options are {self.options}; give two or three different ones, big (1) among them")
        for budget in self.budgets or ():
            if not 0 <= budget <= self.num_layers:
                raise ConfigError(
                    f"budget is {budget} big layers; the model has {self.num_layers}, use 0 to {self.num_layers}"
                )
        if self.num_layers * self.bits > 62:
            raise ConfigError(f"routes of {self.num_layers} layers do not fit 62 bits; use a model of fewer layers")

    @property
    def bits(self) -> int:
        """Bits per layer in a code."""
        return 1 if len(self.options) == 2 else 2

    @property
    def num_rows(self) -> int:
        """How many minima are kept: one per budget, or one over all routes."""
        return 1 if self.budgets is None else len(self.budgets)

    def count(self, budget: int | None = None) -> int:
        """Routes with ``budget`` big layers, or all: C(Y, b) (E - 1)^(Y - b), or E^Y."""
        if budget is None:
            return len(self.options) ** self.num_layers
        return math.comb(self.num_layers, budget) * (len(self.options) - 1) ** (self.num_layers - budget)

    @property
    def num_routes(self) -> int:
        """Routes that the budgets allow."""
        return self.count() if self.budgets is None else sum(self.count(budget) for budget in set(self.budgets))

    def num_big(self, code: int, depth: int | None = None) -> int:
        """Big layers among the first ``depth`` (default: all) of a route."""
        depth = self.num_layers if depth is None else depth
        return sum(self.option(code, layer) == BIG for layer in range(depth))

    def option(self, code: int, layer: int) -> int:
        """What a route does in a layer."""
        return self.options[code >> (self.bits * layer) & (2**self.bits - 1)]

    def code(self, route: Iterable[int]) -> int:
        """The code of a route given as options."""
        return sum(self.options.index(option) << (self.bits * layer) for layer, option in enumerate(route))

    def decode(self, code_X: Tensor) -> Tensor:
        """Options ``[..., Y]`` of a tensor of codes."""
        shift_Y = torch.arange(self.num_layers, device=code_X.device) * self.bits
        digit = code_X.unsqueeze(-1) >> shift_Y & (2**self.bits - 1)
        return torch.tensor(self.options, device=code_X.device)[digit]

    def rows(self, code: int) -> list[int]:
        """Which minima a route counts for."""
        if self.budgets is None:
            return [0]
        num_big = self.num_big(code)
        return [row for row, budget in enumerate(self.budgets) if budget == num_big]

    def allows(self, depth: int, code: int) -> bool:
        """Whether a prefix of ``depth`` layers can still become a route of one of the budgets."""
        if self.budgets is None:
            return True
        num_big, left = self.num_big(code, depth), self.num_layers - depth
        return any(num_big <= budget <= num_big + left for budget in self.budgets)

    def among(self, codes: Iterable[int]) -> Allowed:
        """Like `allows`, for a set of routes."""
        prefixes = {
            (depth, code & ((1 << self.bits * depth) - 1)) for code in codes for depth in range(1, self.num_layers + 1)
        }
        return lambda depth, code: (depth, code) in prefixes

    @cached_property
    def tree_passes(self) -> int:
        """Layer passes of the walk over all routes that the budgets allow: the prefixes that can become one."""
        if self.budgets is None:
            return sum(len(self.options) ** depth for depth in range(1, self.num_layers + 1))
        others = len(self.options) - 1
        total = 0
        for depth in range(1, self.num_layers + 1):
            left = self.num_layers - depth
            reachable = {
                big for budget in self.budgets for big in range(budget - left, budget + 1) if 0 <= big <= depth
            }
            total += sum(math.comb(depth, big) * others ** (depth - big) for big in reachable)
        return total

    def check_exact(self) -> None:
        """Raise ConfigError if there are too many routes to try them all."""
        if self.num_layers > MAX_EXACT_LAYERS:
            raise ConfigError(
                f"all routes of {self.num_layers} layers would need {self.num_routes:,} forward passes ({self.tree_passes:,} layer "
                f"passes with shared prefixes); at most {MAX_EXACT_LAYERS} layers are enumerated, use mode='descent'"
            )


def parse_options(model: Decoder, options: Sequence[str]) -> tuple[int, ...]:
    """Numbers of named options. Raises ConfigError for one the model does not have."""
    layers = duo_layers(model)
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(f"option is {name!r}; use {', '.join(OPTIONS)}")
        if name == "skip" and not all(layer.config.allow_skip for layer in layers):
            raise ConfigError("options have 'skip', but the model was built without it; build it with allow_skip=True")
    return tuple(OPTIONS.index(name) for name in options)


def blocks_of(model: Decoder) -> list[PreNorm]:
    """The blocks of a decoder, typed."""
    return list(model.blocks)  # type: ignore[arg-type]


class Walk:
    """Runs routes of a decoder in evaluation mode, all tokens of a sequence along the same one, sharing prefixes.

    Raises ConfigError for a model of parallel streams.

    Attributes:
        layer_passes: duo layers computed so far, one for each prefix.
        routes: routes finished so far.
    """

    def __init__(self, model: Decoder, space: RouteSpace) -> None:
        if model.streams is not None:
            raise ConfigError(
                "routes are tried in a model of one stream; this one runs parallel streams, build it without"
            )
        self.model, self.space = model, space
        self.layer_passes = self.routes = 0

    def __call__(self, token_BL: Tensor, allowed: Allowed | None = None) -> Iterator[tuple[int, Tensor]]:
        """(code, logits_BLV) of every allowed route, depth first."""
        context = self.model.context(token_BL)
        for code, x_BLD in self._below(self.model.embed(token_BL), 0, 0, 0, context, allowed or self.space.allows):
            self.routes += 1
            yield code, self.model.logits(self.model.norm(x_BLD), context.trial())

    def _below(
        self, x_BLD: Tensor, block: int, depth: int, code: int, context: ForwardContext, allowed: Allowed
    ) -> Iterator[tuple[int, Tensor]]:
        blocks = blocks_of(self.model)
        while block < len(blocks) and not isinstance(blocks[block].feed_forward, DuoFFN):
            x_BLD, block = blocks[block](x_BLD, context), block + 1
        if block == len(blocks):
            yield code, x_BLD
            return
        here, feed_forward = blocks[block], blocks[block].feed_forward
        assert isinstance(feed_forward, DuoFFN)
        # Once for all options.
        x_BLD = x_BLD + here.attention(here.attention_norm(x_BLD), context)
        normed_BLD = here.feed_forward_norm(x_BLD)
        for digit, option in enumerate(self.space.options):
            longer = code | digit << (self.space.bits * depth)
            if allowed(depth + 1, longer):
                self.layer_passes += 1
                y_BLD = feed_forward.option(normed_BLD, option, context)
                next_BLD = x_BLD if y_BLD is None else x_BLD + y_BLD
                yield from self._below(next_BLD, block + 1, depth + 1, longer, context, allowed)

"""Stage 2, the oracle: for each token the route with the lowest loss on its next token, under an exact budget of big layers.

What the other tokens do while one is scored is left open by the paper. Two definitions, and a search:

    uniform           all tokens of a sequence take the route that is tried. Optimistic: a token's own past took another route.
    self_consistent   left to right; earlier tokens keep the routes chosen for them. A machine that knows the labels could do it.
    descent           uniform over some routes only: the neighbours of what is best so far. A lower bound on the gain; for many layers.

Memory is that of ``chunk`` sequences on the way down one route, and the minima. The minimum over many routes falls by selection
alone, so every result can carry a control: the same oracle against targets that were shuffled (``shuffle_seed``).
"""
# Shapes: B sequences, L positions, G rows of minima (budgets), Y duo layers, V vocabulary

import hashlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anabranch.depth.duo_llm.layer import duo_layers
from anabranch.depth.duo_llm.results import BOUNDS, Minima, OracleResult, Parts, evaluating, token_losses
from anabranch.depth.duo_llm.routes import RouteSpace, Walk, parse_options
from anabranch.depth.duo_llm.self_consistent import run_self_consistent
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

Mode = Literal["uniform", "self_consistent", "descent"]


def oracle(
    model: Decoder,
    ids_BL: Tensor,
    budget: int | Sequence[int] | None = None,
    *,
    options: Sequence[str] = ("small", "big"),
    mode: Mode = "uniform",
    chunk: int = 16,
    num_random: int = 100,
    shuffle_seed: int | None = None,
    seed: int = 0,
    width: int = 8,
    max_routes: int = 1024,
    resume: str | Path | None = None,
) -> OracleResult:
    """Find each token's best route.

    Args:
        model: a decoder of duo layers.
        ids_BL: ``[B, L + 1]``: tokens, and the one to predict after each.
        budget: exact number of big layers; several are found in one walk; None for any.
        options: what a layer may do.
        mode: see the module.
        chunk: sequences at a time.
        num_random: k of the random baseline.
        shuffle_seed: also run the control, with targets permuted by this seed over all tokens (not in self_consistent mode).
        seed: of the random routes.
        width: descent: routes whose neighbours are tried in each round, those that most tokens prefer.
        max_routes: descent: about how many routes are tried per budget.
        resume: a file that keeps finished chunks; an oracle that is called again with the same arguments goes on from it.

    Raises ConfigError for a budget outside 0 to Y, an option the model lacks, or more than 20 layers in a mode that tries all
    routes; DataError if ``resume`` holds another oracle's work.
    """
    num_layers = len(duo_layers(model))
    budgets = None if budget is None else (budget,) if isinstance(budget, int) else tuple(budget)
    space = RouteSpace(num_layers, parse_options(model, options), budgets)
    if mode not in BOUNDS:
        raise ConfigError(f"mode is {mode!r}; use {', '.join(BOUNDS)}")
    if mode != "descent":
        space.check_exact()
    targets = _targets(ids_BL, shuffle_seed)
    plan = _Plan(model, space, mode, num_random, seed, width, max_routes)
    key = _key(model, ids_BL, plan, chunk, shuffle_seed)
    parts = Parts.read(resume, key)
    with evaluating(model):
        for start in range(parts.next, ids_BL.shape[0], chunk):
            begin = time.perf_counter()
            token_BL = ids_BL[start : start + chunk, :-1]
            minima = plan.run(token_BL, [target_BL[start : start + chunk] for target_BL in targets])
            parts.count(plan.walk)
            parts.add(minima, start + chunk, time.perf_counter() - begin)
            parts.write(resume, key)
    return parts.result(space, mode, len(targets))


class _Plan:
    """What is run for each chunk."""

    def __init__(
        self, model: Decoder, space: RouteSpace, mode: str, num_random: int, seed: int, width: int, max_routes: int
    ) -> None:
        self.model, self.space, self.mode, self.seed = model, space, mode, seed
        self.width, self.max_routes, self.num_random = width, max_routes, num_random
        self.walk = Walk(model, space)
        draw = random.Random(seed)
        counts = [space.count()] if space.budgets is None else [space.count(budget) for budget in space.budgets]
        self.ranks = (
            [set(draw.sample(range(count), min(num_random, count))) for count in counts] if mode != "descent" else None
        )

    def run(self, token_BL: Tensor, targets: list[Tensor]) -> list[Minima]:
        if self.mode == "self_consistent":
            return [run_self_consistent(self.walk, token_BL, target_BL) for target_BL in targets]
        minima = [Minima(self.space, target_BL) for target_BL in targets]
        if self.mode == "uniform":
            self._try(token_BL, targets, minima, None)
        else:
            # Each set of targets has a search of its own.
            for number, one in enumerate(minima):
                self._descend(token_BL, targets[number], one)
        return minima

    def _try(
        self,
        token_BL: Tensor,
        targets: list[Tensor],
        minima: list[Minima],
        codes: set[int] | None,
        counted: bool = True,
    ) -> None:
        allowed = None if codes is None else self.space.among(codes)
        for code, logits_BLV in self.walk(token_BL, allowed):
            for one, loss_BL in zip(minima, token_losses(logits_BLV, targets), strict=True):
                one.add(code, loss_BL, ranks=self.ranks, counted=counted)

    def _descend(self, token_BL: Tensor, target_BL: Tensor, minima: Minima) -> None:
        """Try random routes, then neighbours of those that most tokens prefer, until none is new or ``max_routes`` are tried."""
        tried = self._starts()
        self._try(token_BL, [target_BL], [minima], tried)
        wanted: set[int] = tried
        while wanted and len(tried) < self.max_routes * self.space.num_rows:
            wanted = set()
            for code_BL in minima.code_GBL:
                code_X, count_X = code_BL.unique(return_counts=True)
                favourites = code_X[count_X.argsort(descending=True, stable=True)][: self.width].tolist()
                wanted |= {other for code in favourites for other in neighbours(self.space, code)}
            wanted -= tried
            if wanted:
                self._try(token_BL, [target_BL], [minima], wanted, counted=False)
            tried |= wanted

    def _starts(self) -> set[int]:
        draw = random.Random(self.seed)
        budgets = [None] if self.space.budgets is None else self.space.budgets
        return {_random_code(self.space, budget, draw) for budget in budgets for _ in range(self.width)}


def neighbours(space: RouteSpace, code: int) -> list[int]:
    """Routes one change away: of one layer, or where there is a budget of one layer or of two that swap, so that it stays kept."""
    route = [space.option(code, layer) for layer in range(space.num_layers)]
    found = []
    for layer, old in enumerate(route):
        for option in space.options:
            changed = [*route[:layer], option, *route[layer + 1 :]]
            if option != old and (space.budgets is None or space.rows(space.code(changed))):
                found.append(space.code(changed))
    if space.budgets is not None:
        for first in range(space.num_layers):
            for second in range(first):
                if route[first] != route[second]:
                    changed = list(route)
                    changed[first], changed[second] = route[second], route[first]
                    found.append(space.code(changed))
    return found


def _random_code(space: RouteSpace, budget: int | None, draw: random.Random) -> int:
    if budget is None:
        return space.code([draw.choice(space.options) for _ in range(space.num_layers)])
    big = set(draw.sample(range(space.num_layers), budget))
    others = [option for option in space.options if option != 1]
    return space.code([1 if layer in big else draw.choice(others) for layer in range(space.num_layers)])


def _targets(ids_BL: Tensor, shuffle_seed: int | None) -> list[Tensor]:
    target_BL = ids_BL[:, 1:]
    if shuffle_seed is None:
        return [target_BL]
    order_N = torch.randperm(target_BL.numel(), generator=torch.Generator().manual_seed(shuffle_seed))
    return [target_BL, target_BL.reshape(-1)[order_N.to(target_BL.device)].view_as(target_BL)]


def _key(model: Decoder, ids_BL: Tensor, plan: _Plan, chunk: int, shuffle_seed: int | None) -> str:
    """A hash of all that decides the result."""
    digest = hashlib.sha256(
        repr(
            (plan.space, plan.mode, plan.num_random, plan.seed, plan.width, plan.max_routes, chunk, shuffle_seed)
        ).encode()
    )
    digest.update(ids_BL.cpu().numpy().tobytes())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()

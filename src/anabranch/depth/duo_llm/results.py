"""What an oracle finds: running minima over routes, kept chunk by chunk, and the result made of them."""
# Shapes: B sequences, L positions, G rows of minima (budgets), Y duo layers, V vocabulary

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.depth.duo_llm.routes import RouteSpace, Walk
from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_file
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating as in_evaluation

BOUNDS = {"uniform": "optimistic", "self_consistent": "exact", "descent": "lower bound"}


@dataclass(frozen=True)
class OracleReport:
    """What an oracle cost, and what its number is.

    Attributes:
        mode: see the module.
        bound: of the gain: ``optimistic`` (uniform), ``exact`` (self_consistent: the routes, replayed, give this loss) or ``lower
            bound`` (descent).
        routes: tried, summed over chunks (self_consistent: over chunks and positions).
        layer_passes: duo layers computed, each for one chunk of sequences (self_consistent: for one position of it).
        naive_layer_passes: what one forward pass per route would have computed: routes Y.
        forwards: layer passes / Y.
        seconds: by the clock, earlier sessions of a resumed oracle included.
    """

    mode: str
    bound: str
    routes: int
    layer_passes: int
    naive_layer_passes: int
    forwards: float
    seconds: float


@dataclass(frozen=True)
class OracleResult:
    """Minima over routes. Losses are in nats per token.

    Attributes:
        space: the routes, and the budgets that the rows G stand for (one row over all routes if there is none).
        loss_GBL: float32, lowest loss of each token.
        code_GBL: int64, the route that has it (`RouteSpace.decode`).
        fixed_G: mean loss of the best single route for all tokens.
        fixed_code_G: that route.
        mean_G: mean loss over routes.
        random_G: mean loss of the best of k random routes per token.
        report: costs.
        control: the same against shuffled targets, where asked for.
    """

    space: RouteSpace
    loss_GBL: Tensor
    code_GBL: Tensor
    fixed_G: Tensor
    fixed_code_G: Tensor
    mean_G: Tensor
    random_G: Tensor
    report: OracleReport
    control: "OracleResult | None" = None

    @property
    def oracle_G(self) -> Tensor:
        """Mean loss of the oracle."""
        return self.loss_GBL.double().mean((1, 2))

    def row(self, budget: int | None) -> int:
        """The row of a budget. Raises ConfigError if it was not asked for."""
        known = (None,) if self.space.budgets is None else self.space.budgets
        if budget not in known:
            raise ConfigError(f"the oracle has no budget {budget}; it has {', '.join(map(str, known))}")
        return known.index(budget)

    def route_BLY(self, budget: int | None = None) -> Tensor:
        """The chosen routes as options, what ``take`` takes."""
        return self.space.decode(self.code_GBL[self.row(budget)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: a row per budget, and the report."""
        budgets = [None] if self.space.budgets is None else list(self.space.budgets)
        names = ("oracle_G", "fixed_G", "mean_G", "random_G")
        rows = [
            {"budget": budget, **{name[:-2]: float(getattr(self, name)[row]) for name in names}}
            for row, budget in enumerate(budgets)
        ]
        table: dict[str, Any] = {"rows": rows, "report": asdict(self.report)}
        return table if self.control is None else {**table, "shuffled": self.control.to_dict()["rows"]}


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in."""
    with in_evaluation(model), torch.no_grad():
        yield


def token_losses(logits_BLV: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
    """Cross-entropy of each token against each of several target_BL, fp32."""
    log_p_BLV = logits_BLV.float().log_softmax(-1)
    return [-log_p_BLV.gather(-1, target_BL.unsqueeze(-1)).squeeze(-1) for target_BL in targets]


class Minima:
    """Running minima of one chunk against one set of targets."""

    def __init__(self, space: RouteSpace, target_BL: Tensor) -> None:
        shape = (space.num_rows, *target_BL.shape)
        self.space = space
        self.loss_GBL = torch.full(shape, torch.inf, device=target_BL.device)
        self.random_GBL = self.loss_GBL.clone()
        self.code_GBL = torch.zeros(shape, dtype=torch.int64, device=target_BL.device)
        # Of each route, in the order of the walk.
        self.sums: list[list[float]] = [[] for _ in range(space.num_rows)]
        self.codes: list[list[int]] = [[] for _ in range(space.num_rows)]

    def add(self, code: int, loss_BL: Tensor, *, ranks: Sequence[set[int]] | None, counted: bool = True) -> None:
        """Take one route's losses. ``ranks`` says which routes of each row are the random ones."""
        for row in self.space.rows(code):
            better_BL = loss_BL < self.loss_GBL[row]
            self.code_GBL[row].masked_fill_(better_BL, code)
            torch.minimum(self.loss_GBL[row], loss_BL, out=self.loss_GBL[row])
            if not counted:
                continue
            if ranks is None or len(self.sums[row]) in ranks[row]:
                torch.minimum(self.random_GBL[row], loss_BL, out=self.random_GBL[row])
            self.sums[row].append(float(loss_BL.double().sum()))
            self.codes[row].append(code)


@dataclass
class Parts:
    """What finished chunks gave, for each set of targets; kept in a file between sessions."""

    next: int = 0
    seconds: float = 0.0
    layer_passes: int = 0
    routes: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _walked: tuple[int, int] = (0, 0)

    @classmethod
    def read(cls, path: str | Path | None, key: str) -> "Parts":
        """What ``path`` holds, or nothing yet. Raises DataError if that is another oracle's."""
        if path is None or not Path(path).is_file():
            return cls()
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            found, counts = str(arrays.pop("key")), arrays.pop("counts")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} does not hold an oracle's work ({error}); remove it to start anew") from error
        if found != key:
            raise DataError(
                f"{path} holds the work of an oracle with another model, text or settings; give another file"
            )
        return cls(int(counts[0]), float(counts[3]), int(counts[1]), int(counts[2]), arrays)

    def add(self, minima: list[Minima], following: int, seconds: float) -> None:
        """Take a chunk; ``following`` is the first sequence after it."""
        self.next, self.seconds = following, self.seconds + seconds
        for number, one in enumerate(minima):
            for name in ("loss_GBL", "code_GBL", "random_GBL"):
                new = getattr(one, name).cpu().numpy()
                key = f"{name}{number}"
                self.arrays[key] = np.concatenate([self.arrays[key], new], axis=1) if key in self.arrays else new
            for row, (sums, codes) in enumerate(zip(one.sums, one.codes, strict=True)):
                key = f"sums{number}_{row}"
                self.arrays[key] = self.arrays.get(key, 0.0) + np.array(sums, np.float64)
                self.arrays[f"codes{number}_{row}"] = np.array(codes, np.int64)

    def count(self, walk: Walk) -> None:
        """Add what the walk did since the last chunk."""
        passes, routes = self._walked
        self.layer_passes += walk.layer_passes - passes
        self.routes += walk.routes - routes
        self._walked = walk.layer_passes, walk.routes

    def write(self, path: str | Path | None, key: str) -> None:
        """Keep all in ``path``, if there is one."""
        if path is None:
            return
        counts = np.array([self.next, self.layer_passes, self.routes, self.seconds], np.float64)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{"key": np.array(key), "counts": counts, **self.arrays})  # type: ignore[arg-type]

    def result(self, space: RouteSpace, mode: str, num_targets: int) -> OracleResult:
        """The result of all chunks; the second set of targets is the control."""
        report = self._report(space, mode)
        results: list[OracleResult] = []
        for number in reversed(range(num_targets)):
            loss_GBL = torch.from_numpy(self.arrays[f"loss_GBL{number}"])
            tokens = loss_GBL[0].numel()
            sums = [self.arrays[f"sums{number}_{row}"] for row in range(space.num_rows)]
            codes = [self.arrays[f"codes{number}_{row}"] for row in range(space.num_rows)]
            results.append(
                OracleResult(
                    space=space,
                    loss_GBL=loss_GBL,
                    code_GBL=torch.from_numpy(self.arrays[f"code_GBL{number}"]),
                    fixed_G=_each(sums, np.min) / tokens,
                    fixed_code_G=torch.tensor(
                        [
                            int(code[values.argmin()]) if len(values) else 0
                            for code, values in zip(codes, sums, strict=True)
                        ]
                    ),
                    mean_G=_each(sums, np.mean) / tokens,
                    random_G=_finite(torch.from_numpy(self.arrays[f"random_GBL{number}"]).double().mean((1, 2))),
                    report=report,
                    control=results[0] if results else None,
                )
            )
        return results[-1]

    def _report(self, space: RouteSpace, mode: str) -> OracleReport:
        num_layers = space.num_layers
        return OracleReport(
            mode,
            BOUNDS[mode],
            self.routes,
            self.layer_passes,
            self.routes * num_layers,
            self.layer_passes / num_layers,
            self.seconds,
        )


def _each(values: list[np.ndarray], make: Callable[[np.ndarray], Any]) -> Tensor:
    return torch.tensor([float(make(value)) if len(value) else float("nan") for value in values], dtype=torch.float64)


def _finite(value_G: Tensor) -> Tensor:
    """nan where no random route was tried."""
    return value_G.masked_fill(value_G.isinf(), float("nan"))

"""Oracle routes as labels, in the format of layer paths: per layer the amount of work, 0 skip, 1 small, 2 big.

Dr.LLM (arXiv 2510.12773) labels a layer with how often its path goes through it: 0 skip, 1 once, 2 twice. A file has a JSON object per
line and sequence: ``id``, ``ids`` (L + 1 tokens), ``label`` (L rows of Y), ``budget``, ``bound`` (what kind of oracle chose).
"""
# Shapes: B sequences, L positions, Y duo layers

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anabranch.depth.duo_llm.layer import OPTIONS
from anabranch.depth.duo_llm.results import OracleResult
from anabranch.errors import DataError
from anabranch.files import atomic_write_text, parse_json

# Of small, big, skip.
WORK = (1, 2, 0)


@dataclass(frozen=True)
class RouteLabels:
    """Sequences and the routes chosen for their tokens.

    Attributes:
        ids_BL: ``[B, L + 1]``.
        route_BLY: options, ``[B, L, Y]``.
        budget: big layers per token, None for any.
        bound: of the oracle, see `OracleReport`.
    """

    ids_BL: Tensor
    route_BLY: Tensor
    budget: int | None
    bound: str

    @classmethod
    def of(cls, ids_BL: Tensor, result: OracleResult, budget: int | None = None) -> "RouteLabels":
        """The choices of an oracle for one of its budgets."""
        return cls(ids_BL, result.route_BLY(budget), budget, result.report.bound)

    def write(self, path: str | Path) -> None:
        """Write as JSON lines, all or nothing."""
        label_BLY = torch.tensor(WORK)[self.route_BLY]
        rows = [
            {"id": number, "ids": ids.tolist(), "label": label.tolist(), "budget": self.budget, "bound": self.bound}
            for number, (ids, label) in enumerate(zip(self.ids_BL, label_BLY, strict=True))
        ]
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def read(cls, path: str | Path) -> "RouteLabels":
        """Read what `write` wrote. Raises DataError if the file is missing, empty or of another form."""
        try:
            rows = [parse_json(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            ids_BL = torch.tensor([row["ids"] for row in rows])
            label_BLY = torch.tensor([row["label"] for row in rows])
            if ids_BL.dtype != torch.int64 or label_BLY.dtype != torch.int64:
                raise ValueError(f"ids are {ids_BL.dtype} and labels {label_BLY.dtype}; both must be whole numbers")
            if (
                label_BLY.dim() != 3
                or label_BLY.shape[1] + 1 != ids_BL.shape[1]
                or not 0 <= label_BLY.min() <= label_BLY.max() <= 2
            ):
                raise ValueError(f"labels of shape {list(label_BLY.shape)} for ids of shape {list(ids_BL.shape)}")
            option_W = torch.tensor([WORK.index(work) for work in range(len(OPTIONS))])
            return cls(ids_BL, option_W[label_BLY], rows[0]["budget"], rows[0]["bound"])
        # Of torch: numbers beyond its own, and nothing where a number is looked for.
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            said = f"no field {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise DataError(f"{path} does not hold route labels ({said})") from error

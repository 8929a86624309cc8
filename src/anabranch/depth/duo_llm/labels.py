"""Oracle routes as labels, in the format of layer paths: per layer the amount of work, 0 skip, 1 small, 2 big.

Dr.LLM (arXiv 2510.12773) labels a layer with how often its path goes through it: 0 skip, 1 once, 2 twice. A file has a JSON object per
line and sequence: ``id``, ``ids`` (L + 1 tokens), ``label`` (L rows of Y), ``budget``, ``bound`` (what kind of oracle chose).
"""
# Shapes: B sequences, L positions, Y duo layers

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
            if not rows:
                raise ValueError("the file is empty; there is a JSON object per sequence")
            ids_BL = _whole_numbers([row["ids"] for row in rows], "ids")
            label_BLY = _whole_numbers([row["label"] for row in rows], "label")
            wanted = f"label has a row of layers for each of ids but the last; it has shape {list(label_BLY.shape)} for ids of shape"
            if label_BLY.dim() != 3 or ids_BL.dim() != 2 or label_BLY.shape[1] + 1 != ids_BL.shape[1]:
                raise ValueError(f"{wanted} {list(ids_BL.shape)}")
            if not label_BLY.numel():
                raise ValueError("label is empty: there is no token, or no layer, in it")
            for work in (int(label_BLY.min()), int(label_BLY.max())):
                if not 0 <= work < len(OPTIONS):
                    raise ValueError(f"label has {work}; it is 0 (skip), 1 (small) or 2 (big)")
            if ids_BL.min() < 0:
                raise ValueError(f"ids has {int(ids_BL.min())}; token ids are 0 or more")
            budget, bound = _same_of_all(rows, label_BLY.shape[2])
            option_W = torch.tensor([WORK.index(work) for work in range(len(OPTIONS))])
            return cls(ids_BL, option_W[label_BLY], budget, bound)
        # Of torch: numbers beyond its own, and nothing where a number is looked for.
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            said = f"no field {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise DataError(f"{path} does not hold route labels ({said})") from error


def _same_of_all(rows: list[dict[str, Any]], num_layers: int) -> tuple[int | None, str]:
    """Budget and bound, which all rows must say alike. Raises ValueError for others, and KeyError where one says none."""
    budget, bound = rows[0]["budget"], rows[0]["bound"]
    if budget is not None and (type(budget) is not int or not 0 <= budget <= num_layers):
        raise ValueError(f"budget is {json.dumps(budget)[:40]}; it is 0 to {num_layers} layers, or null")
    if not isinstance(bound, str):
        raise ValueError(f"bound is {json.dumps(bound)[:40]}; it is a word, as oracles report it")
    for number, row in enumerate(rows):
        if (row["budget"], row["bound"]) != (budget, bound):
            raise ValueError(
                f"line {number + 1} is of another oracle than line 1; budget and bound are the same in all"
            )
    return budget, bound


def _whole_numbers(value: list[Any], name: str) -> Tensor:
    """``value``, lists in lists, as int64. Raises ValueError for anything but whole numbers in it; true and false are none."""
    stack: list[Any] = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, list):
            stack += each
        elif type(each) is not int:
            raise ValueError(f"{name} has {json.dumps(each)[:40]}; it is whole numbers")
    # Empty lists hold no number that would say the type.
    return torch.tensor(value, dtype=torch.int64)

"""`CompiledPaths`: the compiled step taken apart, some blocks at a time, in any order and again, on some of the sequences.

paths = CompiledPaths(fast, pool.key[:, 0], pool.value[:, 0])
step = paths.begin(token_T, position_T, sequence_N4, table_U)
for visits, numbers in schedule_of(visits_N):
    step.run(visits, numbers)
x_TD = step.normed()
"""
# Shapes: V layers of the store, S slots, G key heads, W head width, T tokens of a step, R of them, N sequences, M of them, D width

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.nn.kernels.operands import address, array_address
from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.fast.layout import STEP, CBlock, CModel, CStep

__all__ = ["CompiledPaths", "CompiledStep", "Visits", "schedule_of"]

# Of a path: each block, and the layer of the store that keeps this visit of it.
Visits = tuple[tuple[int, int], ...]

# Forms of parts of a model that are kept; one takes some hundred bytes for each block.
MOST_FORMS = 1024


@lru_cache(maxsize=256)
def schedule_of(visits_N: tuple[Visits, ...]) -> tuple[tuple[Visits, tuple[int, ...] | None], ...]:
    """Parts in order, each with the numbers of the sequences that run it; None for all of them.

    Sequences that come to the same visit of a block next run it together, the lowest block first, so those whose paths ascend meet again in
    all that they share, and each block is read as seldom as can be.
    """
    own: dict[Visits, list[int]] = {}
    for number, visits in enumerate(visits_N):
        own.setdefault(visits, []).append(number)
    place = dict.fromkeys(own, 0)
    parts: list[tuple[list[tuple[int, int]], list[Visits]]] = []
    while going := [visits for visits in own if place[visits] < len(visits)]:
        visit = min(visits[place[visits]] for visits in going)
        here = [visits for visits in going if visits[place[visits]] == visit]
        for visits in here:
            place[visits] += 1
        if parts and parts[-1][1] == here:
            parts[-1][0].append(visit)
        else:
            parts.append(([visit], here))
    made = []
    for run, together in parts:
        numbers = sorted(number for visits in together for number in own[visits])
        made.append((tuple(run), None if len(numbers) == len(visits_N) else tuple(numbers)))
    return tuple(made)


class CompiledPaths:
    """Parts of a compiled model, of one that `supports`.

    Args:
        fast: the model.
        key_VSGW: the store of keys, of all visits that a path may have.
        value_VSGW: that of values.

    Raises ConfigError for a model whose blocks cannot be told apart.
    """

    @staticmethod
    def supports(fast: FastDecoder) -> bool:
        """Whether each block is one part, which hands nothing to others beside its output, and is all in memory."""
        return fast.is_by_block

    def __init__(self, fast: FastDecoder, key_VSGW: Tensor, value_VSGW: Tensor) -> None:
        if not self.supports(fast):
            raise ConfigError(
                "blocks of this model run together; the compiled step knows no path through it but the usual one"
            )
        self.fast, self._stores = fast, (key_VSGW, value_VSGW)
        self._forms: dict[Visits | None, CModel] = {}

    def begin(
        self, token_T: Tensor, position_T: Tensor, sequence_N4: NDArray[np.int64], table_U: NDArray[np.int32]
    ) -> "CompiledStep":
        """A step; arguments are those of `FastDecoder.hidden`."""
        return CompiledStep(self, token_T, position_T, sequence_N4, table_U)

    def form(self, visits: Visits | None) -> CModel:
        """The model of these blocks alone; None for what follows the last block."""
        made = self._forms.get(visits)
        if made is None:
            if len(self._forms) >= MOST_FORMS:
                self._forms.clear()
            made = self._forms[visits] = self._made(visits)
        return made

    def _made(self, visits: Visits | None) -> CModel:
        whole = self.fast.structure
        made = CModel.from_buffer_copy(whole)
        blocks = (CBlock * len(visits or ()))()
        for place, (block, layer) in enumerate(visits or ()):
            blocks[place] = CBlock.from_buffer_copy(whole.blocks[block])
            blocks[place].key, blocks[place].value = (address(part_VSGW[layer]) for part_VSGW in self._stores)
        made.layers, made.blocks = len(blocks), blocks
        if visits is not None:
            made.last_norm = None
        return made


@dataclass(frozen=True)
class _Rows:
    """Some sequences of a step: their rows (None for all), and what the kernel is told of them."""

    row_R: Tensor | None
    sequence_M4: NDArray[np.int64]
    cos: Tensor
    sin: Tensor
    table_U: NDArray[np.int32]


class CompiledStep:
    """One step under way; ``x_TD`` is what the next block gets."""

    def __init__(
        self,
        paths: CompiledPaths,
        token_T: Tensor,
        position_T: Tensor,
        sequence_N4: NDArray[np.int64],
        table_U: NDArray[np.int32],
    ) -> None:
        model = paths.fast.model
        self._paths = paths
        self.x_TD = model.embedding(token_T).float().contiguous()
        cos, sin = model.rotary(position_T[None], torch.float32)
        self._all = _Rows(None, np.ascontiguousarray(sequence_N4), cos, sin, np.ascontiguousarray(table_U))
        self._some: dict[tuple[int, ...], _Rows] = {}

    def run(self, visits: Visits, numbers: Sequence[int] | None = None) -> None:
        """Blocks in order, on these sequences (None: all); keys and values are stored."""
        if visits and (numbers is None or numbers):
            self._run(visits, self._all if numbers is None else self._rows(tuple(numbers)))

    def run_on(
        self,
        visits: Visits,
        row_R: NDArray[np.int64] | None,
        sequence_M4: NDArray[np.int64],
        table_U: NDArray[np.int32],
    ) -> None:
        """Blocks in order, on these rows of the step (None: all), which need not be whole sequences.

        ``sequence_M4`` and ``table_U`` are as of `FastDecoder.hidden`, of these rows; what is stored before them may be fewer entries than
        there are positions.
        """
        cos, sin, at_R = self._all.cos, self._all.sin, None
        if row_R is not None:
            at_R = torch.from_numpy(row_R)
            cos, sin = cos[:, :, at_R], sin[:, :, at_R]
        self._run(visits, _Rows(at_R, np.ascontiguousarray(sequence_M4), cos, sin, np.ascontiguousarray(table_U)))

    def normed(self) -> Tensor:
        """x_TD after the last norm; nothing runs behind it."""
        self._run(None, self._all)
        return self.x_TD

    def _run(self, visits: Visits | None, rows: _Rows) -> None:
        fast, form = self._paths.fast, self._paths.form(visits)
        x_RD = self.x_TD if rows.row_R is None else self.x_TD[rows.row_R]
        count, angles = len(x_RD), (1, 1, len(x_RD), form.width)
        memory = fast.room(count)
        step = CStep(
            count,
            array_address(rows.sequence_M4, "int64", None, 4),
            len(rows.sequence_M4),
            array_address(rows.table_U, "int32", None),
            len(rows.table_U),
            address(rows.cos, "float32", *angles),
            address(rows.sin, "float32", *angles),
            address(x_RD, "float32", count, form.dim),
            None,
            address(memory),
        )
        STEP(form, step, -1, -1)
        if rows.row_R is not None:
            self.x_TD[rows.row_R] = x_RD

    def _rows(self, numbers: tuple[int, ...]) -> _Rows:
        made = self._some.get(numbers)
        if made is None:
            sequence_M4 = self._all.sequence_M4[list(numbers)].copy()
            row_R = np.concatenate([np.arange(first, first + count) for first, count in sequence_M4[:, :2]])
            # Rows of a part follow each other.
            sequence_M4[:, 0] = np.concatenate(([0], np.cumsum(sequence_M4[:-1, 1])))
            at_R = torch.from_numpy(row_R)
            own = self._all
            made = _Rows(at_R, sequence_M4, own.cos[:, :, at_R], own.sin[:, :, at_R], own.table_U)
            self._some[numbers] = made
        return made

"""What clips come from: seams that a `OneShotSet` is made by, and what fills them for drawn subjects.

    Generator     clips(references, count, generator)  ->  clips of these references
    Embedder      embed(references)                    ->  vectors, near where two look alike

For drawn subjects a reference is a `Portrait`. For others it is whatever the generators that somebody plugs in agree on. One that makes
pictures of people says so (``of_people``), and is used with consent only; none ships.
"""
# Shapes: N references, D of their vectors, K found, S side of a drawing

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.extras import require
from anabranch.heads.pvchat.clips import Clip, Composer
from anabranch.heads.pvchat.drawings import Portrait

__all__ = ["Composed", "Embedder", "Generator", "InkEmbedder", "Warped", "is_of_people", "nearest", "warped"]


@runtime_checkable
class Generator(Protocol):
    """Makes clips of subjects. One that has ``of_people`` true is used with consent only."""

    def clips(self, references: Sequence[Any], count: int, generator: torch.Generator) -> list[Clip]:
        """``count`` clips, each of one of the references, taken in turn; its first actor is the reference's subject."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Places references so that those that look alike lie near each other."""

    def embed(self, references: Sequence[Any]) -> np.ndarray:
        """float32 [N, D], finite; their length says nothing."""
        ...


def is_of_people(part: Any) -> bool:
    """Whether a generator or an embedder says that it works on pictures of people."""
    return bool(getattr(part, "of_people", False))


@dataclass(frozen=True, eq=False)
class Composed:
    """Clips of portraits as they are, in other colours, places and actions, beside others.

    Attributes:
        composer: makes them.
        others: portraits that may stand beside the subject; those of a reference's own subject never do.
        most_others: at most so many do.
    """

    of_people: ClassVar[bool] = False
    composer: Composer = field(default_factory=Composer)
    others: Sequence[Portrait] = ()
    most_others: int = 2

    def clips(self, references: Sequence[Portrait], count: int, generator: torch.Generator) -> list[Clip]:
        """See `Generator`."""
        return [
            self.composer.compose(
                [reference, *self._beside(references, reference.subject, generator)],
                generator,
            )
            for reference in _in_turn(references, count)
        ]

    def _beside(self, references: Sequence[Portrait], subject: str, generator: torch.Generator) -> list[Portrait]:
        most = int(torch.randint(self.most_others + 1, (), generator=generator))
        found: list[Portrait] = []
        # Some draws hit the subject, or one that is there already: then there is one fewer.
        for _ in range(most if self.others else 0):
            one = self.others[int(torch.randint(len(self.others), (), generator=generator))]
            if one.subject != subject and all(one.subject != other.subject for other in found):
                found.append(one)
        return found


@dataclass(frozen=True, eq=False)
class Warped:
    """Clips of portraits that are drawn anew, as by another hand: turned, slanted, stretched and bent a little. Identity stays.

    Attributes:
        inner: makes clips of what came out.
        strength: of all of it; 1 is about what writers differ by.
    """

    of_people: ClassVar[bool] = False
    inner: Composed = field(default_factory=Composed)
    strength: float = 1.0

    def clips(self, references: Sequence[Portrait], count: int, generator: torch.Generator) -> list[Clip]:
        """See `Generator`."""
        drawn = [
            Portrait(reference.subject, warped(reference.ink_SS, generator, self.strength))
            for reference in _in_turn(references, count)
        ]
        return self.inner.clips(drawn, count, generator)


def _in_turn(references: Sequence[Portrait], count: int) -> list[Portrait]:
    if count and not references:
        raise InputError(f"{count} clips are to be made of no reference; give at least one")
    return [references[number % len(references)] for number in range(count)]


def warped(ink_SS: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """A drawing as another hand might draw it, float32 [S, S]: an affine map, and a smooth displacement over it.

    Turned by up to 12 degrees, slanted by up to 0.2, stretched by up to 15% each way, bent by up to 8% of its side, times ``strength``.
    """
    turn, slant, wide, high = ((2 * torch.rand(4, generator=generator) - 1) * strength).tolist()
    angle = math.radians(12) * turn
    stretch = torch.tensor([[1 + 0.15 * wide, 0.2 * slant], [0.0, 1 + 0.15 * high]])
    around = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    theta = torch.cat([around @ stretch, torch.zeros(2, 1)], 1)[None]
    side = ink_SS.shape[-1]
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)
    bend = strength * 0.16 * (2 * torch.rand(1, 2, 4, 4, generator=generator) - 1)
    bend = F.interpolate(bend, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    drawn = F.grid_sample(ink_SS[None, None], grid + bend, mode="bilinear", align_corners=False)[0, 0]
    # What is sampled between lines is fainter than what was drawn.
    return (1.5 * drawn).clamp(0, 1)


@dataclass(frozen=True)
class InkEmbedder:
    """Portraits by where they have ink and which way it runs there: blurred, and in four directions, on a grid of cells.

    Attributes:
        cells: of a side.
    """

    of_people: ClassVar[bool] = False
    cells: int = 6

    def embed(self, references: Sequence[Portrait]) -> np.ndarray:
        """See `Embedder`."""
        if not references:
            return np.zeros((0, 5 * self.cells**2), np.float32)
        ink_N1SS = torch.stack([reference.ink_SS for reference in references])[:, None]
        # Lines of one pixel rarely lie on each other.
        soft = F.avg_pool2d(F.pad(ink_N1SS, (1, 1, 1, 1)), 3, stride=1)
        dx, dy = soft[..., :, 1:] - soft[..., :, :-1], soft[..., 1:, :] - soft[..., :-1, :]
        dx, dy = F.pad(dx, (0, 1)), F.pad(dy, (0, 0, 0, 1))
        length, angle = (dx**2 + dy**2).sqrt(), torch.atan2(dy, dx)
        parts = [soft, *(length * (torch.cos(angle - way * math.pi / 4)) ** 4 for way in range(4))]
        cells = [F.adaptive_avg_pool2d(part, self.cells).flatten(1) for part in parts]
        # Each part counts alike, however long its numbers are.
        rows = torch.cat([F.normalize(part, dim=1) for part in cells], 1)
        found: np.ndarray = rows.numpy().astype(np.float32)
        return found


def nearest(
    embedder: Embedder, reference: Any, bank: Sequence[Any], count: int, *, seed: int = 0
) -> list[tuple[int, float]]:
    """The places in ``bank`` of what looks most like ``reference``, and their cosines, the nearest first: by a walk through HNSW.

    Raises InputError for vectors that do not fit, MissingExtraError without the packages of graphs.
    """
    require("numba", by="finding hard negatives", of="graph")
    from anabranch.graph import HNSW

    count = min(count, len(bank))
    if not count:
        return []
    vector_ND = _unit(embedder.embed(list(bank)), len(bank))
    query_1D = _unit(embedder.embed([reference]), 1)
    if query_1D.shape[1] != vector_ND.shape[1]:
        raise InputError(
            f"the embedder gave {query_1D.shape[1]} numbers for the reference and {vector_ND.shape[1]} for the bank"
        )
    index = HNSW(vector_ND.shape[1], metric="ip", seed=seed, workers=1)
    index.add(vector_ND)
    id_1K, distance_1K = index.search(query_1D, count, ef=max(64, 2 * count))
    return [
        (int(row), 1.0 - float(distance)) for row, distance in zip(id_1K[0], distance_1K[0], strict=True) if row >= 0
    ]


def _unit(vectors: Any, count: int) -> np.ndarray:
    """float32 [N, D] of length 1 (or 0). Raises InputError for anything that is no such table."""
    vector_ND = np.asarray(vectors, np.float32)
    if vector_ND.ndim != 2 or len(vector_ND) != count or not vector_ND.shape[1]:
        raise InputError(
            f"the embedder gave {shown(list(vector_ND.shape))} for {count} references; it must give a row for each"
        )
    if not np.isfinite(vector_ND).all():
        raise InputError("the embedder gave numbers that are not finite")
    length_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return vector_ND / np.maximum(length_N1, 1e-12)

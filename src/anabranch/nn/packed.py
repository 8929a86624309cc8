"""`Packed`: a matrix, or a stack of them, in the layout of the compiled products (`kernels/packed.h`): float32, bfloat16, int8 or int4.

Integers come with a scale for every group of ``group`` weights of a row: int8 is w = s (u - 128), int4 is w = s u + m. Scales and
minima are fp16, and rounding is against the stored ones, so what a group loses is half a step of the stored scale and no more.
What is stored in fp4 (`anabranch.nn.fp4`) is only ever kept: 4 bits that stand for w = s t[u], with a scale in bfloat16.
Packing and unpacking are plain torch and exact inverses; the product has a compiled form and one in torch.
"""
# Shapes: E matrices of a stack, N rows (outputs), K depth (inputs), G groups of a row, P panels of 16 rows, C rows of activations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.nn.fp4 import TWICE
from anabranch.nn.remade import linear_remade
from anabranch.nn.superblocks import BITS_OF, BLOCK, block_bytes, lanes_of, unpack_blocks

__all__ = ["KINDS", "Kind", "Packed"]

Kind = Literal["float32", "bfloat16", "int8", "int4", "fp4", "q4_k", "q5_k", "q6_k"]
# What weights can be packed to; fp4 and those of `anabranch.nn.superblocks` are only ever kept.
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8", "int4")

# Those with two numbers in a byte.
HALVED = ("int4", "fp4")

WIDE = 16  # rows of a panel

# Activations that share a scale; depths and groups are multiples of it.
SHARE = 32

# Bytes of scales and minima behind each group of a panel.
SIDE = 64

# Weights that are rounded together, so that what that takes on its way stays small beside a layer.
AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Packed:
    """E matrices of N rows and K columns.

    Attributes:
        data: uint8 ``[E, P, bytes of a panel]``.
        rows: N.
        depth: K.
        kind: how numbers are stored.
        group: weights that share a scale; K where there are none.
    """

    data: Tensor
    rows: int
    depth: int
    kind: Kind
    group: int

    @classmethod
    def pack(cls, weight_ENK: Tensor, kind: Kind, *, group: int | None = None, symmetric: bool = False) -> "Packed":
        """Round and pack ``[N, K]`` or ``[E, N, K]``.

        Args:
            weight_ENK: floating-point weights.
            kind: one of `KINDS`.
            group: for integers, a multiple of 32 that divides K; None for one scale per row.
            symmetric: int4 with w = s (u - 8), whose zero is exact; otherwise the range from the least to the greatest is used whole.

        Raises:
            ConfigError: a depth that is not a multiple of 32 (float32: 16), a group that does not divide it, or weights too large or too
                small for fp16 scales.
        """
        weight_ENK = weight_ENK.detach()
        if weight_ENK.dim() == 2:
            weight_ENK = weight_ENK.unsqueeze(0)
        rows, depth = weight_ENK.shape[1:]
        # Whose activations are neither rounded nor paired.
        if kind != "float32" or group is not None or depth % WIDE:
            check_depth(depth, group)
        if kind in ("float32", "bfloat16"):
            return cls(_pack_floats(weight_ENK, kind), rows, depth, kind, depth)
        made = cls.empty(len(weight_ENK), rows, depth, kind, group or depth, device=weight_ENK.device)
        for expert, weight_NK in enumerate(weight_ENK):
            made.put(expert, weight_NK, symmetric=symmetric)
        return made

    @classmethod
    def empty(
        cls, num: int, rows: int, depth: int, kind: Kind, group: int, *, device: torch.device | str | None = None
    ) -> "Packed":
        """``num`` matrices that are still to be filled; on the device ``meta`` they only tell their sizes."""
        panels = -(-rows // WIDE)
        data = torch.empty(num, panels, panel_bytes(kind, depth, group), dtype=torch.uint8, device=device)
        return cls(data, rows, depth, kind, group)

    def put(self, expert: int, weight_NK: Tensor, *, symmetric: bool = False) -> None:
        """Round and pack one matrix into its place, a few rows at a time. Raises ConfigError as `pack`."""
        step = max(AT_ONCE // self.depth // WIDE, 1) * WIDE
        is_whole = self.kind in ("float32", "bfloat16")
        greatest = 0.0 if is_whole else max(float(end.abs()) for end in weight_NK.detach().aminmax())
        for first in range(0, self.rows, step):
            part = self._packed(weight_NK[first : first + step], symmetric, greatest)
            self.data[expert, first // WIDE : first // WIDE + part.shape[1]] = part[0]

    def _packed(self, weight_NK: Tensor, symmetric: bool, greatest: float) -> Tensor:
        """The panels ``[1, P, bytes]`` of some rows of a matrix whose ``greatest`` weight has this size."""
        if self.kind in ("float32", "bfloat16"):
            return _pack_floats(weight_NK.unsqueeze(0), self.kind)
        grouped = weight_NK.unsqueeze(0).float().unflatten(-1, (-1, self.group))
        is_bytes = self.kind == "int8"
        number, scale_ENG, least_ENG, short_ENG = (
            _round_bytes(grouped) if is_bytes else _round_nibbles(grouped, symmetric)
        )
        if not (torch.isfinite(scale_ENG).all() and torch.isfinite(least_ENG).all()):
            raise ConfigError(
                "weights are not finite, or too large for fp16 scales; keep this matrix in floating point"
            )
        if float(short_ENG.max()) > greatest * MOST_SHORT:
            raise ConfigError(
                f"weights of at most {greatest:.3g} are too small for fp16 scales; keep this matrix in floating point"
            )
        return Packed.of_integers(number.flatten(-2), scale_ENG, least_ENG, self.kind).data

    @classmethod
    def of_integers(cls, number_ENK: Tensor, scale_ENG: Tensor, least_ENG: Tensor | None, kind: Kind) -> "Packed":
        """Pack what is quantised already: ``number`` u as uint8, ``scale`` and ``least`` as fp16. int8 has no minima, nor has fp4."""
        if number_ENK.dim() == 2:
            number_ENK, scale_ENG = number_ENK.unsqueeze(0), scale_ENG.unsqueeze(0)
            least_ENG = None if least_ENG is None else least_ENG.unsqueeze(0)
        rows, depth = number_ENK.shape[1:]
        group = depth // scale_ENG.shape[-1]
        check_depth(depth, group)
        if kind in HALVED:
            half = _panels(number_ENK).unflatten(-1, (-1, 2, 4))  # E P 16 K/8 2 4
            stored = half[..., 0, :] | (half[..., 1, :] << 4)
        else:
            stored = _panels(number_ENK).unflatten(-1, (-1, 4))
        # 4 bytes at a time.
        stored = stored.contiguous().view(torch.int32).transpose(2, 3).contiguous().view(torch.uint8)
        groups = depth // group
        body = stored.reshape(*stored.shape[:2], groups, -1)
        least_ENG = torch.zeros_like(scale_ENG) if least_ENG is None or kind != "int4" else least_ENG
        dtype = _type_of_sides(kind)
        sides = [
            _panels(side).transpose(2, 3).to(dtype).contiguous().view(torch.uint8) for side in (scale_ENG, least_ENG)
        ]
        data = torch.cat((body, *sides), dim=-1).flatten(2).contiguous()
        return cls(data, rows, depth, kind, group)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.data.numel()

    def with_data(self, data: Tensor) -> "Packed":
        """The same matrix stored in ``data``."""
        return Packed(data, self.rows, self.depth, self.kind, self.group)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """(number_ENK uint8, scale_ENG, least_ENG): the inverse of `of_integers`. Of int8, int4 and fp4 alone."""
        groups = self.depth // self.group
        stored = self.data.unflatten(-1, (groups, -1))
        sides = stored[..., -SIDE:].contiguous().view(_type_of_sides(self.kind)).unflatten(-1, (2, WIDE))
        scale, least = (self._rows(sides[..., i, :].transpose(2, 3)) for i in (0, 1))
        body = stored[..., :-SIDE].reshape(*self.data.shape[:2], -1, WIDE, 4).transpose(2, 3)
        if self.kind in HALVED:
            body = torch.stack((body & 15, body >> 4), dim=-2)
        return self._rows(body.flatten(3)), scale, least

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as they count, ``[E, N, K]``."""
        if self.kind == "float32":
            return self._rows(self.data.view(torch.float32).unflatten(-1, (-1, WIDE)).transpose(2, 3)).to(dtype)
        if self.kind in BITS_OF:
            return unpack_blocks(self.kind, self.data, self.rows).to(dtype)
        if self.kind == "bfloat16":
            pairs = self.data.view(torch.bfloat16).unflatten(-1, (-1, WIDE, 2)).transpose(2, 3)
            return self._rows(pairs.flatten(3)).to(dtype)
        return self._values(*self.integers()).to(dtype)

    def _values(self, number: Tensor, scale: Tensor, least: Tensor) -> Tensor:
        """What integers ``[..., K]`` with scales and minima ``[..., G]`` count as, in float32."""
        if self.kind == "fp4":
            number = torch.tensor(TWICE, device=number.device)[number.int()]
        values = number.float().unflatten(-1, (-1, self.group))
        if self.kind == "fp4":
            values = values * scale.float().unsqueeze(-1)
        elif self.kind == "int8":
            values = (values - 128) * scale.float().unsqueeze(-1)
        else:
            values = values * scale.float().unsqueeze(-1) + least.float().unsqueeze(-1)
        return values.flatten(-2)

    def rows_at(self, index_T: Tensor) -> Tensor:
        """Rows ``[T, K]`` of a single matrix, as an embedding is asked for: in bfloat16 if they are stored so, else in float32."""
        panel_T, lane_T = index_T // WIDE, index_T % WIDE
        if self.kind == "float32":
            return self.data[0].view(torch.float32).unflatten(-1, (-1, WIDE))[panel_T, :, lane_T]
        if self.kind == "bfloat16":
            return self.data[0].view(torch.bfloat16).unflatten(-1, (-1, WIDE, 2))[panel_T, :, lane_T, :].flatten(-2)
        if self.kind in BITS_OF:
            rows_TX = lanes_of(self.kind, self.data[0], panel_T, lane_T)
            return unpack_blocks(self.kind, rows_TX.unsqueeze(1), 1, wide=1).flatten(1)
        # Groups, of which each is steps of four bytes of every row, then scales and minima of every row.
        stored = self.data[0].unflatten(-1, (self.depth // self.group, -1))
        body = stored[..., :-SIDE].unflatten(-1, (-1, WIDE, 4))[panel_T, :, :, lane_T]
        sides = stored[..., -SIDE:].unflatten(-1, (2, WIDE, 2))[panel_T, :, :, lane_T].contiguous()
        if self.kind in HALVED:
            body = torch.stack((body & 15, body >> 4), dim=-2)
        scale_TG, least_TG = sides.view(_type_of_sides(self.kind)).squeeze(-1).unbind(-1)
        rows_TK = self._values(body.flatten(1), scale_TG, least_TG)
        # A zero has the sign of its scale, as where eight is taken off a number before it is scaled.
        zero_TG = (0 * scale_TG.float()).repeat_interleave(self.group, -1)
        return torch.where(rows_TK == 0, zero_TG, rows_TK)

    def expert(self, index: int) -> "Packed":
        """One matrix of the stack."""
        return self.with_data(self.data[index : index + 1])

    def linear(self, x_CK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """y_CN = x W^T + bias in the dtype of x, of a stack of one. Compiled on a CPU, else with the weights unpacked."""
        # The kernels know this class.
        from anabranch.nn.kernels import packed as native

        if native.can(self, x_CK, bias_N):
            return native.linear(self, x_CK, bias_N)
        return linear_remade(x_CK, self.weight_in, bias_N)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weights ``[N, K]`` of a stack of one, as they count."""
        return self.unpack(dtype)[0]

    def _rows(self, panels: Tensor) -> Tensor:
        """``[E, P, 16, ...]`` as ``[E, N, ...]``."""
        return panels.flatten(1, 2)[:, : self.rows].contiguous()


def panel_bytes(kind: Kind, depth: int, group: int) -> int:
    """Bytes of 16 rows. ``group`` counts for integers."""
    if kind in ("float32", "bfloat16"):
        return WIDE * depth * (4 if kind == "float32" else 2)
    if kind in BITS_OF:
        return depth // BLOCK * block_bytes(kind)
    return WIDE * depth // (1 if kind == "int8" else 2) + depth // group * SIDE


def _type_of_sides(kind: Kind) -> torch.dtype:
    """Of scales and minima."""
    return torch.bfloat16 if kind == "fp4" else torch.float16


def check_depth(depth: int, group: int | None) -> None:
    """Raise ConfigError for sizes that cannot be packed."""
    if depth % SHARE:
        raise ConfigError(f"a packed matrix needs a depth that is a multiple of {SHARE}; it is {depth}")
    if group is not None and (group % SHARE or depth % group):
        raise ConfigError(f"group is {group}; it must be a multiple of {SHARE} that divides the depth {depth}")


def _panels(x_ENX: Tensor) -> Tensor:
    """``[E, N, ...]`` as ``[E, P, 16, ...]``, with rows of zeros behind the last."""
    missing = -x_ENX.shape[1] % WIDE
    if missing:
        x_ENX = torch.cat((x_ENX, x_ENX.new_zeros(x_ENX.shape[0], missing, *x_ENX.shape[2:])), dim=1)
    return x_ENX.unflatten(1, (-1, WIDE))


def _pack_floats(weight_ENK: Tensor, kind: Kind) -> Tensor:
    if kind == "float32":
        columns = _panels(weight_ENK.float()).transpose(2, 3)
    else:
        columns = _panels(weight_ENK.bfloat16()).unflatten(-1, (-1, 2)).transpose(2, 3)
    return columns.contiguous().flatten(2).view(torch.uint8)


# fp16 has no numbers between 0 and 6e-8, and few near it: by how much, of the greatest weight of a matrix, the ends of a group may be
# missed for it. Half a step of int8 is less than half of this, and fp16's own digits a twentieth.
MOST_SHORT = 0.01


def _round_bytes(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, s, m of ``[E, N, G, group]``: u - 128 is -127 to 127; and by how much stored scales miss the ends of a group."""
    most = grouped.abs().amax(-1)
    scale = (most / 127).half()
    number = (grouped / _divisor(scale)).round().clamp(-127, 127) + 128
    return number.to(torch.uint8), scale, torch.zeros_like(scale), (most - 127 * scale.float()).abs()


def _round_nibbles(grouped: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The side with the greater weight gets the eighth step.
    if symmetric:
        most = torch.where(grouped.amax(-1) >= -grouped.amin(-1), grouped.amax(-1), grouped.amin(-1))
        scale = (most / -8).half()
        least = -8 * scale
        short = (most - least.float()).abs()
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)
        least = low.half()
        scale = ((high - least.float()) / 15).half()
        short = torch.maximum((low - least.float()).abs(), (high - least.float() - 15 * scale.float()).abs())
    number = ((grouped - least.float().unsqueeze(-1)) / _divisor(scale)).round().clamp(0, 15)
    return number.to(torch.uint8), scale, least, short


def _divisor(scale: Tensor) -> Tensor:
    """What to divide by: the stored scale, and anything where all weights are alike."""
    scale = scale.float()
    return torch.where(scale == 0, 1.0, scale).unsqueeze(-1)

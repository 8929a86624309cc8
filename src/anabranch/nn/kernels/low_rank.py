"""The compiled product of rows, sorted by adapter, with the low-rank adapters of a pool, in float32 or bfloat16 on a CPU."""
# Shapes: N items, E adapters, U uses, C inputs, O outputs, R greatest rank, Z numbers of all B

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.operands import takes

__all__ = ["can_add", "low_rank"]

LOW_RANK = Kernel(
    "anabranch_low_rank",
    """types, turned: int, x: item[N, C], a: item[E, R, C], b: item[E*O*R], end: int64[E], rank: int64[E], item: int64[U],
    weight: float32[U], low: float32[U, R] out, kept: float32[U, R]? out, y: float32[N, O] rows out, strides(y), N, C, E, R, O, U,
    threads""",
    types={("float32",): 0, ("bfloat16",): 1},
    result="status",
)


def can_add(x_NC: Tensor, a_ERC: Tensor, b_EOR: Tensor) -> bool:
    """Whether the kernel takes these: on the CPU, as they lie (B in one piece, or turned so), in one type of float32 and bfloat16."""
    if x_NC.dtype not in (torch.float32, torch.bfloat16) or not x_NC.dtype == a_ERC.dtype == b_EOR.dtype:
        return False
    if x_NC.dim() != 2 or not (a_ERC.is_contiguous() and (b_EOR.is_contiguous() or _is_turned(b_EOR))):
        return False
    return takes(x_NC, a_ERC, b_EOR) and load() is not None


def _is_turned(b_EOR: Tensor) -> bool:
    """Whether ranks lie apart and outputs beside one another."""
    return not b_EOR.is_contiguous() and b_EOR.transpose(1, 2).is_contiguous()


def low_rank(
    x_NC: Tensor,
    a_ERC: Tensor,
    b_EOR: Tensor,
    end_E: Tensor,
    item_U: Tensor,
    weight_U: Tensor,
    *,
    ranks: Sequence[int] | None = None,
    keep: bool = False,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y_NO = sum of w_u B_e A_e x_n over the uses u of item n, z_UR = A_e x_n), both float32.

    Args:
        x_NC: items.
        a_ERC, b_EOR: of the adapters; B may be turned in memory (`can_add`), which is quicker of ranks that differ.
        end_E: integers, behind the last use of each adapter.
        item_U: int64, the item of each use; sorted by adapter, and of each by item.
        weight_U: of each use.
        ranks: of each adapter; what is beyond is not looked at. None for R each.
        keep: whether z is wanted, which is None otherwise.
        into: what is added to, in place, float32 ``[N, O]``, whose rows may be parts of wider ones; zeros if None.

    Raises InputError for operands that do not fit.
    """
    (num_adapters, rank, _), uses = a_ERC.shape, len(item_U)
    y_NO = torch.zeros(len(x_NC), b_EOR.shape[1]) if into is None else into
    rank_E = torch.full((num_adapters,), rank) if ranks is None else torch.tensor(ranks)
    low_UR, kept_UR = torch.empty(uses, rank), torch.zeros(uses, rank) if keep else None
    turned = _is_turned(b_EOR)
    b_Z = (b_EOR.transpose(1, 2) if turned else b_EOR).reshape(-1)
    uses_U = item_U.contiguous(), weight_U.float().contiguous()
    LOW_RANK(turned, x_NC.contiguous(), a_ERC, b_Z, end_E.long(), rank_E, *uses_U, low_UR, kept_UR, y_NO)
    return y_NO, kept_UR

"""Rings of ranks that cut heads between them: Ulysses within, a ring without ("USP", Fang and Zhao 2024, arXiv 2405.07719).

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("ring", "heads"))         # nodes, and the ranks of each
    out_BLHD = context_parallel_attention(q_BLHD, k_BLGD, v_BLGD, mesh, causal=True, layout="zigzag")

Ranks of a row of the mesh exchange heads for positions, so that each has the positions of all of them for its heads; with these it takes
part in the ring of its column. More ranks can share a sequence than there are heads, and only the ring's messages go from row to row.
"""
# Shapes: B sequences, L rows of a rank, H query heads, G key heads, D head width

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from anabranch.cluster.ring.agreement import check_agreement
from anabranch.cluster.ring.by_heads import head_shares
from anabranch.cluster.ring.layout import Placement, rows_together
from anabranch.cluster.ring.link import GroupLink, Traffic, drive
from anabranch.errors import InputError

if TYPE_CHECKING:
    from anabranch.cluster.ring.options import RingOptions

__all__ = ["attend_on_grid"]

Heads = Sequence[tuple[int, int]]


def attend_on_grid(
    tensors: tuple[Tensor, Tensor, Tensor],
    queries: Placement,
    keys: Placement,
    mesh: DeviceMesh,
    attend: Callable[..., tuple[Tensor, Tensor]],
    problem: str | None,
    options: "RingOptions",
    told: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out_BLHD, lse_BLH) of this rank's rows.

    Args:
        tensors: query_BLHD, key_BLGD and value_BLGD of this rank.
        queries, keys: of all ranks of the mesh, row by row.
        mesh: of two dimensions, (ring, heads).
        attend: attention over a ring, ``attend(query, key, value, queries, keys, group)``.
        problem: what is wrong with the tensors of this rank; then all ranks raise.
        options: of attention.
        told: what all ranks must be given alike, by name.

    Raises InputError where heads do not divide, or ranks were given different things.
    """
    query, key, value = tensors
    link = GroupLink(mesh.get_group(1), timeout_s=options.timeout_s)
    if options.check:
        _check(told, mesh, link, problem, options.timeout_s)
    elif problem is not None:
        raise InputError(problem)
    shares = head_shares(query.shape[2], key.shape[2], link.world)
    row = mesh.get_local_rank(0)
    members = range(row * link.world, (row + 1) * link.world)
    query_rows, key_rows = ([placed.rows[member] for member in members] for placed in (queries, keys))
    query_heads, key_heads = [share.queries for share in shares], [share.keys for share in shares]
    spread = [
        _Spread.apply(link, rows, heads, part)
        for part, rows, heads in (
            (query, query_rows, query_heads),
            (key, key_rows, key_heads),
            (value, key_rows, key_heads),
        )
    ]
    out, lse = attend(*spread, rows_together(queries, link.world), rows_together(keys, link.world), mesh.get_group(0))
    return _Gather.apply(link, query_rows, query_heads, out), _Gather.apply(link, query_rows, query_heads, lse)


def _check(
    told: Mapping[str, Any], mesh: DeviceMesh, link: GroupLink, problem: str | None, timeout_s: float | None
) -> None:
    """Raise InputError on all ranks of the mesh if something is wrong on one: first along rows, then from row to row."""
    try:
        check_agreement(told, link, problem)
    except InputError as error:
        problem = str(error)
    check_agreement(told, GroupLink(mesh.get_group(0), timeout_s=timeout_s), problem)


def _swap(link: GroupLink, parts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """What every rank has for this one, in order: ``parts`` are what this one has for each, ``shapes`` those of what comes."""
    others = [other for other in range(link.world) if other != link.rank]

    def program() -> Any:
        sent, received = link.exchange(
            "travel",
            0,
            [(other, 0, [parts[other]]) for other in others],
            [(other, 0, [torch.empty(shapes[other], dtype=parts[0].dtype, device="meta")]) for other in others],
        )
        yield from (*received, *sent)
        came = {other: handle.parts()[0] for other, handle in zip(others, received, strict=True)}
        return [came.get(rank, parts[rank]) for rank in range(link.world)]

    return list(drive(program(), Traffic()))


def _to_heads(link: GroupLink, rows: Sequence[int], heads: Heads, x_BLHD: Tensor) -> Tensor:
    """All rows of this rank's heads, of this rank's rows of all heads."""
    first, last = heads[link.rank]
    shapes = [torch.Size((x_BLHD.shape[0], count, last - first, *x_BLHD.shape[3:])) for count in rows]
    return torch.cat(_swap(link, [x_BLHD[:, :, slice(*one)] for one in heads], shapes), 1)


def _to_rows(link: GroupLink, rows: Sequence[int], heads: Heads, y_BXHD: Tensor) -> Tensor:
    """The reverse: this rank's rows of all heads. Heads that several ranks have are summed."""
    ends = list(accumulate(rows))
    parts = [y_BXHD[:, end - count : end] for count, end in zip(rows, ends, strict=True)]
    own = rows[link.rank]
    shapes = [torch.Size((y_BXHD.shape[0], own, last - first, *y_BXHD.shape[3:])) for first, last in heads]
    whole = y_BXHD.new_zeros(y_BXHD.shape[0], own, heads[-1][1], *y_BXHD.shape[3:])
    for (first, last), part in zip(heads, _swap(link, parts, shapes), strict=True):
        whole[:, :, first:last] += part
    return whole


class _Spread(torch.autograd.Function):
    """`_to_heads`, whose gradient is `_to_rows`."""

    @staticmethod
    def forward(ctx: Any, link: GroupLink, rows: list[int], heads: Heads, x_BLHD: Tensor) -> Tensor:
        ctx.told = (link, rows, heads)
        return _to_heads(link, rows, heads, x_BLHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, Tensor]:
        link, rows, heads = ctx.told
        return None, None, None, _to_rows(link, rows, heads, dy.contiguous())


class _Gather(torch.autograd.Function):
    """`_to_rows` of heads that one rank has each, whose gradient is `_to_heads`."""

    @staticmethod
    def forward(ctx: Any, link: GroupLink, rows: list[int], heads: Heads, y_BXHD: Tensor) -> Tensor:
        ctx.told = (link, rows, heads)
        return _to_rows(link, rows, heads, y_BXHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None, Tensor]:
        link, rows, heads = ctx.told
        return None, None, None, _to_heads(link, rows, heads, dx.contiguous())

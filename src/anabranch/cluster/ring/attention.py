"""Exact attention over a sequence that is cut over ranks, each of which has its own queries, keys and values.

    out_BLHD = token_ring_attention(q_BLHD, k_BLGD, v_BLGD, causal=True, layout="zigzag")         # under torchrun

"TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication" (Wang, Liu, Li, Jiang 2024, arXiv
2412.20501), forward as its reference code has it, backward ours; `ring_attention` is the baseline that moves keys and values. The
result is that of one process to rounding, whatever the scheme, the layout and the number of ranks.
"""
# Shapes: B sequences, L positions of a rank, S of all, H query heads, G key heads, D head width, N ranks

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from anabranch.cluster.ring.agreement import check_agreement
from anabranch.cluster.ring.by_heads import ByHeads, head_shares, schedule_by_heads
from anabranch.cluster.ring.choice import choose
from anabranch.cluster.ring.costs import SCHEMES, Sizes, Topology
from anabranch.cluster.ring.grid import attend_on_grid
from anabranch.cluster.ring.hybrid import Hybrid, hybrid_of
from anabranch.cluster.ring.kernel import fine_dtype
from anabranch.cluster.ring.layout import KINDS, Layout, Placement
from anabranch.cluster.ring.link import GroupLink, SimulatedLinks, Traffic
from anabranch.cluster.ring.pieces import Mask
from anabranch.cluster.ring.schedule import Schedule, schedule_of
from anabranch.cluster.ring.team import Group, GroupTeam, Settings, SimulatedTeam, over_ranks, process_group
from anabranch.errors import InputError

__all__ = [
    "Group",
    "RingOptions",
    "context_parallel_attention",
    "placed_attention",
    "ring_attention",
    "simulated_attention",
    "simulated_placed_attention",
    "token_ring_attention",
]

LayoutKind = Literal["contiguous", "zigzag", "stripe"]


@dataclass(frozen=True, kw_only=True)
class RingOptions:
    """What attention over ranks is told beside tensors.

    Attributes:
        scheme: ``auto``, one of `SCHEMES`, or ``hybrid`` (TokenRing inside nodes, a ring of keys between them), which ``auto`` looks at too
            where ``topology`` says which ranks are of a node.
        causal: queries see nothing behind themselves.
        window: positions that a causal query sees, its own among them; None for all.
        softmax_scale: factor on scores; None for 1 / sqrt(D).
        out_dtype: of partial results that travel: None for float32 (float64 of float64), or the type of the inputs.
        topology: what ``auto`` assumes of links, and the nodes of ``hybrid``; None for `Topology()`.
        timeout_s: how long a message may take; None for as long as the group says.
        traffic: counts what is sent and how long it is waited for; None for not at all.
        check: ask first whether all ranks were given the same, which costs one small exchange; without it, ranks that were not wait.
    """

    scheme: str = "auto"
    causal: bool = False
    window: int | None = None
    softmax_scale: float | None = None
    out_dtype: torch.dtype | None = None
    topology: Topology | None = None
    timeout_s: float | None = None
    traffic: Traffic | None = None
    check: bool = True

    @property
    def mask(self) -> Mask:
        """What queries see."""
        return Mask(self.causal, self.window)


def context_parallel_attention(
    query_BLHD: Tensor,
    key_BLGD: Tensor,
    value_BLGD: Tensor,
    group: Group = None,
    causal: bool = False,
    *,
    layout: LayoutKind = "contiguous",
    length: int | None = None,
    documents: Sequence[int] | Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Attention of a sequence over the ranks of a group; every rank calls it with its rows.

    Args:
        query_BLHD, key_BLGD, value_BLGD: float64, float32, bfloat16 or float16; L is as `Layout` says, G divides H.
        group: of processes, or a mesh of one dimension; None for all processes, or for this one alone where there is no group. A mesh of
            two: a ring of rows whose ranks cut heads between them, see `anabranch.cluster.ring.grid`; positions then count row by row.
        causal: queries see nothing behind themselves.
        layout: which rows a rank has, see `anabranch.cluster.ring.layout`. ``zigzag`` balances causal work.
        length: S, where the last rows are padding; None for N L. Padding sees nothing, gives 0 and gets no gradient.
        documents: where documents begin in a packed sequence and the last one ends, ``(0, ..., S)``.
        return_lse: the logarithm of each softmax's sum too, ``[B, L, H]``, float32; it has a gradient.
        options: see `RingOptions`; ``scheme`` is ``auto``.

    Returns:
        out_BLHD of the queries' type.

    Raises InputError for what cannot be, on every rank; PeerError if a rank is gone or late, with its number.
    """
    given = RingOptions(causal=causal, **options)
    documents = None if documents is None else tuple(int(place) for place in documents)
    is_grid = isinstance(group, DeviceMesh) and group.ndim == 2
    team = None if is_grid else _team(group, given)
    world = _size_of(group) if team is None else team.world

    def make(rows: int) -> tuple[Placement, Placement]:
        whole = rows * world if length is None else length
        made = Layout(layout, world, whole, documents, least_rows=rows)
        if made.rows != rows:
            raise InputError(
                f"each rank has {rows} positions, and {layout} of {whole} over {world} ranks has {made.rows}; "
                "pad to that, and pass length="
            )
        return made.placement, made.placement

    told = {
        "length": -1 if length is None else length,
        "layout": _number(KINDS, layout),
        "documents": _digest(documents),
    }
    rows = query_BLHD.shape[1] if query_BLHD.dim() == 4 else -1
    if team is None:
        made = make(max(rows, 0))
        return placed_attention(query_BLHD, key_BLGD, value_BLGD, *made, group, return_lse=return_lse, **vars(given))
    return _attend(
        (query_BLHD, key_BLGD, value_BLGD),
        lambda: make(rows),
        team,
        given,
        {**told, "positions of a rank": rows},
        return_lse,
    )


def token_ring_attention(
    query_BLHD: Tensor, key_BLGD: Tensor, value_BLGD: Tensor, group: Group = None, causal: bool = False, **options: Any
) -> Any:
    """`context_parallel_attention` by TokenRing: queries travel one way, partial results return the other."""
    return context_parallel_attention(query_BLHD, key_BLGD, value_BLGD, group, causal, scheme="token_ring", **options)


def ring_attention(
    query_BLHD: Tensor, key_BLGD: Tensor, value_BLGD: Tensor, group: Group = None, causal: bool = False, **options: Any
) -> Any:
    """`context_parallel_attention` by ring attention: keys and values travel from rank to rank (arXiv 2310.01889)."""
    return context_parallel_attention(query_BLHD, key_BLGD, value_BLGD, group, causal, scheme="ring", **options)


def placed_attention(
    query_BLHD: Tensor,
    key_BSGD: Tensor,
    value_BSGD: Tensor,
    queries: Placement,
    keys: Placement,
    group: Group = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """The same where queries are placed otherwise than keys: some new positions over a long resident cache, which stays where it is.

    ``queries`` and ``keys`` say of every rank which positions its rows are, and are the same on all. Other arguments as of
    `context_parallel_attention`.
    """
    given = RingOptions(**options)
    tensors = (query_BLHD, key_BSGD, value_BSGD)
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        rank = group.get_local_rank(0) * group.size(1) + group.get_local_rank(1)

        def attend(*parts: Any) -> Any:
            return placed_attention(*parts, return_lse=True, **vars(given))

        made = attend_on_grid(
            tensors, queries, keys, group, attend, _misplaced(tensors, queries, keys, group.size(), rank), given
        )
        return made if return_lse else made[0]
    team = _team(group, given)
    told = {"placement": crc32(repr((queries, keys)).encode())}
    problem = _misplaced(tensors, queries, keys, team.world, team.ranks[0])
    return _attend(tensors, lambda: (queries, keys), team, given, told, return_lse, problem)


def simulated_attention(
    query_BSHD: Tensor,
    key_BSGD: Tensor,
    value_BSGD: Tensor,
    world: int,
    causal: bool = False,
    *,
    layout: LayoutKind = "contiguous",
    documents: Sequence[int] | Tensor | None = None,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """The same of a whole sequence by ``world`` ranks that are simulated in this process, message by message: to test, count and plan.

    ``seed`` draws the order in which ranks take turns, and how late messages are; the result does not depend on it. Other arguments as of
    `context_parallel_attention`; S need not be a multiple of anything.
    """
    given = RingOptions(causal=causal, **options)
    places = None if documents is None else tuple(int(place) for place in documents)
    tensors = (query_BSHD, key_BSGD, value_BSGD)
    if problem := _problem(*tensors):
        raise InputError(problem)
    made = Layout(layout, world, query_BSHD.shape[1], places)
    parts = [tuple(made.shard(part, rank) for part in tensors) for rank in range(world)]
    return made.unshard(simulated_placed_attention(parts, made.placement, made.placement, given, seed=seed))


def simulated_placed_attention(
    parts: Sequence[tuple[Tensor, ...]],
    queries: Placement,
    keys: Placement,
    options: RingOptions | None = None,
    *,
    seed: int | None = None,
) -> list[Tensor]:
    """`placed_attention` of simulated ranks: out_BLHD of each, of (query_BLHD, key_BSGD, value_BSGD) of each."""
    options = RingOptions() if options is None else options
    if len(parts) != queries.world:
        raise InputError(f"there are parts of {len(parts)} ranks, and the placement is of {queries.world}")
    team = SimulatedTeam(SimulatedLinks(len(parts), seed=seed, traffic=options.traffic))
    flat = [part.transpose(1, 2) for own in parts for part in own]
    if not len(flat[0]):
        return [own[0].clone() for own in parts]
    found = over_ranks(team, _settings(flat, queries, keys, options), flat)
    return [out.transpose(1, 2) for out in found[::2]]


def _size_of(group: Group) -> int:
    assert isinstance(group, DeviceMesh), "a grid is a mesh"
    return int(group.size())


def _team(group: Group, options: RingOptions) -> Any:
    found = process_group(group)
    if found is None:
        return SimulatedTeam(SimulatedLinks(1, traffic=options.traffic))
    if dist.get_rank(found) < 0:
        raise InputError("this process is not in the group that was given; pass one that it is in")
    return GroupTeam(GroupLink(found, traffic=options.traffic, timeout_s=options.timeout_s))


def _settings(parts: Sequence[Tensor], queries: Placement, keys: Placement, options: RingOptions) -> Settings:
    query, key = parts[0], parts[1]
    home = options.out_dtype
    if home is not None and home not in (query.dtype, fine_dtype(query.dtype)):
        raise InputError(f"out_dtype is {home}; use {fine_dtype(query.dtype)} or the inputs' {query.dtype}")
    sizes = Sizes.of(query, key, home)
    scheme = options.scheme
    if scheme == "auto":
        backward = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        scheme = choose(queries, keys, options.mask, sizes, options.topology or Topology(), backward=backward)
    if scheme == ByHeads.scheme:
        head_shares(query.shape[1], key.shape[1], queries.world)
        schedule: Schedule | ByHeads | Hybrid = schedule_by_heads(queries, keys, options.mask)
    elif scheme == Hybrid.scheme:
        schedule = hybrid_of(queries, keys, options.mask, _node_size(options))
    else:
        schedule = schedule_of(scheme, queries, keys, options.mask)
    scale = query.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    return Settings(schedule, scale, home)


def _node_size(options: RingOptions) -> int:
    size = None if options.topology is None else options.topology.node_size
    if size is None:
        raise InputError(
            "scheme is 'hybrid', and nothing says which ranks are of a node; pass topology=Topology(node_size=...), or another scheme"
        )
    return size


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    place: Callable[[], tuple[Placement, Placement]],
    team: Any,
    options: RingOptions,
    told: dict[str, int],
    return_lse: bool,
    problem: str | None = None,
) -> Any:
    problem = _problem(*tensors) or problem
    if options.scheme not in ("auto", *SCHEMES, Hybrid.scheme):
        problem = f"scheme is {options.scheme!r}; use auto, {', '.join((*SCHEMES, Hybrid.scheme))}"
    if team.group is not None and tensors[0].device.type != team.link.device.type:
        moved = team.link.device.type
        problem = f"the tensors are on {tensors[0].device}, and this group moves those of {moved}; use a group of nccl for CUDA"
    if team.group is not None and options.check:
        check_agreement({**told, **_described(tensors, options)}, team.link, problem)
    if problem is not None:
        raise InputError(problem)
    queries, keys = place()
    parts = [part.transpose(1, 2) for part in tensors]
    if not len(parts[0]):
        # No message is of no bytes.
        out, lse = tensors[0].clone(), tensors[0].new_zeros(tensors[0].shape[:3])
        return (out, lse) if return_lse else out
    out_BHLD, lse_BHL = over_ranks(team, _settings(parts, queries, keys, options), parts)
    return (out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2)) if return_lse else out_BHLD.transpose(1, 2)


def _misplaced(tensors: tuple[Tensor, ...], queries: Placement, keys: Placement, world: int, rank: int) -> str | None:
    """What is wrong with the tensors of a rank, and with where it is said that they are."""
    if problem := _problem(tensors[0], tensors[1], tensors[2]):
        return problem
    for name, part, placement in (("queries", tensors[0], queries), ("keys", tensors[1], keys)):
        if placement.world != world:
            return f"{name} are placed on {placement.world} ranks, and there are {world}"
        if part.shape[1] != placement.rows[rank]:
            return f"rank {rank} has {part.shape[1]} rows of {name}, and their placement says {placement.rows[rank]}"
    return None


def _problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What is wrong with the tensors of one rank."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if any(part.dim() != 4 for part in (query, key, value)):
        return f"the shapes are {shapes}; they must be [B, L, H, D], [B, L, G, D] and the same"
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return f"the shapes are {shapes}; B and D must be the same, and keys as many as values"
    if 0 in query.shape[2:] or key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        return f"there are {query.shape[2]} query heads and {key.shape[2]} key heads; the second must divide the first"
    if len({part.device for part in (query, key, value)}) > 1:
        return f"the tensors are on {query.device}, {key.device} and {value.device}; use one device"
    if len({part.dtype for part in (query, key, value)}) > 1 or not query.dtype.is_floating_point:
        return f"the types are {query.dtype}, {key.dtype} and {value.dtype}; use one floating type"
    return None


def _described(tensors: tuple[Tensor, ...], options: RingOptions) -> dict[str, int]:
    """What must be the same on all ranks, as numbers."""
    query, key = tensors[:2]
    is_fit = query.dim() == key.dim() == 4
    names = ("sequences", "query heads", "head widths", "key heads")
    sizes = (query.shape[0], query.shape[2], query.shape[3], key.shape[2]) if is_fit else (0, 0, 0, 0)
    scale = options.softmax_scale
    return {
        **dict(zip(names, sizes, strict=True)),
        "types": crc32(f"{query.dtype} {options.out_dtype}".encode()),
        "schemes": crc32(f"{options.scheme} {options.topology}".encode()),
        "causal": int(options.causal),
        "windows": -1 if options.window is None else options.window,
        "scales": -1 if scale is None else crc32(repr(float(scale)).encode()),
    }


def _number(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else -1


def _digest(documents: tuple[int, ...] | None) -> int:
    return -1 if documents is None else crc32(repr(documents).encode())

"""Exact attention over a sequence that is cut over ranks, each of which has its own queries, keys and values.

    out_BLHD = token_ring_attention(q_BLHD, k_BLGD, v_BLGD, causal=True, layout="zigzag")         # under torchrun

"TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication" (Wang, Liu, Li, Jiang 2024, arXiv
2412.20501), forward as its reference code has it, backward ours; `ring_attention` is the baseline that moves keys and values. The
result is that of one process to rounding, whatever the scheme, the layout and the number of ranks.
"""
# Shapes: B sequences, L positions of a rank, S of all, H query heads, G key heads, D head width, N ranks

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from anabranch.bounds import shown
from anabranch.cluster.ring.agreement import check_agreement
from anabranch.cluster.ring.by_heads import ByHeads, head_shares, schedule_by_heads
from anabranch.cluster.ring.choice import choose
from anabranch.cluster.ring.costs import Sizes, Topology
from anabranch.cluster.ring.grid import attend_on_grid
from anabranch.cluster.ring.hybrid import Hybrid, hybrid_of
from anabranch.cluster.ring.kernel import fine_dtype
from anabranch.cluster.ring.layout import Layout, Placement
from anabranch.cluster.ring.link import GroupLink, SimulatedLinks
from anabranch.cluster.ring.options import (
    LayoutKind,
    RingOptions,
    asks_gradients,
    described,
    read_documents,
    read_layout,
    read_length,
    read_options,
)
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

Tensors = tuple[Tensor, Tensor, Tensor]
# Scores are sums of products, which torch makes of no smaller ones.
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    cut = _Cut(layout, length, documents, return_lse)
    return _cut_attention((query_BLHD, key_BLGD, value_BLGD), group, cut, {"causal": causal, **options})


def token_ring_attention(
    query_BLHD: Tensor, key_BLGD: Tensor, value_BLGD: Tensor, group: Group = None, causal: bool = False, **options: Any
) -> Any:
    """`context_parallel_attention` by TokenRing: queries travel one way, partial results return the other."""
    return _by_one_scheme("token_ring", (query_BLHD, key_BLGD, value_BLGD), group, causal, options)


def ring_attention(
    query_BLHD: Tensor, key_BLGD: Tensor, value_BLGD: Tensor, group: Group = None, causal: bool = False, **options: Any
) -> Any:
    """`context_parallel_attention` by ring attention: keys and values travel from rank to rank (arXiv 2310.01889)."""
    return _by_one_scheme("ring", (query_BLHD, key_BLGD, value_BLGD), group, causal, options)


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

    ``queries`` and ``keys`` say of every rank which positions its rows are, and are the same on all. Other arguments and errors as of
    `context_parallel_attention`.
    """
    given, problem = read_options(options)
    told = {"placements": (queries, keys)}
    return _placed((query_BLHD, key_BSGD, value_BSGD), queries, keys, group, given, told, return_lse, problem)


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
    given, wrong = read_options({"causal": causal, **options})
    places, unread = read_documents(documents)
    tensors = (query_BSHD, key_BSGD, value_BSGD)
    if problem := _problem(*tensors) or wrong or unread:
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
    if problem := _unplaced(queries, keys):
        raise InputError(problem)
    if len(parts) != queries.world:
        raise InputError(f"there are parts of {len(parts)} ranks, and the placement is of {queries.world}")
    team = SimulatedTeam(SimulatedLinks(len(parts), seed=seed, traffic=options.traffic))
    flat = [part.transpose(1, 2) for own in parts for part in own]
    if not len(flat[0]):
        return [own[0].clone() for own in parts]
    found = over_ranks(team, _settings(flat, queries, keys, options), flat)
    return [out.transpose(1, 2) for out in found[::2]]


@dataclass(frozen=True)
class _Cut:
    """How a sequence is cut, as it was given: see `context_parallel_attention`."""

    layout: Any = "contiguous"
    length: Any = None
    documents: Any = None
    return_lse: bool = False


def _by_one_scheme(scheme: str, tensors: Tensors, group: Group, causal: bool, options: Mapping[str, Any]) -> Any:
    """Attention of a function that is named after its scheme."""
    own = {field.name for field in fields(_Cut)}
    cut = _Cut(**{name: value for name, value in options.items() if name in own})
    others = {name: value for name, value in options.items() if name not in own}
    problem = None
    if (named := others.pop("scheme", scheme)) != scheme:
        problem = f"scheme is {shown(named)}, and {scheme}_attention is by {scheme}; call context_parallel_attention for another one"
    return _cut_attention(tensors, group, cut, {"causal": causal, **others, "scheme": scheme}, problem)


def _cut_attention(
    tensors: Tensors, group: Group, cut: _Cut, options: Mapping[str, Any], problem: str | None = None
) -> Any:
    """`context_parallel_attention`; whatever is wrong on this rank the others learn of, before they wait for it."""
    given, wrong = read_options(options)
    documents, unread = read_documents(cut.documents)
    length, unknown = read_length(cut.length)
    layout = read_layout(cut.layout)
    problem = problem or wrong or unknown or unread
    told = {"length": length, "layout": layout, "documents": documents}
    query = tensors[0]
    rows = query.shape[1] if isinstance(query, Tensor) and query.dim() == 4 else -1

    def make(world: int) -> tuple[Placement, Placement]:
        whole = rows * world if length is None else length
        made = Layout(layout, world, whole, documents, least_rows=rows)
        if made.rows != rows:
            raise InputError(
                f"each rank has {rows} positions, and {layout} of {whole} over {world} ranks has {made.rows}; "
                "pad to that, and pass length="
            )
        return made.placement, made.placement

    told["positions of a rank"] = rows
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        placed = (Placement((), ()), Placement((), ()))
        try:
            placed = make(group.size()) if problem is None and rows >= 0 else placed
        except InputError as error:
            problem = str(error)
        return _placed(tensors, *placed, group, given, told, cut.return_lse, problem)
    team = _team(group, given)
    return _attend(tensors, lambda: make(team.world), team, given, told, cut.return_lse, problem)


def _placed(
    tensors: Tensors,
    queries: Placement,
    keys: Placement,
    group: Group,
    given: RingOptions,
    told: dict[str, Any],
    return_lse: bool,
    problem: str | None,
) -> Any:
    """`placed_attention`, with what is wrong on this rank already."""
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        rank = group.get_local_rank(0) * group.size(1) + group.get_local_rank(1)

        def attend(*parts: Any) -> Any:
            return placed_attention(*parts, return_lse=True, **vars(given))

        problem = problem or _misplaced(tensors, queries, keys, group.size(), rank)
        agreed = {**told, **described(tensors, given)}
        made = attend_on_grid(tensors, queries, keys, group, attend, problem, given, agreed)
        return made if return_lse else made[0]
    team = _team(group, given)
    problem = problem or _misplaced(tensors, queries, keys, team.world, team.ranks[0])
    return _attend(tensors, lambda: (queries, keys), team, given, told, return_lse, problem)


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
        scheme = choose(
            queries, keys, options.mask, sizes, options.topology or Topology(), backward=asks_gradients(parts)
        )
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
    tensors: Tensors,
    place: Callable[[], tuple[Placement, Placement]],
    team: Any,
    options: RingOptions,
    told: dict[str, Any],
    return_lse: bool,
    problem: str | None,
) -> Any:
    problem = _problem(*tensors) or problem
    if problem is None and team.group is not None and tensors[0].device.type != team.link.device.type:
        moved = team.link.device.type
        problem = f"the tensors are on {tensors[0].device}, and this group moves those of {moved}; use a group of nccl for CUDA"
    if team.group is not None and options.check:
        check_agreement({**told, **described(tensors, options)}, team.link, problem)
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
    if problem := _problem(tensors[0], tensors[1], tensors[2]) or _unplaced(queries, keys):
        return problem
    for name, part, placement in (("queries", tensors[0], queries), ("keys", tensors[1], keys)):
        if placement.world != world:
            return f"{name} are placed on {placement.world} ranks, and there are {world}"
        if part.shape[1] != placement.rows[rank]:
            return f"rank {rank} has {part.shape[1]} rows of {name}, and their placement says {placement.rows[rank]}"
    return None


def _unplaced(queries: Any, keys: Any) -> str | None:
    """That one of them says of no rank what its rows are."""
    for name, placement in (("queries", queries), ("keys", keys)):
        if not isinstance(placement, Placement):
            return f"{name} are placed by {shown(placement)}; give a Placement, such as Layout(kind, world, length).placement"
    return None


def _problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What is wrong with the tensors of one rank."""
    if kinds := [type(part).__name__ for part in (query, key, value) if not isinstance(part, Tensor)]:
        return f"queries, keys and values must be tensors, and one of them is of type {kinds[0]}"
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if any(part.dim() != 4 for part in (query, key, value)):
        return f"the shapes are {shapes}; they must be [B, L, H, D], [B, L, G, D] and the same"
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return f"the shapes are {shapes}; B and D must be the same, and keys as many as values"
    if 0 in query.shape[2:] or key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        return f"there are {query.shape[2]} query heads and {key.shape[2]} key heads; the second must divide the first"
    if len({part.device for part in (query, key, value)}) > 1:
        return f"the tensors are on {query.device}, {key.device} and {value.device}; use one device"
    if len({part.dtype for part in (query, key, value)}) > 1 or query.dtype not in _TYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        return f"the types are {query.dtype}, {key.dtype} and {value.dtype}; use one for all, of {allowed}"
    return None

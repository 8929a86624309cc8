"""Visits: a block may run several times in one forward pass, not at all, or for some sequences of the batch only.

Attention keeps keys and values of each visit apart: what the second run of a block sees of earlier positions is what *second runs* of it
left behind. So decoding with a cache gives what one pass over the whole sequence gives, whatever the order of the blocks.
"""
# Shapes: B sequences, R of them, L positions, N = B L items, D width

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.nn.items import Items

if TYPE_CHECKING:
    from anabranch.nn.context import ForwardContext

Path = Sequence[int] | Sequence[Sequence[int]]

# How often attention of each layer has run in a forward pass: one number where all sequences have come as often, which is nearly always.
Visits = dict[int, int | list[int]]

__all__ = [
    "Path",
    "Visits",
    "check_path",
    "next_visits",
    "on_rows",
    "steps_of",
    "take_back",
    "visits_of_rows",
    "whole_sequences",
]


def next_visits(visits: Visits, layer: int, batch: int) -> list[tuple[int, list[int] | None]]:
    """Count one more visit of B sequences to a layer.

    Returns pairs of the number of the visit, from 0, and whose it is; None for all.
    """
    count = visits.get(layer, 0)
    if isinstance(count, int):
        visits[layer] = count + 1
        return [(count, None)]
    visits[layer] = [one + 1 for one in count]
    if len(set(count)) == 1:
        return [(count[0], None)]
    return [(visit, [row for row in range(batch) if count[row] == visit]) for visit in sorted(set(count))]


def visits_of_rows(visits: Visits, rows: Sequence[int]) -> Visits:
    """Those of some sequences of the batch."""
    return {layer: count if isinstance(count, int) else [count[row] for row in rows] for layer, count in visits.items()}


def take_back(visits: Visits, part: Visits, rows: Sequence[int], batch: int) -> None:
    """Take over what has been counted in `visits_of_rows` since."""
    for layer, counted in part.items():
        before = visits.get(layer, 0)
        if counted == before:
            continue
        counts = [before] * batch if isinstance(before, int) else list(before)
        for place, row in enumerate(rows):
            counts[row] = counted if isinstance(counted, int) else counted[place]
        visits[layer] = counts


def on_rows(
    run: Callable[[Tensor, Any], Tensor], x_BLD: Tensor, context: "ForwardContext", rows: Sequence[int]
) -> Tensor:
    """x_BLD where ``run(x_RLD, context)`` has gone over some sequences of the batch; the others are as they were.

    What ``run`` emits and carries on counts for these sequences. Keys and values go to their places in the cache.

    Args:
        run: a block, or anything called like one.
        x_BLD: all sequences.
        context: of all sequences.
        rows: numbers of sequences, each at most once. None at all leaves everything as it is.
    """
    batch, length = x_BLD.shape[:2]
    if len(rows) == batch and list(rows) == list(range(batch)):
        return run(x_BLD, context)
    if not rows:
        return x_BLD
    row_R = torch.tensor(rows, device=x_BLD.device)
    place_L = torch.arange(length, device=x_BLD.device)
    items = Items((row_R.unsqueeze(1) * length + place_L).flatten(), (batch, length), (len(rows), length))
    part = _part(context, items, row_R, rows, batch)
    y_RLD = items.run(run, x_BLD[row_R], context, part)
    take_back(context.visits, part.visits, rows, batch)
    return x_BLD.index_copy(0, row_R, y_RLD.to(x_BLD.dtype))


def _part(context: "ForwardContext", items: Items, row_R: Tensor, rows: Sequence[int], batch: int) -> "ForwardContext":
    """The context of some rows."""

    def sequences(value_B: Any) -> Any:
        return value_B[row_R] if isinstance(value_B, Tensor) and value_B.shape[0] == batch > 1 else value_B

    num_streams, names = _names(context, rows, batch)
    part = context.fork(items.take_all(context.carry, "carry"))
    return replace(
        part,
        item_mask_N=items.take(context.item_mask_N),
        num_streams=num_streams,
        sequences=names,
        all_sequences=context.all_sequences or context.sequences,
        state=items.take_all(context.state, "state"),
        position_BL=context.position_BL[row_R],
        rotary=tuple(sequences(angles) for angles in context.rotary),
        attention_mask=sequences(context.attention_mask),
        token_BL=sequences(context.token_BL),
        visits=visits_of_rows(context.visits, rows),
        rows=list(rows) if context.rows is None else [context.rows[row] for row in rows],
    )


def _names(context: "ForwardContext", rows: Sequence[int], batch: int) -> tuple[int, list[Hashable] | None]:
    """(streams, names of the sequences) of some rows: as they were where each sequence comes with all its streams, else unnamed."""
    own = whole_sequences(rows, context.num_streams, batch // context.num_streams)
    if own is None:
        return 1, None
    return context.num_streams, None if context.sequences is None else [context.sequences[row] for row in own]


def whole_sequences(rows: Sequence[int], num_streams: int, num_sequences: int | None = None) -> list[int] | None:
    """The sequences that ``rows`` of a stream-major batch are: each with all its streams, one stream after another.

    Args:
        rows: numbers of rows.
        num_streams: P.
        num_sequences: of the whole batch, so a sequence's next stream is that many rows behind; None where it is not known: as far behind
            as ``rows`` have it.

    Returns None where ``rows`` are something else.
    """
    count, rest = divmod(len(rows), num_streams)
    own = list(rows[:count])
    if num_sequences is None:
        num_sequences = rows[count] - rows[0] if num_streams > 1 and own else max(own, default=0) + 1
    in_order = [row + stream * num_sequences for stream in range(num_streams) for row in own]
    return own if not rest and list(rows) == in_order and all(row < num_sequences for row in own) else None


def check_path(path: Path, num_blocks: int, batch: int) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """``path`` in tuples; one for all if all sequences have the same.

    Raises ConfigError for what is no sequence, a block that there is not, or another number of paths than sequences.
    """
    if not isinstance(path, Sequence) or isinstance(path, str | bytes):
        raise ConfigError(f"path is {path!r}; give block numbers, such as (0, 1, 1)")
    several = any(isinstance(one, Sequence) and not isinstance(one, str) for one in path)
    rows: Sequence[Any] = path if several else [path]
    for row in rows:
        for block in row if isinstance(row, Sequence) else [path]:
            if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block < num_blocks:
                raise ConfigError(f"path has block {block!r}; the model has blocks 0 to {num_blocks - 1}")
    paths = [tuple(row) for row in rows]
    if rows is path and len(paths) != batch:
        raise ConfigError(f"there are {len(paths)} paths for {batch} sequences; give one for all, or one each")
    return paths[0] if len(set(paths)) == 1 else tuple(paths)


def steps_of(path: Path, num_streams: int, batch: int) -> Iterator[tuple[int, list[int] | None]]:
    """(block, the rows that run it; None for all), each sequence in the order of its path; those that come to a block next run it together.

    B sequences have P streams each, one stream after another.
    """
    if not any(isinstance(one, Sequence) for one in path):
        yield from ((block, None) for block in path)  # type: ignore[misc]
        return
    left = [list(reversed(blocks)) for blocks in path]  # type: ignore[arg-type]
    while any(left):
        # The lowest first: sequences whose paths ascend, with blocks left out or repeated, meet again in every block that they share.
        block = min(blocks[-1] for blocks in left if blocks)
        rows = [row for row, blocks in enumerate(left) if blocks and blocks[-1] == block]
        for row in rows:
            left[row].pop()
        yield block, [row + stream * batch for stream in range(num_streams) for row in rows]

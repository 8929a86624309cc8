"""Some items of a forward pass: the rows that a layer gathers, with a forward context of theirs.

A layer that sends each token somewhere (to an expert, to one of two modules, into another loop) calls what stands there with gathered
rows. `on_items` gives the call what a context says of them: positions, tokens, sequences, which are padding, what is carried on.
"""
# Shapes: N = B L items of the pass, R gathered rows, B batch, L positions, D width

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from anabranch.routing.context import RoutingContext
from anabranch.routing.sequences import StreamSequence

if TYPE_CHECKING:
    from anabranch.nn.context import ForwardContext

__all__ = ["no_rows", "of_items", "on_items"]


def on_items(
    run: Callable[[Tensor, Any], Tensor], x_RD: Tensor, context: Any, item_R: Tensor, num_items: int
) -> Tensor:
    """``run(x_RD, context of these items)``; what it emits and carries on counts for them.

    Args:
        run: a layer, or anything called like one.
        x_RD: the gathered rows.
        context: of the whole pass; None where there is none, and then ``run`` gets none.
        item_R: int64, which item each row is.
        num_items: N.
    """
    if context is None:
        return run(x_RD, None)
    part = of_items(context, item_R, num_items)
    y_RD = run(x_RD, part)
    for name, value in part.carry.items():
        before = context.carry.get(name)
        if value is not before:
            context.carry[name] = _put_back(before, value, item_R, num_items)
    context.merge(*part.collected())
    return y_RD


def no_rows(layers: Sequence[nn.Module], x_0D: Tensor) -> Tensor:
    """The output of ``layers`` that nobody goes to: no rows, with a gradient of zero for their parameters.

    Not a missing one, since in data parallel training other processes may have one. The layers are not called: few are written for no rows.
    """
    sums = [parameter.sum().to(x_0D.dtype) for layer in layers for parameter in layer.parameters()]
    return x_0D + sum(sums, start=x_0D.new_zeros(()))


def of_items(context: RoutingContext, item_R: Tensor, num_items: int) -> Any:
    """A fork of ``context`` for some of its N items, which are no sequences any more: each is one of length 1.

    Keys and values are not theirs to use: ``cache`` is None.
    """
    part = context.fork({name: _items(value, item_R, num_items) for name, value in context.carry.items()})
    mask_N = context.item_mask_N
    part = replace(
        part,
        item_mask_N=None if mask_N is None else mask_N[item_R],
        sequence_length=1,
        num_streams=1,
        sequences=_names(context, item_R, num_items),
        all_sequences=context.all_sequences or context.sequences,
        state={name: _items(value, item_R, num_items) for name, value in context.state.items()},
    )
    if "position_BL" not in {field.name for field in fields(context)}:
        return part
    return _with_positions(part, context, item_R)  # type: ignore[arg-type]


def _with_positions(part: Any, context: "ForwardContext", item_R: Tensor) -> Any:
    """What a language model's pass says besides."""
    length = context.position_BL.shape[1]
    row_R, column_R = item_R // max(length, 1), item_R % max(length, 1)
    cos_sin = (
        angles.expand(context.position_BL.shape[0], *angles.shape[1:])[row_R, 0, column_R] for angles in context.rotary
    )
    token_BL = context.token_BL
    of_whole = token_BL is not None and token_BL.shape == context.position_BL.shape
    rows = row_R.tolist() if context.rows is None else [context.rows[row] for row in row_R.tolist()]
    return replace(
        part,
        position_BL=context.position_BL[row_R, column_R].unsqueeze(1),
        rotary=tuple(angles[:, None, None] for angles in cos_sin),
        attention_mask=None,
        is_causal=False,
        cache=None,
        token_BL=token_BL[row_R, column_R].unsqueeze(1) if of_whole else None,  # type: ignore[index]
        rows=rows,
    )


def _names(context: RoutingContext, item_R: Tensor, num_items: int) -> list[Hashable] | None:
    """The name of each item's sequence, with its stream."""
    sequences, streams, length = context.sequences, context.num_streams, context.sequence_length or 1
    if not sequences or num_items != streams * len(sequences) * length:
        return None
    named = [StreamSequence.of(name, stream) for stream in range(streams) for name in sequences]
    return [named[row] for row in (item_R // length).tolist()]


def _items(value: Any, item_R: Tensor, num_items: int) -> Any:
    """The part of ``value`` that speaks of these items, where it speaks of each."""
    if not isinstance(value, Tensor):
        return value
    if value.shape[:1] == (num_items,):
        return value[item_R]
    if value.dim() > 1 and value.shape[0] * value.shape[1] == num_items:
        return value.flatten(0, 1)[item_R].unsqueeze(1)
    return value


def _put_back(before: Tensor | None, value: Tensor, item_R: Tensor, num_items: int) -> Tensor:
    """What a layer carries on, of all items; zeros for those that have none yet."""
    if value.shape[:1] != item_R.shape:
        return value
    full = value.new_zeros(num_items, *value.shape[1:])
    if before is not None and before.shape == full.shape:
        full = before.to(value.dtype)
    return full.index_copy(0, item_R, value)

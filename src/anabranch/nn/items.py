"""Some items of a forward pass: the rows that a layer gathers, with a forward context of theirs.

A layer that sends each token somewhere (to an expert, to one of two modules, into another loop) calls what stands there with gathered
rows. `on_items` gives the call what a context says of them: positions, tokens, sequences, which are padding, what is carried on.

What is carried or said by name (``context.carry``, ``context.state``) is of the items where it is a tensor ``[N, ...]`` or ``[B, L, ...]``.
`Items` takes such tensors apart and puts them together again, in the shape that they had. What is of the whole pass is a single number, no
tensor, or says so as an `OfPass`.
"""
# Shapes: N = B L items of the pass, R gathered ones, B batch, L positions, D width

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError
from anabranch.routing.context import RoutingContext
from anabranch.routing.sequences import BEGINS, ITEMS, StreamSequence

if TYPE_CHECKING:
    from anabranch.nn.context import ForwardContext

__all__ = ["Items", "no_rows", "of_items", "on_items", "on_positions"]


@dataclass(frozen=True)
class Items:
    """Some items of a pass, and how to cut what is said of each item.

    Attributes:
        item_R: int64, which they are of the N, each at most once.
        whole: (B, L) of the pass, B L = N.
        part: (B, L) of what is cut out, B L = R.
    """

    item_R: Tensor
    whole: tuple[int, int]
    part: tuple[int, int]

    def take(self, value: Any) -> Any:
        """The part of ``value`` that speaks of these items, where it is ``[N, ...]`` or ``[B, L, ...]``; anything else as it is."""
        flat = _flat(value, self.whole)
        if flat is None:
            return value
        taken = flat[self.item_R]
        return taken if flat is value else taken.unflatten(0, self.part)

    def take_all(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`take` of each of ``values``, the ``carry`` or ``state`` of a context."""
        for name, value in values.items():
            self._check(value, f"context.{where}[{name!r}]", self.whole)
        return {name: self.take(value) for name, value in values.items()}

    def _check(self, value: Any, what: str, sizes: tuple[int, int]) -> None:
        """Warn of a tensor that is neither of items nor says that it is of the whole pass."""
        if isinstance(value, Tensor) and value.dim() and _flat(value, sizes) is None:
            warnings.warn(
                f"{what} has shape {list(value.shape)}, so it is of none of the {sizes[0] * sizes[1]} items of the pass; wrap what is of "
                "the whole pass in anabranch.routing.OfPass, or it is taken apart where its first size is the number of items. The next "
                "version raises an error here",
                DeprecationWarning,
                stacklevel=2,
            )

    def put_back(self, before: Any, value: Any) -> Any:
        """``before``, which is of all items, where ``value`` stands for these; zeros for the others if there is none that fits.

        It has the form of ``before``, ``[N, ...]`` or ``[B, L, ...]``. A value that speaks of no single items is returned as it is.
        """
        flat_before = _flat(before, self.whole)
        # Where these items are sequences of length 1, a tensor could be of either form; it is of that which it was cut from.
        flat = _flat(value, self.part, by_sequence=flat_before is not None and flat_before is not before)
        if flat is None:
            return value
        if flat_before is not None and flat_before.shape[1:] == flat.shape[1:]:
            # The others keep all their digits, and these theirs.
            dtype = torch.promote_types(flat_before.dtype, flat.dtype)
            whole = flat_before.to(dtype)
        else:
            whole = flat.new_zeros(self.whole[0] * self.whole[1], *flat.shape[1:])
        whole = whole.index_copy(0, self.item_R, flat.to(whole.dtype))
        return whole if flat is value else whole.unflatten(0, self.whole)

    def run(self, run: Callable[[Tensor, Any], Tensor], x: Tensor, context: RoutingContext, part: Any) -> Tensor:
        """``run(x, part)`` for a fork ``part`` of ``context`` for these items: what it emits and carries on counts for them alone."""
        given = dict(part.carry)
        y = run(x, part)
        for name, value in part.carry.items():
            if name not in given or value is not given[name]:
                self._check(value, f"context.carry[{name!r}]", self.part)
                context.carry[name] = self.put_back(context.carry.get(name), value)
        context.merge(*part.collected())
        return y


def _flat(value: Any, sizes: tuple[int, int], *, by_sequence: bool = False) -> Tensor | None:
    """``value`` as [B L, ...] if it is of the items of (B, L) = ``sizes``, itself where it is so already; None if it is not of items.

    ``by_sequence`` says to take it for [B, L, ...] where it could be both.
    """
    if not isinstance(value, Tensor):
        return None
    is_flat, is_by_sequence = value.shape[:1] == (sizes[0] * sizes[1],), value.shape[:2] == sizes
    if is_by_sequence and (by_sequence or not is_flat):
        return value.flatten(0, 1)
    return value if is_flat else None


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
    return _items_of(context, item_R, num_items).run(run, x_RD, context, of_items(context, item_R, num_items))


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
    items = _items_of(context, item_R, num_items)
    part = context.fork(items.take_all(context.carry, "carry"))
    mask_N = context.item_mask_N
    part = replace(
        part,
        item_mask_N=None if mask_N is None else mask_N[item_R],
        sequence_length=1,
        num_streams=1,
        sequences=_names(context, item_R, num_items),
        all_sequences=context.all_sequences or context.sequences,
        state=items.take_all(context.state, "state"),
    )
    part.state.setdefault(ITEMS, item_R)
    if "position_BL" not in {field.name for field in fields(context)}:
        return part
    return _with_positions(part, context, item_R)  # type: ignore[arg-type]


def on_positions(
    run: Callable[[Tensor, Any], Tensor], x_BKD: Tensor, context: "ForwardContext", keep_L: Tensor | None = None
) -> Tensor:
    """``run(x_BKD, context of these)`` for what stands behind the blocks: K positions of every sequence, and one stream where several were.

    Args:
        run: a layer, or anything called like one.
        x_BKD: hidden states of B sequences, those of all streams merged.
        context: of the whole pass, of P B sequences and L positions.
        keep_L: int64 ``[K]``, which positions they are; None for all L.

    What the layer emits and carries on counts for these items. They have the names of the first stream.
    """
    rows, length = context.position_BL.shape
    if keep_L is None and context.num_streams == 1 and x_BKD.shape[1] == length:
        return run(x_BKD, context)
    batch, device = rows // context.num_streams, context.position_BL.device
    keep_L = torch.arange(length, device=device) if keep_L is None else keep_L.to(device)
    if x_BKD.shape[1] != len(keep_L):
        raise AnabranchError(
            f"x has {x_BKD.shape[1]} positions, and {len(keep_L)} of {length} are said to be kept; say which in keep_L"
        )
    # From the end, as indices are.
    keep_L = torch.where(keep_L < 0, keep_L + length, keep_L)
    item_R = (torch.arange(batch, device=device)[:, None] * length + keep_L).flatten()
    items = Items(item_R, (rows, length), (batch, len(keep_L)))
    token_BL, mask_N = context.token_BL, context.item_mask_N
    is_of_whole = token_BL is not None and token_BL.shape == context.position_BL.shape
    part = replace(
        context.fork(items.take_all(context.carry, "carry")),
        item_mask_N=None if mask_N is None else mask_N[item_R],
        num_streams=1,
        state=items.take_all(context.state, "state"),
        position_BL=context.position_BL[:batch, keep_L],
        rotary=(context.rotary[0][:batch, :, keep_L], context.rotary[1][:batch, :, keep_L]),
        attention_mask=None,
        is_causal=False,
        cache=None,
        token_BL=token_BL[:batch, keep_L] if is_of_whole else None,  # type: ignore[index]
        rows=None if context.rows is None else context.rows[:batch],
    )
    part.state.setdefault(ITEMS, item_R)
    if not torch.compiler.is_compiling() and bool((context.position_BL == 0).any()):
        part.state[BEGINS] = True
    if context.sequence_length is not None:
        part.sequence_length = len(keep_L)
    elif context.sequences is not None and len(context.sequences) == batch * length:
        # Every item has a name of its own.
        part.all_sequences = context.all_sequences or context.sequences
        part.sequences = [context.sequences[item] for item in item_R.tolist()]
    return items.run(run, x_BKD, context, part)


def _items_of(context: RoutingContext, item_R: Tensor, num_items: int) -> Items:
    """Items that are sequences of length 1 from here on."""
    position_BL = getattr(context, "position_BL", None)
    if position_BL is not None and position_BL.numel() == num_items:
        batch, length = position_BL.shape
    else:
        length = context.sequence_length or 1
        batch, length = (num_items // length, length) if num_items % length == 0 else (num_items, 1)
    return Items(item_R, (batch, length), (len(item_R), 1))


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

"""Predictions of a model beside its routing: which token it expects after each one that was routed."""
# Shapes: B sequences of a forward pass, L positions, P streams, R rows

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from anabranch.errors import DataError
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import schema_with

__all__ = ["with_predictions"]


def with_predictions(trace: RoutingTrace, passes: Sequence[tuple[np.ndarray, np.ndarray]]) -> RoutingTrace:
    """The trace with a column ``predicted``.

    Args:
        trace: of forward passes over whole sequences, recorded one after the other from an empty record, and with tokens. In several
            parallel streams every stream of a pass predicts the same.
        passes: ``(token_BL, predicted_BL)`` of each forward pass, in order.

    Raises DataError if the trace is not of these passes.
    """
    num_sequences = sum(len(token_BL) for token_BL, _ in passes)
    item_R, position_R = (trace.table[name].to_numpy() for name in ("item", "position"))
    num_items = int(item_R.max(initial=-1)) + 1
    streams, rest = divmod(num_items, max(num_sequences, 1))
    if rest or (num_items and not streams):
        raise DataError(
            f"the trace has {num_items} sequences, which {num_sequences} sequences of predictions do not fit"
        )
    width = max((token_BL.shape[1] for token_BL, _ in passes), default=0)
    table = np.full((2, num_items, width), -1, np.int32)
    first = 0
    for pair in passes:
        for values_XL, value_BL in zip(table, pair, strict=True):
            rows = np.tile(value_BL, (streams, 1))
            values_XL[first : first + len(rows), : rows.shape[1]] = rows
        first += streams * len(pair[0])
    if position_R.size and not 0 <= position_R.min() <= position_R.max() < width:
        raise DataError(f"the trace has positions to {position_R.max()}, and the predictions are of {width}")
    token_R, predicted_R = table[:, item_R, position_R]
    known = trace.table["token"].fill_null(-1).to_numpy()
    if not np.array_equal(known, token_R):
        raise DataError("the tokens of the trace are not those of the predictions")
    names = [*trace.table.column_names, "predicted"]
    column = pa.array(predicted_R, pa.int32(), mask=predicted_R < 0)
    table = trace.table.append_column("predicted", column)
    return RoutingTrace(table.select(schema_with(names).names), trace.layers)

"""Nodes into parts of near-equal degree, and negatives from one part.

Zig-zag (section "parallel negative sampling" of the paper): nodes sorted by falling degree get the parts 0 ... P-1, then P-1 ... 0, and so
on. The degree sums of any two parts then differ by at most the largest degree, and their sizes by at most one.
"""
# Shapes: N nodes, P parts

from dataclasses import dataclass

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.alias import AliasTable, build_alias

# Of degrees, in the draw of negatives.
POWER = 0.75


@dataclass(frozen=True)
class Partition:
    """Which node lies where. Rows of parameters lie part after part.

    Attributes:
        part_N: int32, the part of each node.
        local_N: int32, its row within the part; nodes of a part stand by falling degree.
        start_P: int64 [P + 1], where each part begins.
        row_N: int64, its row among all: ``start_P[part_N] + local_N``.
        node_N: int64, the node of each row.
    """

    part_N: np.ndarray
    local_N: np.ndarray
    start_P: np.ndarray
    row_N: np.ndarray
    node_N: np.ndarray

    @property
    def num_parts(self) -> int:
        """P."""
        return len(self.start_P) - 1

    @property
    def largest(self) -> int:
        """Nodes of the largest part."""
        return int(np.diff(self.start_P).max(initial=0))


def zig_zag(degree_N: np.ndarray, num_parts: int) -> Partition:
    """The zig-zag partition; ties of degree stand by node. Raises InputError for more parts than nodes, or none."""
    count = len(degree_N)
    if not 1 <= num_parts <= max(count, 1):
        raise InputError(f"partitions is {num_parts}; a graph of {count:,} nodes has 1 to {max(count, 1)}")
    by_degree_N = np.argsort(-np.asarray(degree_N), kind="stable")
    place_N = np.arange(count)
    round_N, within_N = place_N // num_parts, place_N % num_parts
    part_N = np.empty(count, np.int32)
    part_N[by_degree_N] = np.where(round_N % 2 == 0, within_N, num_parts - 1 - within_N)
    node_N = by_degree_N[np.argsort(part_N[by_degree_N], kind="stable")]
    start_P = np.zeros(num_parts + 1, np.int64)
    np.cumsum(np.bincount(part_N, minlength=num_parts), out=start_P[1:])
    row_N = np.empty(count, np.int64)
    row_N[node_N] = np.arange(count)
    return Partition(part_N, (row_N - start_P[part_N]).astype(np.int32), start_P, row_N, node_N)


def negative_tables(degree_N: np.ndarray, partition: Partition) -> AliasTable:
    """One alias table per part, in the order of rows: nodes of the part by degree^0.75 (evenly in a part without edges)."""
    weight_N = np.asarray(degree_N, np.float64)[partition.node_N] ** POWER
    for start, end in zip(partition.start_P[:-1], partition.start_P[1:], strict=True):
        if not weight_N[start:end].any():
            weight_N[start:end] = 1.0
    return build_alias(partition.start_P, weight_N)

"""A `PowerWalk` goes along with its graph: which rows a change touches, and walking again for those alone."""
# Shapes: N nodes

from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_flag, is_number
from anabranch.graph.coerce import as_graph
from anabranch.graph.delta import with_changes
from anabranch.graph.powerwalk.held import DTYPES, Held
from anabranch.graph.powerwalk.index import make_chunks
from anabranch.graph.powerwalk.stored import Gathered, changed_nodes, check_successor
from anabranch.graph.ppr.rules import Transition
from anabranch.graph.workers import num_workers

# Beyond any share of visits: rows that are not there at all come first.
NEW = 1e-6


class Changing(Held):
    """The changes of `PowerWalk`."""

    def update(
        self,
        graph: Any = None,
        *,
        edges_added: Any = None,
        edges_removed: Any = None,
        num_nodes: int | None = None,
        refresh: bool = True,
    ) -> np.ndarray:
        """Go over to a changed graph, given whole or by its edges that are new and gone; only rows that a change touches are walked.

        The result is what `build` makes of the new graph, row by row. Rows are found by what the index holds (full paths, not cut),
        or by what was tracked. New nodes get rows where `build` would give them some, in an index of chosen ``nodes`` none; a node
        whose in-edges fall below ``min_in_degree`` keeps its row. The new graph is `graph` afterwards.

        Args:
            graph: the new graph, whatever `as_graph` takes: the old nodes in their order, new ones after them.
            edges_added: edges instead, rows ``(u, v)`` or ``(u, v, weight)`` or a tuple of columns; ends that are not known are new
                nodes. See `anabranch.graph.delta.with_changes`.
            edges_removed: likewise, without weights.
            num_nodes: nodes afterwards, where some new ones have no edge.
            refresh: walk at once; otherwise rows wait as stale until `refresh`, and new nodes answer without a row of their own.

        Returns:
            Ids of the stale rows: those of new nodes, then those with the largest share of visits at changed nodes.

        Raises:
            InputError: a graph and edges, or neither; edges as in `with_changes`; a graph of fewer nodes or other names; or the index
                cannot say where walks passed.
        """
        index, refresh = self._built(), check_flag("refresh", refresh)
        old = index.transition.graph
        changes = (edges_added, edges_removed, num_nodes)
        if (graph is None) == all(change is None for change in changes):
            raise InputError("give the changed graph, or the edges that were added and removed")
        cut = self.keep is not None or (self.mass is not None and self.mass < 1)
        if (self.mode == "endpoint" or cut) and not self.track:
            raise InputError(
                "this index does not say where walks passed (end points, or cut rows); build it with track=True"
            )
        if graph is None:
            given = with_changes(self.graph, edges_added, edges_removed, num_nodes=num_nodes)
        else:
            given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        check_successor(old, graph)
        share_N = np.zeros(graph.num_nodes)
        share_N[: old.num_nodes] = np.maximum(index.stale(changed_nodes(old, graph)), self._stale_N)
        grown = index.grown(Transition(graph, self.alpha, self.dangling))
        # Not by the rows there are: a node that lost its in-edges keeps its row, and a new one waits for its own.
        if not self._is_chosen:
            wanted = self._sources(graph, None)
            share_N[wanted[~grown.has_N[wanted]]] = 1.0 + NEW
        self._index, self._asked, self._stale_N = grown, given, share_N
        stale = self.stale
        if refresh:
            self.refresh()
        return stale

    @property
    def stale(self) -> np.ndarray:
        """Ids of rows that a change of the graph has made stale, the most affected first."""
        stale = np.flatnonzero(self._stale_N > 0)
        return stale[np.argsort(-self._stale_N[stale], kind="stable")]

    def refresh(self, fraction: float = 1.0) -> int:
        """Walk again for ``fraction`` of the stale rows, the most affected first. Returns how many."""
        if not is_number(fraction) or not 0 < fraction <= 1:
            raise InputError(f"fraction is {shown(fraction)}; the share of stale rows to refresh must lie in (0, 1]")
        index, stale = self._built(), self.stale
        nodes = np.sort(stale[: int(np.ceil(fraction * len(stale)))])
        if len(nodes):
            graph = index.transition.graph
            made = Gathered(graph.num_nodes, nodes, DTYPES[self.dtype], self.track)
            for chunk in make_chunks(graph, self._plan(), nodes, num_workers(self.workers), None):
                made.append(chunk)
            self._index = index.replaced(index.transition, nodes, made)
            self._stale_N = self._stale_N.copy()
            self._stale_N[nodes] = 0.0
        return len(nodes)

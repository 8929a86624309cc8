"""How a command's graph is read: options that several commands have, in one place."""

from dataclasses import dataclass

from anabranch.cli.graph.inputs import Opened, open_graph
from anabranch.cli.graph.options import Columns, Directed, Ids
from anabranch.cli.option_sets import OptionSet


@dataclass(frozen=True)
class Reading(OptionSet):
    """How a graph is read."""

    directed: Directed = None
    columns: Columns = None
    ids: Ids = "auto"

    def open(self, source: str, quiet: bool) -> Opened:
        """The graph in a file or data set; see `open_graph`."""
        return open_graph(source, directed=self.directed, columns=self.columns, ids=self.ids, quiet=quiet)


# Nothing is asked for.
AS_IT_SAYS = Reading()

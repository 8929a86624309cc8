"""How a command's graph is read: options that several commands have, in one place."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from anabranch.cli.graph.inputs import Opened, open_graph
from anabranch.cli.graph.options import Columns, Directed, Ids


@dataclass(frozen=True)
class Reading:
    """How a graph is read. Each field is an option of the commands that take one (`takes_reading`)."""

    directed: Directed = None
    columns: Columns = None
    ids: Ids = "auto"

    def open(self, source: str, quiet: bool) -> Opened:
        """The graph in a file or data set; see `open_graph`."""
        return open_graph(source, directed=self.directed, columns=self.columns, ids=self.ids, quiet=quiet)


# Nothing is asked for.
AS_IT_SAYS = Reading()


def takes_reading(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `Reading` in the place of its parameter ``reading``."""
    hints = get_type_hints(command, include_extras=True)
    kinds, options = get_type_hints(Reading, include_extras=True), fields(Reading)
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name != "reading":
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        parameters += [
            inspect.Parameter(one.name, parameter.kind, default=one.default, annotation=kinds[one.name])
            for one in options
        ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        command(reading=Reading(**{one.name: given.pop(one.name) for one in options}), **given)

    # What typer looks at.
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called

"""The backend ``anabranch`` of networkx: its own calls, done here.

    networkx.pagerank(G, personalization={"a": 1}, backend="anabranch")
    networkx.config.backend_priority = ["anabranch"]                        # or for all calls that it takes

networkx finds it by the entry points ``networkx.backends`` and ``networkx.backend_info`` of the installed package, and reads `get_info`
whenever it is imported: nothing is loaded here until a call is made. A graph is converted once and kept where networkx keeps
conversions (``G.__networkx_cache__``, emptied when the graph changes); it holds an edge's attributes in 64 bits.

`pagerank` makes networkx's own rounds with networkx's own rules, to rounding: the same start, dangling rule, stopping rule, errors. What
is quicker for many queries of one graph is `anabranch.graph.PageRank` on ``as_graph(G)``, which bounds its error instead.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.graph.networkx_pagerank import Converted

NAME = "anabranch"

# Below, networkx is done before anything is converted and loaded.
FEW_NODES = 500
_NEEDED = ("numba", "scipy")


def get_info() -> dict[str, Any]:
    """What networkx wants to know of a backend."""
    return {
        "backend_name": NAME,
        "project": "anabranch",
        "package": "anabranch",
        "url": "https://anabranch.readthedocs.io/en/latest/systems/graph/",
        "short_summary": "Compiled PageRank on a graph that is converted once.",
        "functions": {
            "pagerank": {
                "additional_docs": "The rounds, rules and errors of networkx in compiled code, equal to rounding."
            }
        },
    }


class Backend:
    """What networkx calls: functions by the names they have there, and conversions."""

    @staticmethod
    def convert_from_nx(
        graph: Any, edge_attrs: dict[str, Any] | None = None, preserve_edge_attrs: bool = False, **_: Any
    ) -> "Converted":
        """The graph as compiled code takes it.

        Args:
            graph: a networkx graph of any class.
            edge_attrs: attributes to keep, with what edges have that lack them; None for none.
            preserve_edge_attrs: keep all of them.
        """
        require("graph", by=f"backend={NAME!r}")
        from anabranch.graph.networkx_pagerank import convert

        return convert(graph, edge_attrs or {}, preserve_edge_attrs)

    @staticmethod
    def convert_to_nx(result: Any, **_: Any) -> Any:
        """What `convert_from_nx` took, and results, which are networkx's already, as they are."""
        return getattr(result, "source", result)

    @staticmethod
    def pagerank(G: "Converted", *args: Any, **options: Any) -> dict[Any, float]:
        """As `networkx.pagerank`."""
        from anabranch.graph.networkx_pagerank import pagerank

        return pagerank(G, *args, **options)

    @staticmethod
    def can_run(name: str, args: Any, kwargs: Any) -> bool | str:
        """Whether this call can be made here; else why not."""
        missing = next((module for module in _NEEDED if importlib.util.find_spec(module) is None), None)
        if missing is not None:
            return f"{missing} is not installed; pip install 'anabranch[graph]'"
        return name == "pagerank" or f"backend {NAME!r} has no {name}"

    @staticmethod
    def should_run(name: str, args: Any, kwargs: Any) -> bool | str:
        """Whether it is worth a conversion; else why not."""
        graph = args[0] if args else kwargs.get("G")
        is_here = getattr(graph, "__networkx_backend__", None) == NAME
        if not is_here and hasattr(graph, "__len__") and len(graph) < FEW_NODES:
            return f"a graph of fewer than {FEW_NODES} nodes is done before it is converted"
        return True


backend = Backend()

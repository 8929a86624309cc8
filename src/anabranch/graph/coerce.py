"""The one door for graphs, by which every estimator and function takes them; see `anabranch.graph.formats.coerce`."""

from anabranch.graph.formats.coerce import ACCEPTED, as_graph

__all__ = ["ACCEPTED", "as_graph"]

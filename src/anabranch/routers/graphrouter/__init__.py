"""GraphRouter: models chosen by predicting the effect and cost of edges in a graph of tasks, queries and models (arXiv 2410.03834)."""

from anabranch.routers.graphrouter.predictor import GraphRouter

__all__ = ["GraphRouter"]

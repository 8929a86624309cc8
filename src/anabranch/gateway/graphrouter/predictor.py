"""GraphRouter: which model for a query, by predicting effect and cost of the edge between them in a graph of tasks, queries and models.

Feng, Shen and You, "GraphRouter: A Graph-based Router for LLM Selections", ICLR 2025, arXiv 2410.03834.

    from anabranch.gateway.graphrouter import GraphRouter

    router = GraphRouter.Config(mode="plus").build().fit(recorded)
    router.decide(query, trade_off=1.0)                         # the worth of a dollar is said here
    router.add_llm("newcomer", "good at code", price, shots)    # no training again
    router.observe(outcome)                                     # one edge more

Modes: ``reference`` (the published code), ``mean`` (messages averaged), ``hetero`` (task nodes, edges both ways): see `network`.
``plus``: gated messages, attention between queries, edges between models, two heads, trained in episodes: see `plus_network`.
Departures: duplicates are never parted by the validation split; costs are scaled by what training saw alone; every model that ties for the
best is labelled so; the task is told from the query's vector unless ``task`` says otherwise. The paper's other choices are the defaults.
"""
# Shapes: N queries, M models, T tasks, D dimensions of a query's vector, V of a description's

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.gateway.dataset import Recorded
from anabranch.gateway.embed.embedder import Embedder
from anabranch.gateway.graphrouter import newcomers
from anabranch.gateway.graphrouter.classic import Classic
from anabranch.gateway.graphrouter.graph import CostScale, Scenario, groups, hold_out, utility
from anabranch.gateway.graphrouter.nodes import Tasks, described
from anabranch.gateway.graphrouter.plus import Plus
from anabranch.gateway.graphrouter.settings import Episodes, PlusConfig, Training
from anabranch.gateway.money import Price
from anabranch.gateway.predictor import Prediction, Predictor
from anabranch.gateway.query import Outcome, Query
from anabranch.gateway.strategy import Arrays, Facts

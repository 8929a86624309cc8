"""Every registered strategy and predictor keeps the contract, with its defaults (made small) and with the options that change most."""

import json
import subprocess
import sys

import pytest

from anabranch.registry import kinds, resolve
from anabranch.routers import strategies
from anabranch.routers.contract.ask import Answered
from anabranch.routers.made_outcomes import DIM, made_outcomes
from anabranch.testing import check_strategy
from jailed import needs_jail

ELSEWHERE = {"coe", "graph", "ic_cache"}  # systems with contract tests of their own
SMALL = {
    "mf": {"epochs": 3, "dim": 8},
    "mlp": {"hidden": 8, "epochs": 5},
    "irt": {"dim": 4, "epochs": 5},
    "cluster": {"num_clusters": 6, "num_starts": 2},
    "encoder": {
        "vocab_size": 64,
        "dim": 8,
        "num_heads": 2,
        "num_layers": 1,
        "hidden_dim": 8,
        "epochs": 1,
        "length": 16,
    },
}


async def middling(arm, messages, **how):
    return Answered.saying("3")


ASKED = {
    "oracle": {"decides": False},
    "prompt": {"plays": False, "ask": middling},
    "scale": {"plays": False},
    "router_r1": {"plays": False},
    "best_of": {"plays": False},
}


@pytest.mark.parametrize("kind", sorted(set(kinds("predictor")) - ELSEWHERE))
def test_predictor(kind):
    check_strategy(resolve("predictor", kind).Config(**SMALL.get(kind, {})))


@pytest.mark.parametrize("kind", sorted(set(kinds("strategy")) - ELSEWHERE - {"ranked"}))
def test_strategy(kind):
    check_strategy(resolve("strategy", kind).Config(), **ASKED.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("knn", {"k": 1}),
        ("knn", {"temperature": 0.1}),
        ("cluster", {"num_clusters": 5, "nearest": 1, "performance_weight": 0.7}),
        ("cluster", {"num_clusters": 5, "prior": 0.0}),
        ("ridge", {"predicts_cost": False}),
        ("sw_elo", {"num_tiers": 2}),
        ("mf", {"epochs": 2, "dim": 4, "battles_per_query": None}),
        ("hybrid", {"labels": "hard", "large": "large"}),
        ("hybrid", {"labels": "soft"}),
        ("random", {"strong": "large", "weak": "small"}),
        ("random", {"weights": {"small": 1.0, "large": 3.0}}),
        ("semantic", {"aggregate": "max", "max_examples": 5}),
        ("linucb", {"dim": 4, "discount": 0.99, "trade_off": 10.0}),
        ("thompson", {"discount": 0.9}),
        ("eps_greedy", {"epsilon": 1.0, "decay": 0.1}),
        ("cascade", {"max_length": 2, "uses_vector": False}),
        ("cascade", {"models": ("small", "large"), "budget": 1e-4}),
        ("automix", {"rule": "threshold"}),
        ("automix", {"max_length": 3}),
        ("logprob", {"measure": "entropy"}),
        ("consistency", {"models": ("small", "large")}),
        ("scale", {"system1": "small", "system2": "large", "budget_tokens": 100}),
        ("best_of", {"rounds": True}),
        ("best_of", {"select": "judge", "decides": "prior"}),
        pytest.param("best_of", {"select": "logprob", "verifier": "examples"}, marks=needs_jail),
    ],
)
def test_options(kind, fields):
    family = "predictor" if kind in kinds("predictor") else "strategy"
    if "large" in fields or "models" in fields:  # a model that odd data lack is refused, which the contract allows
        fields = dict(fields)
    check_strategy(resolve(family, kind).Config(**fields), **ASKED.get(kind, {}))


def test_no_torch_to_decide():
    """All strategies but the encoder learn without torch too, and none needs it to decide."""
    code = """
import json, sys
from anabranch.routers import strategies
from anabranch.routers.contract.ask import Answered
from anabranch.routers.made_outcomes import made_outcomes, made_pool
data, pool = made_outcomes(), made_pool()
small = json.loads(sys.argv[1])
for name in strategies.names():
    if name in ("coe", "graph", "ic_cache", "encoder", "oracle", "prompt"):
        continue
    strategies.make(name, **small.get(name, {})).fit(data).route(next(data.queries()), pool)
assert not {"torch", "numba", "scipy", "aiohttp"} & set(sys.modules), sorted({"torch", "numba", "scipy"} & set(sys.modules))
"""
    subprocess.run([sys.executable, "-c", code, json.dumps(SMALL)], check=True, timeout=120)


# What learns from vectors: beside the defaults, settings with which it does.
OF_VECTORS = {
    "coe": {"head": "knn"},
    "graph": {"mode": "plus"},
    "ic_cache": {},
    "best_of": {},
    "semantic": {},
    "cascade": {},
}


@pytest.mark.parametrize("kind", sorted(set(strategies.names()) - {"encoder", "oracle", "prompt"}))
def test_what_learned_from_vectors_says_their_dimensions(kind):
    """By it an embedder that gives others is refused at once, where else every query would be."""

    def made():
        return strategies.make(kind, **SMALL.get(kind, {}), **OF_VECTORS.get(kind, {}))

    assert made().learned_dim is None
    fitted = made().fit(made_outcomes(60))
    assert fitted.learned_dim == (DIM if fitted.needs_vector else None)
    assert fitted.needs_vector or kind not in OF_VECTORS
    again = made()
    again.load_state(*fitted.state())
    assert again.learned_dim == fitted.learned_dim


def test_names_cover_the_survey():
    assert {
        "static",
        "random",
        "round_robin",
        "least_latency",
        "cheapest",
        "oracle",
        "rules",
        "semantic",
        "knn",
        "cluster",
        "sw_elo",
        "ridge",
        "mlp",
        "mf",
        "hybrid",
        "irt",
        "task",
        "encoder",
        "linucb",
        "thompson",
        "eps_greedy",
        "prompt",
        "cascade",
        "automix",
        "consistency",
        "logprob",
        "best_of",
    } <= set(strategies.names())

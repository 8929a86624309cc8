"""Router-R1: a router that is itself a language model, thinks, asks other models over several rounds, and answers.

    <think>...</think> <search>NAME: question</search> <information>...</information> ... <answer>...</answer>

Source: Zhang, Feng, You, "Router-R1: Teaching LLMs Multi-Round Routing and Aggregation via Reinforcement Learning" (NeurIPS 2025, arXiv
2506.09033). Here is all of it that needs no training: the language, the environment, rewards and masks, the program of a gateway, and a
world of facts that models know (`two_hop`); `anabranch.rl.router_r1` trains. What departs from the code is in docs/systems/router-r1.md.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.routers.router_r1.environment import FunctionPool, MultiRoundRouteEnv, Price, RecordedPool, Reply
    from anabranch.routers.router_r1.episode import Episode, Rules
    from anabranch.routers.router_r1.grammar import faults
    from anabranch.routers.router_r1.masks import Tokens
    from anabranch.routers.router_r1.program import RouterR1
    from anabranch.routers.router_r1.reward import CostWindow, exact_match, raw_cost, token_f1, total_reward
    from anabranch.routers.router_r1.two_hop import TwoHop

_WHERE = {
    ".environment": ("FunctionPool", "MultiRoundRouteEnv", "Price", "RecordedPool", "Reply"),
    ".episode": ("Episode", "Rules"),
    ".grammar": ("faults",),
    ".masks": ("Tokens",),
    ".program": ("RouterR1",),
    ".two_hop": ("TwoHop",),
    ".reward": ("CostWindow", "exact_match", "raw_cost", "token_f1", "total_reward"),
}

__all__ = [
    "CostWindow",
    "Episode",
    "FunctionPool",
    "MultiRoundRouteEnv",
    "Price",
    "RecordedPool",
    "Reply",
    "RouterR1",
    "Rules",
    "Tokens",
    "TwoHop",
    "exact_match",
    "faults",
    "raw_cost",
    "token_f1",
    "total_reward",
]

__getattr__, __dir__ = lazy(__name__, {name: module for module, names in _WHERE.items() for name in names})

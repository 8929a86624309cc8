"""Router-R1 learns: the two-hop world in tokens, worlds of one's own questions, ready trainings, and routers back from their runs."""

from anabranch.rl.router_r1.live import LiveWorld, PoolModel, PoolPrice
from anabranch.rl.router_r1.recorded import RecordedWorld
from anabranch.rl.router_r1.routed import Routed, RoutedPlay, RoutedWorld
from anabranch.rl.router_r1.runs import (
    Router,
    Training,
    judge_router,
    load_router,
    own_router_training,
    router_training,
    warm_model,
    warm_up,
)
from anabranch.rl.router_r1.words import word_tokenizer
from anabranch.rl.router_r1.world import TwoHopPlay, TwoHopWorld

__all__ = [
    "LiveWorld",
    "PoolModel",
    "PoolPrice",
    "RecordedWorld",
    "Routed",
    "RoutedPlay",
    "RoutedWorld",
    "Router",
    "Training",
    "TwoHopPlay",
    "TwoHopWorld",
    "judge_router",
    "load_router",
    "own_router_training",
    "router_training",
    "warm_model",
    "warm_up",
    "word_tokenizer",
]

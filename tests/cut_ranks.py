"""What each of several processes does in `tests/serving/engine/test_serving_cut.py`: an engine over a cache that is cut."""

import os
import signal
import threading
from functools import partial
from typing import Any

import torch

from anabranch.errors import AnabranchError
from anabranch.lm import Decoder
from anabranch.nn import MoE, Rotary, SelfAttention
from anabranch.routing import Router, TopK
from anabranch.serving import LLM, Sampling
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Request
from anabranch.serving.engine.cut import Cut, RankLost, Told
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.runner import ModelRunner
from waiting import until

SIZES: dict[str, Any] = {"block_tokens": 4, "max_batched_tokens": 24, "max_seqs": 4, "num_blocks": 60}
GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
DRAWN = Sampling(temperature=1.0, max_tokens=24, ignore_eos=True, seed=3)
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
NARROW = SelfAttention.Config(**HEADS, window=6, sinks=True, rotary=Rotary.Config(theta=100.0))
MODELS: dict[str, dict[str, Any]] = {
    "whole": {},
    "with windows": {
        "attention": SelfAttention.Config(**HEADS),
        "local_attention": NARROW,
        "local_layers": (0,),
    },
}


def model(name: str) -> Decoder:
    """A small mixture of experts, in float64: no rounding of sums in another order makes another token."""
    config = Decoder.Config(
        vocab_size=64,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(**HEADS),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=Router.Config(select=TopK.Config(top_k=2))),
        init_std=0.4,
        max_positions=256,
    )
    return config.replace(**MODELS[name]).build(seed=0).eval().double()


def prompts() -> list[list[int]]:
    """Long and short ones, two of which begin alike."""
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(0, 64, (70,), generator=generator).tolist()
    return [long, [*long[:41], 5, 6], [7], [3, 9], torch.randint(0, 64, (33,), generator=generator).tolist()]


def answers(llm: LLM) -> list[Any]:
    """Tokens and their log probabilities, of requests beside each other; then those of a second round, which finds prefixes."""
    found: list[Any] = []
    for sampling in (GREEDY, DRAWN):
        for made in llm.generate(prompts(), sampling):
            logprobs = [round(each.logprob, 9) for each in made.output.logprobs]
            found.append((made.tokens, logprobs, made.finish.name))
    vector = llm.generate([prompts()[0]], Sampling(max_tokens=0), pooling="mean")[0].output.embedding
    assert len(vector) == 16
    found.append([round(value, 9) for value in vector])
    return found


def serving(rank: int, world: int, name: str, changes: dict[str, Any]) -> Any:
    """The first one's answers and those of one process; the others', that they came to an end."""
    config = {**SIZES, **changes}
    cut = Cut(world, timeout_s=120.0)
    make = partial(ModelRunner, cut=cut)
    if rank:
        engine = Engine.of(model(name), ServingConfig(**config), make_runner=make)
        engine.runner.follow()
        return None
    expected = answers(LLM(model(name), **config))
    llm = LLM(model(name), **config, make_runner=make)
    llm.engine.warm_up()
    found = answers(llm)
    pool = llm.engine.runner.pool
    llm.close()
    return found, expected, pool.num_blocks, cut.traffic.size_bytes


def idle(rank: int, world: int) -> str:
    """For longer than the patience, as far as signs of life go, then a pass: they have kept the others waiting."""
    cut = Cut(world, timeout_s=120.0)
    if rank:
        count: list[int] = []
        cut.follow(lambda told: count.append(len(told.rows)))
        return f"ran {count}"
    cut._is_closed = quick = _Quick()
    for rows in (1, 2):
        with cut.passing(Told([], [], range(rows))):
            pass
        before = len(quick.waits)
        until(lambda before=before: len(quick.waits) > before + 9)
    cut.close()
    # More often than the others lose their patience.
    assert set(quick.waits) == {30.0}
    return "closed"


class _Quick(threading.Event):
    """For whose waits no time passes to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return super().wait(0.001)


def lost(rank: int, world: int, how: str) -> str:
    """The last one goes away in the midst of a request, is stopped, or the first one is gone; what the others raise."""
    cut = Cut(world, timeout_s=3.0)
    engine = Engine.of(model("whole"), ServingConfig(**SIZES), make_runner=partial(ModelRunner, cut=cut))
    victim = 0 if how == "first" else world - 1
    passes = 0

    def go(told: Any) -> None:
        nonlocal passes
        passes += 1
        if rank == victim and passes == 3:
            os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)

    hidden = engine.runner.modules.hidden

    def counted(*given: Any) -> Any:
        go(given)
        return hidden(*given)

    engine.runner.modules.hidden = counted  # type: ignore[method-assign]
    try:
        if rank:
            engine.runner.follow()
            return "followed to the end"
        llm = LLM.__new__(LLM)
        events: list[Any] = []
        llm.tokenizer, llm.engine, llm._events, llm._loop = None, engine, events, engine.loop(events.extend)
        llm._numbers = iter(range(99))  # type: ignore[assignment]
        llm.generate(prompts()[:2], GREEDY)
    except RankLost as error:
        return f"{type(error).__name__}: {error}"
    return "answered"


def refused(rank: int, world: int) -> list[str]:
    """Requests that are of one process, between two that are answered."""
    cut = Cut(world, timeout_s=120.0)
    engine = Engine.of(model("whole"), ServingConfig(**SIZES), make_runner=partial(ModelRunner, cut=cut))
    if rank:
        engine.runner.follow()
        return []
    said = []
    for request in (
        Request(id="path", prompt=(1,), path=(0,)),
        Request(id="adapter", prompt=(1,), adapters={"nobody": 1.0}),
        Request(id="token", prompt=(64,)),
    ):
        try:
            engine.check(request)
            engine.prepare(request)
        except Exception as error:
            said.append(str(error))
    engine.runner.close()
    return said


def loading(rank: int, world: int, folders: list[str], changes: list[dict[str, Any]]) -> str:
    """Each process loads a model of its own; what it says."""
    config = ServingConfig(model=folders[rank], context=world, num_blocks=8, **changes[rank])
    try:
        config.load()
    except AnabranchError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"

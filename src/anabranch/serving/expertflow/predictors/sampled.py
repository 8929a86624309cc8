"""The paper's data set of routes: inputs of a task, each continued several times with sampling, and where every token went.

Paper: 10,000 inputs of a task, each generated 3 times. The routes are those of the steps that generate, prompts included; the last token
of each continuation is not run, so it has none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from anabranch.errors import ConfigError, DataError
from anabranch.lm.decoder import Decoder
from anabranch.routing import Router, record_routing
from anabranch.routing.discovery import find_routers
from anabranch.serving.core.hooks import StepHook
from anabranch.serving.core.request import Sampling
from anabranch.serving.engine.llm import LLM
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.expertflow.routes import Routes

__all__ = ["held_out", "sample_routes"]

# Continuations whose routes are recorded before they are packed into bits.
TOGETHER = 256


def sample_routes(
    model: Decoder,
    inputs: Sequence[Sequence[int]],
    *,
    samples: int = 3,
    sampling: Sampling = Sampling(max_tokens=64),  # noqa: B008
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    batch: int = 16,
    hooks: Sequence[StepHook] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Routes:
    """Continue each input ``samples`` times and record where its tokens go.

    Args:
        model: the decoder.
        inputs: token ids.
        samples: continuations of each.
        sampling: how; seeds are set here.
        stop_tokens: end a continuation.
        seed: of the first one; the others count up.
        batch: continuations in a step.
        hooks: what brings the model's experts, where it is offloaded.
        progress: told how many continuations there are.

    The sequences are in the order of ``inputs``, samples of one input behind each other. Raises ConfigError if an input and its
    continuation are longer than the model reads, DataError if nothing is routed.
    """
    longest = max(map(len, inputs), default=0) + sampling.max_tokens
    if longest > model.config.max_positions:
        raise ConfigError(
            f"inputs with {sampling.max_tokens} new tokens have {longest}, and the model reads {model.config.max_positions}; use fewer"
        )
    block = 16
    llm = LLM(
        model,
        hooks=list(hooks),
        # Recorders hear what runs module by module; no second, packed copy of the weights is wanted.
        make_runner=partial(ModelRunner, use_kernel=False),
        num_blocks=batch * (-(-longest // block) + 1),
        block_tokens=block,
        max_seqs=batch,
        # What it holds is not run, and has no routes.
        prefix_cache=False,
        scheduling="sync",
    )
    routers = {name: module for name, module in find_routers(model).items() if isinstance(module, Router)}
    all_inputs = [ids for ids in inputs for _ in range(samples)]
    parts = []
    for first in range(0, len(all_inputs), TOGETHER):
        some = all_inputs[first : first + TOGETHER]
        own = [_seeded(sampling, seed + first + number, stop_tokens) for number in range(len(some))]
        with record_routing(model, routers=routers or None) as recorder:
            llm.generate(some, own)
        parts.append(Routes.from_trace(recorder.trace()))
        progress(first + len(some))
    if not parts:
        raise DataError("there are no inputs, so there are no routes")
    return Routes.concatenate(parts)


def _seeded(sampling: Sampling, seed: int, stop_tokens: Sequence[int]) -> Sampling:
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
    return Sampling(**{**fields, "seed": seed, "stop_tokens": tuple(stop_tokens)})


def held_out(num: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Places of ``num`` things, ascending: those to learn from and the ``share`` to be judged on, at least one of each.

    Raises DataError for fewer than two.
    """
    if num < 2:
        raise DataError(f"{num} is too few to learn from some and be judged on others; give more text")
    count = min(max(round(share * num), 1), num - 1)
    order = np.random.default_rng(seed).permutation(num)
    return np.sort(order[count:]), np.sort(order[:count])

"""What ``generate`` and ``chat`` continue prompts with: the engine that serves, in a thread of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import sampling_of

if TYPE_CHECKING:
    from anabranch.serving.engine.background import Background
    from anabranch.serving.load import Loaded

TopK = Annotated[
    int | None,
    typer.Option(metavar="K", min=1, help="Sample among the K likeliest. Default: as the model says, else all."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        help="Leave out tokens less likely than P times the likeliest. Default: as the model says, else 0.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="Divide positive and multiply negative logits of tokens that were there by R. Default: as the model says, else 1.",
    ),
]
BLOCK = 16
# Bytes of keys and values that a conversation may take.
MOST_BYTES = 4 * 2**30


@contextmanager
def running(
    loaded: Loaded, positions: int, *, streams: int | None = None, prefix_cache: bool = False
) -> Iterator[Background]:
    """The engine of a model, for one request of up to so many ``positions`` at a time; it ends with the block.

    More positions than the model is meant for are run, as `anabranch.lm.generate` does, and no more than fit `MOST_BYTES`, or a plan.
    """
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.engine.background import Background
    from anabranch.serving.engine.kinds import Kinds
    from anabranch.serving.load import engine_of

    config = ServingConfig(
        block_tokens=BLOCK,
        max_seqs=1,
        scheduling="sync",
        num_streams=streams,
        prefix_cache=prefix_cache,
    )
    kinds = Kinds.of(loaded.model, config)
    blocks = min(kinds.needed(positions) + 1, kinds.blocks_in(loaded.kv_memory or MOST_BYTES))
    config = config.replace(num_blocks=blocks)
    engine = Background(engine_of(loaded, config, most_positions=positions))
    try:
        yield engine
    finally:
        engine.close()


def sampling_fields(model: str, said: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Fields of `anabranch.serving.Sampling`: what the user ``said``, else what the model's makers do, else the ``usual``.

    Raises ConfigError for a number that cannot be.
    """
    from anabranch.serving.core.request import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = sampling_of(model, {name: said.get(name) for name in names}, usual)
    # Before the model is loaded.
    Sampling(**found)
    return found


def tokens_of(
    engine: Background, prompt: Sequence[int], fields: dict[str, Any], *, streams: int | None
) -> Iterator[int]:
    """The new tokens as they come; ``fields`` of `anabranch.serving.Sampling`."""
    from anabranch.serving.core.request import Sampling

    for output in engine.stream(prompt, Sampling(**fields), num_streams=streams):
        yield from output.tokens

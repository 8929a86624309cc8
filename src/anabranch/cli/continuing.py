"""What ``generate`` and ``chat`` continue prompts with: the engine that serves, in a thread of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import sampling_of
from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.serving.depth import DepthConfig
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
Depth = Annotated[
    Path | None,
    typer.Option(
        "--depth",
        metavar="DIR",
        help="Depth routers that anabranch depth train made of this model; they choose which blocks run.",
    ),
]
DepthControl = Annotated[
    float | None,
    typer.Option(
        "--depth-control",
        metavar="P",
        help="From -1, no block, by -0.5, what the routers say, and 0.5, all blocks, to 1, all twice. Default: -0.5.",
    ),
]
Skipper = Annotated[
    Path | None,
    typer.Option(
        "--skipper",
        metavar="FILE",
        help="What anabranch depth prune made of this model: blocks pass over tokens of the prompt.",
    ),
]
BLOCK = 16
# Bytes of keys and values that a conversation may take.
MOST_BYTES = 4 * 2**30


@contextmanager
def running(
    loaded: Loaded,
    positions: int,
    *,
    streams: int | None = None,
    prefix_cache: bool = False,
    depth: DepthConfig | None = None,
) -> Iterator[Background]:
    """The engine of a model, for one request of up to so many ``positions`` at a time; it ends with the block.

    More positions than the model is meant for are run, as `anabranch.lm.generate` does, and no more than fit `MOST_BYTES`, or a plan.
    """
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.core.client import MOST_VISITS
    from anabranch.serving.depth import DepthConfig
    from anabranch.serving.engine.background import Background
    from anabranch.serving.engine.kinds import Kinds
    from anabranch.serving.load import engine_of

    depth = depth or DepthConfig()
    config = ServingConfig(
        block_tokens=BLOCK,
        max_seqs=1,
        scheduling="sync",
        num_streams=streams,
        prefix_cache=prefix_cache,
        depth=depth,
        # Room for any path, which also says how much a position takes.
        max_depth=None if depth.routers is None else MOST_VISITS * loaded.model.config.num_layers,
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
    engine: Background,
    prompt: Sequence[int],
    fields: dict[str, Any],
    *,
    streams: int | None,
    depth: str = "full",
    told: dict[str, Any] | None = None,
) -> Iterator[int]:
    """The new tokens as they come; ``fields`` of `anabranch.serving.Sampling`.

    Where routers or a skipper decide about ``depth``, ``told`` gets what they chose: ``path`` and ``computed``, see
    `anabranch.serving.Output`.
    """
    from anabranch.serving.core.request import Sampling

    more = {"routes_depth": depth == "routed", "skips_tokens": depth == "pruned"}
    for output in engine.stream(prompt, Sampling(**fields), num_streams=streams, **more):
        if told is not None:
            told |= {name: value for name in ("path", "computed") if (value := getattr(output, name)) is not None}
        yield from output.tokens


def depth_of(routers: Path | None, control: float | None, skipper: Path | None) -> DepthConfig:
    """What the options on depth mean. Raises ConfigError for ones that do not go together, or a control that cannot be."""
    from anabranch.serving.depth import DepthConfig

    if routers is not None and skipper is not None:
        raise ConfigError("--depth and --skipper both say what of the model runs; give one of them")
    if control is not None and routers is None:
        raise ConfigError(
            f"--depth-control is {control:g}, and there are no depth routers; name their folder with --depth"
        )
    said: dict[str, Any] = {"routers": routers, "control": control, "skipper": skipper}
    told: dict[str, Any] = {name: str(value) if isinstance(value, Path) else value for name, value in said.items()}
    return DepthConfig(**{name: value for name, value in told.items() if value is not None})

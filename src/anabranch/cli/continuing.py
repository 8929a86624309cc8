"""What ``generate`` and ``chat`` continue prompts with: the engine that serves, in a thread of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.option_sets import OptionSet
from anabranch.cli.options import Device, Dtype, ExpertBudget, Memory, Quantize, load_parts, named_folder, sampling_of
from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.serving.adapters import AdaptersConfig
    from anabranch.serving.depth import DepthConfig
    from anabranch.serving.engine.background import Background
    from anabranch.serving.load import Loaded


@dataclass(frozen=True)
class Sampled(OptionSet):
    """How tokens are drawn. Commands tell what they do where neither the user nor the model says it: ``{temperature}``, ``{top_p}``."""

    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T", min=0, help="0 takes the likeliest token. Default: as the model says, else {temperature}."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Sample among the K likeliest. Default: as the model says, else all."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample among the likeliest that make up P. Default: as the model says, else {top_p}."
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            metavar="P",
            help="Leave out tokens less likely than P times the likeliest. Default: as the model says, else 0.",
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Divide positive and multiply negative logits of earlier tokens by R. Default: as the model says, else 1.",
        ),
    ] = None

    def of(self, model: str, usual: dict[str, Any]) -> dict[str, Any]:
        """Fields of `anabranch.serving.Sampling`: what the user said, else what the model's makers do, else the ``usual``.

        Raises ConfigError for a number that cannot be.
        """
        from anabranch.serving.core.request import Sampling

        found = sampling_of(model, asdict(self), usual)
        # Before the model is loaded.
        Sampling(**found)
        return found


@dataclass(frozen=True)
class Deep(OptionSet):
    """Which blocks run, and on which tokens, where the prompt decides it."""

    depth: Annotated[
        Path | None,
        typer.Option(
            "--depth",
            metavar="DIR",
            help="Depth routers that anabranch depth train made for this model; they choose which blocks run.",
        ),
    ] = None
    depth_control: Annotated[
        float | None,
        typer.Option(
            "--depth-control",
            metavar="P",
            help="From fewer to more blocks: -1 none, -0.5 as the routers decide, 0.5 every block once, 1 every block twice. "
            "Default: -0.5.",
        ),
    ] = None
    skipper: Annotated[
        Path | None,
        typer.Option(
            "--skipper",
            metavar="FILE",
            help="Skipper that anabranch depth prune made for this model; blocks skip some tokens of the prompt.",
        ),
    ] = None

    def config(self) -> DepthConfig:
        """What the options mean. Raises ConfigError for ones that do not go together, or a control that cannot be."""
        from anabranch.serving.depth import DepthConfig

        if self.depth is not None and self.skipper is not None:
            raise ConfigError("--depth and --skipper both choose what the model computes; give only one of them")
        if self.depth_control is not None and self.depth is None:
            raise ConfigError(
                f"--depth-control is {self.depth_control:g}, and there are no depth routers; name their folder with --depth"
            )
        said: dict[str, Any] = {"routers": self.depth, "control": self.depth_control, "skipper": self.skipper}
        told: dict[str, Any] = {name: str(value) if isinstance(value, Path) else value for name, value in said.items()}
        return DepthConfig(**{name: value for name, value in told.items() if value is not None})


@dataclass(frozen=True)
class Adapted(OptionSet):
    """The adapter that the model is used with."""

    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            callback=named_folder,
            help="Use the model with this adapter, a folder that peft or anabranch adapt saved. A folder of such folders is a router "
            "over them.",
        ),
    ] = None
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="The task of the text, for what routes by task.")
    ] = None
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            metavar="TEXT",
            help="With a router over adapters: text to compare with the adapters' instructions; '' leaves the choice to the tokens. "
            "Default: what is asked.",
        ),
    ] = None

    def config(self) -> AdaptersConfig:
        """What the options mean for an engine, which nobody else asks for adapters."""
        from anabranch.serving.adapters import AdaptersConfig

        return AdaptersConfig(load=() if self.adapter is None else (f"{_NAME}={self.adapter}",), memory=_MOST_ADAPTERS)

    def of_request(self, asked: str) -> dict[str, Any]:
        """Fields of `anabranch.serving.Request`; ``asked`` is the prompt, or of a chat the last message of its user."""
        from anabranch.serving.core.query import asked_in

        if self.adapter is None:
            return {"task": self.task}
        return {"adapters": _NAME, "task": self.task, **asked_in(asked, told=self.instruction)}

    def check(self, model: str) -> None:
        """Raises what loading the adapter would, before the weights of ``model`` are read, and for an instruction that nobody compares."""
        from anabranch.bounds import MOST_QUERY
        from anabranch.serving.engine.adapter_place import folder_of

        if self.instruction is not None and (self.adapter is None or not folder_of(self.adapter, None).experts):
            raise ConfigError(
                "--instruction is compared with the instructions of a pool's adapters; name a pool with --adapter, or leave it out"
            )
        if self.instruction is not None and len(self.instruction) > MOST_QUERY:
            raise ConfigError(f"--instruction has {len(self.instruction):,} characters; it may have {MOST_QUERY:,}")
        if self.adapter is None:
            return
        from anabranch.serving.config import ServingConfig
        from anabranch.serving.load import check_adapters

        check_adapters(ServingConfig(model=model, adapters=self.config()))


@dataclass(frozen=True)
class Loading(OptionSet):
    """How a model is held."""

    memory: Memory = None
    quantize: Quantize = None
    expert_budget: ExpertBudget = None
    dtype: Dtype = None
    device: Device = None

    def load(
        self, model: str, device: str | None = None, *, is_plain: bool = False, adapters: AdaptersConfig | None = None
    ) -> Loaded:
        """See `load_parts`; on ``device`` where one is named, in floating point where it must be ``is_plain``."""
        bits, place = "none" if is_plain else self.quantize, device or self.device
        return load_parts(model, self.dtype, place, bits, self.expert_budget, self.memory, adapters=adapters)


def engine_alone(
    sampled: Sampled, streams: int | None, loading: Loading, deep: Deep, adapted: Adapted
) -> dict[str, Any]:
    """Values of the options that only the engine knows, by their names: what goes on without it takes none of them."""
    return {
        "--min-p": sampled.min_p,
        "--repetition-penalty": sampled.repetition_penalty,
        "--streams": streams,
        "--memory": loading.memory,
        "--expert-budget": loading.expert_budget,
        "--depth": deep.depth,
        "--skipper": deep.skipper,
        "--adapter": adapted.adapter,
        "--task": adapted.task,
        "--instruction": adapted.instruction,
    }


# Where nothing is said.
AS_MODEL_SAYS, WHOLE, PLAIN, AS_STORED = Sampled(), Deep(), Adapted(), Loading()
BLOCK = 16
# Bytes of keys and values that a conversation may take.
MOST_BYTES = 4 * 2**30
# What the one adapter is called, and bytes that it may take: whoever names it wants it whole.
_NAME, _MOST_ADAPTERS = "adapter", "1TiB"


@contextmanager
def running(
    loaded: Loaded,
    positions: int,
    *,
    streams: int | None = None,
    prefix_cache: bool = False,
    depth: DepthConfig | None = None,
    adapters: AdaptersConfig | None = None,
) -> Iterator[Background]:
    """The engine of a model, for one request of up to so many ``positions`` at a time; it ends with the block.

    More positions than the model is meant for are run, as `anabranch.lm.generate` does, and no more than fit `MOST_BYTES`, or a plan.
    """
    from anabranch.serving.adapters import AdaptersConfig
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
        adapters=adapters or AdaptersConfig(),
        # Room for any path, which also says how much a position takes.
        max_depth=None if depth.routers is None else MOST_VISITS * loaded.model.config.num_layers,
    )
    kinds = Kinds.of(loaded.model, config)
    # An engine has room for a token beside the prompt, though nobody may ask for one.
    positions = max(positions, 2)
    blocks = min(kinds.needed(positions) + 1, kinds.blocks_in(loaded.kv_memory or MOST_BYTES))
    config = config.replace(num_blocks=blocks)
    engine = Background(engine_of(loaded, config, most_positions=positions))
    try:
        yield engine
    finally:
        engine.close()


def tokens_of(
    engine: Background,
    prompt: Sequence[int],
    fields: dict[str, Any],
    *,
    streams: int | None,
    depth: str = "full",
    told: dict[str, Any] | None = None,
    adapted: Adapted = PLAIN,
    asked: str = "",
) -> Iterator[int]:
    """The new tokens as they come; ``fields`` of `anabranch.serving.Sampling`, ``asked`` see `Adapted.of_request`.

    Where routers or a skipper decide about ``depth``, ``told`` gets what they chose: ``path`` and ``computed``, see
    `anabranch.serving.Output`.
    """
    from anabranch.serving.core.request import Sampling

    more = {"routes_depth": depth == "routed", "skips_tokens": depth == "pruned", **adapted.of_request(asked)}
    for output in engine.stream(prompt, Sampling(**fields), num_streams=streams, **more):
        if told is not None:
            told |= {name: value for name in ("path", "computed") if (value := getattr(output, name)) is not None}
        yield from output.tokens

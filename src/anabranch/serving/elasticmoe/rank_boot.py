"""What a rank is told when it starts."""

from dataclasses import dataclass
from typing import Any

from anabranch.serving.core.scheduler import Scheduler, SchedulerConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.backend import Kind
from anabranch.serving.elasticmoe.layout import Layout

__all__ = ["Boot", "Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of every rank of a group; see `SchedulerConfig`.

    ``threads``: of a step. ``max_depth``: most blocks of a request's own path, where one may be longer than the model.

    ``pace_s`` and ``pace_token_s`` make a *paced* device: each step takes at least that long, and that long per token, while the
    computation stays real. For studies of more devices than the machine has cores.
    """

    num_blocks: int
    block_tokens: int = 16
    max_positions: int = 2048
    max_batched_tokens: int = 512
    max_seqs: int = 16
    long_prefill_chunk: int | None = None
    threads: int = 1
    prefix_cache: bool = True
    stop_tokens: tuple[int, ...] = ()
    seed: int | None = None
    max_depth: int | None = None
    pace_s: float = 0.0
    pace_token_s: float = 0.0

    def scheduler(self) -> Scheduler:
        """A scheduler without requests."""
        return SchedulerConfig(
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            max_positions=self.max_positions,
            max_batched_tokens=self.max_batched_tokens,
            max_seqs=self.max_seqs,
            long_prefill_chunk=self.long_prefill_chunk,
            prefix_cache=self.prefix_cache,
            stop_tokens=self.stop_tokens,
        ).build()


@dataclass(frozen=True, kw_only=True)
class Boot:
    """What a rank is told first. The files beside it: its channel to the memory manager, then those to ask each peer and to answer it.

    ``routers``: an `anabranch.depth.dr_llm.RouterBank`, by which requests are routed as deep as ``control`` says; None for none.
    ``skipper``: an `anabranch.depth.ftp.saving.Stored`, by which prompts are pruned; None for none.
    """

    layout: Layout
    device: int
    rank: int
    num_ranks: int
    limits: Limits
    copies: bool = False
    kind: Kind = "cpu"
    routers: Any = None
    control: float = DepthConfig.control
    skipper: Any = None

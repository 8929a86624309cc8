"""What depth routing did: how often each block ran per token, and what the routers took of the time."""
# Shapes: N blocks

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from anabranch.depth.decisions import EXECUTE, REPEAT, SKIP

__all__ = ["DepthReport", "DepthUse"]


@dataclass(frozen=True, kw_only=True)
class DepthReport:
    """Of all tokens since the counts were last reset, prompts included and padding not.

    Attributes:
        num_blocks: N.
        sequences: that were generated.
        tokens: positions that went through the model.
        uses: runs of each block per token.
        layers_per_token: their sum, the block runs of a token; N for the whole model.
        decisions: how many of each kind the routers made: ``skip``, ``execute``, ``repeat``.
        seconds: in passes of the model.
        router_seconds: of these, in routers.
        router_share: the share; 0 where nothing ran.
    """

    num_blocks: int
    sequences: int
    tokens: int
    uses: tuple[float, ...]
    layers_per_token: float
    decisions: dict[str, int]
    seconds: float
    router_seconds: float
    router_share: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "uses": list(self.uses)}

    def __str__(self) -> str:
        runs = "  ".join(f"{block}:{use:.2f}" for block, use in enumerate(self.uses))
        return (
            f"{self.layers_per_token:.2f} of {self.num_blocks} blocks per token, over {self.tokens:,} tokens of "
            f"{self.sequences:,} sequences; routers took {self.router_share:.2%} of {self.seconds:.3f} s\n"
            f"runs per token of each block: {runs}"
        )


@dataclass
class DepthUse:
    """Counts as they come.

    Attributes:
        num_blocks: N.
    """

    num_blocks: int
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    router_s: float = 0.0
    _runs: list[int] = field(default_factory=list)
    _decisions: dict[int, int] = field(default_factory=lambda: {SKIP: 0, EXECUTE: 0, REPEAT: 0})

    def __post_init__(self) -> None:
        self._runs = [0] * self.num_blocks

    def add(self, path: Sequence[int], tokens: int) -> None:
        """So many tokens went along ``path``."""
        self.tokens += tokens
        for block in path:
            self._runs[block] += tokens

    def add_decisions(self, decisions: Sequence[int]) -> None:
        """What routers decided."""
        for decision in decisions:
            self._decisions[decision] += 1

    def report(self) -> DepthReport:
        """What there is so far."""
        uses = tuple(runs / max(self.tokens, 1) for runs in self._runs)
        return DepthReport(
            num_blocks=self.num_blocks,
            sequences=self.sequences,
            tokens=self.tokens,
            uses=uses,
            layers_per_token=sum(self._runs) / max(self.tokens, 1),
            decisions={
                "skip": self._decisions[SKIP],
                "execute": self._decisions[EXECUTE],
                "repeat": self._decisions[REPEAT],
            },
            seconds=self.seconds,
            router_seconds=self.router_s,
            router_share=self.router_s / self.seconds if self.seconds else 0.0,
        )

"""What a pruned pass did: asked and achieved sparsity of each block, and the multiply-adds of blocks that it took."""
# Shapes: I blocks, B prompts, L positions

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anabranch.depth.ftp.decider import Schedule
from anabranch.depth.ftp.passes import Meter

__all__ = ["SkipReport", "joined", "report_of"]


@dataclass(frozen=True)
class SkipReport:
    """What one or several passes did.

    Attributes:
        target: the sparsity of each block that was asked for.
        skipped: of each block, tokens of prompts that it passed over.
        tokens: of the prompts, padding left out; those of prompts of one token, which are never pruned, among them.
        work: multiply-adds of each block, as they were done.
        dense: those of each block of the dense model on the same tokens.
        overhead: multiply-adds of what decides: attention scores and the router.
        decoded: tokens behind the prompts; they are in ``work`` and ``dense``.
    """

    target: Schedule
    skipped: tuple[int, ...]
    tokens: int
    work: tuple[int, ...]
    dense: tuple[int, ...]
    overhead: int = 0
    decoded: int = 0

    @property
    def achieved(self) -> tuple[float, ...]:
        """Share of the prompts' tokens that each block passed over."""
        return tuple(count / self.tokens for count in self.skipped)

    @property
    def sparsity(self) -> float:
        """Mean of ``achieved``."""
        return sum(self.achieved) / len(self.skipped)

    @property
    def target_sparsity(self) -> float:
        """Mean of ``target``."""
        return sum(self.target) / len(self.target)

    @property
    def saved(self) -> float:
        """Share of the dense model's block multiply-adds that were not done; what decides is not in it."""
        dense = sum(self.dense)
        return 1 - sum(self.work) / dense if dense else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; FLOPs are two per multiply-add."""
        return {
            "target_sparsity": self.target_sparsity,
            "sparsity": self.sparsity,
            "target": list(self.target),
            "achieved": list(self.achieved),
            "tokens": self.tokens,
            "decoded": self.decoded,
            "block_flops": 2 * sum(self.work),
            "dense_block_flops": 2 * sum(self.dense),
            "block_flops_saved": self.saved,
            "overhead_flops": 2 * self.overhead,
        }

    def __str__(self) -> str:
        """A line for each block, and one for all."""
        lines = ["block   asked  skipped  FLOPs saved"]
        for block, (asked, done) in enumerate(zip(self.target, self.achieved, strict=True)):
            saved = 1 - self.work[block] / self.dense[block] if self.dense[block] else 0.0
            lines.append(f"{block:>5}  {asked:6.3f}  {done:7.3f}  {saved:11.3f}")
        lines.append(f"  all  {self.target_sparsity:6.3f}  {self.sparsity:7.3f}  {self.saved:11.3f}")
        share = self.overhead / sum(self.dense) if sum(self.dense) else 0.0
        lines.append(
            f"{self.tokens} tokens of prompts, {self.decoded} behind them; what decides took {share:.4f} of the dense blocks"
        )
        return "\n".join(lines)


def report_of(target: Schedule, keep_IBL: Tensor, real_BL: Tensor, meter: Meter, dense: list[int]) -> SkipReport:
    """The report of one prefill. ``dense`` is of each block."""
    skipped = (real_BL & ~keep_IBL).sum((1, 2)).tolist()
    return SkipReport(
        target, tuple(skipped), int(real_BL.sum()), tuple(meter.blocks), tuple(dense), overhead=meter.overhead
    )


def joined(reports: list[SkipReport]) -> SkipReport:
    """One report of several passes with one schedule."""

    def sums(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(map(sum, zip(*rows, strict=True)))

    return SkipReport(
        reports[0].target,
        sums([one.skipped for one in reports]),
        sum(one.tokens for one in reports),
        sums([one.work for one in reports]),
        sums([one.dense for one in reports]),
        sum(one.overhead for one in reports),
        sum(one.decoded for one in reports),
    )

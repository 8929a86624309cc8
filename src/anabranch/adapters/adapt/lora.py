"""LoRA as a method of `anabranch adapt`: one low-rank adapter for all rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from anabranch.adapters.adapt.method import Method, Written, write_peft_or_own
from anabranch.adapters.low_rank import LowRank
from anabranch.config import Field, Size, configclass
from anabranch.lm.decoder import Decoder

__all__ = ["Lora"]


class Lora(Method, kind="lora"):
    """scale B A x beside each target (Hu et al. 2021, arXiv 2106.09685)."""

    summary: ClassVar[str] = "one low-rank adapter for all tasks"

    @configclass
    class Config(Method.Config):
        """Attributes: ``rank``; ``alpha``, the scale times the rank; ``rslora``, whether the scale is alpha / sqrt(rank)."""

        rank: Size = Field(default=8, ge=1)
        alpha: float = 16.0
        rslora: bool = False

    config: Config

    def layer(self, tasks: Sequence[str]) -> LowRank.Config:
        """The same for all tasks."""
        return LowRank.Config(rank=self.config.rank, alpha=self.config.alpha, rslora=self.config.rslora)

    def write(self, folder: Path, model: Decoder, base: str) -> Written:
        """A folder of peft's; one of our own for a model that no family of Hugging Face's has."""
        return write_peft_or_own(folder, model, base)

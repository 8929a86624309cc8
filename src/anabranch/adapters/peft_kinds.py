"""The kinds of adapters that the package peft computes and no code of ours does, by ``peft_type``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from anabranch.adapters.peft_config import TargetTable

__all__ = ["BY_PEFT", "NOT_BY_ROWS", "ByPeft", "ByPeftTable"]


@dataclass(frozen=True)
class ByPeft:
    """One kind: ``name`` as people write it, and whether a matrix can take it in."""

    name: str
    merges: bool = True


BY_PEFT: Mapping[str, ByPeft] = {
    "ADALORA": ByPeft("AdaLoRA"),
    "BEFT": ByPeft("BEFT", merges=False),
    "BOFT": ByPeft("BOFT"),
    "C3A": ByPeft("C3A"),
    "DELORA": ByPeft("DeLoRA"),
    "FOURIERFT": ByPeft("FourierFT"),
    "GRALORA": ByPeft("GraLoRA"),
    "HIRA": ByPeft("HiRA"),
    "HRA": ByPeft("HRA"),
    "LOHA": ByPeft("LoHa"),
    "LOKR": ByPeft("LoKr"),
    "MISS": ByPeft("MiSS"),
    "OFT": ByPeft("OFT"),
    "PSOFT": ByPeft("PSOFT"),
    "RANDLORA": ByPeft("RandLoRA"),
    "ROAD": ByPeft("RoAd"),
    "SHIRA": ByPeft("SHiRA"),
    "TINYLORA": ByPeft("TinyLoRA"),
    "UNILORA": ByPeft("Uni-LoRA"),
    "VBLORA": ByPeft("VB-LoRA"),
    "VERA": ByPeft("VeRA"),
    "WAVEFT": ByPeft("WaveFT"),
}
# What peft computes from all tokens of a pass together: the same row gets something else beside others, and through a cache.
NOT_BY_ROWS: Mapping[str, str] = {
    "LILY": "weighs its experts by the mean over all tokens of a pass, so what a row gets depends on the rows beside it and on its later "
    "tokens; it cannot be put onto a model that batches and caches"
}


class ByPeftTable(TargetTable):
    """The config of one of these kinds. What it says of the kind itself is peft's to read."""

    peft_type: ClassVar[str] = ""

    def __post_init__(self) -> None:
        kind = self.table.get("peft_type")
        if kind not in BY_PEFT:
            self._refuse("peft_type", kind, f"{', '.join(BY_PEFT)} are what peft runs here")
        self._refuse_set(
            {"modules_to_save": "whole tensors beside it", "target_parameters": "parameters by their names"}
        )
        bias = self.table.get("bias", "none")
        if bias not in (None, False, "none"):
            self._refuse("bias", bias, "biases of the base that learned beside it cannot be put on here")
        self._check()

    @property
    def kind(self) -> ByPeft:
        """Which."""
        return BY_PEFT[str(self.table["peft_type"])]

"""Adapters of kinds that the package peft alone computes, on models of ours."""

from anabranch.adapters.tuners.layer import PeftTuner
from anabranch.adapters.tuners.moved import MovedLowRank

__all__ = ["MovedLowRank", "PeftTuner"]

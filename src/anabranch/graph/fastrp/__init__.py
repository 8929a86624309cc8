"""FastRP: vectors of nodes by iterated sparse random projection, without training. See `anabranch.graph.fastrp.model`."""

from anabranch.graph.fastrp.model import FastRP, Powers
from anabranch.graph.fastrp.tuning import Trial, Tuning, tune

__all__ = ["FastRP", "Powers", "Trial", "Tuning", "tune"]

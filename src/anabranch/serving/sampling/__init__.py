"""Sampling: from logits to tokens, each request by its own rules, seed and grammar, all rows of a step at once."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.sampling.sampler import Sampler
from anabranch.serving.sampling.uniform import Uniforms

__all__ = ["Sampler", "Uniforms"]

"""The fast path of a step on a CPU: all layers of a supported model in one call of compiled code."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.fast.watch import Watch

__all__ = ["FastDecoder", "Watch"]

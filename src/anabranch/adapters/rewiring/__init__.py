"""Rewiring: routers turned to a text while it goes on, by vectors that are added to their logits and fitted to the text itself.

    rerouter = Rerouter(model, Rewiring(steps=5, interval=128))
    for step in rerouter.stream([prompt]): ...
    state = rerouter.new_state(); rerouter.adapt([context], [state])      # phase 1 alone

No weight changes, no label or other data is needed, and each request has vectors of its own: one number for each expert of each layer.

Su, Yang, Li, Yin, Liu, Geiping: "Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation in Mixture-of-Expert
models", 2025, arXiv 2510.14853.
"""

from anabranch.adapters.rewiring.rerouter import Rerouter
from anabranch.adapters.rewiring.state import Phase, RewiringState
from anabranch.rewiring import Rewiring

__all__ = ["Phase", "Rerouter", "Rewiring", "RewiringState"]

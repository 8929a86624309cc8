"""Token -> head: attention whose heads are on for some tokens only. PVChat's ReMoH (arXiv 2503.17069) and MoH (arXiv 2410.11842).

from anabranch.heads import RoutedHeads, put_heads

heads = RoutedHeads(attention, num_shared=5)      # one attention of ours, of torch or of transformers
model = put_heads(model, num_shared=6)            # all of a model's
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.heads.config import HeadRouting
from anabranch.heads.gate import HeadGate
from anabranch.heads.own import RoutedAttention
from anabranch.heads.put_on import (
    head_losses,
    head_report,
    load_heads,
    put_heads,
    routed_heads_of,
    save_heads,
    take_off_heads,
    with_heads,
)
from anabranch.heads.routed_heads import RoutedHeads
from anabranch.routing import HeadActivation, RateBalance, ReMoEController, SmoothProximity

__all__ = [
    "HeadActivation",
    "HeadGate",
    "HeadRouting",
    "RateBalance",
    "ReMoEController",
    "RoutedAttention",
    "RoutedHeads",
    "SmoothProximity",
    "head_losses",
    "head_report",
    "load_heads",
    "put_heads",
    "routed_heads_of",
    "save_heads",
    "take_off_heads",
    "with_heads",
]

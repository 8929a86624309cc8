"""Building blocks: norms, rotary positions, attention, feed-forward, the stacked expert pool, the plain mixture-of-experts layer."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.nn.attention import Attention, SelfAttention
from anabranch.nn.block import Block, PreNorm, Sandwich
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.feed_forward import MLP, FeedForward, SwiGLU
from anabranch.nn.latent_attention import LatentAttention
from anabranch.nn.linear import Dense, Linear
from anabranch.nn.moe import MoE
from anabranch.nn.norm import RMSNorm
from anabranch.nn.pool import ExpertPool
from anabranch.nn.rotary import Rotary

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "BuildContext",
    "Count",
    "Dense",
    "ExpertPool",
    "FeedForward",
    "ForwardContext",
    "LatentAttention",
    "Linear",
    "MoE",
    "PreNorm",
    "RMSNorm",
    "Rotary",
    "Sandwich",
    "SelfAttention",
    "SwiGLU",
]

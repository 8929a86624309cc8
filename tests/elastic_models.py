"""Small mixture-of-experts models on disk, for tests of elastic serving."""

from pathlib import Path

from anabranch.lm import Decoder
from anabranch.lm.checkpoint import save_model
from anabranch.nn.attention import SelfAttention
from anabranch.nn.moe import MoE
from anabranch.routing import Router, TopK


def moe_config(experts: int = 6, layers: int = 2, dim: int = 32, hidden: int = 48, top_k: int = 2) -> Decoder.Config:
    """One expert's w13 is 3 pages of 4 KiB to the byte, its w2 a page and a half: with and without padding."""
    router = Router.Config(select=TopK.Config(top_k=top_k))
    return Decoder.Config(
        vocab_size=61,
        dim=dim,
        num_layers=layers,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(num_experts=experts, hidden_dim=hidden, router=router),
        max_positions=128,
        init_std=0.3,  # logits far enough apart that the order of a sum decides nothing
    )


def save_moe(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A model folder."""
    save_model(folder, moe_config(**sizes).build(seed=seed))
    return folder

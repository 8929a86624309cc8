"""The mixture of DeepSeek-V3 and what took it over (GLM-4.5): sigmoid scores, a bias to select by, groups, a factor, shared experts."""

from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import dense_of, mixture_of
from anabranch.lm.formats.foreign import Foreign
from anabranch.nn import MoE
from anabranch.routing import BiasBalancer, GroupTopK, LinearScore, Router, Select, TopK

__all__ = ["read_biased_moe", "write_biased_moe", "write_shared_layers"]


def read_biased_moe(foreign: Foreign) -> MoE.Config:
    """The mixture."""
    num_groups, top_groups = foreign.get("n_group", 1), foreign.get("topk_group", 1)
    weights: dict[str, Any] = {
        "top_k": foreign.get("num_experts_per_tok", 8),
        "normalize": "sum" if foreign.get("norm_topk_prob", True) else "none",
        "scale": float(foreign.get("routed_scaling_factor", 1.0)),
    }
    select: Select.Config = TopK.Config(**weights)
    if top_groups < num_groups:
        select = GroupTopK.Config(**weights, num_groups=num_groups, top_groups=top_groups, group_score="top2_sum")
    return MoE.Config(
        num_experts=foreign["n_routed_experts"],
        hidden_dim=foreign["moe_intermediate_size"],
        shared_experts=foreign.get("n_shared_experts", 1),
        router=Router.Config(
            score=LinearScore.Config(activation="sigmoid"), select=select, balance=(BiasBalancer.Config(),)
        ),
    )


def write_biased_moe(config: Decoder.Config) -> dict[str, Any]:
    """The fields that `read_biased_moe` reads."""
    moe = mixture_of(config)
    select = moe.router.select
    groups = (select.num_groups, select.top_groups) if isinstance(select, GroupTopK.Config) else (1, 1)
    return {
        **write_shared_layers(config),
        "num_experts_per_tok": select.exact_choices or 1,
        "norm_topk_prob": select.normalize != "none",
        "routed_scaling_factor": select.scale,
        "n_group": groups[0],
        "topk_group": groups[1],
    }


def write_shared_layers(config: Decoder.Config) -> dict[str, Any]:
    """Experts, shared experts and dense layers, which are the first ones."""
    moe = mixture_of(config)
    dense = dense_of(config) if config.dense_layers else moe
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_width // moe.hidden_dim,
        "moe_intermediate_size": moe.hidden_dim,
        "intermediate_size": dense.hidden_dim,
        "first_k_dense_replace": len(config.dense_layers),
    }

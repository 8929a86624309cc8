"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax scores, the best groups of experts, shared experts."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import Foreign, Pieces, mixture, mixture_of, read_moe, with_dense_layers, write_moe
from anabranch.lm.formats.deepseek_v3 import USUAL, latent_pieces, read_latent_body, write_latent
from anabranch.lm.formats.routers import write_shared_layers
from anabranch.routing import GroupTopK, Select

MODEL_TYPE = "deepseek_v2"
ARCHITECTURE = "DeepseekV2ForCausalLM"


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    table = {**USUAL, **foreign.table}
    table.setdefault("q_lora_rank", 1536)
    foreign = Foreign(table, foreign.path)
    foreign.require("scoring_func", ("softmax",))
    foreign.require("topk_method", ("greedy", "group_limited_greedy"))
    foreign.require("norm_topk_prob", (False,))
    foreign.require("moe_layer_freq", (1,))
    moe = read_moe(
        foreign,
        num_experts=foreign.get("n_routed_experts", 64),
        hidden_dim=foreign["moe_intermediate_size"],
        renormalize=False,
        default_alpha=foreign.get("aux_loss_alpha", 0.001),
        shared_experts=foreign.get("n_shared_experts", 2),
    )
    scale, top_k = float(foreign.get("routed_scaling_factor", 1.0)), foreign["num_experts_per_tok"]
    select: Select.Config = moe.router.select.replace(scale=scale)
    if foreign.get("topk_method") == "group_limited_greedy":
        groups = {"num_groups": foreign["n_group"], "top_groups": foreign["topk_group"]}
        select = GroupTopK.Config(top_k=top_k, group_score="max", scale=scale, **groups)
    moe = moe.replace(router=moe.router.replace(select=select))
    dense = range(min(foreign.get("first_k_dense_replace", 0), foreign.num_layers))
    return with_dense_layers(read_latent_body(foreign), moe, foreign["intermediate_size"], dense)


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    moe = mixture_of(config)
    select, fields = moe.router.select, write_moe(config)
    groups: dict[str, Any] = {"topk_method": "greedy", "n_group": None, "topk_group": None}
    if isinstance(select, GroupTopK.Config):
        groups = {
            "topk_method": "group_limited_greedy",
            "n_group": select.num_groups,
            "topk_group": select.top_groups,
        }
    return {
        **write_latent(config),
        **write_shared_layers(config),
        **groups,
        "num_experts_per_tok": fields["num_experts_per_tok"],
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": fields["router_aux_loss_coef"],
        "routed_scaling_factor": select.scale,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names, shared="shared_experts", attention=latent_pieces(names))

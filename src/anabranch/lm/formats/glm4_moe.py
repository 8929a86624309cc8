"""GLM-4.5 and 4.6 (arXiv 2508.06471): half of each head is rotated; the mixture is DeepSeek-V3's.

Layers behind the last one, which predict further tokens, are left out.
"""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    mixture,
    read_attention,
    read_body,
    self_attention,
    with_dense_layers,
    write_body,
    write_head_dim,
)
from anabranch.lm.formats.positions import read_rotary
from anabranch.lm.formats.routers import read_biased_moe, write_biased_moe

MODEL_TYPE = "glm4_moe"
ARCHITECTURE = "Glm4MoeForCausalLM"
HAS_DRAFT_LAYERS = True


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=131072)
    attention = read_attention(
        foreign,
        qk_norm="head" if foreign.get("use_qk_norm", False) else "none",
        qkv_bias=foreign.get("attention_bias", False),
        head_dim=foreign.get("head_dim"),
        default_eps=1e-5,
    )
    rotary = read_rotary(foreign, 10000.0, 0.5)
    body = {**read_body(foreign, attention, rotary=rotary)}
    dense = range(min(foreign.get("first_k_dense_replace", 1), foreign.num_layers))
    return with_dense_layers(body, read_biased_moe(foreign), foreign["intermediate_size"], dense)


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    attention = self_attention(config)
    return {
        **write_body(config),
        **write_head_dim(config),
        **write_biased_moe(config),
        "partial_rotary_factor": config.rotary.fraction,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm == "head",
        "num_nextn_predict_layers": 0,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names, shared="shared_experts", bias="gate.e_score_correction_bias")

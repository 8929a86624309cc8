"""The table of models, formats and bits in docs/serving-guide.md is what the code makes of a small model of each family."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from anabranch.lm.formats import FAMILIES, read_config
from anabranch.lm.formats.few_bits import METHODS
from anabranch.nn.pool import ExpertPool
from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.memory.forms import Form

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import transformers

from anabranch.lm import gguf_architectures as made

PAGE = (Path(__file__).parents[2] / "docs" / "serving-guide.md").read_text()
SIZES = dict.fromkeys(
    (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
        "max_position_embeddings",
    ),
    64,
)  # fmt: skip
SIZES |= dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4
)
SIZES |= dict.fromkeys(
    ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16
)
SIZES |= {"num_hidden_layers": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
# Built like another family that transformers knows.
LIKE = {"deepseek": "llama", "qwen2_parscale": "qwen2"}
MORE = {
    "deepseek": {"kv_lora_rank": None, "q_lora_rank": None, "first_k_dense_replace": 1, "moe_layer_freq": 1},
    "qwen2_parscale": {"parscale_n": 2, "parscale_n_tokens": 4},
}
NAMES = re.compile(r"`([^`]+)`")


def config_of(family):
    with warnings.catch_warnings():
        # Of sizes that no model has.
        warnings.simplefilter("ignore")
        theirs = transformers.AutoConfig.for_model(LIKE.get(family, family), **SIZES)
    table = {**theirs.to_dict(), "model_type": family, "first_k_dense_replace": 1, **MORE.get(family, {})}
    return read_config(table, Path("config.json"))


def architectures_of(family):
    others = {"mixtral": ("llama",), "ministral3": ("mistral3",), "deepseek_v3": ("deepseek2",)}
    return tuple(name for name, one in made.ARCHITECTURES.items() if one.model_type == family) + others.get(family, ())


def told():
    lines = PAGE.split("## Which models, in which bits\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_family_has_a_row():
    assert list(told()) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_the_code_makes_of_the_family(family):
    folder, gguf, quantize, step, budget = told()[family]
    config = config_of(family)
    few = Form.of(config, "int4", torch.float32)
    assert set(NAMES.findall(folder)) == {*METHODS, *(["mxfp4"] if family == "gpt_oss" else [])}
    assert tuple(NAMES.findall(gguf)) == architectures_of(family)
    stay = any(isinstance(module, ExpertPool) for module in few.model.modules())
    assert quantize == ("all but experts" if stay else "all")
    assert step == ("compiled" if FastDecoder.supports(config.build(seed=0).eval()) is None else "by module")
    both = {Form.of(config, "none", torch.float32).pools is not None, few.pools is not None}
    assert both == {budget == "yes"}

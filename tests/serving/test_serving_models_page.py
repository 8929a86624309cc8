"""The table of models, formats and bits in docs/serving-guide.md is what the code makes of a small model of each family."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.errors import AnabranchError
from anabranch.lm import load_model
from anabranch.lm.formats import FAMILIES, read_config
from anabranch.lm.formats.export import export
from anabranch.lm.formats.few_bits import METHODS
from anabranch.lm.gguf import GgufFile
from anabranch.lm.gguf_architectures import ARCHITECTURES
from anabranch.nn.pool import ExpertPool
from anabranch.serving.fast.decoder import FastDecoder
from anabranch.serving.memory.forms import Form

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from few_bits_packings import WAYS, mxfp4
from gguf_made import MADE, theirs, write

PAGE = (Path(__file__).parents[2] / "docs" / "serving-guide.md").read_text()
SIZES = dict.fromkeys(
    (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "max_position_embeddings",
    ),
    64,
)
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
        made = transformers.AutoConfig.for_model(LIKE.get(family, family), **SIZES)
    table = {**made.to_dict(), "model_type": family, "first_k_dense_replace": 1, **MORE.get(family, {})}
    return read_config(table, Path("config.json"))


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    """Family: architectures of the GGUF files that become it, by files of each kind that there is."""
    place, found = tmp_path_factory.mktemp("gguf"), {}
    for number, name in enumerate(MADE):
        file = GgufFile(write(place / f"{number}.gguf", theirs(name), name))
        found.setdefault(file.foreign_config()["model_type"], {})[name.split()[0]] = None
    assert {name for names in found.values() for name in names} == ARCHITECTURES.keys()
    return found


def told():
    lines = PAGE.split("## Which models, in which bits\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_family_has_a_row():
    assert list(told()) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_the_code_makes_of_the_family(family, architectures):
    _, gguf, quantize, step, budget = told()[family]
    config = config_of(family)
    few = Form.of(config, "int4", torch.float32)
    assert NAMES.findall(gguf) == list(architectures.get(family, ()))
    stay = any(isinstance(module, ExpertPool) for module in few.model.modules())
    assert quantize == ("all but experts" if stay else "all")
    assert step == ("compiled" if FastDecoder.supports(config.build(seed=0).eval()) is None else "by module")
    both = {Form.of(config, "none", torch.float32).pools is not None, few.pools is not None}
    assert both == {budget == "yes"}


MATRIX = re.compile(r"(_proj|_proj_with_mqa|\.w[123])\.weight$")


def alone(state):
    """Stacked experts of gpt-oss, inputs first and gate and up alternating, as matrices and biases of each."""
    found = {}
    for name, tensor in state.items():
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", name)
        if not stacked:
            found[name] = tensor
            continue
        for expert, one in enumerate(tensor):
            parts = {"gate": one[..., ::2], "up": one[..., 1::2]} if stacked[2] == "gate_up" else {"down": one}
            for part, value in parts.items():
                kind = "bias" if stacked[3] else "weight"
                found[f"{stacked[1]}.{expert}.{part}_proj.{kind}"] = value if stacked[3] else value.t()
    return found


def in_bits(state, method):
    """(quantization_config, what is stored, the same numbers in floating point)."""
    few, plain = dict(state), dict(state)
    if method == "mxfp4":
        for number, name in enumerate(
            name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ):
            experts, columns, rows = few.pop(name).shape
            blocks, scales = mxfp4((experts, rows, columns), number)
            few |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float()
        return {"quant_method": method}, few, plain
    pack, table = WAYS[method]
    torch.manual_seed(5)
    for name in filter(MATRIX.search, state):
        parts, plain[name] = pack(few.pop(name), table)
        few |= {f"{name.removesuffix('.weight')}.{part}": stored for part, stored in parts.items()}
    return table, few, plain


def folder_of(place, family, method):
    """A folder of the family whose matrices, of experts too, are stored so, beside one of the same numbers in floating point."""
    place.mkdir()
    export(place, config_of(family).build(seed=0), family=family)
    table = json.loads((place / "config.json").read_text())
    state = load_file(place / "model.safetensors")
    scheme, few, plain = in_bits(alone(state) if method != "mxfp4" else state, method)
    assert table["model_type"] == family
    for name, tensors, more in (("few", few, {"quantization_config": scheme}), ("plain", plain, {})):
        (place / name).mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, place / name / "model.safetensors")
        (place / name / "config.json").write_text(json.dumps({**table, **more}))
    return place / "few", place / "plain", few.keys() - state.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_in_these_bits_is_loaded(family, method, tmp_path):
    few, plain, stored = folder_of(tmp_path / "m", family, method)
    if method not in NAMES.findall(told()[family][0]):
        with pytest.raises(AnabranchError, match=f"quant_method .*{method}"):
            load_model(few)
        return
    assert stored
    has_experts = any(isinstance(module, ExpertPool) for module in config_of(family).build(seed=0).modules())
    assert any(".experts." in name for name in stored) == has_experts
    wanted, _ = load_model(plain, dtype=torch.float32)
    found, _ = load_model(few, dtype=torch.float32)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-6, atol=1e-7)

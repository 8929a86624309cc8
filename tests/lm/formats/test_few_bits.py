"""Folders in FP8, GPTQ and AWQ: by hand, against a naive packing, and through the front door; rounded layer by layer they are what loading
and rounding gives, in every family."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from anabranch.errors import CheckpointError
from anabranch.lm import convert, load_config, load_model
from anabranch.lm.formats.few_bits import AWQ_ORDER, dequantised
from anabranch.lm.outline import outline
from anabranch.lm.quantized import load_quantized
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool, dequantize, quantize
from anabranch.serving.expertflow import load_offloaded
from few_bits_packings import QWEN, WAYS, awq, folder_of, gptq
from foreign_models import build_theirs

FAMILIES = {
    "Llama": {"intermediate_size": 64},
    "Qwen3Moe": QWEN,
    "Mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "Gemma3Text": {"intermediate_size": 64, "head_dim": 16, "query_pre_attn_scalar": 16},
    "DeepseekV3": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_layer_by_layer_is_loaded_and_rounded(family, dtype, tmp_path):
    build_theirs(family, **FAMILIES[family]).save_pretrained(tmp_path)
    wanted, _ = load_model(tmp_path, dtype=dtype)
    assert quantize(wanted, "int4")
    found, _ = load_quantized(tmp_path, "int4", dtype=dtype)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_in_few_bits_is_the_model_of_its_numbers(way, tmp_path):
    few = folder_of(tmp_path, way)
    wanted, _ = load_model(tmp_path / "plain")
    assert load_config(few) == wanted.config
    found, _ = load_model(few, dtype=torch.float32)
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    if way == "gptq v2":
        # Whose numbers stay, see below.
        return
    convert(few, tmp_path / "q", dtype=torch.float32, quantize="int4")
    rounded, _ = load_model(tmp_path / "q")
    quantize(found, "int4")
    assert all(torch.equal(rounded.state_dict()[key], value) for key, value in found.state_dict().items())
    offloaded, _, engine = load_offloaded(few, None, dtype=torch.float32, quantize="int4")
    with engine, torch.inference_mode():
        tokens = torch.arange(20).view(1, 20)
        assert torch.equal(offloaded(tokens).logits_BLV, rounded.eval()(tokens).logits_BLV)


KEPT = {
    "gptq, symmetric": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "gptq v2": WAYS["gptq v2"],
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
}


def assert_stored(few, kept):
    """Where nothing is rounded all of these stay too, also if experts come from the folder."""
    tokens = torch.arange(20).view(1, 20)
    stored, _ = load_quantized(few, "stored", dtype=torch.float32)
    state, wanted = stored.state_dict(), kept.state_dict()
    few_names = {name for name in wanted if ".data" in name and not name.startswith("head")}
    assert len(few_names) >= 8
    assert all(torch.equal(state[name], wanted[name]) for name in few_names)
    assert {name for name, _ in stored.named_modules() if name.startswith("head")} == {"head"}
    assert isinstance(stored.head, torch.nn.Linear)
    made = outline(few, bits="stored", dtype=torch.float32)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    pool = next(module for module in stored.modules() if isinstance(module, QuantizedPool))
    budget = 2 * sum(part.nbytes for part in pool.packed) // pool.num_experts
    offloaded, _, engine = load_offloaded(few, budget, dtype=torch.float32, quantize="stored")
    with engine, torch.inference_mode():
        assert torch.equal(offloaded(tokens).logits_BLV, stored.eval()(tokens).logits_BLV)


@pytest.mark.parametrize("way", KEPT)
def test_four_bits_stay_as_they_are_stored(way, tmp_path, monkeypatch):
    """Numbers and scales to the bit; minima too where zeros are 8, else rounded to half precision."""
    monkeypatch.setitem(WAYS, way, KEPT[way])
    few = folder_of(tmp_path, way)
    plain, _ = load_model(tmp_path / "plain", dtype=torch.float32)
    kept, _ = load_quantized(few, "int4", dtype=torch.float32)
    found = {name: module for name, module in kept.named_modules() if isinstance(module, QuantizedLinear)}
    pools = {name: module for name, module in kept.named_modules() if isinstance(module, QuantizedPool)}
    assert len(found) >= 2 * 2
    assert len(pools) >= 2
    assert {part.group for pool in pools.values() for part in pool.packed} == {32}
    assert sum(part.nbytes for pool in pools.values() for part in pool.packed) < 0.2 * sum(
        parameter.nbytes for name, parameter in plain.named_parameters() if "experts" in name
    )
    assert_stored(few, kept)
    convert(few, tmp_path / "q", dtype=torch.float32, quantize="int4")
    saved, _ = load_model(tmp_path / "q")
    assert all(torch.equal(saved.state_dict()[key], value) for key, value in kept.state_dict().items())
    dequantize(kept)
    for key, value in plain.state_dict().items():
        if "head" in key:
            continue
        ours = kept.state_dict()[key]
        if "symmetric" in way:
            assert torch.equal(ours, value), key
        else:
            # Half of the last place of a minimum, which is at most 15 scales of 0.1.
            torch.testing.assert_close(ours, value, rtol=0, atol=15 * 0.1 / 2048)


@pytest.mark.parametrize("way", ["gptq, ordered", "gptq", "awq"])
def test_what_kernels_do_not_take_is_rounded(way, tmp_path):
    """Eight bits in another order, and groups of 16."""
    few = folder_of(tmp_path, way)
    wanted, _ = load_model(few, dtype=torch.float32)
    quantize(wanted, "int4")
    found, _ = load_quantized(few, "int4", dtype=torch.float32)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.state_dict().items())


def test_experts_that_no_kernel_takes_are_told(tmp_path, caplog):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    build_theirs("GptOss", **sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e4}).save_pretrained(
        tmp_path
    )
    model, _ = load_quantized(tmp_path, "int4")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert not any(isinstance(module, QuantizedPool) for module in model.modules())
    assert "experts of" in caplog.text
    assert "of the weights stay in floating point" in caplog.text


def test_fp8_is_rounded_once_to_the_type_that_is_asked_for(tmp_path):
    few = folder_of(tmp_path, "fp8")
    stored = load_file(tmp_path / "plain" / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert not torch.equal(stored, stored.bfloat16().float())
    for dtype in (torch.float32, torch.float16, torch.bfloat16, None):
        found = load_model(few, dtype=dtype)[0].blocks[1].attention.out.weight
        assert torch.equal(found, stored.to(dtype or torch.bfloat16))


class Held(dict):
    names = property(dict.keys)
    read = dict.__getitem__

    def shape(self, name):
        return tuple(self[name].shape)

    def dtype(self, name):
        return self[name].dtype


def test_by_hand():
    # One input, eight outputs: the number of output AWQ_ORDER[i] in nibble i, as AutoAWQ's GEMM kernels read it.
    number = sum((output + 1) << 4 * place for place, output in enumerate(AWQ_ORDER))
    stored = {"a.qweight": torch.tensor([[number - 2**32 if number >= 2**31 else number]]).int()}
    stored |= {"a.qzeros": torch.tensor([[0x11111111]]).int(), "a.scales": torch.full((1, 8), 0.5).half()}
    source = dequantised(Held(stored), {"quant_method": "awq", "bits": 4})
    assert list(source.names) == ["a.weight"]
    assert source.read("a.weight")[:, 0].tolist() == [0.5 * output for output in range(8)]
    # Two of eight inputs: 3 (8 - z) and 3 (15 - z), z stored as z - 1.
    stored = {"a.qweight": torch.tensor([[0x000000F8]]).int(), "a.qzeros": torch.tensor([[6]]).int()}
    stored |= {"a.scales": torch.tensor([[3.0] * 8]).half()}
    stored["a.qweight"] = stored["a.qweight"].expand(1, 8).contiguous()
    found = dequantised(Held(stored), {"quant_method": "gptq", "bits": 4}).read("a.weight")
    assert found[0, :3].tolist() == [3.0, 24.0, -21.0]


@pytest.mark.parametrize(
    ("way", "change", "message"),
    [
        ("gptq", {"bits": 3}, "quantization_config.bits is 3; GPTQ is read with 2, 4 or 8"),
        ("awq", {"version": "gemv"}, "quantization_config.version is 'gemv'; AWQ is read with 'gemm'"),
        ("fp8", {"weight_block_size": [0, 1]}, r"weight_block_size is \[0, 1\]; it must be two whole numbers"),
        (
            "fp8",
            {"weight_block_size": [8, 8]},
            r"weight_scale_inv has shape .*; a weight of .* in blocks of \[8, 8\] needs",
        ),
        ("awq", {"quant_method": "bitsandbytes"}, "quant_method in .* is 'bitsandbytes'.*fp8, gptq, awq"),
    ],
)
def test_variants_that_are_not_read(way, change, message, tmp_path):
    few = folder_of(tmp_path, way)
    config = json.loads((few / "config.json").read_text())
    config["quantization_config"] |= change
    (few / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(few)


@given(
    st.sampled_from(["gptq", "awq"]),
    st.integers(1, 16),
    st.integers(1, 6),
    st.integers(1, 80) | st.just(-1),
    st.booleans(),
)
def test_groups_are_those_of_the_table_or_refused(way, eighths, groups, size, has_index):
    depth = 8 * eighths
    shape = (depth // 8, 8) if way == "gptq" else (depth, 1)
    stored = {"a.qweight": torch.zeros(shape, dtype=torch.int32), "a.qzeros": torch.zeros(groups, 1, dtype=torch.int32)}
    # Number 0 and zero 0 of AWQ, 1 of GPTQ: the weight is -s of the input's group, or 0.
    stored["a.qzeros"] += 0 if way == "gptq" else 0x11111111
    stored["a.scales"] = torch.arange(1, groups + 1).half()[:, None].expand(groups, 8).contiguous()
    wide = depth if size == -1 else size
    if has_index and way == "gptq":
        stored["a.g_idx"] = torch.arange(depth) // wide
    try:
        found = dequantised(Held(stored), {"quant_method": way, "bits": 4, "group_size": size}).read("a.weight")
    except CheckpointError:
        assert depth % groups or groups != -(-depth // wide) or depth % wide
        return
    assert found[0].tolist() == [-(1.0 + place // wide) for place in range(depth)]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (48, None),
        (None, None),
        (64, "does not divide, and no g_idx"),
        (32, "2 groups of its 96 inputs, and by .*=32 there are 3"),
        (-1, "there are 1"),
        (0, "group_size is 0"),
        (True, "group_size is True"),
        ("64", "group_size is '64'"),
        (10**30, "there are 1"),
    ],
)
@pytest.mark.parametrize("way", ["gptq", "awq"])
def test_two_groups_of_96_inputs(way, size, message):
    shape = (12, 8) if way == "gptq" else (96, 1)
    stored = {"a.qweight": torch.zeros(shape, dtype=torch.int32), "a.qzeros": torch.zeros(2, 1, dtype=torch.int32)}
    source, table = Held({**stored, "a.scales": torch.ones(2, 8).half()}), {"quant_method": way, "bits": 4}
    table |= {} if size is None else {"group_size": size}
    if message is None:
        assert dequantised(source, table).shape("a.weight") == (8, 96)
        return
    with pytest.raises(CheckpointError, match=message):
        dequantised(source, table)


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_parts_that_are_missing_or_do_not_fit(part, tmp_path):
    few = folder_of(tmp_path, "awq")
    stored = load_file(few / "model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{part}"
    save_file({**stored, name: stored[name][:1].clone()}, few / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.qweight, scales .* do not fit each other"):
        load_model(few)
    del stored[name]
    save_file(stored, few / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model(few)

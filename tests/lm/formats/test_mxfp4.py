"""Weights in MXFP4: by hand, against transformers' own unpacking, and a folder of gpt-oss that stores its experts so."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from anabranch.lm import convert, load_model
from anabranch.lm.checkpoint import check_weights
from anabranch.lm.formats.mxfp4 import unpack
from few_bits_packings import mxfp4 as packed
from foreign_models import build_theirs

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
}


def test_numbers_by_hand():
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x21  # 0.5, then 1
    blocks[0, 0, 0, 1] = 0xF7  # 6, then -6
    blocks[0, 0, 1, 15] = 0x9A  # -1, then -0.5, the last two of the row
    scales = torch.tensor([[[127 + 3, 127 - 2]]], dtype=torch.uint8)
    row = unpack(blocks, scales)[0, 0]
    assert row.dtype == torch.bfloat16
    assert row.shape == (64,)
    assert row[:4].tolist() == [4.0, 8.0, 48.0, -48.0]
    assert row[-2:].tolist() == [-0.25, -0.125]
    assert not row[4:-2].any()


def test_it_is_the_unpacking_of_transformers():
    blocks, scales = packed((3, 8, 64), 0)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    torch.testing.assert_close(unpack(blocks, scales).transpose(1, 2), theirs, rtol=0, atol=0)
    # The least and the greatest exponents.
    scales = torch.tensor([0, 254], dtype=torch.uint8).repeat(3, 8, 1)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    torch.testing.assert_close(unpack(blocks, scales).transpose(1, 2), theirs, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path_factory):
    """Experts in MXFP4, the rest in bfloat16, as the published models are; and a model of theirs with the same numbers."""
    theirs = build_theirs("GptOss", **FIELDS)
    tmp_path = tmp_path_factory.mktemp("mxfp4")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for number, name in enumerate(sorted(name for name in state if name.endswith(("gate_up_proj", "down_proj")))):
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"], state[f"{name}_scales"] = packed((experts, rows, columns), number)
        whole = convert_moe_packed_tensors(state[f"{name}_blocks"], state[f"{name}_scales"], dtype=torch.bfloat16)
        with torch.no_grad():
            dict(theirs.named_parameters())[name].copy_(whole)
    save_file(state, tmp_path / "model.safetensors")
    table = json.loads((tmp_path / "config.json").read_text())
    table["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(table))
    return tmp_path, theirs


def test_a_folder_is_read_and_becomes_one_in_floating_point(folder, tmp_path):
    place, theirs = folder
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        ours, _ = load_model(place, dtype=torch.float32)
        torch.testing.assert_close(ours(tokens).logits_BLV, expected, rtol=0, atol=1e-4)
    check_weights(place)
    convert(place, tmp_path / "back", "huggingface", dtype=torch.float32)
    given = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(given[name], tensor, rtol=0, atol=0)

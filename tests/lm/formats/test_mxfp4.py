"""Weights in MXFP4: by hand, against transformers' own unpacking, and a folder of gpt-oss that stores its experts so."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from anabranch.lm import convert, load_model
from anabranch.lm.checkpoint import check_weights
from anabranch.lm.formats.mxfp4 import unpack
from anabranch.lm.outline import outline, weight_bytes
from anabranch.lm.quantized import load_quantized
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedPool, dequantize
from anabranch.serving import LLM, Sampling
from few_bits_packings import gpt_oss
from few_bits_packings import mxfp4 as packed


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
    tmp_path = tmp_path_factory.mktemp("mxfp4")
    return tmp_path, gpt_oss(tmp_path)


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


@pytest.mark.parametrize("bits", ["stored", "int4"])
def test_experts_stay_in_their_bits(bits, folder, tmp_path, caplog):
    place, theirs = folder
    plain, _ = load_model(place, dtype=torch.float32)
    found, _ = load_quantized(place, bits, dtype=torch.float32)
    assert "stay in floating point" not in caplog.text
    pools = [module for module in found.modules() if isinstance(module, QuantizedPool)]
    assert len(pools) == len(found.blocks)
    assert {part.kind for pool in pools for part in pool.packed} == {"fp4"}
    assert weight_bytes(outline(place, bits=bits, dtype=torch.float32)) == weight_bytes(found)
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        kept = found.eval()(tokens).logits_BLV
        expected = theirs(tokens).logits
    # Activations are rounded, which changes a choice of experts now and then.
    error_BL = (kept - expected).norm(dim=-1) / expected.norm(dim=-1)
    if bits == "stored":
        assert error_BL.median() < 0.05
    convert(place, tmp_path / "q", quantize="int4", dtype=torch.float32)
    saved, _ = load_model(tmp_path / "q")
    assert weight_bytes(outline(tmp_path / "q", dtype=torch.float32)) == weight_bytes(saved)
    if bits == "int4":
        with torch.inference_mode():
            assert torch.equal(saved.eval()(tokens).logits_BLV, kept)
    for model in (found, saved):
        dequantize(model)
        for name, value in plain.state_dict().items():
            # What else there is was rounded for int4.
            if "experts" in name or (bits == "stored" and model is found):
                assert torch.equal(model.state_dict()[name], value), name


def test_an_engine_gives_the_tokens_of_the_same_bits(folder):
    place, _ = folder
    found, _ = load_quantized(place, "stored", dtype=torch.float32)
    llm = LLM(str(place), quantize="stored", dtype="float32", num_blocks=20, process=False)
    [answer] = llm.generate([[1, 2, 3]], Sampling(temperature=0.0, max_tokens=6, ignore_eos=True))
    llm.close()
    text = [1, 2, 3]
    with torch.inference_mode():
        for _ in answer.tokens:
            text.append(int(found.eval()(torch.tensor([text])).logits_BLV[0, -1].argmax()))
    assert list(answer.tokens) == text[3:]
    assert not any(isinstance(module, ExpertPool) for module in found.modules())

"""An outline has the bytes, to the last, of the model that is really loaded: in every form, of every kind of file."""

import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder, convert, export_huggingface, load_model, save_model
from anabranch.lm.outline import outline, weight_bytes
from anabranch.lm.quantized import load_quantized
from anabranch.nn import MoE, SelfAttention, SwiGLU

BITS = [None, "int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16]


def decoder(feed_forward=None, **fields):
    config = Decoder.Config(
        vocab_size=257,
        dim=64,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, qkv_bias=True),
        feed_forward=feed_forward or SwiGLU.Config(hidden_dim=96),
        max_positions=128,
        **fields,
    )
    return config.build(seed=3).eval()


MODELS = {
    "dense": lambda: decoder(),
    "tied": lambda: decoder(tie_embeddings=True),
    "moe": lambda: decoder(MoE.Config(num_experts=4, hidden_dim=32, shared_experts=1, shared_gate=True)),
    "shared pool": lambda: decoder(ReXMoE.Config(num_experts=4, hidden_dim=32, reuse=2)),
    "narrow": lambda: decoder(MoE.Config(num_experts=4, hidden_dim=40)),  # experts that cannot be packed
}


def held(model):
    """Bytes of distinct memory behind parameters and buffers."""
    parts = (*model.parameters(), *model.buffers())
    return sum(
        {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts if part.numel()}.values()
    )


def loaded(path, bits, dtype):
    model, _ = load_model(path, dtype=dtype) if bits is None else load_quantized(path, bits, dtype=dtype)
    return model


def check(path, bits, dtype):
    made, real = outline(path, bits=bits, dtype=dtype), loaded(path, bits, dtype)
    shapes = [{name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()} for model in (made, real)]
    assert shapes[0] == shapes[1]
    assert weight_bytes(made) == weight_bytes(real) == held(real)
    assert all(parameter.is_meta for parameter in made.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MODELS)
def test_native_folders(name, bits, dtype, tmp_path):
    save_model(tmp_path / "m", MODELS[name](), ByteTokenizer())
    check(tmp_path / "m", bits, dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["tied", "moe"])
def test_huggingface_folders(name, bits, tmp_path):
    model = decoder(MoE.Config(num_experts=4, hidden_dim=32)) if name == "moe" else MODELS[name]()
    export_huggingface(tmp_path / "m", model, None)
    check(tmp_path / "m", bits, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", ["tied", "moe", "shared pool", "narrow"])
def test_folders_that_are_saved_in_few_bits(name, bits, dtype, tmp_path):
    save_model(tmp_path / "m", MODELS[name](), ByteTokenizer())
    convert(tmp_path / "m", tmp_path / "q", "native", quantize=bits)
    check(tmp_path / "q", None, dtype)
    other = "int4" if bits == "int8" else "int8"
    with pytest.raises(ConfigError, match=f"saved in {bits}, and {other} is asked for"):
        outline(tmp_path / "q", bits=other, dtype=dtype)


@pytest.mark.parametrize("bits", [*BITS, "stored"])
@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q8_0", "Q5_0"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_gguf_files(is_tied, kind, bits, tmp_path):
    files = pytest.importorskip("gguf_files")
    model = files.tiny(300, tie_embeddings=is_tied)
    path = tmp_path / "m.gguf"
    files.write(path, model, kind=files.gguf.GGMLQuantizationType[kind])
    check(path, bits, torch.float32)
    if bits == "stored" and kind in ("F16", "Q5_0"):
        assert weight_bytes(outline(path, bits=bits, dtype=torch.float32)) == weight_bytes(loaded(path, None, None))


@pytest.mark.parametrize("name", ["tied", "moe"])
def test_folders_that_have_nothing_to_keep_are_as_they_are(name, tmp_path):
    save_model(tmp_path / "m", MODELS[name](), ByteTokenizer())
    export_huggingface(tmp_path / "hf", MODELS[name](), None)
    convert(tmp_path / "m", tmp_path / "q", "native", quantize="int4")
    for place in ("m", "hf", "q"):
        check(tmp_path / place, "stored", torch.bfloat16)


def test_config_json_is_enough_where_all_is_rounded_here(tmp_path):
    save_model(tmp_path / "m", MODELS["moe"](), ByteTokenizer())
    whole = [weight_bytes(outline(tmp_path / "m", bits=bits, dtype=torch.bfloat16)) for bits in BITS]
    config = MODELS["moe"]().config
    (tmp_path / "m" / "model.safetensors").unlink()
    assert [weight_bytes(outline(tmp_path / "m", bits=bits, dtype=torch.bfloat16)) for bits in BITS] == whole
    assert [weight_bytes(outline(config, bits=bits, dtype=torch.bfloat16)) for bits in BITS] == whole


def test_what_cannot_be_is_said(tmp_path):
    save_model(tmp_path / "m", decoder(SwiGLU.Config(hidden_dim=96)), ByteTokenizer())
    with pytest.raises(CheckpointError, match="no model at"):
        outline(tmp_path / "none", dtype=torch.float32)
    small = Decoder.Config(
        dim=24, attention=SelfAttention.Config(num_heads=3), feed_forward=SwiGLU.Config(hidden_dim=40)
    )
    with pytest.raises(ConfigError, match=r"no layer of .* can be in int4"):
        outline(small, bits="int4", dtype=torch.float32)

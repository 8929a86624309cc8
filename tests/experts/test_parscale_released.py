"""Folders in the layout of the released ParScale models: read by `load_model`, ``anabranch convert`` and all that load a model."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.cli.main import main
from anabranch.errors import CheckpointError
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder, convert, export_huggingface, load_config, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU

transformers = pytest.importorskip("transformers")
P, M, EPS, DIM, LAYERS, VOCAB = 3, 5, 0.02, 16, 2, 257
HEADS, KV_HEADS, WIDTH = 4, 2, 4
FIELDS = {"parscale_n": P, "parscale_n_tokens": M, "parscale_attn_smooth": EPS}


def build_body():
    config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    return model


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(folder, the Qwen2 body by transformers, the other tensors): names and shapes as in the released weights."""
    folder, body = tmp_path_factory.mktemp("released") / "ParScale", build_body()
    body.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    more = {
        "model.aggregate_layer.0.weight": (DIM, P * DIM),
        "model.aggregate_layer.0.bias": (DIM,),
        "model.aggregate_layer.2.weight": (P, DIM),
        "model.aggregate_layer.2.bias": (P,),
    }
    for layer in range(LAYERS):
        for name in ("prefix_k", "prefix_v"):
            more[f"model.layers.{layer}.self_attn.{name}"] = (P, KV_HEADS, M, WIDTH)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in more.items()}
    save_file(
        load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    table = json.loads((folder / "config.json").read_text()) | FIELDS
    table |= {
        "model_type": "qwen2_parscale",
        "architectures": ["Qwen2ParScaleForCausalLM"],
        "use_sliding_window": False,
    }
    table["auto_map"] = {"AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM"}
    (folder / "config.json").write_text(json.dumps(table))
    return folder, body, tensors


@torch.no_grad()
def by_hand(body, tensors, token_BL):
    """Logits as the paper has them: each stream by transformers with a past of its prefix, then the gate."""
    name = "cache" if "cache" in inspect.signature(body.model.forward).parameters else "past_key_values"
    batch, length = token_BL.shape
    hidden = []
    for stream in range(P):
        past = transformers.DynamicCache()
        for layer in range(LAYERS):
            key, value = (tensors[f"model.layers.{layer}.self_attn.prefix_{part}"][stream] for part in "kv")
            past.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
        position_BL = torch.arange(length).expand(batch, length)
        hidden.append(body.model(token_BL, **{name: past}, position_ids=position_BL).last_hidden_state)
    together = torch.stack(hidden, dim=-1)  # features interleave as (feature, stream)
    gate = {
        name.removeprefix("model.aggregate_layer."): value for name, value in tensors.items() if "aggregate" in name
    }
    x = torch.nn.functional.silu(together.flatten(2) @ gate["0.weight"].T + gate["0.bias"])
    weight = (x @ gate["2.weight"].T + gate["2.bias"]).softmax(-1)
    weight = (1 - EPS) * weight + EPS / P
    return body.lm_head((together * weight[:, :, None]).sum(-1))


def tokens():
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))


def same(model, wanted, **options):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens(), **options).logits_BLV, wanted, rtol=1e-4, atol=1e-4)


def test_load_model_reads_what_was_released(released):
    folder, body, tensors = released
    model, tokenizer = load_model(folder)
    assert tokenizer is None
    assert load_config(folder) == model.config
    assert (model.config.streams.num_streams, model.config.streams.prefix_len, model.config.streams.smoothing) == (
        P,
        M,
        EPS,
    )
    same(model, by_hand(body, tensors, tokens()))
    with torch.no_grad():
        same(model, body(tokens()).logits, num_streams=1)


def test_it_goes_to_our_format_and_back_by_command(released, tmp_path, caplog):
    folder, body, tensors = released
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", str(folder), str(native), "--to", "native"]) == 0
    wanted = by_hand(body, tensors, tokens())
    same(load_model(native)[0], wanted)
    assert main(["convert", str(native), str(back), "--to", "huggingface"]) == 0

    assert "reads this folder only with the code of the released models" in caplog.text
    table = json.loads((back / "config.json").read_text())
    assert (table["model_type"], table["architectures"]) == ("qwen2_parscale", ["Qwen2ParScaleForCausalLM"])
    assert {name: table[name] for name in FIELDS} == FIELDS
    first, again = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() - {"lm_head.weight"} == again.keys() - {"lm_head.weight"}
    assert all(torch.equal(first[name], again[name]) for name in again)
    same(load_model(back)[0], wanted)


def parscale(**options):
    return Decoder.Config(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=HEADS, num_kv_heads=KV_HEADS),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        streams=ParScale.Config(prefix_len=M, embedding_dim=3, mlp_dim=4, **options),
        init_std=0.2,
    )


def test_a_model_trained_here_is_folded_and_gets_the_biases_that_qwen2_has(tmp_path):
    model = parscale(num_streams=2, train="adapter").build(seed=0).eval()
    save_model(tmp_path / "ours", model)
    convert(tmp_path / "ours", tmp_path / "theirs", "huggingface")
    again, _ = load_model(tmp_path / "theirs")
    with torch.no_grad():
        same(again, model(tokens()).logits_BLV)
    assert again.config.attention.qkv_bias
    assert again.config.streams.prefix == "direct"


def test_one_stream_is_a_plain_model(tmp_path):
    model = parscale(num_streams=1).build(seed=0).eval()
    export_huggingface(tmp_path / "plain", model, family="qwen2_parscale")
    again, _ = load_model(tmp_path / "plain")
    assert again.config.streams is None
    with torch.no_grad():
        same(again, model(tokens()).logits_BLV)


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"num_streams": 3, "switchable": (2,)}, "streams.switchable=[2]"),
        ({"num_streams": 2, "in_use": 1}, "streams.in_use=1"),
        ({"num_streams": 1, "prefix_alone": True}, "streams."),
    ],
)
def test_what_the_family_lacks_is_named(tmp_path, options, lacking):
    with pytest.raises(CheckpointError) as caught:
        export_huggingface(tmp_path / "out", parscale(**options).build(), family="qwen2_parscale")
    assert "Hugging Face's qwen2_parscale has no " in str(caught.value)
    assert lacking in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.prefix_v", "model.aggregate_layer.2.bias"])
def test_a_part_that_is_missing_is_not_left_uninitialised(released, tmp_path, name):
    folder, _, _ = released
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    del stored[name]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_model(tmp_path)

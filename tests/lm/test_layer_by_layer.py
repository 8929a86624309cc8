"""Models are rounded layer by layer: no more than what is made and a layer or two is in memory, however large the checkpoint."""

import gc
import json
import os
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, convert, save_model
from anabranch.lm.quantized import load_quantized
from anabranch.lm.quantized_layers import Layers
from anabranch.lm.shards import Later, write_file, write_tensors
from anabranch.lm.tensors import open_tensors
from anabranch.nn import MoE, SelfAttention
from anabranch.nn.packed import Packed
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool


@pytest.fixture
def plain(tmp_path):
    model = Decoder.Config(
        vocab_size=257,
        dim=64,
        num_layers=3,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=32),
        max_positions=64,
    ).build(seed=1)
    save_model(tmp_path / "plain", model, ByteTokenizer())
    return tmp_path / "plain"


def test_what_was_written_is_let_go_before_the_next_layer_is_made(plain, monkeypatch):
    made, alive = [], []
    # What other tests have left is not looked through each time.
    gc.collect()
    gc.freeze()
    for name in ("_pool", "_linear"):
        was = getattr(Layers, name)

        def watched(self, *arguments, was=was):
            gc.collect()
            alive.append(sum(reference() is not None for reference in made))
            layer = was(self, *arguments)
            made.append(weakref.ref(layer))
            return layer

        monkeypatch.setattr(Layers, name, watched)
    convert(plain, plain.parent / "q", quantize="int4")
    assert len(made) == 3 * 3 + 1  # qkv, out and a pool of each layer, and the head
    assert max(alive) <= 1
    made.clear()
    alive.clear()
    model, _ = load_quantized(plain, "int4")  # these stay, and are all that does
    gc.collect()
    kinds = (QuantizedLinear, QuantizedPool)
    assert {id(reference()) for reference in made} == {id(part) for part in model.modules() if isinstance(part, kinds)}


@pytest.mark.parametrize("at_once", [1, 16 * 64, 10**9])
@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int8", None)])
def test_rows_are_rounded_the_same_however_many_at_once(monkeypatch, at_once, kind, group):
    weight = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(2))
    wanted = torch.stack([Packed.pack(expert, kind, group=group).data[0] for expert in weight])
    monkeypatch.setattr("anabranch.nn.packed.AT_ONCE", at_once)
    assert torch.equal(Packed.pack(weight, kind, group=group).data, wanted)


def test_tensors_made_when_they_are_written(tmp_path):
    tensors = {
        "a": torch.arange(5000.0),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.ones(3, 2).half(),
        "e": torch.zeros(0),
    }
    calls = []

    def make(*names):
        calls.append(names)
        return {name: tensors[name] for name in names}

    together, alone = partial(make, "a", "c"), partial(make, "b")
    later = {name: Later(tuple(tensors[name].shape), tensors[name].dtype, together) for name in ("a", "c")}
    later["b"] = Later((7,), torch.uint8, alone)
    write_file(tmp_path / "now.safetensors", tensors)
    write_file(tmp_path / "later.safetensors", {"a": later["a"], "b": later["b"], "c": later["c"], "e": tensors["e"]})
    assert (tmp_path / "later.safetensors").read_bytes() == (tmp_path / "now.safetensors").read_bytes()
    assert calls == [("a", "c"), ("b",)]
    write_tensors(tmp_path, later, max_shard_bytes=19_000)
    found = open_tensors(tmp_path)
    assert all(torch.equal(found.read(name), tensors[name]) for name in later)


SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}


def checkpoint(folder, layers):
    """Qwen3-30B-A3B with few layers, its numbers the same few again and again."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    few = torch.randn(1_000_003, generator=torch.Generator().manual_seed(4)).bfloat16() * 0.02

    def numbers(name, *shape):
        count = torch.Size(shape).numel()
        return {name: few.repeat(count // len(few) + 1)[:count].view(shape)}

    shapes = {
        "model.embed_tokens.weight": (151936, 2048),
        "lm_head.weight": (151936, 2048),
        "model.norm.weight": (2048,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}_layernorm.weight": (2048,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{norm}_norm.weight": (128,) for norm in "qk"}
        shapes |= {
            f"{at}.self_attn.{name}_proj.weight": (rows, 2048) for name, rows in (("q", 4096), ("k", 512), ("v", 512))
        }
        shapes |= {f"{at}.self_attn.o_proj.weight": (2048, 4096), f"{at}.mlp.gate.weight": (128, 2048)}
        for expert in range(128):
            part = f"{at}.mlp.experts.{expert}"
            shapes |= {f"{part}.{name}_proj.weight": (768, 2048) for name in ("gate", "up")}
            shapes[f"{part}.down_proj.weight"] = 2048, 768
    tensors = {name: Later(shape, torch.bfloat16, partial(numbers, name, *shape)) for name, shape in shapes.items()}
    write_tensors(folder, tensors, max_shard_bytes=2_000_000_000)


def peak_bytes(code, *arguments):
    """Most memory that a program of its own took."""
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss * 1024


CONVERT = "import sys; from anabranch.cli.main import main; main(['convert', *sys.argv[1:], '--to', 'native', '--quantize', 'int4'])"
LOAD = "import sys; from anabranch.lm.quantized import load_quantized; load_quantized(sys.argv[1], 'int4')"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_checkpoint_of_qwen3_30b_takes_the_result_and_less_than_two_layers(plain, tmp_path):
    checkpoint(tmp_path / "large", 2)
    bytes_of_layer = (128 * 3 * 768 + 2 * 4096 + 2 * 512) * 2048 * 2
    peaks = {}
    for place in (plain, tmp_path / "large"):
        quantized = tmp_path / f"{place.name}-int4"
        peaks[place] = peak_bytes(CONVERT, place, quantized), peak_bytes(LOAD, place)
    result = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    written, loaded = (large - small for large, small in zip(peaks[place], peaks[plain], strict=True))
    told = {"layer": bytes_of_layer, "result": result, "written": written, "loaded": loaded}
    print({key: f"{value / 2**20:,.0f} MiB" for key, value in told.items()})
    assert loaded < result + 2 * bytes_of_layer
    # What is written is not kept: beside the embedding, in bfloat16, there is no more than that.
    assert written < 151936 * 2048 * 2 + 2 * bytes_of_layer

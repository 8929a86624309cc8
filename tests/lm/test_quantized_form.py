"""Quantised models on disk: loaded they are, to the bit, what quantising at load gives; and what does not fit is said."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.data import ByteTokenizer
from anabranch.errors import CapacityError, CheckpointError, ConfigError, DataError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import (
    Decoder,
    SamplingConfig,
    convert,
    export_huggingface,
    generate,
    load_config,
    load_model,
    load_weights,
    save_model,
)
from anabranch.lm.quantized import load_quantized
from anabranch.lm.shards import MAX_SHARD_BYTES
from anabranch.nn import Dense, MoE, SelfAttention, SwiGLU
from anabranch.nn.kernels import load as load_kernels
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool, dequantize, quantize
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.expertflow import load_offloaded
from anabranch.serving.expertflow.native_mover import NativeMover


def decoder(feed_forward=None, **fields):
    config = Decoder.Config(
        vocab_size=257,
        dim=64,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, qkv_bias=True),
        feed_forward=feed_forward or SwiGLU.Config(hidden_dim=96),
        init_std=0.2,
        max_positions=128,
        **fields,
    )
    model = config.build(seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))  # built as zeros
    return model


MODELS = {
    "dense": lambda: decoder(),
    "tied": lambda: decoder(tie_embeddings=True),
    "moe": lambda: decoder(MoE.Config(num_experts=4, hidden_dim=32, shared_experts=1, shared_gate=True)),
    "shared pool": lambda: decoder(ReXMoE.Config(num_experts=4, hidden_dim=32, reuse=2)),
    "narrow": lambda: decoder(MoE.Config(num_experts=4, hidden_dim=40)),  # experts that cannot be packed
}
WAYS = [("int8", None), ("int8", 32), ("int4", None), ("int4", 64)]


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "plain", MODELS["moe"](), ByteTokenizer())
    convert(tmp_path / "plain", tmp_path / "q", quantize="int4")
    return tmp_path / "q"


def same(one, other):
    """The same modules, with the same tensors in all their bits."""
    assert [(name, type(module)) for name, module in one.named_modules()] == [
        (name, type(module)) for name, module in other.named_modules()
    ]
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name
    for module, twin in zip(one.modules(), other.modules(), strict=True):
        if isinstance(module, QuantizedLinear):
            assert (module.packed.kind, module.packed.group) == (twin.packed.kind, twin.packed.group)


def tokens(model):
    return generate(model, [[1, 2, 3], [200]], SamplingConfig(max_tokens=12, temperature=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_saved_is_what_quantising_at_load_gives(name, bits, group, dtype, tmp_path):
    save_model(tmp_path / "plain", MODELS[name]())
    wanted, _ = load_quantized(tmp_path / "plain", bits, dtype=dtype, group=group)
    convert(tmp_path / "plain", tmp_path / "q", dtype=dtype, quantize=bits, group=group)
    for found in (load_model(tmp_path / "q")[0], load_quantized(tmp_path / "q", bits, dtype=dtype, group=group)[0]):
        same(found, wanted)
        assert tokens(found) == tokens(wanted)
    convert(tmp_path / "q", tmp_path / "again")  # what is quantised stays so
    same(load_model(tmp_path / "again")[0], wanted)
    assert load_config(tmp_path / "q") == wanted.config


def test_layers_share_a_pool_again(tmp_path):
    convert_of(MODELS["shared pool"](), tmp_path, "int8")
    model, _ = load_model(tmp_path / "q")
    pools = {id(block.feed_forward.experts) for block in model.blocks}
    assert len(pools) == 1
    assert all(isinstance(block.feed_forward.experts, QuantizedPool) for block in model.blocks)


def convert_of(model, place, bits, **options):
    save_model(place / "plain", model)
    convert(place / "plain", place / "q", quantize=bits, **options)
    return json.loads((place / "q" / "config.json").read_text())


def test_numbers_on_disk_are_plain(tmp_path):
    # w = s u + m by hand: the row's least is m, its step (greatest - least) / 15; u of even columns in the low half of a byte.
    model = decoder()
    weight = torch.zeros(64, 64)
    weight[0, :32] = torch.arange(32) % 16 * 0.5 - 2
    model.blocks[0].attention.out.weight.data = weight
    table = convert_of(model, tmp_path, "int4")
    assert table["schema"] == 2
    assert (table["quantization"]["scheme"], table["quantization"]["group"]) == ("int4", 32)
    assert table["quantization"]["modules"]["blocks.0.attention.out"] == "int4"
    assert table["quantization"]["modules"]["head"] == "int8"
    stored = load_file(tmp_path / "q" / "model.safetensors")
    name = "blocks.0.attention.out"
    assert stored[f"{name}.number"][0, :16].tolist() == [2 * pair % 16 | (2 * pair % 16 + 1) << 4 for pair in range(16)]
    assert stored[f"{name}.scale"][0].tolist() == [0.5, 0]
    assert stored[f"{name}.least"][0].tolist() == [-2, 0]
    assert f"{name}.weight" not in stored
    number, scale = stored["head.number"].float() - 128, stored["head.scale"].float()
    assert torch.allclose(number * scale, model.head.weight, atol=scale.max().item() / 2)
    plain, few = ((tmp_path / part / "model.safetensors").stat().st_size for part in ("plain", "q"))
    assert few < plain / 2.5  # the embedding stays


def test_one_scale_a_row_is_no_group(tmp_path):
    assert convert_of(decoder(), tmp_path, "int8")["quantization"]["group"] is None


def test_models_without_few_bits_are_saved_as_before(tmp_path):
    save_model(tmp_path / "m", decoder())
    table = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (table["schema"], "quantization" in table) == (1, False)


def test_shards_and_another_type_for_the_rest(tmp_path):
    convert_of(MODELS["moe"](), tmp_path, "int4", max_shard_bytes=20_000)
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 2
    model, _ = load_model(tmp_path / "q", dtype=torch.bfloat16)
    assert model.embedding.weight.dtype == model.blocks[0].attention.qkv.bias.dtype == torch.bfloat16
    wanted, _ = load_quantized(tmp_path / "plain", "int4")
    assert torch.equal(model.head.data, wanted.head.data)


def test_a_model_quantised_in_memory_is_saved_as_it_is(tmp_path):
    model = MODELS["moe"]()
    quantize(model, "int4", group=64, head=None, skip=("blocks.0.attention",))
    save_model(tmp_path / "q", model)
    found, _ = load_model(tmp_path / "q")
    same(found, model)
    assert type(found.head) is type(found.blocks[0].attention.qkv) is Dense


def test_a_save_that_fails_leaves_what_was_there(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(ByteTokenizer, "save", lambda self, place: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(DataError, match="full"):
        convert(folder.parent / "plain", folder, quantize="int8")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(file.name for file in folder.parent.iterdir()) == ["plain", "q"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "is saved in int4, and int8 is asked for"),
        ({"quantize": "int4", "group": 64}, "32 weights share a scale, and group is 64"),
        ({"quantize": "int4", "to": "huggingface"}, "only 'native' folders hold quantised weights"),
        ({"group": 32}, "group is 32, but there is no quantize"),
    ],
)
def test_other_bits_than_the_saved_ones_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        convert(folder, folder.parent / "new", **options)
    assert not (folder.parent / "new").exists()


def test_what_takes_floating_point_weights_says_so(folder):
    model, _ = load_model(folder)
    with pytest.raises(CheckpointError, match="the model is quantised"):
        convert(folder, folder.parent / "hf", "huggingface")
    with pytest.raises(CheckpointError, match="the model is quantised"):
        export_huggingface(folder.parent / "hf", model)
    with pytest.raises(CheckpointError, match="saved in fewer bits"):
        load_weights(model, folder)
    dequantize(model)
    save_model(folder.parent / "floats", model)
    assert json.loads((folder.parent / "floats" / "config.json").read_text())["schema"] == 1


OUT = "blocks.0.attention.out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored, table: stored.pop(f"{OUT}.least"), f"lacks {OUT}.least"),
        (lambda stored, table: stored.update({f"{OUT}.number": torch.zeros(64, 64, dtype=torch.uint8)}), "has shape"),
        (lambda stored, table: stored.update({f"{OUT}.scale": torch.zeros(64, 2)}), "is stored as torch.float32"),
        (lambda stored, table: stored.update({f"{OUT}.scale": torch.zeros(64, 3).half()}), f"{OUT}.least|3 groups"),
        (
            lambda stored, table: stored.update(
                {f"{OUT}.{part}": torch.zeros(64, 4).half() for part in ("scale", "least")}
            ),
            "group is 16",
        ),
        (lambda stored, table: table["modules"].update({"blocks.9": "int4"}), "says blocks.9 is int4"),
        (lambda stored, table: table["modules"].update({OUT: "int3"}), f"says {OUT} is int3"),
        (lambda stored, table: table["modules"].update({"embedding": "int8"}), "says embedding is int8"),
        (lambda stored, table: table["modules"].pop(OUT), f"lacks {OUT}.weight"),
        (lambda stored, table: table.update(scheme="int2"), "no table of a scheme"),
        (lambda stored, table: table.pop("modules"), "no table of a scheme"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, change, message):
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(stored, config["quantization"])
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_quantization_that_is_no_table(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": "int4"}))
    with pytest.raises(CheckpointError, match="no table of a scheme"):
        load_model(folder)


# -- in an engine


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_engine_says_the_same(tmp_path, bits):
    save_model(tmp_path / "plain", MODELS["moe"](), ByteTokenizer())
    convert(tmp_path / "plain", tmp_path / "q", dtype=torch.float32, quantize=bits)
    said = []
    for place, quantized in (("plain", bits), ("q", "none"), ("q", bits)):
        llm = LLM(tmp_path / place, dtype="float32", num_blocks=20, quantize=quantized)
        sampling = Sampling(temperature=0.0, max_tokens=16, logprobs=3, ignore_eos=True)
        [answer] = llm.generate(["a prompt"], sampling)
        said.append((answer.tokens, answer.output.logprobs))
        llm.close()
    assert said[1] == said[0]
    assert said[2] == said[0]


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_an_engine_does_not_round_it_again(folder, budget):
    with pytest.raises(ConfigError, match="is saved in int4, and int8 is asked for"):
        LLM(folder, num_blocks=20, quantize="int8", expert_budget=budget)


def bytes_of_experts(model):
    return sum(
        packed.nbytes for module in model.modules() if isinstance(module, QuantizedPool) for packed in module.packed
    )


def as_schema_2(folder):
    """The folder as it was written before pools lay as they are computed with: their integers, scales and minima."""
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    model, _ = load_model(folder)
    for name, module in model.named_modules():
        for part, packed in zip(("w13", "w2"), module.packed, strict=True) if isinstance(module, QuantizedPool) else ():
            number, scale, least = packed.integers()
            if packed.kind == "int4":
                number = number[..., ::2] | number[..., 1::2] << 4
                stored[f"{name}.{part}.least"] = least
            stored |= {f"{name}.{part}.number": number.contiguous(), f"{name}.{part}.scale": scale}
            del stored[f"{name}.{part}.panels"]
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "schema": 2}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), WAYS)
@pytest.mark.parametrize("name", ["moe", "shared pool"])
@pytest.mark.parametrize("kept", ["folder", "schema 2", "rounded here"])
def test_experts_come_in_their_bits_when_they_are_wanted(kept, name, bits, group, dtype, tmp_path):
    if kept == "rounded here" and group is not None:
        pytest.skip("an engine rounds in groups of its own choice")
    limit = MAX_SHARD_BYTES if kept == "schema 2" else 20_000
    convert_of(MODELS[name](), tmp_path, bits, group=group, max_shard_bytes=limit, dtype=dtype)
    if kept == "schema 2":
        as_schema_2(tmp_path / "q")
    model, _ = load_model(tmp_path / "q", dtype=dtype)
    budget = bytes_of_experts(model) * 5 // 8
    options = {"quantize": bits} if kept == "rounded here" else {}
    place = tmp_path / ("plain" if options else "q")
    offloaded, _, engine = load_offloaded(place, budget, dtype=dtype, **options)
    with engine, torch.inference_mode():
        assert isinstance(offloaded.blocks[0].attention.qkv, QuantizedLinear)
        if load_kernels() is not None:
            assert isinstance(engine.mover, NativeMover) is (kept != "schema 2")
        token_BL = torch.arange(40).view(2, 20)
        assert torch.equal(offloaded(token_BL).logits_BLV, model.eval()(token_BL).logits_BLV)
        # Slots hold what a resident model would: the budget counts packed bytes.
        assert budget - max(engine.layout.bytes_of_kind) < engine.arena.bytes <= engine.budget_bytes == budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_cannot_be_packed_stay_floats_beside_a_quantised_rest(dtype, tmp_path):
    if dtype == torch.bfloat16:
        pytest.skip("sums of waves are rounded otherwise than one sum at this width, also where nothing is quantised")
    convert_of(MODELS["narrow"](), tmp_path, "int4", dtype=dtype)
    model, _ = load_model(tmp_path / "q", dtype=dtype)
    offloaded, _, engine = load_offloaded(tmp_path / "q", None, dtype=dtype)
    with engine, torch.inference_mode():
        token_BL = torch.arange(40).view(2, 20)
        torch.testing.assert_close(offloaded(token_BL).logits_BLV, model.eval()(token_BL).logits_BLV)
    with pytest.raises(ConfigError, match=r"not all experts of .* can be in int4"):
        load_offloaded(tmp_path / "plain", None, quantize="int4")


def test_experts_rounded_here_need_room_on_the_disk(tmp_path, monkeypatch):
    save_model(tmp_path / "plain", MODELS["moe"]())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"1,000 bytes free, and the rounded experts take .*ANABRANCH_CACHE"):
        load_offloaded(tmp_path / "plain", None, quantize="int4")


def test_a_budget_in_the_engine_gives_the_same_tokens(folder):
    model, _ = load_model(folder, dtype=torch.float32)
    budget = f"{bytes_of_experts(model) * 5 // 8}B"
    sampling = Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)
    said = []
    for model_or_place, options in (
        (model, {}),
        (folder, {"dtype": "float32", "expert_budget": budget}),
        (folder, {"dtype": "float32", "expert_budget": budget, "quantize": "int4"}),
        (folder.parent / "plain", {"dtype": "float32", "expert_budget": budget, "quantize": "int4"}),
    ):
        llm = LLM(model_or_place, num_blocks=20, **options)
        said.append([answer.tokens for answer in llm.generate([[1, 2, 3], [200, 7]], sampling)])
        llm.close()
    assert said[1:] == said[:1] * 3


def test_experts_that_do_not_fit_are_refused(folder):
    stored = load_file(folder / "model.safetensors")
    name = "blocks.1.feed_forward.experts.w2"
    save_file({**stored, f"{name}.panels": stored[f"{name}.panels"][:3].clone()}, folder / "model.safetensors")
    for load in (load_model, lambda place: load_offloaded(place, None)):
        with pytest.raises(CheckpointError, match=f"{name}.panels in .* has shape"):
            load(folder)
    for cut in (8, 32, 64):
        save_file(
            {**stored, f"{name}.panels": stored[f"{name}.panels"][..., cut:].clone()}, folder / "model.safetensors"
        )
        for load in (load_model, lambda place: load_offloaded(place, None)):
            with pytest.raises(CheckpointError, match=rf"{name} in .*: its panels have {320 - cut} bytes"):
                load(folder)


@pytest.mark.parametrize("name", ["moe", "shared pool"])
@pytest.mark.parametrize(("bits", "group"), WAYS)
def test_folders_of_before_are_the_same_model(name, bits, group, tmp_path):
    convert_of(MODELS[name](), tmp_path, bits, group=group)
    wanted, _ = load_model(tmp_path / "q")
    as_schema_2(tmp_path / "q")
    same(load_model(tmp_path / "q")[0], wanted)


def test_devices_do_not_map_it(folder):
    with pytest.raises(ConfigError, match="saved in fewer bits, and devices map experts in floating point"):
        layout_of(folder)


# -- pools lie in the file as they are computed with


def regions_of(path):
    """What is mapped of a file."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


@pytest.fixture
def pools(tmp_path):
    """A folder of a mixture in int4, and the model."""
    model = decoder(MoE.Config(num_experts=4, hidden_dim=32))
    quantize(model, "int4")
    save_model(tmp_path / "q", model, ByteTokenizer())
    return tmp_path / "q", model.eval()


needs_maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to look at")


@needs_maps
@torch.no_grad()
def test_pools_are_read_and_what_becomes_of_the_folder_does_not_reach_them(pools):
    folder, model = pools
    file, token_BL = folder / "model.safetensors", torch.arange(20).view(1, 20)
    wanted, stored = model(token_BL).logits_BLV, file.read_bytes()
    found = load_model(folder)[0].eval()
    held = [module for module in found.modules() if isinstance(module, QuantizedPool)]
    assert len(held) == 2
    assert regions_of(file) == []
    assert torch.equal(found(token_BL).logits_BLV, wanted)
    # Written to in memory alone.
    before = held[0].data13.clone()
    held[0].data13.zero_()
    assert file.read_bytes() == stored
    held[0].data13.copy_(before)
    # Shortened, and written anew where it is.
    for become in (stored[:4096], bytes(len(stored))):
        file.write_bytes(become)
        assert torch.equal(found(token_BL).logits_BLV, wanted)


@needs_maps
def test_an_engine_has_its_own_memory_and_lets_go_of_the_file(pools):
    if load_kernels() is None:
        pytest.skip("no compiler")
    folder, _ = pools
    engine, _ = ServingConfig(model=str(folder), num_blocks=8, process=False).load()
    gc.collect()
    assert regions_of(folder / "model.safetensors") == []
    assert any(isinstance(module, QuantizedPool) for module in engine.runner.model.modules())

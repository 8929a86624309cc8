"""GGUF files of every architecture, made from transformers' models as llama.cpp's converter makes them, compute what those compute."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from anabranch.cli.main import main
from anabranch.errors import CheckpointError
from anabranch.lm import convert, load_config, load_model
from anabranch.lm.formats import FAMILIES
from anabranch.lm.gguf import GgufFile
from anabranch.lm.gguf_blocks import BLOCKS
from anabranch.lm.gguf_file import part_files
from anabranch.lm.outline import outline, weight_bytes
from anabranch.lm.quantized import load_quantized
from anabranch.lm.seen_model import check_unchanged, see_model
from anabranch.nn.parts import parts_of
from anabranch.nn.quantize import FewBitLinear, QuantizedLinear, QuantizedPool, dequantize
from anabranch.serving import LLM, Sampling
from anabranch.serving.expertflow import load_offloaded
from gguf_files import TEXT, bpe
from gguf_made import COMMON, DIM, HEAD_DIM, MADE, VOCAB, medium, tensors_of, theirs, with_blocks, write

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def supported(name):
    kind, _, _ = MADE[name]
    if getattr(transformers, kind).model_type not in FAMILIES:
        pytest.skip(f"{kind} is no family here")


TOKENS = torch.arange(40).view(2, 20) * 7 % VOCAB


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tmp_path):
    supported(name)
    model = theirs(name)
    loaded, tokenizer = load_model(write(tmp_path / "m.gguf", model, name))
    assert tokenizer is None
    assert loaded.config == load_config(tmp_path / "m.gguf")
    wanted = model(TOKENS).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(loaded.eval()(TOKENS).logits_BLV, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_yarn_is_that_of_transformers(tmp_path):
    kind, changes, _ = MADE["qwen2"]
    rotary = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**{**COMMON, **changes, "rope_parameters": rotary})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    loaded, _ = load_model(write(tmp_path / "m.gguf", model, "qwen2", extra=extra))
    torch.testing.assert_close(loaded.eval()(TOKENS).logits_BLV, model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}, {"beta_fast": 8.0, "beta_slow": 2.0}),
        ({"yarn_log_multiplier": 1.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}),
        ({"yarn_log_multiplier": 0.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}),
        ({"yarn_log_multiplier": 0.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0}, {}),
    ],
)
@torch.no_grad()
def test_yarn_of_ministral_is_that_of_transformers(given, wanted, tmp_path):
    kind, changes, _ = MADE["mistral3"]
    rotary = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, **wanted}
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**{**COMMON, **changes, "rope_parameters": rotary})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_value_length(HEAD_DIM)
        for key, value in given.items():
            writer.add_float32(f"mistral3.rope.scaling.{key}", value)

    loaded, _ = load_model(write(tmp_path / "m.gguf", model, "mistral3", extra=extra))
    torch.testing.assert_close(loaded.eval()(TOKENS).logits_BLV, model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mscale", [1.0, 0.707])
@torch.no_grad()
def test_yarn_of_deepseek_is_that_of_transformers(mscale, tmp_path):
    """Its files have a tenth of the factor, and attention is scaled by it too."""
    kind, changes, _ = MADE["deepseek2"]
    rotary = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    rotary |= {"mscale": mscale, "mscale_all_dim": mscale}
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**{**COMMON, **changes, "rope_parameters": rotary})
    config.is_apart = True
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)

    loaded, _ = load_model(write(tmp_path / "m.gguf", model, "deepseek2", extra=extra))
    torch.testing.assert_close(loaded.eval()(TOKENS).logits_BLV, model(TOKENS).logits, rtol=0, atol=1e-4)
    plain, _ = load_model(write(tmp_path / "p.gguf", model, "deepseek2"))
    assert (plain.eval()(TOKENS).logits_BLV - model(TOKENS).logits).abs().max() > 0.01


@torch.no_grad()
def test_yarn_of_gpt_oss_is_that_of_transformers(tmp_path):
    """Whose ramp is not rounded to whole dimensions."""
    kind, changes, _ = MADE["gpt-oss"]
    rotary = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**COMMON | changes | {"rope_parameters": {**rotary, "truncate": False}})
    config.is_apart = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    loaded, _ = load_model(write(tmp_path / "m.gguf", model, "gpt-oss", extra=extra))
    torch.testing.assert_close(loaded.eval()(TOKENS).logits_BLV, model(TOKENS).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_mxfp4_is_what_a_folder_has(tmp_path):
    """The same numbers, blocks of which lie in another order in a folder: its experts, and the logits."""
    model = theirs("gpt-oss")
    path = write(tmp_path / "m.gguf", model, "gpt-oss", kind=gguf.GGMLQuantizationType.MXFP4)
    loaded, _ = load_model(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer in range(3):
        whole = {
            name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for name in ("gate", "up", "down")
            for tensor in (stored[f"blk.{layer}.ffn_{name}_exps.weight"],)
        }
        pool = loaded.blocks[layer].feed_forward.experts
        assert np.array_equal(pool.w13.numpy(), np.concatenate((whole["gate"], whole["up"]), axis=1))
        assert np.array_equal(pool.w2.numpy(), whole["down"])
        experts = model.model.layers[layer].mlp.experts
        experts.gate_up_proj.copy_(
            torch.from_numpy(np.stack((whole["gate"], whole["up"]), axis=2).reshape(5, 64, DIM).swapaxes(1, 2))
        )
        experts.down_proj.copy_(torch.from_numpy(whole["down"].swapaxes(1, 2)))
    for name, parameter in model.named_parameters():
        if "experts" not in name and parameter.dim() > 1 and "router" not in name:
            parameter.copy_(mxfp4(parameter))
    torch.testing.assert_close(loaded.eval()(TOKENS).logits_BLV, model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "Q4_0"])
@torch.no_grad()
def test_experts_with_biases_stay_as_they_are_stored(kind, tmp_path):
    path = write(tmp_path / "m.gguf", theirs("gpt-oss"), "gpt-oss", kind=gguf.GGMLQuantizationType[kind])
    plain, _ = load_model(path)
    stored, _ = load_quantized(path, "stored")
    pools = [module for module in stored.modules() if isinstance(module, QuantizedPool)]
    form = {"MXFP4": "fp4", "Q8_0": "int8", "Q4_0": "int4"}[kind]
    assert [{part.kind for part in pool.packed} for pool in pools] == [{form}] * 3
    assert all(pool.activation == "clamped_swiglu" and pool.b13 is not None for pool in pools)
    logits = plain.eval()(TOKENS).logits_BLV
    # Activations are rounded, which changes a choice of experts now and then.
    error_BL = (stored.eval()(TOKENS).logits_BLV - logits).norm(dim=-1) / logits.norm(dim=-1)
    assert error_BL.median() < 0.1
    dequantize(stored)
    assert stored.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(stored.state_dict()[key], value) for key, value in plain.state_dict().items())


def mxfp4(weight):
    kind = gguf.GGMLQuantizationType.MXFP4
    return torch.from_numpy(gguf.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


# Every field of the package that says what attention, positions and scales are.
TELLING = sorted(
    value.removeprefix("{arch}.")
    for part in (gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.LLM)
    for value in vars(part).values()
    if isinstance(value, str) and re.match(r"\{arch\}\.(attention\.|rope\.|.*(_scale|_softcapping)$)", value)
)
# Notes, and what has a meaning beside another field only.
IDLE = {"attention.layer_norm_epsilon", "attention.temperature_length", "rope.scaling.finetuned"}
# Refused under the name that it has as a folder's.
SEEN_ELSEWHERE = {"attention.sliding_window", "rope.dimension_count"}


@pytest.mark.parametrize("name", ["mistral3", "qwen3", "qwen3moe", "olmoe", "gemma3", "gpt-oss", "deepseek2 v3"])
def test_a_field_that_would_change_the_model_changes_it_or_is_refused(name, tmp_path):
    supported(name)
    model, architecture = theirs(name), name.split()[0]

    def config_with(field, value):
        def extra(writer):
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            if field is not None:
                {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](
                    f"{architecture}.{field}", value
                )

        tensors = [("token_embd.weight", model.get_input_embeddings().weight.detach().numpy())]
        return load_config(write(tmp_path / "m.gguf", model, name, extra=extra, tensors=tensors))

    plain, left = config_with(None, None), set()
    written = {"attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base"}
    written |= {"rope.scaling.type", "rope.scaling.factor", "attention.key_length"}
    written |= MADE[name][2].keys() & set(TELLING)
    assert {"attention.temperature_scale", "attention.scale", "rope.scaling.yarn_log_multiplier"} <= set(TELLING)
    for field in [field for field in TELLING if field not in written | IDLE]:
        value = 3 if re.search("count|length|window|pattern|layers|groups|buckets|rank|sections", field) else 0.375
        value = False if field == "attention.causal" else value
        said = None
        try:
            found = config_with(field, value)
        except CheckpointError as error:
            said = str(error)
        assert said is None or f"{architecture}.{field} in" in said or field in SEEN_ELSEWHERE
        if said is None and found == plain:
            left.add(field)
    # Whose windows have a switch, which these files cannot have; llama.cpp gives them none either.
    assert left == ({"attention.sliding_window"} if name.startswith("qwen") else set())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["llama with experts", "qwen2moe"])
@torch.no_grad()
def test_experts_keep_the_blocks_that_are_stored(name, kind, tmp_path):
    path = write(tmp_path / "m.gguf", theirs(name), name, kind=gguf.GGMLQuantizationType[kind])
    plain, _ = load_model(path)
    stored, _ = load_quantized(path, "int4")
    wanted = "int8" if kind == "Q8_0" else "int4"
    pools = [module for module in stored.modules() if isinstance(module, QuantizedPool)]
    assert len(pools) == 2
    assert {part.kind for pool in pools for part in pool.packed} == {wanted}
    assert {module.packed.kind for module in stored.modules() if isinstance(module, QuantizedLinear)} == {wanted}
    convert(path, tmp_path / "q", quantize="int4")
    saved, _ = load_model(tmp_path / "q")
    for model in (stored, saved):
        dequantize(model)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())


# Of gates, ups and downs.
MIXED = [("Q4_K", "Q6_K", "Q5_K"), ("Q6_K", "Q4_0", "Q4_0"), ("Q8_0", "MXFP4", "Q6_K"), ("Q4_1", "Q5_K", "Q8_0")]


def mixture(path, kinds):
    """A small mixture whose gates, ups and downs are stored so."""
    parts = dict(zip(("gate", "up", "down"), kinds, strict=True))
    return with_blocks(path, lambda name: next((kind for part, kind in parts.items() if f"ffn_{part}" in name), "Q4_0"))


@pytest.mark.parametrize("bits", ["int4", "stored"])
@pytest.mark.parametrize("kinds", MIXED, ids=" ".join)
@torch.no_grad()
def test_gates_and_ups_of_several_types_stay_each_in_its_own(kinds, bits, tmp_path, caplog):
    path = mixture(tmp_path / "m.gguf", kinds)
    plain, _ = load_model(path)
    stored, _ = load_quantized(path, bits)
    assert [record for record in caplog.records if record.name == "anabranch.lm.quantized"] == []
    convert(path, tmp_path / "q", quantize="int4")
    saved, _ = load_model(tmp_path / "q")
    assert weight_bytes(outline(path, bits=bits, dtype=torch.float32)) == weight_bytes(stored)
    assert weight_bytes(outline(tmp_path / "q", dtype=torch.float32)) == weight_bytes(saved)
    tokens = torch.arange(12).view(1, 12)
    given = saved.eval()(tokens).logits_BLV
    if bits == "int4":
        assert torch.equal(stored.eval()(tokens).logits_BLV, given)
    whole = load_offloaded(tmp_path / "q", None)
    with whole[2] as engine:
        assert torch.equal(whole[0](tokens).logits_BLV, given)
        budget = engine.layout.total_bytes // 3
    part = load_offloaded(tmp_path / "q", budget)
    with part[2]:
        assert torch.equal(part[0](tokens).logits_BLV, given)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for model in (stored, saved):
        pools = [module for module in model.modules() if isinstance(module, QuantizedPool)]
        for layer, pool in enumerate(pools):
            w13, w2 = pool.packed
            assert [part.kind for part in parts_of(w13)] == [BLOCKS[kind] for kind in kinds[:2]]
            assert w2.kind == BLOCKS[kinds[2]]
            # As the gguf package has the numbers, exactly.
            numbers = {
                part: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
                for part in ("gate", "up", "down")
                for tensor in [reader[f"blk.{layer}.ffn_{part}_exps.weight"]]
            }
            assert torch.equal(w13.unpack(), torch.cat((numbers["gate"], numbers["up"]), dim=1))
            assert torch.equal(w2.unpack(), numbers["down"])
        dequantize(model)
        for key, value in plain.state_dict().items():
            if model is stored or "experts" in key:
                assert torch.equal(model.state_dict()[key], value), key


def test_with_int8_gates_and_ups_are_rounded_to_it(tmp_path):
    found, _ = load_quantized(mixture(tmp_path / "m.gguf", MIXED[0]), "int8")
    kinds = {part.kind for module in found.modules() if isinstance(module, QuantizedPool) for part in module.packed}
    assert kinds == {"int8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([["q4_k"], "q5_k"], "rows in its parts"),
        ([["q4_k", "q6_k", "q6_k"], "q5_k"], r"lacks blocks\.0\.feed_forward\.experts\.w13\.part2\.panels"),
        ([["q4_k", "q9"], "q5_k"], "the model has no such layer"),
        ([[], "q5_k"], "rows in its parts"),
        (["q4_k", "q5_k"], r"lacks blocks\.0\.feed_forward\.experts\.w13\.panels"),
        ([["q6_k", "q6_k"], "q5_k"], "its panels have"),
        ([["q4_k", "q6_k"], ["q5_k", "q5_k"]], r"lacks blocks\.0\.feed_forward\.experts\.w2\.part0\.panels"),
        ([[["q4_k"]], "q5_k"], "the model has no such layer"),
        ([[3, None], "q5_k"], "the model has no such layer"),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_gates_and_ups(change, message, tmp_path):
    convert(mixture(tmp_path / "m.gguf", MIXED[0]), tmp_path / "q", quantize="int4")
    said = json.loads((tmp_path / "q/config.json").read_text())
    said["quantization"]["modules"]["blocks.0.feed_forward.experts"] = change
    (tmp_path / "q/config.json").write_text(json.dumps(said))
    for load in (load_model, outline, lambda path, dtype: load_offloaded(path, None, dtype=dtype)):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "q", dtype=torch.float32)


def test_the_gguf_package_dequantises_the_same(tmp_path):
    path = write(tmp_path / "m.gguf", theirs("qwen3moe"), "qwen3moe", kind=gguf.GGMLQuantizationType.Q4_1)
    file = GgufFile(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, matrix in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        tensor = stored[f"blk.1.ffn_{name}_exps.weight"]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        for expert in range(5):
            assert np.array_equal(
                file.read(f"model.layers.1.mlp.experts.{expert}.{matrix}.weight").numpy(), whole[expert]
            )


def test_a_tensor_for_each_expert_as_older_files_have(tmp_path):
    model, name = theirs("llama with experts"), "llama with experts"
    apart = []
    for tensor, array in tensors_of(model, "llama"):
        kind = re.fullmatch(r"(blk\.\d\.ffn_(?:gate|up|down))_exps\.weight", tensor)
        apart += [(f"{kind[1]}.{i}.weight", one) for i, one in enumerate(array)] if kind else [(tensor, array)]
    write(tmp_path / "old.gguf", model, name, tensors=apart)
    write(tmp_path / "new.gguf", model, name)
    old, new = (load_model(tmp_path / f"{age}.gguf")[0].state_dict() for age in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_weights_scale", 2.5, "expert_weights_scale in .* is 2.5, which is not supported; supported: 1.0"),
        ("expert_gating_func", 2, "expert_gating_func in .* is 2, which is not supported; supported: 1"),
        ("expert_group_count", 4, "expert_group_count in .* is 4"),
        ("expert_weights_norm", 1, "expert_weights_norm in .* is 1; it must be true or false"),
    ],
)
def test_routing_that_no_family_has_is_refused(field, value, message, tmp_path):
    def extra(writer):
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"qwen2moe.{field}", value)

    with pytest.raises(CheckpointError, match=message):
        load_config(write(tmp_path / "m.gguf", theirs("qwen2moe"), "qwen2moe", extra=extra))


# -- K types, which the package reads and does not write: blocks of random bytes


@pytest.mark.parametrize("kinds", [lambda name: "Q4_K", lambda name: "Q5_K", lambda name: "Q6_K", medium])
def test_superblocks_stay_as_they_are_stored(kinds, tmp_path):
    path = with_blocks(tmp_path / "m.gguf", kinds)
    plain, _ = load_model(path)
    stored, _ = load_quantized(path, "int4")
    found = {
        name: module for name, module in stored.named_modules() if isinstance(module, FewBitLinear | QuantizedPool)
    }
    assert len(found) == 2 * 3 + 1
    for name, module in found.items():
        if "qkv" in name and kinds is medium:
            # Queries and keys, then values.
            assert [(part.rows, part.kind) for part in module.parts] == [(256 + 128, "q4_k"), (128, "q6_k")]
            continue
        packed = module.packed if isinstance(module, QuantizedPool) else (module.packed,)
        names = {"head": ("output.weight",), "out": ("attn_output",), "experts": ("ffn_gate", "ffn_down")}
        wanted = [kinds(part).lower() for part in names.get(name.rpartition(".")[2], ("attn_q",))]
        assert [part.kind for part in packed] == wanted
    token_BL = TOKENS
    with torch.no_grad():
        logits = plain.eval()(token_BL).logits_BLV
        assert (stored.eval()(token_BL).logits_BLV - logits).norm() / logits.norm() < 0.05
    convert(path, tmp_path / "q", quantize="int4")
    saved, _ = load_model(tmp_path / "q")
    assert saved.state_dict().keys() == stored.state_dict().keys()
    assert all(torch.equal(saved.state_dict()[key], value) for key, value in stored.state_dict().items())
    with torch.no_grad():
        offloaded, _, engine = load_offloaded(tmp_path / "q", None, dtype=torch.float32)
        with engine, torch.inference_mode():
            assert torch.equal(offloaded(token_BL).logits_BLV, saved.eval()(token_BL).logits_BLV)
    dequantize(saved)
    for key, value in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[key], value), key


def test_an_engine_runs_superblocks(tmp_path):
    path = with_blocks(tmp_path / "m.gguf", medium)
    convert(path, tmp_path / "q", quantize="int4")
    said = []
    for place, options in (
        (path, {"quantize": "int4"}),
        (tmp_path / "q", {}),
        (tmp_path / "q", {"expert_budget": "1MiB"}),
    ):
        llm = LLM(place, num_blocks=20, dtype="float32", **options)
        sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
        said.append([answer.tokens for answer in llm.generate([[1, 2, 3], [9, 7]], sampling)])
        llm.close()
    assert said[1:] == said[:1] * 2


# -- split files


@pytest.fixture
def parts(tmp_path):
    model = theirs("qwen2")
    write(tmp_path / "whole.gguf", model, "qwen2")
    write(tmp_path / "m.gguf", model, "qwen2", split=10)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert len(found) == 3
    return found


def test_all_parts_of_a_split_file_are_read(parts):
    whole, split = (load_model(path)[0].state_dict() for path in (parts[0].with_name("whole.gguf"), parts[0]))
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[key], split[key]) for key in whole)


def test_all_parts_of_a_split_file_are_told(parts):
    assert part_files(parts[0]) == parts
    seen = see_model(parts[0])
    assert [one.path for one in seen.files] == [str(path) for path in parts]
    # Another quantization of the model, and a file whose name is none of a part.
    (parts[0].with_name("m-Q8_0.gguf")).write_bytes(b"GGUF")
    check_unchanged(seen, parts[0])
    for path in parts:
        seen, whole = see_model(parts[0]), path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{path} is another file"):
            check_unchanged(seen, parts[0])
        assert see_model(parts[0]).content != seen.content
        path.write_bytes(whole)
    seen = see_model(parts[0])
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[2]} is another file"):
        check_unchanged(seen, parts[0])


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-99999.gguf", "m-1-of-3.gguf", "m-00001-of-00001.gguf"])
def test_a_file_that_has_no_other_parts_is_alone(name, tmp_path):
    assert part_files(tmp_path / name) == [tmp_path / name]


def test_parts_that_are_missing_or_not_the_first_are_told(parts):
    with pytest.raises(CheckpointError, match=r"is part 2 of 3; give the first, .*m-00001-of-00003.gguf"):
        load_model(parts[1])
    last = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf is missing, part 3 of 3"):
        load_model(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf is not part 3 of 3"):
        load_model(parts[0])
    parts[2].write_bytes(last[: len(last) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read .*m-00003-of-00003.gguf: .*truncated or corrupt"):
        load_model(parts[0])
    # The same part with the number of another: its tensors are there twice.
    key = b"split.no" + (2).to_bytes(4, "little")
    second = parts[1].read_bytes()
    at = second.index(key) + len(key)
    parts[2].write_bytes(second[:at] + (2).to_bytes(2, "little") + second[at + 2 :])
    with pytest.raises(
        CheckpointError, match=r"the 3 parts of .* hold 'blk.* more than once; copy or convert the model again"
    ):
        load_model(parts[0])
    parts[2].write_bytes(last)
    parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(CheckpointError, match=r"names must end in -00001-of-00003.gguf"):
        load_model(parts[0].with_name("first.gguf"))


def test_a_file_that_holds_a_tensor_twice_is_refused(tmp_path):
    """Nobody knows which of the two was meant."""

    def extra(writer):
        write_header = writer.write_header_to_file

        def late(*args, **kwargs):
            writer.add_tensor("output_norm.weigh?", np.full(256, 9.0, np.float32))
            return write_header(*args, **kwargs)

        writer.write_header_to_file = late

    path = with_blocks(tmp_path / "m.gguf", lambda name: None, layers=1, extra=extra)
    path.write_bytes(path.read_bytes().replace(b"output_norm.weigh?", b"output_norm.weight"))
    for load in (load_model, load_config):
        with pytest.raises(CheckpointError, match=r"m\.gguf holds 'output_norm\.weight' more than once"):
            load(path)


# -- through the front door


def test_a_file_is_scored_and_converted_as_the_folder_that_it_was_made_from(tmp_path, capsys):
    model, reference = theirs("qwen2moe"), bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    model.resize_token_embeddings(reference.get_vocab_size())
    model.save_pretrained(tmp_path / "folder")
    reference.save(str(tmp_path / "folder" / "tokenizer.json"))

    def extra(writer):
        table = reference.get_vocab()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(table, key=table.get))
        writer.add_token_merges([" ".join(merge) for merge in json.loads(reference.to_str())["model"]["merges"]])

    write(tmp_path / "m.gguf", model, "qwen2moe", extra=extra)
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "q"), "--to", "native", "--quantize", "int8"]) == 0
    capsys.readouterr()
    found = []
    for place in ("folder", "m.gguf", "q"):
        options = ["--data", str(tmp_path / "text.txt"), "--sequence-length", "32", "--dtype", "float32", "--json"]
        assert main(["eval", str(tmp_path / place), *options]) == 0
        found.append(json.loads(capsys.readouterr().out)["nats_per_token"])
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=0.1)

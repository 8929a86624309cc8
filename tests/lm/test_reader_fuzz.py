"""Damaged model files: whatever is changed in them, a reader reads or says in one line what is wrong, in bounded time and memory."""

import json
import shutil
import struct

import pytest
from tokenizers import pre_tokenizers

from anabranch.data import ByteTokenizer, load_tokenizer
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.errors import CheckpointError, TokenizerError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder, export_huggingface, load_config, load_model, save_model
from anabranch.lm.gguf import GgufFile
from anabranch.lm.tensors import read_header
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import Router, TopK
from damage import VALUES, altered, as_json, damaged, each, little_room, refuse_or_read
from gguf_files import bpe, tiny, write

FEW, MANY = 40, 1000
CASES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
FOREIGN = (  # what configs of other families have
    "rope_scaling rope_parameters sliding_window layer_types quantization_config mlp_only_layers decoder_sparse_step head_dim "
    "use_sliding_window attention_bias model_type partial_rotary_factor format family num_key_value_heads num_experts "
    "first_k_dense_replace moe_layer_freq n_routed_experts hidden_act mlp_bias clip_qkv shared_expert_intermediate_size"
).split()
MESSAGES = [{"role": "user", "content": "x"}]


def model(qk_norm="none", feed_forward=None):
    moe = MoE.Config(num_experts=4, hidden_dim=8, router=Router.Config(select=TopK.Config(normalize="sum")))
    attention = SelfAttention.Config(num_heads=2, qk_norm=qk_norm)
    sizes = {"vocab_size": 257, "dim": 16, "num_layers": 2, "max_positions": 64}
    return Decoder.Config(**sizes, attention=attention, feed_forward=feed_forward or moe).build(seed=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Valid models of every kind, by name."""
    top = tmp_path_factory.mktemp("models")
    save_model(top / "native", model(feed_forward=ReXMoE.Config(num_experts=4, hidden_dim=8)), ByteTokenizer())
    save_model(top / "sharded", model(), ByteTokenizer(), max_shard_bytes=4000)
    export_huggingface(top / "mixtral", model(), ByteTokenizer(), family="mixtral")
    export_huggingface(top / "qwen3_moe", model("head"), ByteTokenizer(), family="qwen3_moe")
    export_huggingface(top / "olmoe", model("full"), ByteTokenizer(), family="olmoe")
    backend = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    HuggingFaceTokenizer(backend, eos_id=1, chat_template=template).save(top / "tokenizer")
    write(top / "model.gguf", tiny(backend.get_vocab_size()), backend)
    return top


def use(tokenizer):
    """What a model folder's tokenizer is asked for."""
    tokenizer.decode(tokenizer.encode("hello <|endoftext|>"))
    tokenizer.apply_chat_template(MESSAGES)
    return tokenizer.stop_ids, tokenizer.byte_length_V, tokenizer.token_bytes(5), tokenizer.fingerprint


@pytest.mark.parametrize("number", CASES)
def test_gguf(folders, tmp_path, number):
    whole, path = (folders / "model.gguf").read_bytes(), tmp_path / "x.gguf"

    def read():
        load_config(path)
        _, tokenizer = load_model(path)
        if tokenizer is not None:
            use(tokenizer)

    found = set()
    with little_room():
        for random in each(number):
            at = 14_000 if random.random() < 0.8 else len(whole)
            path.write_bytes(damaged(whole[:at], random) + whole[at:])
            found.add(refuse_or_read(read, random.name))
    assert found == {True, False}


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("kind", ["native", "mixtral", "qwen3_moe", "olmoe"])
def test_config_of_a_model(folders, tmp_path, kind, number):
    shutil.copytree(folders / kind, tmp_path / "model")
    whole = json.loads((tmp_path / "model" / "config.json").read_text())

    def read():
        load_config(tmp_path / "model")
        load_model(tmp_path / "model")

    found = set()
    with little_room():
        for random in each(number):
            table = altered(whole, random)
            if kind != "native" and random.random() < 0.4:
                of_rope = {"rope_type": random.choice(["llama3", "linear", "yarn"]), "factor": random.choice(VALUES)}
                table = {**whole, random.choice(FOREIGN): random.choice([*VALUES, of_rope])}
            (tmp_path / "model" / "config.json").write_bytes(as_json(table, random))
            found.add(refuse_or_read(read, random.name))
    assert found == {True, False}


@pytest.mark.parametrize("number", CASES)
def test_index_of_shards(folders, tmp_path, number):
    shutil.copytree(folders / "sharded", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    with little_room():
        for random in each(number):
            path.write_bytes(as_json(altered(whole, random), random))
            refuse_or_read(lambda: load_model(tmp_path / "model"), random.name)


@pytest.mark.parametrize("number", CASES)
def test_header_of_safetensors(folders, tmp_path, number):
    shutil.copytree(folders / "native", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    with little_room():
        for random in each(number):
            text = as_json(altered(header, random), random)
            path.write_bytes(
                damaged(whole, random)
                if random.random() < 0.4
                else struct.pack("<Q", len(text)) + text + whole[8 + size :]
            )
            refuse_or_read(lambda: load_model(tmp_path / "model"), random.name)
            refuse_or_read(lambda: read_header(path), random.name)


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(folders, tmp_path, file, number):
    shutil.copytree(folders / "tokenizer", tmp_path / "model")
    whole = json.loads((tmp_path / "model" / file).read_text())
    with little_room():
        for random in each(number):
            (tmp_path / "model" / file).write_bytes(as_json(altered(whole, random), random))
            refuse_or_read(lambda: use(load_tokenizer(tmp_path / "model")), random.name)


def test_a_token_with_a_huge_id_is_refused_before_a_table_of_all_ids_is_made(folders, tmp_path):
    """Written out, such a tokenizer has a hole for every id: the tokenizers package ended the process for want of memory."""
    shutil.copytree(folders / "tokenizer", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(table))
    with pytest.raises(TokenizerError, match=r"has id 2147483648; at most 10000000 can be"):
        load_tokenizer(tmp_path / "model")


def test_a_config_that_asks_for_more_than_the_files_hold_takes_no_memory(folders, tmp_path):
    shutil.copytree(folders / "mixtral", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 2**31 - 1}))
    with little_room(), pytest.raises(CheckpointError, match="and its config describes a model of"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "native"])
@pytest.mark.parametrize("layers", [10**9, 4097, 0, -1, "4", 2.0, True])
def test_layers_are_counted_before_they_are_walked_through(folders, tmp_path, family, layers):
    shutil.copytree(folders / family, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    table = json.loads(path.read_text())
    (table["model"] if family == "native" else table)["num_layers" if family == "native" else "num_hidden_layers"] = (
        layers
    )
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=rf"(num_hidden_layers|num_layers).* is '?{layers}"):
        load_config(tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("llama.attention.head_count", 0, "llama.attention.head_count in .* is 0; it must be a whole number from 1"),
        ("llama.attention.head_count", "x", "is 'x'; it must be a whole number"),
        ("llama.block_count", 2**32 - 1, "llama.block_count in .* is 4294967295; it must be a whole number from 1"),
        ("llama.block_count", 10**8, "llama.block_count in .* is 100000000; it must be a whole number from 1 to 4096"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "is nan; it must be a finite number above 0"),
        ("llama.rope.freq_base", float("inf"), "llama.rope.freq_base in .* is inf; it must be a finite number"),
        ("split.count", "two", "split.count in .* is 'two'; it must be a whole number from 0"),
        ("llama.embedding_length", 1, "is 1, less than its 4 heads"),
    ],
)
def test_metadata_of_gguf_is_told_by_field_and_value(folders, monkeypatch, field, value, message):
    import anabranch.lm.gguf_file as reading

    class Changed(reading.Container):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.fields[field] = value

    monkeypatch.setattr(reading, "Container", Changed)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(folders / "model.gguf").foreign_config()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "its header is a list; it must be a table of tensors"),
        (b'{"a":3}', "its entry 'a' is 3; it must have dtype, shape, data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}', "its tensor 'a' lies at bytes 0 to 80 of 16"),
        (b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', r"has 8 bytes, and \[3\] numbers of type F32"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}', "its entry 'a' is"),
        (b"[" * 100_000, "it is nested too deeply"),
    ],
)
def test_header_of_safetensors_is_checked_against_the_file(tmp_path, header, message):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="its header of 9223372036854775808 bytes does not fit in its 10"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ 'x' * 10**12 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.x.y }}",
        "{{ range(10**9) | list }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in messages %}" * 60 + "{% endfor %}" * 60,
        "{{ messages | tojson(separators=1) }}",
    ],
)
def test_a_chat_template_that_fails_is_told_in_a_line(folders, tmp_path, template):
    shutil.copytree(folders / "tokenizer", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path / "model")
    with little_room(), pytest.raises(TokenizerError, match="the tokenizer's chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_a_chat_template_in_another_encoding_is_refused(folders, tmp_path):
    shutil.copytree(folders / "tokenizer", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_bytes(b"\xff\xfe{\0")
    with pytest.raises(TokenizerError, match=r"cannot read .*chat_template.jinja"):
        load_tokenizer(tmp_path / "model")

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from anabranch.config import from_dict, to_dict
from anabranch.data.bpe import BpeTokenizer, train_bpe
from anabranch.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from anabranch.errors import ConfigError, TokenizerError
from tokenizers_of_every_make import ALL, LOSSLESS, SAMPLE, by_name, like_llama, lossless, unicode_text


def test_bytes_are_the_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (257, 256, None, (256,))
    assert tokenizer.decode([97, 256, 98]) == "ab"
    assert tokenizer.decode([97, 256, 98], skip_special=False) == "a<|endoftext|>b"
    assert tokenizer.byte_length_V.tolist() == [1] * 256 + [0]


def test_bpe_merges_the_commonest_pair_first():
    # "abab abab": the pair (a, b) is seen four times, more than any other, so "ab" is the first merge, id 256
    tokenizer = train_bpe(["abab abab"], 258)
    assert tokenizer.vocab_size == 258
    assert tokenizer.eos_id == 257
    assert len(tokenizer.encode("abab")) == 2
    assert tokenizer.encode("abab") == [tokenizer._backend.token_to_id("ab")] * 2
    assert tokenizer.byte_length_V[tokenizer.encode("ab")].tolist() == [2]


def test_bpe_training_is_the_same_in_another_process():
    code = f"from anabranch.data.bpe import train_bpe;print(train_bpe({SAMPLE!r}, 300).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == LOSSLESS["bpe"].fingerprint


@lossless
@given(text=unicode_text)
def test_lossless_tokenizers_return_the_text(name, text):
    tokenizer = LOSSLESS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


@by_name
@given(text=unicode_text)
def test_byte_lengths_add_up_to_the_text(name, text):
    tokenizer = ALL[name]
    [(ids_L, length_L)] = tokenizer.encode_with_byte_lengths([text])
    assert ids_L.tolist() == tokenizer.encode(text, parse_special=False)
    assert len(ids_L) == len(length_L)
    assert (length_L >= 0).all()
    if len(ids_L):
        assert length_L.sum() == len(text.encode("utf-8"))


@lossless
@given(text=unicode_text)
def test_each_byte_length_is_that_of_the_bytes_of_the_token(name, text):
    tokenizer = LOSSLESS[name]
    [(ids_L, length_L)] = tokenizer.encode_with_byte_lengths([text])
    assert [len(tokenizer.token_bytes(index)) for index in ids_L.tolist()] == length_L.tolist()
    assert b"".join(tokenizer.token_bytes(index) for index in ids_L.tolist()) == text.encode("utf-8")


def test_byte_lengths_of_a_normalising_tokenizer_are_those_of_the_text():
    # "e" + combining acute is 3 bytes; NFC makes it "é" of 2 bytes, which is what the tokens hold
    [(_, length_L)] = ALL["qwen"].encode_with_byte_lengths(["e\u0301"])
    assert length_L.sum() == 3
    assert ALL["qwen"].byte_length_V is None
    # nothing stands for the blanks in front, so the first word takes them; the last word takes those behind
    [(ids_L, length_L)] = ALL["bert"].encode_with_byte_lengths(["  the cats "])
    assert ids_L.tolist() == [3, 4, 5]
    assert length_L.tolist() == [5, 4, 2]


def test_an_added_token_that_swallows_blanks_is_still_counted_in_full():
    backend = tokenizers.Tokenizer.from_str(LOSSLESS["bpe"]._backend.to_str())
    backend.add_tokens([AddedToken("[X]", lstrip=True, rstrip=True)])
    [(_, length_L)] = HuggingFaceTokenizer(backend).encode_with_byte_lengths(["a  [X]  b"])
    assert length_L.sum() == 9


@pytest.mark.parametrize("name", ["bytes", "bpe", "qwen"])
@given(ids=st.lists(st.integers(0, 330), max_size=30))
def test_streaming_any_ids_gives_what_decoding_them_gives(name, ids):
    tokenizer = ALL[name]
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@given(text=unicode_text)
def test_streaming_text_of_tokens_that_lean_on_their_neighbours(text):
    tokenizer = ALL["llama"]
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_streaming_holds_back_half_a_character():
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert stream.push(0xC3) == ""
    assert stream.flush() == "\ufffd"


@by_name
def test_decoding_never_raises_on_partial_or_unknown_ids(name):
    tokenizer = ALL[name]
    ids = ALL[name].encode("日本 the")
    for end in range(len(ids)):
        assert isinstance(tokenizer.decode(ids[:end]), str)
    assert tokenizer.decode([*ids, 10**6, -1]) == tokenizer.decode(ids)


@by_name
def test_lone_surrogates_are_replaced(name):
    assert ALL[name].encode("a\udcff") == ALL[name].encode("a\ufffd")


def test_special_tokens_are_parsed_only_where_asked():
    tokenizer = LOSSLESS["bpe"]
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_id]
    as_text = tokenizer.encode("<|endoftext|>", parse_special=False)
    assert len(as_text) > 1
    assert tokenizer.decode(as_text) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == "<|endoftext|>"


@by_name
def test_saving_and_loading_gives_the_same_tokenizer(name, tmp_path):
    tokenizer = ALL[name]
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert isinstance(loaded, ByteTokenizer) == (name == "bytes")
    for field in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(loaded, field) == getattr(tokenizer, field)
    assert loaded.encode(SAMPLE[1]) == tokenizer.encode(SAMPLE[1])


@by_name
def test_pickling_gives_the_same_tokenizer(name):
    assert pickle.loads(pickle.dumps(ALL[name])).encode(SAMPLE[0]) == ALL[name].encode(SAMPLE[0])


def test_a_saved_byte_tokenizer_is_a_plain_tokenizer_json_too(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # what marks it as ours
    foreign = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(foreign, HuggingFaceTokenizer)
    assert foreign.eos_id == 256
    for text in SAMPLE:
        assert foreign.encode(text) == ByteTokenizer().encode(text)
    assert foreign.byte_length_V.tolist() == ByteTokenizer().byte_length_V.tolist()


def test_transformers_reads_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, tokenizer in LOSSLESS.items():
        tokenizer.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs(SAMPLE[1])["input_ids"] == tokenizer.encode(SAMPLE[1])
        assert theirs.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
        ("special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
        ("config.json", {"bos_token_id": 1, "eos_token_id": [2, 7]}),
    ],
)
def test_special_ids_are_found_in_each_place(tmp_path, file, content):
    like_llama().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / file).write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, None)


def test_padding_and_truncation_of_a_file_are_switched_off(tmp_path):
    backend = tokenizers.Tokenizer.from_str(LOSSLESS["bpe"]._backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("zqjxw")) == 5


def test_stop_ids_include_the_end_of_turn():
    backend = tokenizers.Tokenizer.from_str(LOSSLESS["bpe"]._backend.to_str())
    backend.add_special_tokens(["<|im_end|>"])
    eos = backend.token_to_id("<|endoftext|>")
    assert HuggingFaceTokenizer(backend, eos_id=eos).stop_ids == (eos, backend.token_to_id("<|im_end|>"))


@pytest.mark.parametrize(
    "config", [ByteTokenizer.Config(), BpeTokenizer.Config(vocab_size=300), HuggingFaceTokenizer.Config(path="x")]
)
def test_configs_read_back_equal(config):
    assert from_dict(Tokenizer.Config, to_dict(config)) == config


def test_configs_build_their_kind(tmp_path):
    LOSSLESS["bpe"].save(tmp_path)
    assert isinstance(ByteTokenizer.Config().build(), ByteTokenizer)
    assert HuggingFaceTokenizer.Config(path=str(tmp_path)).build().fingerprint == LOSSLESS["bpe"].fingerprint
    assert BpeTokenizer.Config(vocab_size=300).build(SAMPLE).fingerprint == LOSSLESS["bpe"].fingerprint


def test_training_stops_reading_after_the_training_bytes():
    def texts():
        yield "abab " * 5
        raise AssertionError("read on")

    assert BpeTokenizer.Config(vocab_size=258, training_bytes=20).build(texts()).vocab_size == 258


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer.json at .*nowhere; give a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(TokenizerError, match="SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer.json: "):
        load_tokenizer(tmp_path)
    LOSSLESS["bpe"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="it must be a table of settings"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no text to train"):
        train_bpe([], 300)
    with pytest.raises(TokenizerError, match="vocab_size is 5"):
        train_bpe(SAMPLE, 5)
    with pytest.raises(ConfigError, match="vocab_size"):
        BpeTokenizer.Config(vocab_size=5)


def test_ids_are_numpy_int64():
    for tokenizer in ALL.values():
        [(ids_L, length_L)] = tokenizer.encode_with_byte_lengths(["the"])
        assert ids_L.dtype == length_L.dtype == np.int64


# Prompts


def framed(front, back):
    """A byte-level tokenizer with a post-processor that puts tokens around a text; its own beginning is <bos>."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(SAMPLE, 300)._backend.to_str())
    backend.add_special_tokens(["<bos>", "<sep>"])
    names = {name: backend.token_to_id(name) for name in ("<bos>", "<sep>", "<|endoftext|>")}
    if front or back:
        single = [*front, "$A", *back]
        special = [(name, names[name]) for name in {*front, *back}]
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    ids = {"bos_id": names["<bos>"], "eos_id": names["<|endoftext|>"]}
    return HuggingFaceTokenizer(backend, **ids)


FRAMES = {
    "nothing": lambda: framed([], []),
    "a beginning": lambda: framed(["<bos>"], []),
    "both": lambda: framed(["<bos>", "<sep>"], ["<|endoftext|>"]),
    "an end": lambda: framed([], ["<sep>"]),
    "no post-processor": like_llama,
}


class Noted:
    """A backend that notes how many characters it is given one text at a time, for which it holds Python's lock."""

    def __init__(self, backend):
        self._backend, self.alone = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def encode(self, text, **options):
        self.alone.append(len(text))
        return self._backend.encode(text, **options)


@pytest.mark.parametrize("start", ["", " " * 5_000, "<bos>", "<bos><sep>"])
@pytest.mark.parametrize("name", FRAMES)
def test_a_long_prompt_has_the_same_around_it_and_holds_up_no_other_thread(name, start):
    """It was encoded twice, the second time with Python's lock: a prompt of two megabytes stopped a server for seconds."""
    tokenizer, text = FRAMES[name](), start + "a long prompt " * 2_000
    whole = tokenizer._backend.encode(text, add_special_tokens=True)
    own = tokenizer._backend.encode(text, add_special_tokens=False).ids
    tokenizer._backend = Noted(tokenizer._backend)
    front = whole.ids[: whole.special_tokens_mask.index(0)]
    wanted = whole.ids[len(front) :] if front and own[: len(front)] == front else whole.ids
    assert tokenizer.encode_prompt(text) == wanted
    assert tokenizer.encode_chat(text) == wanted[: len(wanted) - (len(whole.ids) - len(front) - len(own))]
    assert tokenizer._backend.alone == []


@pytest.mark.parametrize("name", FRAMES)
def test_a_prompt_has_around_it_what_transformers_puts_there(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = FRAMES[name]()
    tokenizer.save(tmp_path)
    reference, again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), load_tokenizer(tmp_path)

    @settings(max_examples=20, deadline=None)
    @given(unicode_text | st.sampled_from(["", "a<|endoftext|>b", "<sep>x", " <bos>"]))
    def check(text):
        assert tokenizer.encode_prompt(text) == again.encode_prompt(text) == reference(text)["input_ids"]
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]

    check()
    assert again.fingerprint == tokenizer.fingerprint


def test_what_begins_as_prompts_begin_is_left_alone():
    tokenizer = FRAMES["both"]()
    bos, sep = (tokenizer._backend.token_to_id(name) for name in ("<bos>", "<sep>"))
    assert tokenizer.encode_prompt("<bos><sep>a") == [bos, sep, *tokenizer.encode("a"), tokenizer.eos_id]
    assert tokenizer.encode_prompt("<bos>a") == [bos, sep, bos, *tokenizer.encode("a"), tokenizer.eos_id]


def test_nothing_ends_a_chat_before_the_answer():
    tokenizer = FRAMES["both"]()
    bos, sep = (tokenizer._backend.token_to_id(name) for name in ("<bos>", "<sep>"))
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer.encode_chat(plain) == [bos, sep, *tokenizer.encode(plain)]


def test_a_template_of_the_models_writes_its_own_beginning():
    tokenizer = FRAMES["a beginning"]()
    messages = [{"role": "user", "content": "hi"}]
    plain = tokenizer.apply_chat_template(messages)
    assert tokenizer.encode_chat(plain) == [tokenizer.bos_id, *tokenizer.encode(plain)]
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    text = tokenizer.apply_chat_template(messages)
    assert tokenizer.encode_chat(text) == [tokenizer.bos_id, *tokenizer.encode("hi")]

"""SentencePiece vocabularies of GGUF files, against a naive copy of llama.cpp's algorithm (llama-vocab.cpp, llm_tokenizer_spm)."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import TokenizerError
from anabranch.lm import load_model
from anabranch.lm.gguf import GgufFile
from gguf_files import tiny, write

gguf = pytest.importorskip("gguf")

SPACE = "▁"
ALPHABET = "abcé日 \n"
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def vocabulary():
    """(token, score, kind): special ones, bytes, characters, and pieces that can be reached, each with a score of its own."""
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<user>", 0.0, USER)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = [SPACE, *"abcé"]
    pieces, draw = list(letters), random.Random(3)
    while len(pieces) < 60:
        made = draw.choice(pieces) + draw.choice(pieces)
        if made not in pieces and len(made) < 9:
            pieces.append(made)
    scores = draw.sample(range(1, 1000), len(pieces))
    return rows + [(piece, -float(score), NORMAL) for piece, score in zip(pieces, scores, strict=True)]


ROWS = vocabulary()
ID = {token: index for index, (token, _, _) in enumerate(ROWS)}


def naive(text, prefix):
    """Of all neighbours whose joint is a piece, those of the best score are joined, the leftmost first."""
    symbols = list((SPACE if prefix and text else "") + text.replace(" ", SPACE))
    while True:
        joints = [
            (-ROWS[ID[left + right]][1], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ID and ROWS[ID[left + right]][2] == NORMAL
        ]
        if not joints:
            break
        _, at = min(joints)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        ids += [ID[symbol]] if symbol in ID else [ID[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


def file_of(path, *, prefix=None, rows=ROWS, scores=None, **flags):
    def extra(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([token for token, _, _ in rows])
        writer.add_token_scores([score for _, score, _ in rows] if scores is None else scores)
        writer.add_token_types([kind for _, _, kind in rows])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    return write(path, tiny(512), extra=extra)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    return {prefix: GgufFile(file_of(folder / f"{prefix}.gguf", prefix=prefix)).tokenizer() for prefix in (True, False)}


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(ALPHABET), max_size=24), st.booleans())
def test_pieces_are_joined_as_sentencepiece_joins_them(both, text, prefix):
    tokenizer = both[prefix]
    assert tokenizer.encode(text) == naive(text, prefix)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_tokens_stand_alone_and_prompts_begin(tmp_path):
    tokenizer = load_model(file_of(tmp_path / "m.gguf"))[1]
    assert tokenizer.encode("abc")[0] != 1
    assert tokenizer.encode_prompt("abc") == [1, *naive("abc", True)]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert {1, 2} <= set(tokenizer.encode("ab</s>c<s>"))
    assert ID["<user>"] in tokenizer.encode("a<user>b")
    quiet = load_model(file_of(tmp_path / "q.gguf", add_bos_token=False, add_eos_token=True))[1]
    assert quiet.encode_prompt("abc") == [*naive("abc", True), 2]


def test_scores_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(TokenizerError, match=r"scores in .* has 2 numbers for \d+ tokens"):
        load_model(file_of(tmp_path / "m.gguf", scores=[0.0, 1.0]))

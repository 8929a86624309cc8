"""Counting by a tokenizer's file."""

import pytest

from anabranch.gateway.runtime import _counter

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize("cut", [True, False])
def test_all_tokens_of_a_text_count(tmp_path, cut):
    """Files of models that embed cut a text after 128 tokens: what was reserved was short by as much."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if cut:
        made.enable_truncation(128)
        made.enable_padding(length=128)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    count = _counter(str(path), "models.0.tokenizer")
    assert [count("a " * 1000), count("a b"), count("")] == [1000, 2, 0]

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


def test_a_special_token_that_a_prompt_spells_out_is_the_text_that_it_is(tmp_path):
    """It counted as one token, and providers read six: a budget was passed by that much."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, end = tokenizers.pre_tokenizers.ByteLevel.alphabet(), "<|end|>"
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=257, initial_alphabet=alphabet, special_tokens=[end])
    made.train_from_iterator(["nothing"], trainer)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    assert len(made.encode(end).ids) == 1
    count = _counter(str(path), "models.0.tokenizer")
    assert count(end * 100) == 100 * len(end)

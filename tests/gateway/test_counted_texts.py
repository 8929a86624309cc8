"""Texts that are counted a piece at a time: pieces are the text, and their tokens those of it."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import counted_texts
from anabranch.gateway.counted_texts import CUT_TOKENS, PIECE, Texts
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.web.turns import Turns

WORDS = st.lists(
    st.sampled_from(["the", "fox", "jumps,", "éa", "don't", "12", "\n\n", " ", "狐狸", "x_1"]), max_size=60
)


def bpe():
    """Of bytes, in the manner of GPT-2, with merges of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog, don't they? "] * 9, trainer)
    return lambda text: len(made.encode(text, add_special_tokens=False).ids)


def chat(*texts):
    return {"model": "m", "messages": [{"role": "user", "content": text} for text in texts]}


def counted(body, counter):
    """In pieces, and what they were."""
    pieces = []

    async def beside(work):
        pieces.append(None)
        return work()

    texts = Texts(counter)
    return asyncio.run(texts.counted(count_prompt(body, texts), beside)), len(pieces)


def test_what_fits_a_piece_is_counted_as_ever_in_one():
    counter = bpe()
    body = chat("the quick fox", "jumps", "over")
    found, num = counted(body, counter)
    assert (found, num) == (count_prompt(body, counter), 1)


def test_a_long_text_is_cut_between_words_and_comes_to_as_many_tokens():
    counter = bpe()
    body = chat("the quick brown fox, " * 2_000, "jumps 12 times")
    found, num = counted(body, counter)
    assert found == count_prompt(body, counter)
    assert num == -(-21 * 2_000 // PIECE)


@given(WORDS)
def test_pieces_are_the_text_and_never_come_to_less(words):
    counter, body = COUNTER, chat(" ".join(words), "".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counted_texts, "PIECE", 16)
        patch.setattr(counted_texts, "_NEAR", 12)
        seen = []
        found, _ = counted(body, lambda text: seen.append(text) or counter(text))
        assert "".join(seen) == "".join(message["content"] for message in body["messages"])
        assert max(map(len, seen)) <= 16
    whole = count_prompt(body, counter)
    assert whole.at_most <= found.at_most
    # Each cut within a word may make a few more.
    assert whole.tokens <= found.tokens <= whole.tokens + CUT_TOKENS * len(seen)


def test_a_text_without_spaces_is_cut_and_more_is_reserved_for_it():
    found, num = counted(chat("x" * (2 * PIECE + 1)), lambda text: len(text))
    whole = count_prompt(chat("x" * (2 * PIECE + 1)), len)
    assert (found.tokens, num) == (whole.tokens, 3)
    assert found.at_most == whole.at_most + 2 * CUT_TOKENS


def test_senders_take_turns_at_the_tokenizer():
    """One whose text is of many pieces was counted to its end before the next one."""
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    order, gate = [], threading.Event()

    def counter(whose, text):
        gate.wait(60)
        order.append(whose)
        return 1

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor)

            async def count(whose, size):
                texts = Texts(partial(counter, whose))
                await texts.counted(count_prompt(chat("x" * size), texts), partial(turns.run, whose))

            asked = [asyncio.ensure_future(count(whose, size)) for whose, size in (("a", 20 * PIECE), ("b", PIECE))]
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(*asked)

    asyncio.run(main())
    assert order.index("b") <= 2
    assert len(order) == 21


COUNTER = bpe()

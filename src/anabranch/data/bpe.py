"""Byte-level BPE trained on the corpus at hand (Radford et al. 2019, section 2.2, after Sennrich et al. 2016)."""

from collections.abc import Iterable

from tokenizers import AddedToken, models, pre_tokenizers, trainers

from anabranch.config import Field, configclass
from anabranch.data.byte_level import byte_level_backend, utf8
from anabranch.data.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, Tokenizer
from anabranch.errors import TokenizerError


class BpeTokenizer(HuggingFaceTokenizer, kind="bpe"):
    """A byte-level BPE trained on the corpus at hand; see `train_bpe`."""

    @configclass
    class Config(Tokenizer.Config):
        """How to train it."""

        vocab_size: int = Field(default=4096, ge=257, le=1_000_000)  # with the end-of-text token
        min_frequency: int = Field(default=2, ge=1)  # pairs seen less often are not merged
        training_bytes: int = Field(default=20_000_000, ge=1)  # text to learn from, from the start of the corpus

        def build(self, texts: Iterable[str] = ()) -> "BpeTokenizer":
            """Train on ``texts``, up to ``training_bytes`` of them."""
            return train_bpe(
                _first_bytes(texts, self.training_bytes), self.vocab_size, min_frequency=self.min_frequency
            )


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> BpeTokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenisation) with end of text as its last id; the same texts give the same tokenizer.

    The vocabulary comes out smaller than ``vocab_size`` where the texts have too few pairs that repeat. Raises TokenizerError
    for no text, or for a ``vocab_size`` under 257.
    """
    if vocab_size < 257:
        raise TokenizerError(
            f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least 257 (256 bytes and the end of text)"
        )
    backend = byte_level_backend(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = False

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text)
            yield utf8(text).decode("utf-8")

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise TokenizerError("no text to train a BPE tokenizer on; give a corpus with text in it")
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return BpeTokenizer(backend, eos_id=backend.token_to_id(END_OF_TEXT))


def _first_bytes(texts: Iterable[str], size: int) -> Iterable[str]:
    for text in texts:
        data = utf8(text)[:size]
        yield data.decode("utf-8", "ignore")
        size -= len(data)
        if size <= 0:
            return

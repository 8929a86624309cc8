"""A tokenizer whose tokens are words: small vocabularies of worlds that are made, tags and names among them.

A model with such a tokenizer can be served as any other: its template of chats puts messages one behind the other, so that what a gateway
sends turn by turn are the tokens that a policy was taught with.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from anabranch.data.tokenizer import HuggingFaceTokenizer

__all__ = ["END", "UNKNOWN", "word_tokenizer"]

UNKNOWN, END = "<unk>", "<eos>"
# Tags and signs are words of their own, whatever stands beside them.
_SIGNS = r"</?[a-z]+>|[:;?]"
# Messages one behind the other.
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def word_tokenizer(words: Iterable[str]) -> HuggingFaceTokenizer:
    """A tokenizer that knows these words; all others are `UNKNOWN`. Words may be parted by any white space."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([UNKNOWN, END, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    signs = pre_tokenizers.Split(Regex(_SIGNS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([signs, pre_tokenizers.WhitespaceSplit()])
    return HuggingFaceTokenizer(backend, eos_id=vocabulary[END], chat_template=_TEMPLATE)

"""A tokenizer whose tokens are words: small vocabularies of worlds that are made, tags and names among them; and the template of chats.

A router can be served as any other model. Its template puts messages one behind the other, as episodes are written, so that what a gateway
sends turn by turn reads as what the router was taught with: no roles, and nothing where a turn came to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from anabranch.data.tokenizer import HuggingFaceTokenizer

__all__ = ["END", "TEMPLATE", "UNKNOWN", "word_tokenizer"]

UNKNOWN, END = "<unk>", "<eos>"
# Tags and signs are words of their own, whatever stands beside them.
_SIGNS = r"</?[a-z]+>|[:;?]"
# As `Episode` writes: information between blank lines, all else as it is. Where that adds nothing, the gateway's program says "Go on.".
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first or message['role'] == 'assistant' %}{{ message['content'] }}"
    "{% elif message['content'] != 'Go on.' %}{{ '\\n\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


def word_tokenizer(words: Iterable[str]) -> HuggingFaceTokenizer:
    """A tokenizer that knows these words; all others are `UNKNOWN`. Words may be parted by any white space."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([UNKNOWN, END, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    signs = pre_tokenizers.Split(Regex(_SIGNS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([signs, pre_tokenizers.WhitespaceSplit()])
    return HuggingFaceTokenizer(backend, eos_id=vocabulary[END], chat_template=TEMPLATE)

"""What byte-level vocabularies share: the printable stand-ins of bytes, and exact byte counts.

Source: Radford et al., *Language Models are Unsupervised Multitask Learners* (2019), section 2.2; the table of stand-ins is that of the
GPT-2 encoder.
"""
# Shapes: L tokens of a text

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers


def byte_level_backend(model: models.Model, *, use_regex: bool) -> tokenizers.Tokenizer:
    """A byte-level tokenizer around ``model``; ``use_regex`` first cuts text into words with GPT-2's pattern."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies: itself if printable, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def lengths_from_offsets(text: str, offsets: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Bytes from the end of the furthest token before to the end of this one; the last token also takes what is left."""
    size = np.array([len(character.encode("utf-8")) for character in text], dtype=np.int64)
    bytes_before = np.concatenate([[0], np.cumsum(size)])
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    end_L = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    end_L[-1] = len(text)
    return np.diff(bytes_before[end_L], prepend=0)


def utf8(text: str) -> bytes:
    """UTF-8 of ``text``, with U+FFFD for lone surrogates, which have none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return "".join("�" if 0xD800 <= ord(character) < 0xE000 else character for character in text).encode("utf-8")

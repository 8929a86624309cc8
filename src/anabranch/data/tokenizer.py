"""Text to token ids and back, with exact byte counts.

One face, `Tokenizer`, and three kinds: ``bytes`` (256 bytes and an end-of-text token), ``bpe`` (trained on the corpus, see
`anabranch.data.bpe`), ``file`` (a ``tokenizer.json`` in the Hugging Face layout, read with the ``tokenizers`` package). All save
as a ``tokenizer.json`` that `load_tokenizer` and transformers' ``AutoTokenizer`` read back.
"""
# Shapes: L tokens of a text, V vocabulary

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, models

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.data.byte_level import byte_characters, byte_level_backend, lengths_from_offsets, utf8
from anabranch.data.chat import render_chat
from anabranch.errors import TokenizerError
from anabranch.files import atomic_write_json, atomic_write_text, read_json

END_OF_TEXT = "<|endoftext|>"
# Names that mark the end of a text where a folder does not say which token does, most specific first.
# Ids; the largest vocabularies have a million.
_MOST_TOKENS = 10_000_000
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")

# In a config.json.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SENTENCE_PIECE = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})  # steps of its decoders
_HARMONY_ENDS = ("<|return|>", "<|call|>")
_END_OF_TURN_NAMES = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")

# Characters of a text that tell what stands around it.
_BEGINNING = 1 << 10


class Tokenizer(Part, family="tokenizer"):
    """What every tokenizer does. Ids run from 0 to ``vocab_size - 1``; a special id is None where there is none."""

    @configclass
    class Config(BaseConfig):
        """How to get a tokenizer; see the kinds."""

        def build(self, texts: Iterable[str] = ()) -> "Tokenizer":
            """Make the tokenizer. ``texts`` is what a kind that must be trained is trained on; the others ignore it."""
            raise NotImplementedError

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: end of text and, where the vocabulary has them, end of turn."""
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def special_names(self) -> dict[str, str]:
        """The text of the ``bos``, ``eos`` and ``pad`` tokens, empty for those that there are not."""
        return {name: self._name_of(getattr(self, f"{name}_id")) for name in ("bos", "eos", "pad")}

    @property
    def special_ids(self) -> dict[str, Any]:
        """The special ids as a config.json has them: one, or for ``eos_token_id`` all `stop_ids` where there are several."""
        ids: dict[str, Any] = {f"{name}_token_id": getattr(self, f"{name}_id") for name in ("bos", "eos", "pad")}
        if self.eos_id is not None and len(self.stop_ids) > 1:
            ids["eos_token_id"] = list(self.stop_ids)
        return {name: value for name, value in ids.items() if value is not None}

    @property
    def fingerprint(self) -> str:
        """A digest that differs whenever any text could be tokenised differently."""
        raise NotImplementedError

    @property
    def byte_length_V(self) -> NDArray[np.int64] | None:
        """Bytes of text that each token stands for (special tokens: 0), or None where that depends on the text.

        It does for tokenizers that normalise (NFC, lower case) or strip: use `encode_with_byte_lengths`.
        """
        raise NotImplementedError

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of ``text``, with nothing put before or after.

        ``parse_special`` reads special tokens written out in the text (``<|im_start|>``) as what they stand for, as chat
        prompts need; False takes them as plain characters, as data should be. `ByteTokenizer` never parses them.
        """
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on from: `encode` with what the post-processor of its tokenizer.json puts around (``bos``).

        A text that has the same in front already is left alone. Data is encoded without, see `encode`.
        """
        return self.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of what `apply_chat_template` gave. A template of the model's writes all it needs; plain lines are a text like any other."""
        return self.encode(text) if self.chat_template is not None else self.encode_prompt(text)

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """`encode` for many texts, on all cores where the tokenizer can."""
        return [self.encode(text, parse_special=parse_special) for text in texts]

    def encode_with_byte_lengths(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each text its ids ``[L]`` (special tokens not parsed) and the bytes ``[L]`` of the text under each id.

        The bytes add up to the length of the text in UTF-8 exactly, whatever the tokenizer drops or rewrites.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``. Never raises: broken UTF-8 becomes U+FFFD, ids outside the vocabulary are left out."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that one token always stands for, or None where its text depends on its neighbours."""
        raise NotImplementedError

    def inner_bytes(self, token_id: int) -> bytes | None:
        """The bytes that one token stands for inside a text, wherever a decoder would strip a blank at its start.

        None where they depend on the neighbours (WordPiece); nothing for special tokens and ids without a token.
        """
        return self.token_bytes(token_id)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``, each all or nothing."""
        raise NotImplementedError

    def apply_chat_template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, given as ``[{"role": "user", "content": "..."}, ...]``; `encode_chat` makes ids of it.

        Uses the folder's own Jinja template, else ChatML where the vocabulary has its tokens, else plain ``User:`` lines.
        Raises TokenizerError for a message without role or content, or one that the template refuses.
        """
        return render_chat(
            messages,
            template=self.chat_template,
            has_chatml=self._id_of("<|im_start|>") is not None,
            special=self.special_names,
            add_generation_prompt=add_generation_prompt,
        )

    def stream(self) -> "StreamDecoder":
        """A decoder that is fed one id at a time."""
        return StreamDecoder(self)

    def id_of(self, token: str) -> int | None:
        """The id of a token that is written so, such as ``<|im_start|>``; None where there is none."""
        return self._id_of(token)

    def _id_of(self, token: str) -> int | None:
        return None

    def _name_of(self, token_id: int | None) -> str:
        return ""


class StreamDecoder:
    """Decodes ids as they come: the pieces joined are `Tokenizer.decode` of all ids, and no piece ends inside a character.

    (With SentencePiece-style byte fallback, whose decoder judges a run of bytes as a whole, as long as the bytes are UTF-8.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """The text that this id completes, often one word, empty inside a character."""
        piece = self._tokenizer.token_bytes(token_id)
        if piece is not None:
            return self._utf8.decode(piece)
        # Tokens that lean on their neighbours (a leading space that decoding strips): decode all, show what is new.
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("�") else self._show(text)

    def flush(self) -> str:
        """What was still held back; an unfinished character shows as U+FFFD."""
        return self._show(self._tokenizer.decode(self._ids)) if self._ids else self._utf8.decode(b"", final=True)

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        return new


class ByteTokenizer(Tokenizer, kind="bytes"):
    """UTF-8 bytes as ids 0 to 255, and 256 for end of text. Nothing to train, no text it cannot hold."""

    @configclass
    class Config(Tokenizer.Config):
        """No fields."""

        def build(self, texts: Iterable[str] = ()) -> "ByteTokenizer":
            """Make the tokenizer."""
            return ByteTokenizer()

    vocab_size = 257
    eos_id = 256

    @property
    def fingerprint(self) -> str:
        """Fixed: there is only one."""
        return "bytes-257"

    @cached_property
    def byte_length_V(self) -> NDArray[np.int64]:
        """1 for each byte, 0 for end of text."""
        length_V = np.ones(self.vocab_size, dtype=np.int64)
        length_V[self.eos_id] = 0
        return length_V

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The bytes of ``text``; special tokens are never parsed."""
        return list(utf8(text))

    def encode_with_byte_lengths(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """See `Tokenizer`."""
        ids = [np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64) for text in texts]
        return [(ids_L, np.ones_like(ids_L)) for ids_L in ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer`."""
        if skip_special:
            return bytes(index for index in ids if 0 <= index < 256).decode("utf-8", "replace")
        return b"".join(
            END_OF_TEXT.encode() if index == self.eos_id else bytes([index])
            for index in ids
            if 0 <= index <= self.eos_id
        ).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself; nothing for end of text."""
        return bytes([token_id]) if 0 <= token_id < 256 else b""

    def save(self, folder: str | Path) -> None:
        """Save as a BPE without merges, so that transformers reads the folder too, marked so that we know it again."""
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = byte_level_backend(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        _write(folder, backend, {"eos_token": END_OF_TEXT, "anabranch_kind": "bytes"})

    def _name_of(self, token_id: int | None) -> str:
        return END_OF_TEXT if token_id == self.eos_id else ""


class HuggingFaceTokenizer(Tokenizer, kind="file"):
    """A tokenizer in the Hugging Face layout, run by the ``tokenizers`` package.

    Args:
        backend: the ``tokenizers.Tokenizer``; its padding and truncation are switched off.
        bos_id, eos_id, pad_id: special ids, None for none.
        chat_template: Jinja source, as in ``tokenizer_config.json``.
        ends: further ids that end an answer.
    """

    @configclass
    class Config(Tokenizer.Config):
        """Read from a folder."""

        path: str = Field(min_length=1)  # a folder with tokenizer.json, or that file

        def build(self, texts: Iterable[str] = ()) -> Tokenizer:
            """Load it. Raises TokenizerError as `load_tokenizer`."""
            return load_tokenizer(self.path)

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.bos_id, self.eos_id, self.pad_id, self.chat_template = bos_id, eos_id, pad_id, chat_template
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._ends = [index for index in ends if index < self.vocab_size]
        # The tokenizers package would write a hole for each id without a token.
        if self.vocab_size > _MOST_TOKENS:
            raise TokenizerError(
                f"a token of the tokenizer has id {self.vocab_size - 1}; at most {_MOST_TOKENS} can be"
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        # Of gpt-oss, whose turns have several messages.
        names = _HARMONY_ENDS if self._id_of("<|channel|>") is not None else _END_OF_TURN_NAMES
        named = [self._id_of(name) for name in names]
        return tuple(dict.fromkeys(index for index in [self.eos_id, *self._ends, *named] if index is not None))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of ``tokenizer.json`` and the end-of-text id."""
        return hashlib.blake2b(f"{self.eos_id} {self._backend.to_str()}".encode(), digest_size=16).hexdigest()

    @cached_property
    def byte_length_V(self) -> NDArray[np.int64] | None:
        """See `Tokenizer`; an array for byte-level vocabularies that do not normalise (GPT-2, SmolLM2, Llama 3, ...)."""
        if self._token_bytes is None or self._backend.normalizer is not None:
            return None
        special = {index for index, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return np.array(
            [0 if i in special else len(piece) for i, piece in enumerate(self._token_bytes)], dtype=np.int64
        )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_prompt(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        front, ids, back = self._framed(text)
        return [*front, *ids, *back]

    def encode_chat(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        if self.chat_template is not None:
            return self.encode(text)
        # What stands behind a text would end it before the answer.
        front, ids, _ = self._framed(text)
        return [*front, *ids]

    def _framed(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """(what the post-processor puts in front, the text, what it puts behind); nothing in front of a text that begins so already."""
        # It puts the same around every text: the beginning of a long one will do, unless nothing is left of that.
        ids, start = self.encode(text), text[:_BEGINNING]
        start_ids = ids if len(start) == len(text) else self.encode(start)
        if not start_ids:
            start, start_ids = text, ids
        # Of one text alone (`encode`) the package would hold Python's lock from its beginning to its end.
        [framed] = self._backend.encode_batch([utf8(start).decode("utf-8")], add_special_tokens=True)
        # What the post-processor added; special tokens that are written in the text are not marked.
        num_front = framed.special_tokens_mask.index(0) if start_ids else len(framed.ids)
        front, back = framed.ids[:num_front], framed.ids[num_front + len(start_ids) :]
        return ([] if front and ids[:num_front] == front else front), ids, back

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """See `Tokenizer`."""
        backend = self._backend if parse_special else self._plain_backend
        # The tokenizers package refuses lone surrogates, which a shell argument that is not UTF-8 turns into.
        clean = [utf8(text).decode("utf-8") for text in texts]
        return [encoding.ids for encoding in backend.encode_batch_fast(clean, add_special_tokens=False)]

    def encode_with_byte_lengths(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """See `Tokenizer`; counted from the table where it is exact, otherwise from character offsets."""
        if self.byte_length_V is not None:
            batches = [np.array(ids, dtype=np.int64) for ids in self.encode_batch(texts, parse_special=False)]
            counted = [(ids_L, self.byte_length_V[ids_L]) for ids_L in batches]
            # An added token may swallow the blanks beside it; those texts are counted again below.
            exact = [int(length_L.sum()) == len(utf8(text)) for (_, length_L), text in zip(counted, texts, strict=True)]
            if all(exact):
                return counted
        clean = [utf8(text).decode("utf-8") for text in texts]
        encodings = self._plain_backend.encode_batch(clean, add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.int64), lengths_from_offsets(text, encoding.offsets))
            for text, encoding in zip(clean, encodings, strict=True)
        ]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer`."""
        known = [int(index) for index in ids if 0 <= index < self.vocab_size]
        if self._token_bytes is None:
            return self._backend.decode(known, skip_special_tokens=skip_special)
        pieces = (b"" if skip_special and index in self._special_ids else self._token_bytes[index] for index in known)
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Tokenizer`; special tokens give nothing, as in `decode`."""
        if self._token_bytes is None:
            return None
        hidden = not 0 <= token_id < self.vocab_size or token_id in self._special_ids
        return b"" if hidden else self._token_bytes[token_id]

    def inner_bytes(self, token_id: int) -> bytes | None:
        """See `Tokenizer`; also known for SentencePiece vocabularies (U+2581 for a blank, ``<0x0A>`` for a byte)."""
        if self._token_bytes is not None:
            return self.token_bytes(token_id)
        if not self._decoder_steps <= _SENTENCE_PIECE:
            return None
        piece = self._name_of(token_id)
        if token_id in self._special_ids or not piece:
            return b""
        if "ByteFallback" in self._decoder_steps and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode("utf-8")

    def save(self, folder: str | Path) -> None:
        """See `Tokenizer`."""
        settings = {f"{name}_token": token for name, token in self.special_names.items() if token}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        _write(folder, self._backend, settings)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy that takes special tokens as text: switching the shared one to and fro would race between threads."""
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def _decoder_steps(self) -> frozenset[str]:
        """What turns pieces into text, by the tokenizers package's names."""
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        return frozenset(step.get("type", "") for step in steps)

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """Bytes of every token of a byte-level vocabulary, None for any other."""
        if self._decoder_steps != {"ByteLevel"}:
            return None
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        # Ids without a token decode to nothing.
        pieces = [b""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            is_bytes = all(character in byte_of for character in token)
            pieces[index] = bytes(byte_of[character] for character in token) if is_bytes else token.encode("utf-8")
        for index, added in self._backend.get_added_tokens_decoder().items():
            pieces[index] = added.content.encode("utf-8")
        return pieces

    def _id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _name_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._backend.id_to_token(token_id) or ""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a model folder (or of one ``tokenizer.json``).

    Special ids come from ``tokenizer_config.json``, else ``special_tokens_map.json``, else ``config.json``; end of text also from its
    usual names. Every ``eos_token_id`` of ``config.json`` and ``generation_config.json`` ends an answer.

    Raises TokenizerError if there is no readable ``tokenizer.json``.
    """
    path = Path(folder)
    file = path if path.suffix == ".json" else path / "tokenizer.json"
    if not file.is_file():
        if (file.parent / "tokenizer.model").is_file():
            fix = "it has a SentencePiece tokenizer.model: load it once with transformers and save_pretrained beside it"
        else:
            fix = "give a folder with a tokenizer.json, as saved by anabranch or transformers"
        raise TokenizerError(f"no tokenizer.json at {path}; {fix}")
    settings = _settings_in(file.parent / "tokenizer_config.json")
    if settings.get("anabranch_kind") == "bytes":
        return ByteTokenizer()
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        # The tokenizers package raises plain Exception for whatever it cannot parse.
        raise TokenizerError(f"cannot read {file}: {error}") from None
    except BaseException as error:
        # And a panic of its own, which is no Exception, for what it did not expect.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"cannot read {file}: {error}") from None
    ids = {name: _special_id(backend, file.parent, settings, name) for name in ("bos", "eos", "pad")}
    if ids["eos"] is None:
        ids["eos"] = next(
            (backend.token_to_id(name) for name in _END_NAMES if backend.token_to_id(name) is not None), None
        )
    return HuggingFaceTokenizer(
        backend,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        chat_template=_chat_template(file.parent, settings),
        ends=_ends(file.parent),
    )


def _special_id(backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any], name: str) -> int | None:
    for table in (settings, _settings_in(folder / "special_tokens_map.json")):
        token = table.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return backend.token_to_id(utf8(token).decode("utf-8"))
    index = _settings_in(folder / "config.json").get(f"{name}_token_id")
    # Some models list several ends.
    index = index[0] if isinstance(index, list) and index else index
    return index if type(index) is int and 0 <= index < _MOST_TOKENS else None


def _ends(folder: Path) -> list[int]:
    """All ids that the folder's configs say end a text: many chat models have several."""
    given = [_settings_in(folder / name).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    listed = [index for entry in given for index in (entry if isinstance(entry, list) else [entry])]
    return [index for index in listed if isinstance(index, int) and not isinstance(index, bool) and index >= 0]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"cannot read {file}: {error}") from None
    template = settings.get("chat_template")
    # Several named ones: [{"name": "default", "template": "..."}, ...].
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _settings_in(file: Path) -> dict[str, Any]:
    """The table in ``file``, empty if there is no such file."""
    return read_json(file, TokenizerError) if file.is_file() else {}


def _write(folder: str | Path, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    atomic_write_text(Path(folder) / "tokenizer.json", backend.to_str(pretty=True))
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    atomic_write_json(Path(folder) / "tokenizer_config.json", fixed | settings)

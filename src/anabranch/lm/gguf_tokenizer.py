"""Tokenizers of GGUF files, rebuilt from their metadata: byte-level BPE (``gpt2``) and SentencePiece's (``llama``)."""

import logging
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.errors import TokenizerError
from anabranch.lm.gguf_file import Fields

__all__ = ["tokenizer_of"]

logger = logging.getLogger(__name__)

# How text is cut before merging, by tokenizer.ggml.pre: regular expressions applied one after the other (llama.cpp, llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters that DeepSeek's first tokenizer takes for cased ones, its `tokenizer.json` says: not lower Armenian and Georgian ones.
_CASED = (
    "["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]"
)
_MARKS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]"
_WIDE = "[一-龥ࠀ-一가-\ud7ff]+"
_SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": (rf"{_WORD % ('', '')}|\p{{N}}|{_REST}",),
    "gpt-4o": (rf"{_WORD % (_SHORT, _SHORT)}|\p{{N}}{{1,3}}|{_REST}",),
    "deepseek-llm": (r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_MARKS}+", r"\s+$", _WIDE, r"\p{N}"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK),
}
# Those whose words that are tokens stay whole.
_WHOLE = ("llama-bpe", "tekken")
# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# SentencePiece's space.
_SPACE = "▁"


def tokenizer_of(fields: Fields) -> HuggingFaceTokenizer | None:
    """The tokenizer of a file; None, with a warning, for one that has another kind or none. Raises TokenizerError, CheckpointError."""
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre") or "default"
    if kind == "llama":
        return _finished(fields, _sentencepiece(fields), begins=True)
    if kind == "gpt2" and isinstance(cut, str) and cut in _SPLITS:
        return _finished(fields, _byte_level(fields, cut), begins=cut == "llama-bpe")
    logger.warning(
        "%s has a tokenizer of kind %r (%r), so the model comes without one; supported: 'llama', and 'gpt2' with %s",
        fields.path,
        kind,
        cut,
        ", ".join(map(repr, _SPLITS)),
    )
    return None


def _byte_level(fields: Fields, cut: str) -> tokenizers.Tokenizer:
    tokens = fields.list_of(str, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.list_of(str, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = _made(fields, vocab=vocabulary, merges=merges, ignore_merges=cut in _WHOLE)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[cut]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields) -> tokenizers.Tokenizer:
    """SentencePiece joins, of all neighbours, the two that make the piece of the best score: merges in the order of scores."""
    tokens = fields.list_of(str, "tokenizer.ggml.tokens")
    scores = fields.list_of(float, "tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise TokenizerError(
            f"tokenizer.ggml.scores in {fields.path} has {len(scores)} numbers for {len(tokens)} tokens; it is corrupt, copy it again"
        )
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    kinds = fields.list_of(int, "tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    merges = []
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind in (_NORMAL, _USER_DEFINED):
            pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            merges += [(-scores[index], index, pair) for pair in pairs if vocabulary.keys() >= set(pair)]
    unknown = next((token for token, kind in zip(tokens, kinds, strict=False) if kind == _UNKNOWN), None)
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": _BYTE in kinds}
    backend = _made(fields, vocab=vocabulary, merges=[pair for _, _, pair in sorted(merges)], **options)
    is_led = fields.flag("tokenizer.ggml.add_space_prefix", default=True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if is_led else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if is_led else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def _made(fields: Fields, **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(**options))
    except Exception as error:
        # A merge of one piece, or of tokens that do not exist, raises anything.
        raise TokenizerError(f"the tokenizer in {fields.path} cannot be read: {error}") from None


def _finished(fields: Fields, backend: tokenizers.Tokenizer, *, begins: bool) -> HuggingFaceTokenizer:
    """With its special tokens, its template and what stands around prompts, which ``begins`` says where the file does not."""
    tokens = fields.list_of(str, "tokenizer.ggml.tokens")
    added = {
        index: AddedToken(tokens[index], special=kind == _CONTROL, normalized=False)
        for index, kind in enumerate(fields.list_of(int, "tokenizer.ggml.token_type")[: len(tokens)])
        if kind in (_CONTROL, _USER_DEFINED) and tokens[index]
    }
    backend.add_tokens(list(added.values()))
    frame = _frame(fields, tokens, begins)
    if frame is not None:
        backend.post_processor = frame
    return HuggingFaceTokenizer(
        backend,
        bos_id=_token_id(fields, "bos"),
        eos_id=_token_id(fields, "eos"),
        pad_id=_token_id(fields, "padding"),
        chat_template=template if isinstance(template := fields.get("tokenizer.chat_template"), str) else None,
        ends=[index for name in ("eot", "eom") if (index := _token_id(fields, name)) is not None],
    )


def _frame(fields: Fields, tokens: list[str], begins: bool) -> processors.TemplateProcessing | None:
    """What puts tokens around prompts. llama.cpp begins those of some kinds where a file does not say (llama-vocab.cpp)."""
    adds = {
        name: fields.flag(f"tokenizer.ggml.add_{name}_token", default=default)
        for name, default in (("bos", begins), ("eos", False))
    }
    ids = {name: index for name in adds if adds[name] and (index := _token_id(fields, name)) is not None}
    if not ids or max(ids.values()) >= len(tokens):
        return None
    single = [*(["bos"] if "bos" in ids else []), "$A", *(["eos"] if "eos" in ids else [])]
    special = [{"id": name, "ids": [index], "tokens": [tokens[index]]} for name, index in ids.items()]
    return processors.TemplateProcessing(single=single, special_tokens=special)


def _token_id(fields: Fields, name: str) -> int | None:
    field = f"tokenizer.ggml.{name}_token_id"
    return None if fields.get(field) is None else fields.integer(field, 0)

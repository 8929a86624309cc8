"""Tokenizers of every make, small, for tests: two that lose nothing, and three that normalise or strip."""

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from anabranch.data.bpe import train_bpe
from anabranch.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer

SAMPLE = [
    "def route(score):\n    return score.topk(2)\n",
    "Zoë said: 日本語 🎉, naïve ﬁ Å\r\n\t end",
    "the the the cat sat on the mat",
] * 3


def like_qwen():
    """Byte-level, but text is normalised to NFC first, so bytes of tokens are not bytes of the text."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(SAMPLE, 300)._backend.to_str())
    backend.normalizer = normalizers.NFC()
    return HuggingFaceTokenizer(backend, eos_id=backend.token_to_id("<|endoftext|>"))


def like_llama():
    """SentencePiece style: a blank is put in front and shown as U+2581, unknown characters fall back to bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "▁th",
        "▁the",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return HuggingFaceTokenizer(backend, bos_id=1, eos_id=2)


def like_bert():
    """Lower case, accents stripped, blanks dropped, one token for any word that is not known."""
    vocabulary = {
        piece: index for index, piece in enumerate(["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "a", "##b"])
    }
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return HuggingFaceTokenizer(backend, eos_id=2)


LOSSLESS = {"bytes": ByteTokenizer(), "bpe": train_bpe(SAMPLE, 300)}
ALL = {**LOSSLESS, "qwen": like_qwen(), "llama": like_llama(), "bert": like_bert()}
by_name = pytest.mark.parametrize("name", ALL)
lossless = pytest.mark.parametrize("name", LOSSLESS)
unicode_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)

"""Corpus and tokenizer joined: `DataConfig` says what to read, `Data` hands out training streams and validation windows."""

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anabranch.config import Config, Field, Size, configclass, to_dict
from anabranch.data.bpe import BpeTokenizer
from anabranch.data.corpus import Corpus, Mixture, Stdlib
from anabranch.data.reading import digest_file, stable_hash
from anabranch.data.split import TRAIN, VALIDATION, labels_cut_inside, split
from anabranch.data.store import TokenStore
from anabranch.data.stream import Lane, TokenStream
from anabranch.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from anabranch.data.windows import StoredRun, TextRun, Windows
from anabranch.errors import DataError, TokenizerError
from anabranch.files import atomic_folder, atomic_write_text
from anabranch.places import cache_folder

log = logging.getLogger(__name__)

# In the folder of a cached tokenizer.
DIGEST = "digest"


@configclass
class DataConfig(Config):
    """What a language model learns from."""

    corpus: Corpus.Config = Field(default_factory=Stdlib.Config)
    tokenizer: Tokenizer.Config = Field(default_factory=ByteTokenizer.Config)
    sequence_length: Size = Field(default=256, ge=1)  # tokens a training sequence
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)  # of the documents, by the hash of their keys

    def build(self, tokenizer: Tokenizer | None = None) -> "Data":
        """Read and tokenise, or find both in the cache (`cache_folder`).

        ``tokenizer``, that of a model which goes on being trained, takes the place of the configured one. Raises DataError if
        the corpus is missing, unreadable or empty, TokenizerError if the tokenizer is.
        """
        return Data(self, tokenizer)

    def content_digest(self) -> str:
        """`Data.fingerprint` of what lies there now. Raises as `build`."""
        return self.build().fingerprint()


class Data:
    """A tokenised corpus.

    Attributes:
        config: what it was made from.
        tokenizer: its tokenizer.
        domains: names of the domains, in the order that ``Batch.domain_B`` counts: those of a mixture, else the labels.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        sources = _sources(config.corpus)
        fraction = config.validation_fraction
        self.tokenizer = tokenizer or _tokenizer(config.tokenizer, [corpus for _, _, corpus in sources], fraction)
        stores = [TokenStore.open(corpus, self.tokenizer, fraction) for _, _, corpus in sources]
        # A domain of a mixture goes by the mixture's name for it, whatever its own documents are labelled.
        self._stores = [(domain, weight, store) for (domain, weight, _), store in zip(sources, stores, strict=True)]
        names = [domain or segment.label for domain, _, store in self._stores for segment in _all_segments(store)]
        self.domains = tuple(dict.fromkeys(names))

    def fingerprint(self, *, byte_lengths: bool = True) -> str:
        """Names the tokens of both splits and the bytes under them, their domains and weights, and the tokenizer.

        By content, wherever they were read from. ``byte_lengths=False``: without the bytes under the tokens, as earlier
        checkpoints name their data; the same wherever the tokens alone say how many bytes they stand for (bytes, byte-level BPE).
        """
        stores = [
            [name, weight, *(store.content(split, byte_lengths=byte_lengths) for split in (TRAIN, VALIDATION))]
            for name, weight, store in self._stores
        ]
        return f"{stable_hash(json.dumps([self.tokenizer.fingerprint, stores])):016x}"

    def train(self, *, seed: int, rank: int = 0, world_size: int = 1) -> TokenStream:
        """A new stream over the training split; see `TokenStream`."""
        lanes = [
            Lane(
                weight, tuple((store, segment, self._domain(name, segment.label)) for segment in store.segments[TRAIN])
            )
            for name, weight, store in self._stores
        ]
        # What is trained on are tokens; the bytes under them count where something is measured: see `fingerprint`.
        content = [[store.content(TRAIN, byte_lengths=False), weight] for _, weight, store in self._stores]
        fingerprint = stable_hash(json.dumps(content))
        return TokenStream(
            lanes,
            self.domains,
            sequence_length=self.config.sequence_length,
            seed=seed,
            rank=rank,
            world_size=world_size,
            fingerprint=f"{fingerprint:016x}",
        )

    def validation(self, *, sequence_length: int | None = None, **options: Any) -> Windows:
        """Windows over the validation split; ``options`` as `Windows` (batch_size, num_windows, rank, world_size)."""
        return self.windows(VALIDATION, sequence_length=sequence_length, **options)

    def windows(self, split: str, *, sequence_length: int | None = None, **options: Any) -> Windows:
        """Windows over ``train`` or ``validation``, of the configured sequence length unless another is given."""
        parts = [
            (StoredRun(store, split, segment, self.tokenizer.eos_id), self._domain(name, segment.label))
            for name, _, store in self._stores
            for segment in store.segments[split]
        ]
        if not parts:
            raise DataError(f"the {split} split is empty; validation_fraction is {self.config.validation_fraction}")
        return Windows(parts, self.domains, sequence_length=sequence_length or self.config.sequence_length, **options)

    def num_tokens(self, split: str) -> dict[str, int]:
        """Tokens of each domain in ``train`` or ``validation``."""
        return self._count(split, "length")

    def num_bytes(self, split: str) -> dict[str, int]:
        """Bytes of text of each domain in ``train`` or ``validation``."""
        return self._count(split, "size_bytes")

    def _count(self, split: str, field: str) -> dict[str, int]:
        total = dict.fromkeys(self.domains, 0)
        for name, _, store in self._stores:
            for segment in store.segments[split]:
                total[name or segment.label] += getattr(segment, field)
        return total

    def _domain(self, name: str | None, label: str) -> int:
        return self.domains.index(name or label)


def text_windows(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int, **options: Any) -> Windows:
    """Windows over ``texts`` as they are, all of them, end of text between two; ``options`` as `Windows`."""
    return Windows([(TextRun(texts, tokenizer), 0)], ("text",), sequence_length=sequence_length, **options)


def corpus_windows(corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, **options: Any) -> Windows:
    """Windows over a whole corpus, nothing split off, a run for each label; ``options`` as `Windows`."""
    texts: dict[str, list[str]] = {}
    for document in corpus.documents():
        texts.setdefault(document.label, []).append(document.text)
    parts = [(TextRun(texts[label], tokenizer), number) for number, label in enumerate(sorted(texts))]
    return Windows(parts, sorted(texts), sequence_length=sequence_length, **options)


def _sources(
    config: Corpus.Config, name: str | None = None, weight: float = 1.0
) -> list[tuple[str | None, float, Corpus]]:
    """(domain or None for the documents' own labels, weight, corpus) of each plain corpus in ``config``."""
    if not isinstance(config, Mixture.Config):
        return [(name, weight, config.build())]
    total = sum(domain.weight for domain in config.domains.values())
    return [
        source
        for inner, domain in config.domains.items()
        for source in _sources(domain.corpus, name or inner, weight * domain.weight / total)
    ]


def _all_segments(store: TokenStore) -> Iterator[Any]:
    for segments in store.segments.values():
        yield from segments


def _tokenizer(config: Tokenizer.Config, corpora: list[Corpus], fraction: float) -> Tokenizer:
    """Build the tokenizer; one that is trained is kept in the cache, found by its config and the content of the corpora."""
    if not isinstance(config, BpeTokenizer.Config):
        return config.build()
    key = json.dumps([to_dict(config), fraction, [corpus.fingerprint() for corpus in corpora]])
    folder = cache_folder() / "tokenizers" / f"{stable_hash(key):016x}"
    try:
        if (folder / DIGEST).read_text(encoding="utf-8") == _digest(folder):
            return load_tokenizer(folder)
    except (OSError, ValueError, DataError, TokenizerError) as error:
        log.info("no tokenizer in the cache (%s)", error)
    tokenizer = config.build(_training_texts(corpora, fraction))
    with atomic_folder(folder, replacing=".*") as temporary:
        tokenizer.save(temporary)
        atomic_write_text(temporary / DIGEST, _digest(temporary))
    return tokenizer


def _digest(folder: Path) -> str:
    """Of the files of a cached tokenizer: one in which a bit has flipped may be readable still, and mean other tokens."""
    parts = [f"{file.name} {digest_file(file)}" for file in sorted(folder.glob("*.json"))]
    return f"{stable_hash(chr(10).join(parts)):016x}"


def _training_texts(corpora: list[Corpus], fraction: float) -> Iterator[str]:
    """Texts of the training split, one from each corpus in turn, so that the first few megabytes hold something of all."""
    readers = []
    for corpus in corpora:
        cut_inside = labels_cut_inside(corpus.documents(), fraction)
        readers.append(
            document.text for side, document in split(corpus.documents(), fraction, cut_inside) if side == TRAIN
        )
    for turn in itertools.zip_longest(*readers):
        yield from (text for text in turn if text is not None)

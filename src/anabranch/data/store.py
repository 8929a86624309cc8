"""Tokenise once: a corpus becomes arrays in a cache folder, found again by the content of corpus and tokenizer.

A cache entry is a folder: for each split ``SPLIT.bin`` (uint16, or uint32 for vocabularies over 65,536), for tokenizers whose
byte counts depend on the text ``SPLIT.lengths.bin`` (uint32), and ``index.json``, which says where each label's tokens lie. It holds
the digest of each file and of itself; an entry in which a single bit has flipped is made anew.
Documents of one label lie together, each followed by end of text where the tokenizer has one.
"""
# Shapes: T tokens of a split, V vocabulary

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from anabranch.data.corpus import Corpus, Document
from anabranch.data.reading import digest_file, stable_hash
from anabranch.data.split import TRAIN, VALIDATION, labels_cut_inside, split, stretches
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import DataError
from anabranch.files import atomic_folder, atomic_write_json
from anabranch.locks import locked
from anabranch.places import cache_folder, make_cache

log = logging.getLogger(__name__)

# Of the cache entry; another one is built anew.
FORMAT = 3
INDEX = "index.json"
SPLITS = (TRAIN, VALIDATION)

# To make an entry that somebody deletes as soon as it is there.
_ATTEMPTS = 3
_BATCH_CHARACTERS = 1 << 20

# Bytes of a file that are held in memory by every process that reads it, rather than mapped.
_MOST_HELD = 256 << 20


@dataclass(frozen=True)
class Segment:
    """The tokens of one label in one split: ``length`` of them from ``start``, made from ``documents`` of ``size_bytes``."""

    label: str
    start: int
    length: int
    size_bytes: int
    documents: int


class TokenStore:
    """The tokens of a corpus, read from a cache entry. Cheap to pickle and to fork.

    All is checked against its digests at once. Files of up to 256 MiB are held in memory, so what happens to the cache later is nothing
    to a store that is open. Larger ones are mapped: they may be deleted or replaced at any time, as we do, but not be written in place by
    others. Who cuts one short ends the process that reads it (SIGBUS), and training goes on from its last checkpoint.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        entry = _read_entry(folder)
        if entry is None:
            raise _damaged(folder)
        index, self._arrays = entry
        self.folder = folder
        self._tokenizer = tokenizer
        self.segments = {name: tuple(Segment(**entry) for entry in index["splits"][name]) for name in SPLITS}
        self._dtype = index["dtype"]
        self._digests = index["digests"]

    @classmethod
    def open(
        cls, corpus: Corpus, tokenizer: Tokenizer, validation_fraction: float, cache: Path | None = None
    ) -> "TokenStore":
        """The store of ``corpus``, from the cache or else made and put there; a damaged entry is replaced.

        Processes that ask for one entry at once wait for the first to make it. Raises DataError as `Corpus.documents`, or if
        the cache cannot be written.
        """
        key = f"{FORMAT} {corpus.fingerprint()} {tokenizer.fingerprint} {validation_fraction!r}"
        folder = (cache or cache_folder()) / "tokens" / f"{stable_hash(key):016x}"
        for attempt in range(1, _ATTEMPTS + 1):
            store = cls._open(folder, tokenizer)
            if store is not None:
                return store
            try:
                with _locked(folder):
                    # No other process has made it meanwhile.
                    if cls._open(folder, tokenizer) is None:
                        _build(folder, corpus, tokenizer, validation_fraction)
            except DataError:
                # Whoever deletes the cache may do so while an entry is made, or waited for.
                if folder.parent.is_dir() or attempt == _ATTEMPTS:
                    raise
        store = cls._open(folder, tokenizer)
        if store is None:
            raise _damaged(folder)
        return store

    @classmethod
    def _open(cls, folder: Path, tokenizer: Tokenizer) -> "TokenStore | None":
        """The store of a cache entry, or None if that is absent or damaged."""
        try:
            return cls(folder, tokenizer)
        except DataError:
            return None

    def tokens(self, split: str) -> NDArray[Any]:
        """All tokens of ``split``, ``[T]``, uint16 or uint32; read-only."""
        return self._arrays[f"{split}.bin"]

    def byte_lengths(self, split: str, start: int, end: int) -> NDArray[np.int64]:
        """Bytes of text under each of the tokens ``start`` to ``end`` (excluded) of ``split``."""
        table_V = self._tokenizer.byte_length_V
        if table_V is not None:
            return table_V[self.tokens(split)[start:end]]
        return self._arrays[f"{split}.lengths.bin"][start:end].astype(np.int64)

    def content(self, split: str, *, byte_lengths: bool = True) -> str:
        """Names the tokens of ``split``, what they are labelled and the bytes under each, wherever the text was read from.

        Where a tokenizer normalises, other text may give the same tokens with other bytes under them, and so other bits per byte.
        ``byte_lengths=False`` leaves those out: what a model is trained on.
        """
        segments = [[segment.label, segment.start, segment.length] for segment in self.segments[split]]
        named = f"{self._dtype} {self._digests[f'{split}.bin']} {json.dumps(segments)}"
        # No file of lengths: the tokens alone say how many bytes they stand for.
        lengths = self._digests.get(f"{split}.lengths.bin") if byte_lengths else None
        return named if lengths is None else f"{named} {lengths}"

    def __getstate__(self) -> dict[str, Any]:
        # The other process reads the files itself.
        return self.__dict__ | {"_arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        entry = _read_entry(state["folder"])
        if entry is None or entry[0]["digests"] != state["_digests"]:
            raise _damaged(state["folder"])
        self.__dict__ |= state | {"_arrays": entry[1]}


def _damaged(folder: Path) -> DataError:
    return DataError(f"the token cache {folder} is damaged or gone; delete what is left, and it is built anew")


def _read_entry(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """Index and arrays of a cache entry; None if it is absent, of another format, or not, to the bit, what was written."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT or index.pop("digest") != _digest_of(index):
            return None
        arrays = {name: _array(folder / name, _dtype(name, index)) for name in index["digests"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # What was read or mapped is what is checked: a file that is exchanged meanwhile is another one.
    return (index, arrays) if all(_digest(arrays[name]) == found for name, found in index["digests"].items()) else None


def _array(file: Path, dtype: str) -> NDArray[Any]:
    """The numbers in a file: held where it is small, mapped where it is large. Raises ValueError for a part of one at the end."""
    if file.stat().st_size <= _MOST_HELD:
        return np.frombuffer(file.read_bytes(), dtype)
    # A plain view of the map: slicing np.memmap itself costs several times more.
    return np.asarray(np.memmap(file, dtype=dtype, mode="r"))


def _dtype(name: str, index: dict[str, Any]) -> str:
    return "uint32" if name.endswith(".lengths.bin") else index["dtype"]


def _digest(array: NDArray[Any]) -> str:
    """As `digest_file` gives it for the file."""
    return hashlib.blake2b(array.data, digest_size=16).hexdigest()


def _digest_of(index: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    make_cache(folder.parent)
    with locked(folder.parent / f".{folder.name}.lock", wait_s=math.inf):
        yield


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, validation_fraction: float) -> None:
    log.info("tokenising %s", corpus.describe())
    cut_inside = labels_cut_inside(corpus.documents(), validation_fraction)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    has_lengths = tokenizer.byte_length_V is None
    with atomic_folder(folder, replacing=".*") as temporary:
        pieces: dict[tuple[str, str], list[_Piece]] = {}
        spool, spool_lengths = temporary / "spool", temporary / "spool.lengths"
        with spool.open("wb") as out, spool_lengths.open("wb") as out_lengths:
            position = 0
            parts = split(corpus.documents(), validation_fraction, cut_inside)
            for side, label, ids, lengths in _tokenise(parts, tokenizer):
                pieces.setdefault((side, label), []).append(_Piece(position, len(ids), int(lengths.sum())))
                position += len(ids)
                out.write(ids.astype(dtype).tobytes())
                if has_lengths:
                    out_lengths.write(lengths.astype(np.uint32).tobytes())
        splits = {side: _segments(side, pieces) for side in SPLITS}
        for side in SPLITS:
            order = [piece for (of, _), found in sorted(pieces.items()) if of == side for piece in found]
            _gather(spool, temporary / f"{side}.bin", dtype, order)
            if has_lengths:
                _gather(spool_lengths, temporary / f"{side}.lengths.bin", "uint32", order)
        spool.unlink()
        spool_lengths.unlink()
        index = {
            "format": FORMAT,
            "dtype": dtype,
            "splits": {side: [asdict(segment) for segment in splits[side]] for side in SPLITS},
            "digests": {file.name: digest_file(file) for file in sorted(temporary.iterdir())},
        }
        atomic_write_json(temporary / INDEX, {**index, "digest": _digest_of(index)})


@dataclass(frozen=True, slots=True)
class _Piece:
    """The tokens of one document, or of the part of it in one split, in the spool."""

    start: int
    length: int
    size_bytes: int


def _segments(side: str, pieces: dict[tuple[str, str], list[_Piece]]) -> list[Segment]:
    segments, start = [], 0
    for (of, label), found in sorted(pieces.items()):
        if of == side:
            length = sum(piece.length for piece in found)
            segments.append(Segment(label, start, length, sum(piece.size_bytes for piece in found), len(found)))
            start += length
    return segments


def _tokenise(
    parts: Iterable[tuple[str, Document]], tokenizer: Tokenizer
) -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.int64]]]:
    """(split, label, ids, byte lengths) of each part, in order, end of text included; encoded in batches to use all cores."""
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=np.int64)
    batch: list[tuple[str, Document]] = []
    size = 0

    def encoded() -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.int64]]]:
        cut = [list(stretches(document.text)) for _, document in batch]
        results = iter(tokenizer.encode_with_byte_lengths([text for texts in cut for text in texts]))
        for (side, document), texts in zip(batch, cut, strict=True):
            ids, lengths = zip(*(next(results) for _ in texts), strict=True)
            yield side, document.label, np.concatenate([*ids, end]), np.concatenate([*lengths, np.zeros_like(end)])

    for side, document in parts:
        batch.append((side, document))
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield from encoded()
            batch, size = [], 0
    if batch:
        yield from encoded()


def _gather(source: Path, target: Path, dtype: str, pieces: list[_Piece]) -> None:
    """Copy ``pieces`` of the spool, one after another."""
    width = np.dtype(dtype).itemsize
    with source.open("rb") as spool, target.open("wb") as out:
        for piece in pieces:
            _copy(spool, out, piece.start * width, piece.length * width)


def _copy(source: IO[bytes], target: IO[bytes], start: int, size: int) -> None:
    source.seek(start)
    while size:
        chunk = source.read(min(size, 1 << 24))
        target.write(chunk)
        size -= len(chunk)

"""Vectors that were computed once are read back: by embedder and text, from files that are written whole."""
# Shapes: N texts, D dimensions, M missing texts

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from anabranch.config import to_dict
from anabranch.files import atomic_write, parse_json
from anabranch.places import cache_folder
from anabranch.routers.embed.checked import are_unit, unit_vectors
from anabranch.routers.embed.embedder import Embedder

# Texts between two words of progress.
AT_ONCE = 1024


def embed_cached(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """Vectors of ``texts``, computing only those that no earlier call computed.

    Files are only added, each whole: processes may share the folder. A damaged one is left aside and its texts embedded again; so are
    texts whose vectors there are not of length 1, as earlier versions kept them of some embedders of others.

    Args:
        embedder: whose config and learned state name its part of the cache.
        texts: any number, repeats too.
        folder: of the cache; None takes `anabranch.places.cache_folder`.
        progress: told how far it is.

    Returns: float32 ``[N, D]``.
    """
    place = (cache_folder() if folder is None else folder) / "vectors" / fingerprint(embedder)
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts]
    known = _read(place, embedder.dim)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        found = _embed(embedder, list(missing.values()), progress)
        _write(place, list(missing), found)
        known |= dict(zip(missing, found, strict=True))
    return np.array([known[key] for key in keys], np.float32).reshape(len(texts), embedder.dim)


def fingerprint(embedder: Embedder) -> str:
    """Names an embedder by all that decides its vectors."""
    arrays, facts = embedder.state()
    hashed = hashlib.sha256(json.dumps([to_dict(embedder.config), facts], sort_keys=True).encode())
    for name, value in sorted(arrays.items()):
        hashed.update(name.encode() + value.tobytes())
    return f"{embedder.kind}-{hashed.hexdigest()[:16]}"


def _embed(embedder: Embedder, texts: list[str], progress: Callable[[str], None]) -> np.ndarray:
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    vector_MD = np.zeros((len(texts), embedder.dim), np.float32)
    for start in range(0, len(texts), AT_ONCE):
        progress(f"embedding texts: {start:,} of {len(texts):,}")
        rows = order[start : start + AT_ONCE]
        vector_MD[rows] = unit_vectors(embedder, [texts[row] for row in rows])
    return vector_MD


def _read(place: Path, dim: int) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    known: dict[str, np.ndarray] = {}
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                keys = parse_json((file.metadata() or {}).get("keys", "[]"))
                vector_ND = file.get_tensor("vector_ND")
        except (SafetensorError, OSError, ValueError):
            continue
        if not isinstance(keys, list) or vector_ND.shape != (len(keys), dim) or vector_ND.dtype != np.float32:
            continue
        known |= {str(keys[row]): vector_ND[row] for row in np.flatnonzero(are_unit(vector_ND))}
    return known


def _write(place: Path, keys: list[str], vector_MD: np.ndarray) -> None:
    from safetensors.numpy import save_file

    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    metadata = {"keys": json.dumps(keys)}
    atomic_write(
        place / f"{name}.safetensors", lambda temporary: save_file({"vector_ND": vector_MD}, temporary, metadata)
    )

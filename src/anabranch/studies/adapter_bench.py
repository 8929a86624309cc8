"""The adapter bench: text tasks of real words, a small decoder that knows the single steps, and adapters that learn to combine them.

    8 steps on a word (reverse, rot1, ...); a task is an ordered pair of two of them, 56 in all
    48 pairs are learned together; 8, in which each step stands first once and second once, are kept for few examples

The base is pre-trained on single steps alone, once for all arms, and frozen. Words are those of the documentation that every Python carries
(`pydoc_data.topics`), split once into words to learn and words to measure on.
"""

import hashlib
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch import __version__
from anabranch.adapters.tasks import on_tasks
from anabranch.config import Config, Field, configclass, to_dict
from anabranch.data import ByteTokenizer
from anabranch.files import atomic_write_json, sha256_of
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.locks import locked
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.places import cache_folder
from anabranch.train import DecoderTask, Examples, Losses, TaskContext, TaskRunConfig, TrainConfig, Trainer, TrainResult

__all__ = ["FEW", "LEARNED", "STEPS", "Bench", "BenchSize", "accuracy", "bench_words", "pair_rows"]

_VOWELS = frozenset("aeiou")
STEPS: Mapping[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "rot1": lambda word: "".join(chr((ord(letter) - 97 + 1) % 26 + 97) for letter in word),
    "drop vowels": lambda word: "".join(letter for letter in word if letter not in _VOWELS),
    "swap ends": lambda word: word[-1] + word[1:-1] + word[0] if len(word) > 1 else word,
    "repeat last": lambda word: word + word[-1:],
    "sort": lambda word: "".join(sorted(word)),
    "cut last": lambda word: word[:-1],
    "rotate left": lambda word: word[1:] + word[:1],
}
_PAIRS = tuple(itertools.permutations(STEPS, 2))
# A ring: each step stands first once and second once.
FEW = tuple(zip(STEPS, [*list(STEPS)[1:], next(iter(STEPS))], strict=True))
LEARNED = tuple(pair for pair in _PAIRS if pair not in FEW)


@configclass
class BenchSize(Config):
    """Sizes of the bench.

    Attributes:
        dim, num_layers, num_heads: of the base.
        base_steps, base_rate: its training, of ``base_batch`` rows a step.
        words_learned, words_measured: how many words there are on each side.
        shots: examples of a task that is learned from few.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    base_steps: int = Field(default=3000, ge=1)
    base_batch: int = 64
    base_rate: float = 2e-3
    words_learned: int = 1200
    words_measured: int = 100
    shots: int = 32


def bench_words(size: BenchSize) -> tuple[list[str], list[str]]:
    """(words to learn, words to measure on): of 4 to 8 letters, with two consonants at least, in an order that is drawn once."""
    from pydoc_data.topics import topics

    found = sorted({word for text in topics.values() for word in re.findall(r"\b[a-z]{4,8}\b", text)})
    found = [word for word in found if sum(letter not in _VOWELS for letter in word) > 1]
    random.Random(0).shuffle(found)
    held = size.words_measured
    return found[held : held + size.words_learned], found[:held]


def name_of(pair: Sequence[str]) -> str:
    """The name of a task."""
    return " then ".join(pair)


def pair_rows(
    pairs: Sequence[Sequence[str]], words: Sequence[str], *, per_task: int, seed: int
) -> list[dict[str, str]]:
    """``per_task`` rows of each task, of words that are drawn for it."""
    rows = []
    for number, pair in enumerate(pairs):
        for word in random.Random(f"{seed} {number}").sample(list(words), min(per_task, len(words))):
            made = word
            for step in pair:
                made = STEPS[step](made)
            rows.append({"task": name_of(pair), "input": f"{name_of(pair)}: {word}", "output": made})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """A file that `anabranch.adapters.adapt` reads."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Singles(DecoderTask):
    """The base: single steps, learned by all of a decoder, loss on answers alone."""

    headline: ClassVar[str] = "nats_per_token"

    @configclass
    class Config(DecoderTask.Config):
        """Attributes: ``size``, of the bench."""

        size: BenchSize = BenchSize()

    config: Config

    def __init__(self, config: Any, *, model: nn.Module | None = None) -> None:
        super().__init__(config, model=model)
        self.tokenizer = ByteTokenizer.Config().build()

    def training_data(self, context: TaskContext) -> Examples:
        """Each word under each step."""
        words, _ = bench_words(self.config.size)
        rows = pair_rows([(step,) for step in STEPS], words, per_task=len(words), seed=0)
        return Examples(*_tensors(rows, self.tokenizer), seed=context.settings.seed)

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], context: TaskContext) -> Losses:
        """Cross-entropy of answers."""
        token_BL, target_BL = batch
        logits_BLV = model(token_BL.long()).logits_BLV
        return Losses.of(
            answer=F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.long().flatten(), ignore_index=-100)
        )


def _tensors(rows: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(token_NL, target_NL), padded on the right, where nothing is asked."""
    asked = [tokenizer.encode(row["input"] + "\n") for row in rows]
    said = [[*tokenizer.encode(row["output"]), tokenizer.eos_id] for row in rows]
    longest = max(len(one) + len(other) for one, other in zip(asked, said, strict=True)) - 1
    token_NL = torch.zeros(len(rows), longest, dtype=torch.int32)
    target_NL = torch.full((len(rows), longest), -100, dtype=torch.int32)
    for number, (one, other) in enumerate(zip(asked, said, strict=True)):
        ids = torch.tensor([*one, *other], dtype=torch.int32)
        token_NL[number, : len(ids) - 1] = ids[:-1]
        target_NL[number, len(one) - 1 : len(ids) - 1] = ids[len(one) :]
    return token_NL, target_NL


def kept_folder(told: Sequence[Any], make: Callable[[Path], Path]) -> Path:
    """What ``make`` left in the folder it is given, made once on a machine for all who tell the same.

    Args:
        told: what it depends on, JSON-ready, beside versions and this file.
        make: gives the folder that matters, in the one it is given. Whoever comes second waits.
    """
    own = [*told, __version__, torch.__version__, sha256_of(Path(__file__))]
    name = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    place = cache_folder() / "adapter_bench" / name
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "lock", wait_s=math.inf):
        told_in = place / "base.json"
        if not told_in.is_file():
            # What a killed process left is no base.
            shutil.rmtree(place / "run", ignore_errors=True)
            made = make(place / "run")
            atomic_write_json(told_in, {"folder": str(made.relative_to(place))})
        return place / json.loads(told_in.read_text("utf-8"))["folder"]


def whole_base(result: TrainResult) -> Path:
    """The checkpoint of a base. Raises KeyboardInterrupt where its training was interrupted: half of one would be kept for all who come."""
    if result.status != "finished":
        raise KeyboardInterrupt
    assert result.checkpoint is not None, "a run that ends has a checkpoint"
    return result.checkpoint


@dataclass(frozen=True)
class Bench:
    """The base of a size, in a folder.

    Attributes:
        folder: of the base, a model folder.
        size: of the bench.
    """

    folder: Path
    size: BenchSize

    @classmethod
    def kept(cls, size: BenchSize) -> "Bench":
        """The base of this size, which is trained once on a machine for all studies, arms and seeds, and kept in the cache folder.

        Its place says what it depends on: the size, versions, and this file. Whoever comes second waits.
        """
        return cls(kept_folder([to_dict(size)], lambda folder: cls.make(folder, size).folder), size)

    @classmethod
    def make(cls, folder: Path, size: BenchSize) -> "Bench":
        """Train the base, where ``folder`` holds none yet. One seed for all arms: they are compared on one base."""
        model = Decoder.Config(
            dim=size.dim,
            num_layers=size.num_layers,
            attention=SelfAttention.Config(num_heads=size.num_heads),
            feed_forward=SwiGLU.Config(hidden_dim=size.dim * 8 // 3 // 8 * 8),
            max_positions=96,
        )
        train = TrainConfig(
            steps=size.base_steps,
            batch_size=size.base_batch,
            learning_rate=size.base_rate,
            weight_decay=0.01,
            eval_every=None,
            checkpoint_every=None,
            device="cpu",
        )
        result = Trainer(TaskRunConfig(task=Singles.Config(model=model, size=size), train=train), folder).fit()
        return cls(whole_base(result), size)


Telling = Callable[[Sequence[str], int], AbstractContextManager[Any]]


@torch.no_grad()
def accuracy(
    model: Decoder,
    pairs: Sequence[Sequence[str]],
    size: BenchSize,
    *,
    routed: bool,
    telling: Telling | None = None,
    words: Sequence[str] | None = None,
) -> float:
    """The share of answers that are right to the letter, on words that were not learned (``words``, or all of these); greedy.

    ``routed`` tells each pass its task; ``telling`` is another block that tells it something, of a pair and so many rows.
    """
    tokenizer = ByteTokenizer.Config().build()
    words = bench_words(size)[1] if words is None else words
    right, asked = 0, 0
    for pair in pairs:
        rows = pair_rows([pair], words, per_task=len(words), seed=1)
        prompts = [tokenizer.encode_prompt(row["input"] + "\n") for row in rows]
        assert tokenizer.eos_id is not None
        sampling = SamplingConfig(max_tokens=12, temperature=0.0, stop=(tokenizer.eos_id,))
        told = telling(pair, len(rows)) if telling is not None else nullcontext()
        with on_tasks(model, name_of(pair)) if routed else told:
            made = generate(model, prompts, sampling)
        right += sum(tokenizer.decode(ids) == row["output"] for ids, row in zip(made, rows, strict=True))
        asked += len(rows)
    return right / asked

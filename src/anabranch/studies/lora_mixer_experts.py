"""The experts of the study of LoRA-Mixer: six adapters, each trained on its task alone, and kept for all arms of a seed.

They lie in a file of their own since they are kept under its digest: arms and claims may come without training them anew.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.adapters.adapt import AdaptTask, Lora, Method
from anabranch.config import to_dict
from anabranch.files import atomic_write_json, sha256_of
from anabranch.studies.adapter_bench import (
    LEARNED,
    Bench,
    accuracy,
    bench_words,
    kept_folder,
    pair_rows,
    whole_base,
    write_rows,
)
from anabranch.studies.harness import Progress
from anabranch.studies.lora_mixer_ssm import StateSpaceSize
from anabranch.train import TaskRunConfig, TrainConfig, Trainer

if TYPE_CHECKING:
    from anabranch.studies.lora_mixer import Size

ATTENTION, FEED_FORWARD = ("*.attention.*",), ("gate", "up", "down")
Rows = list[dict[str, str]]


def experts(
    size: "Size", seed: int, bench: Bench, progress: Progress, targets: tuple[str, ...] = ATTENTION
) -> tuple[tuple[str, ...], float]:
    """(folders of the experts, how often each is right on its own task): trained once on a machine for all arms of a seed."""
    pairs = pairs_of(size)

    def make(folder: Path) -> Path:
        right = []
        folder.mkdir(parents=True)
        for number, pair in enumerate(pairs):
            progress(f"expert {number + 1}")
            with tempfile.TemporaryDirectory(prefix="anabranch-study-") as place:
                rows = write_rows(Path(place) / "rows.jsonl", own_rows(size, seed, number))
                method = Lora.Config(rank=size.rank, alpha=size.alpha, targets=targets)
                task = trained(method, bench, rows, Path(place) / "run", size.expert_steps, size, seed)
                right.append(accuracy(task.base, [pair], size.bench, routed=False))
                task.write(folder / str(number))
        atomic_write_json(folder / "oracle.json", {"right": right})
        return folder

    # What they depend on: all but what routers alone learn from.
    shared = to_dict(size.replace(rows=(), router_steps=1, ssm=StateSpaceSize()))
    place = kept_folder(["experts of lora_mixer", seed, shared, list(targets), sha256_of(Path(__file__))], make)
    right = json.loads((place / "oracle.json").read_text("utf-8"))["right"]
    return tuple(str(place / str(number)) for number in range(len(pairs))), sum(right) / len(right)


def pairs_of(size: "Size") -> Sequence[tuple[str, str]]:
    """The tasks."""
    return LEARNED[:: len(LEARNED) // size.tasks][: size.tasks]


def own_rows(size: "Size", seed: int, number: int) -> Rows:
    """What expert ``number`` learns from."""
    words, _ = bench_words(size.bench)
    return pair_rows([pairs_of(size)[number]], words, per_task=size.expert_rows, seed=seed + number)


def mixed_rows(size: "Size", seed: int, count: int) -> Rows:
    """About ``count`` rows, as many of each task."""
    words, _ = bench_words(size.bench)
    return pair_rows(pairs_of(size), words, per_task=max(1, count // size.tasks), seed=seed + 100)


def trained(method: Method.Config, bench: Bench, rows: Path, out: Path, steps: int, size: "Size", seed: int) -> Any:
    """The task after its training."""
    task = AdaptTask.Config(model=str(bench.folder), data=str(rows), method=method, sequence_length=96, held_out=0.0)
    train = TrainConfig(
        steps=steps,
        batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        weight_decay=0.0,
        eval_every=None,
        checkpoint_every=None,
        device="cpu",
        seed=seed,
    )
    trainer = Trainer(TaskRunConfig(task=task, train=train), out)
    whole_base(trainer.fit())
    return trainer.task

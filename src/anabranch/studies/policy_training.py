"""`train_policy`: one training of a policy in a study, and what it is measured by."""

import tempfile
import time
from pathlib import Path
from typing import Any

from anabranch.rl.runs import samples_of
from anabranch.studies.harness import Metrics, Progress
from anabranch.train import Event, TaskRunConfig, Trainer

__all__ = ["train_policy"]

# Seconds between two lines of a long training.
_TOLD_EVERY_S = 15.0


def train_policy(config: TaskRunConfig, seed: int, progress: Progress) -> Metrics:
    """What a policy came to, measured at the end of its training, and what that took.

    ``seed`` takes the place of the config's.
    """
    said = time.monotonic()

    def tell(event: Event) -> None:
        nonlocal said
        if event.kind == "step" and time.monotonic() - said > _TOLD_EVERY_S:
            said = time.monotonic()
            progress(f"step {event.step:,} of {event.steps:,}")

    config = config.replace(train=config.train.replace(seed=seed, checkpoint_every=None))
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        trainer = Trainer(config, Path(folder) / "run", on_event=tell)
        try:
            result = trainer.fit()
        finally:
            trainer.stream.close()
    samples, task = samples_of(config, result.step), config.task
    measured: dict[str, Any] = {name: value for name, value in result.measures.items() if name not in ("step", "kind")}
    return {
        **measured,
        "samples": samples,
        "updates": samples // task.collecting.num_samples,  # type: ignore[attr-defined]
        "gradient_steps": result.step - result.skipped_steps,
        "learning_rate": config.train.learning_rate,
        "seconds": result.seconds,
        "samples_per_second": samples / max(result.seconds, 1e-9),
    }

"""The arms ``superni-`` of the study of MHR: an inventory of adapters on SmolLM2-135M and real tasks.

32 tasks of Super-NaturalInstructions, one of each category, are learned together; 6 further ones are learned from 32 examples each. Rows
that are judged, and those examples, are others for each seed (`superni.rows_for_seed`).
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anabranch.adapters import load_peft
from anabranch.adapters.adapt import Row, measure_rows
from anabranch.adapters.own_folder import is_own, read_own
from anabranch.adapters.tasks import on_tasks
from anabranch.lm import Decoder, load_model
from anabranch.studies import superni
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.small_model import find_weights

if TYPE_CHECKING:
    from anabranch.studies.mhr import ArmConfig

Telling = Callable[[Sequence[Row]], AbstractContextManager[Any]]
# What the paper adapts of Natural Instructions' models.
TARGETS = ("q", "k", "v", "o")
_SHOTS_SEED = 1000


def run(config: "ArmConfig", seed: int, progress: Progress) -> Metrics:
    """Learn the tasks together; then look at new ones without an example, and learn each from few, in all ways that there are."""
    from anabranch.studies.peft_survey import trained

    torch.set_num_threads(1)
    size, weights, routed = config.size, find_weights(), config.method != "lora"
    tasks, new = superni.some_tasks(size.real_tasks, size.real_new)
    asked = {name: superni.rows_for_seed(name, "test", size.real_rows, seed) for name in (*tasks, *new)}
    options: dict[str, Any] = {"length": size.real_length, "dtype": "bfloat16", "rate": config.learning_rate}
    tokenizer = load_model(weights)[1]
    assert tokenizer is not None, "the file has one"

    def scores(model: Decoder, rows: Sequence[Row], name: str, telling: Telling) -> Metrics:
        found = measure_rows(
            model,
            tokenizer,
            rows,
            most_tokens=size.real_length,
            batch_size=4,
            max_new_tokens=size.real_new_tokens,
            telling=telling,
        ).all
        assert found.rouge_l is not None, "answers were asked for"
        return {f"better{name}": -found.nats_per_token, f"rouge{name}": found.rouge_l}

    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        place = Path(folder)
        progress(f"{len(tasks)} tasks")
        rows = superni.write_task(
            place / "rows.jsonl", [row for task in tasks for row in superni.rows_of(task, "train")]
        )
        method = config.of(targets=TARGETS)
        task: Any = trained(
            method, str(weights), rows, place / "all", seed, steps=size.real_steps, batch=size.real_batch, **options
        )
        found = scores(task.base, [row for task in tasks for row in asked[task]], "", _telling(task.base, routed))
        fresh = [row for name in new for row in asked[name]]
        found |= scores(task.base, fresh, "_zero", _telling(task.base, routed, unknown="average"))
        adapter = task.write(place / "adapter").folder
        begin = None if routed else _state(weights, adapter)
        del task
        few: dict[str, list[Metrics]] = {}
        for number, name in enumerate(new):
            examples = superni.rows_for_seed(name, "train", size.bench.shots, seed)
            shots = superni.write_task(place / f"{number}.jsonl", examples)
            for mode in ("full", "z", "mu", "random") if routed else ("full",):
                progress(f"{name}: {mode}")
                way = config.of(targets=TARGETS, start=str(adapter), mode=mode) if routed else method
                own: Any = trained(
                    way,
                    str(weights),
                    shots,
                    place / f"{mode}-{number}",
                    seed + _SHOTS_SEED,
                    begin=begin,
                    steps=size.real_few_steps,
                    batch=size.real_few_batch,
                    **options,
                )
                few.setdefault(mode, []).append(
                    scores(own.base, asked[name], f"_few_{mode}", _telling(own.base, routed and mode != "mu"))
                )
        return found | {
            name: sum(each[name] for each in values) / len(values) for values in few.values() for name in values[0]
        }


def _telling(model: Decoder, routed: bool, **options: Any) -> Telling:
    """What says to a routed model the tasks of some rows."""
    if not routed:
        return lambda rows: nullcontext()
    return lambda rows: on_tasks(model, [row.task for row in rows], **options)


def _state(weights: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Numbers of the model with the adapter beside it, from which a training of the same method goes on."""
    base, _ = load_model(weights, dtype=torch.bfloat16)
    (read_own if is_own(adapter) else load_peft)(adapter, base)
    return base.state_dict()

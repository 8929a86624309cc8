"""The arm ``superni`` of the study of GLIDER: adapters of real tasks on SmolLM2-135M, told apart by their definitions."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anabranch.adapters.adapt import Lora, measure_rows
from anabranch.adapters.glider import describe_expert
from anabranch.lm import Decoder, load_model
from anabranch.studies import superni
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.small_model import find_weights

if TYPE_CHECKING:
    from anabranch.studies.glider import Size

TARGETS = ("q", "v", "down")


def run(size: "Size", seed: int, place: Path, progress: Progress) -> Metrics:
    """Train the adapters and their gates, each on its own task, and ask all ways."""
    from anabranch.studies.glider import Asking, measured, trained_expert

    torch.set_num_threads(1)
    weights = find_weights()
    tasks, others = superni.some_tasks(size.real_pool, size.real_others)
    told = superni.definitions()
    pool: dict[str, Path] = {}
    for number, task in enumerate(tasks):
        progress(f"adapter {number + 1} of {len(tasks)}")
        rows = superni.write_task(place / f"{number}.jsonl", superni.rows_of(task, "train"))
        pool[task] = trained_expert(
            weights,
            rows,
            place / str(number),
            Lora.Config(targets=TARGETS, rank=size.rank),
            seed,
            steps=(size.real_steps, size.real_gate_steps),
            rates=(size.real_rate, size.gate_rate),
            batch=size.real_batch,
            length=size.real_length,
            dtype="bfloat16",
        )
        describe_expert(pool[task], instruction=told[task])
    tokenizer = load_model(weights)[1]
    assert tokenizer is not None, "the file has one"

    def measure(model: Decoder, task: str, telling: Any) -> float:
        rows = superni.rows_of(task, "test")[: size.real_rows]

        def block(some: Any) -> Any:
            return telling([row.prompt for row in some])

        scores = measure_rows(model, tokenizer, rows, most_tokens=size.real_length, batch_size=4, telling=block)
        return -scores.all.nats_per_token

    asked = (Asking(some, None, measure) for some in (tasks, others))
    held_in, held_out = asked
    return measured(weights, pool, held_in, held_out, progress, dtype=torch.bfloat16)

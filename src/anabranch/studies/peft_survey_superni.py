"""The arms ``superni-`` of the study of the PEFT survey: methods on SmolLM2-135M and real tasks."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anabranch.adapters.adapt import Row, measure_rows
from anabranch.lm import Decoder, load_model
from anabranch.studies import superni
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.small_model import find_weights

if TYPE_CHECKING:
    from anabranch.studies.peft_survey import ArmConfig


def run(config: "ArmConfig", seed: int, progress: Progress) -> Metrics:
    """Each rate; the best by half of the held-out rows, measured on the others."""
    from anabranch.studies.peft_survey import costs, trained

    torch.set_num_threads(1)
    size, weights = config.size, find_weights()
    tasks = [task for own in superni.categories().values() for task in own][: size.real_tasks]
    learned = [row for task in tasks for row in superni.rows_of(task, "train")]
    held = [superni.rows_for_seed(task, "test", size.real_rows, seed) for task in tasks]
    chosen, measured = ([row for own in held for row in own[half::2]] for half in (0, 1))
    base, tokenizer = load_model(weights, dtype=torch.bfloat16)
    assert tokenizer is not None, "the file has one"

    def nats(model: Decoder, rows: list[Row]) -> float:
        return measure_rows(model, tokenizer, rows, most_tokens=size.real_length, batch_size=4).all.nats_per_token

    progress("the model as it was")
    found: Metrics = {"better_base": -nats(base, measured)}
    del base
    best: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        place = Path(folder)
        rows = superni.write_task(place / "rows.jsonl", learned)
        for rate in size.real_rates:
            progress(f"rate {rate:g}")
            task: Any = trained(
                config.of(),
                str(weights),
                rows,
                place / f"{rate:g}",
                seed,
                steps=size.real_steps,
                batch=size.real_batch,
                rate=rate,
                length=size.real_length,
                dtype="bfloat16",
            )
            score = nats(task.base, chosen)
            if best is None or score < best[0]:
                best = (score, rate)
                own = nats(task.base, measured)
                gained = -own - found["better_base"]
                found |= {"nats": own, "better": -own, "gained": gained, "rate": rate, **costs(config, task)}
                found["at_an_end"] = float(rate in (size.real_rates[0], size.real_rates[-1]))
    return found

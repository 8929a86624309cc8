"""The arms ``one`` and ``hub`` of the study of LoRA-Mixer: what one may do with the same rows in the place of routers."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.adapters import load_peft, read_peft, write_peft
from anabranch.adapters.adapt import Lora, read_rows
from anabranch.adapters.algebra import combine
from anabranch.adapters.lorahub import lorahub_weights
from anabranch.lm import load_model
from anabranch.studies.adapter_bench import Bench, accuracy, write_rows
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.lora_mixer_experts import Rows, experts, mixed_rows, own_rows, pairs_of, trained

if TYPE_CHECKING:
    from anabranch.studies.lora_mixer import Size


def run_one(size: "Size", seed: int, progress: Progress) -> Metrics:
    """One adapter with the ranks of all experts together: from the rows of routers for their steps, and from all rows for all steps."""
    bench, most = _bench(size, progress), size.rows[-1]
    method = Lora.Config(rank=size.rank * size.tasks, alpha=size.alpha * size.tasks)

    def right(rows: Rows, steps: int) -> float:
        with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
            data = write_rows(Path(folder) / "rows.jsonl", rows)
            task = trained(method, bench, data, Path(folder) / "run", steps, size, seed)
            return accuracy(task.base, pairs_of(size), size.bench, routed=False)

    progress(f"one adapter, {most} rows")
    mixed = mixed_rows(size, seed, most)
    found = {f"accuracy_{most}": right(mixed, size.router_steps)}
    progress("one adapter, all rows")
    whole = [*(row for number in range(size.tasks) for row in own_rows(size, seed, number)), *mixed]
    return {**found, "whole": right(whole, size.tasks * size.expert_steps + size.router_steps)}


def run_hub(size: "Size", seed: int, progress: Progress) -> Metrics:
    """The experts of the seed, weighed once for all tokens by LoRAHub on the rows of routers."""
    bench, most = _bench(size, progress), size.rows[-1]
    folders, oracle = experts(size, seed, bench, progress)
    adapters = [read_peft(folder) for folder in folders]
    base, tokenizer = load_model(bench.folder)
    assert tokenizer is not None, "the base of the bench has a tokenizer"
    progress(f"weights, {most} rows")
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        rows = read_rows(write_rows(Path(folder) / "rows.jsonl", mixed_rows(size, seed, most)))
        found = lorahub_weights(adapters, base, tokenizer, rows, search_seed=seed, batch_size=size.batch_size)
        if any(found.weights):
            write_peft(Path(folder) / "mixed", combine(adapters, found.weights, "linear").adapter)
            base = load_peft(Path(folder) / "mixed", base)
        right = accuracy(base, pairs_of(size), size.bench, routed=False)
    gained = found.base_loss - found.loss
    return {"oracle": oracle, f"accuracy_{most}": right, "weights": list(found.weights), "gained_nats": gained}


def _bench(size: "Size", progress: Progress) -> Bench:
    progress("base")
    return Bench.kept(size.bench)

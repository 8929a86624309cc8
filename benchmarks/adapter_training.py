"""What does training take by each method of the PEFT survey's study: memory, and tokens a second?

Every method trains in a process of its own, by the trainer, on a base of random numbers in the shape of SmolLM2-135M (float32):

    memory     the highest resident size (ru_maxrss) of that process, over that of an idle one: the same, that has made the base and no more
    speed      tokens of a step over its time, the median of all steps but the first; with one thread, the processor's time
    kept       bytes that one forward pass keeps for the backward one, weights left out, LST's against LoRA's. bar: 2, at most half
    mezo       the highest resident size of a process in which the whole model learns by MeZO, over that of one that has imported
               everything and made no base, against the same of a process that computes losses without gradients. bar: 0.91,
               within a tenth

Options of methods are those of the study (`anabranch.studies.peft_survey.METHODS`).

    python benchmarks/adapter_training.py --threads 1 --json benchmarks/results/adapter_training.json
"""
# Shapes: B rows, L tokens

import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _harness import arguments, finish, start
from anabranch.adapters.adapt import method_named
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.peft_survey import METHODS
from anabranch.train import Constant, Losses, Task, TaskRunConfig, TrainConfig, Trainer

EMPTY, IDLE, INFERENCE, MEZO = "empty", "idle", "inference", "mezo"
SMOLLM2 = Decoder.Config(
    vocab_size=49152,
    dim=576,
    num_layers=30,
    attention=SelfAttention.Config(num_heads=9, num_kv_heads=3),
    feed_forward=SwiGLU.Config(hidden_dim=1536),
)
SMALL = SMOLLM2.replace(vocab_size=512, dim=144, num_layers=4, feed_forward=SwiGLU.Config(hidden_dim=384))
# Rows, tokens of a row, steps.
SIZES = {"full": (4, 256, 6), "quick": (2, 64, 3)}


class Rows:
    """The same batch at every step."""

    def __init__(self, token_BL: Tensor) -> None:
        self.token_BL = token_BL

    def next_batch(self, batch_size: int) -> Tensor:
        """int64 [B, L + 1]."""
        return self.token_BL

    def state_dict(self) -> dict[str, Any]:
        """Nothing moves."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing moves."""


class Learning(Task):
    """A model that learns a batch by one method; steps are timed between each other."""

    headline = "none"
    decoder: Decoder
    token_BL: Tensor

    def __init__(self, config: Task.Config, *, model: nn.Module | None = None) -> None:
        super().__init__(config, model=model)
        self.ends: list[float] = []
        self.peak = 0.0

    def build_model(self, context: Any) -> nn.Module:
        """The adapted one."""
        return self.decoder

    def training_data(self, context: Any) -> Rows:
        """One batch."""
        return Rows(self.token_BL)

    def step(self, model: nn.Module, batch: Tensor, context: Any) -> Losses:
        """Nats per token."""
        return Losses.of(nats=model(batch[:, :-1], target_BL=batch[:, 1:]).loss)

    def on_step(self, step: int, fraction: float) -> None:
        """The time, and the memory so far: what a checkpoint takes at the end is not of training."""
        self.ends.append(clock())
        self.peak = peak_mb()


def clock() -> float:
    """The processor's seconds where one thread works."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_mb() -> float:
    """The highest resident size of this process, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def kept_bytes(model: Decoder, token_BL: Tensor) -> int:
    """What one forward pass keeps for the backward one, the model's own numbers left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until all is counted, or places would be taken twice.
        _loss = model.train()(token_BL[:, :-1], target_BL=token_BL[:, 1:]).loss
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    return sum(size for place, size in seen.items() if place not in own)


def one(what: str, size: str) -> dict[str, float]:
    """The figures of this process."""
    if what == EMPTY:
        return {"peak_mb": peak_mb()}
    rows, length, steps = SIZES[size]
    model = (SMOLLM2 if size == "full" else SMALL).build(seed=0)
    token_BL = torch.randint(model.config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    if what == IDLE:
        return {"peak_mb": peak_mb()}
    if what == INFERENCE:
        with torch.no_grad():
            for _ in range(steps):
                model(token_BL[:, :-1], target_BL=token_BL[:, 1:])
        return {"peak_mb": peak_mb()}
    if what != MEZO:
        method_named(what).replace(**METHODS[what]).build().begin(model, (), seed=0)
    task = type("Of", (Learning,), {"decoder": model, "token_BL": token_BL})
    train = TrainConfig(
        steps=steps,
        batch_size=rows,
        learning_rate=1e-6,
        schedule=Constant.Config(),
        optimizer="mezo" if what == MEZO else "adamw",
        weight_decay=0.0,
        eval_every=None,
        checkpoint_every=None,
        device="cpu",
    )
    with tempfile.TemporaryDirectory(prefix="anabranch-benchmark-") as folder:
        trainer = Trainer(TaskRunConfig(task=task.Config(), train=train), Path(folder) / "run")
        trainer.fit()
        ends = trainer.task.ends
    times = [after - before for before, after in itertools.pairwise(ends[1:])]
    found = {"peak_mb": trainer.task.peak, "tokens_per_s": rows * length / statistics.median(times)}
    # After what was measured, so that it adds nothing to it.
    return found if what == MEZO else {**found, "kept_mb": kept_bytes(model, token_BL) / 2**20}


def measured(what: str, options: Any) -> dict[str, float]:
    """`one` in a process of its own."""
    size = "quick" if options.quick else "full"
    command = [sys.executable, __file__, "--one", what, "--size", size, "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{what:<20} " + "   ".join(f"{name} {value:,.1f}" for name, value in found.items()), file=sys.stderr)
    return found


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of a record, of what each process measured, round by round."""

    def median(what: str, name: str) -> float:
        return statistics.median(each[name] for each in found[what])

    idle, empty, rows = median(IDLE, "peak_mb"), median(EMPTY, "peak_mb"), []
    for id in [id for id in METHODS if id in found]:
        for told, unit, name, less in (
            ("tokens a second of training", "tokens/s", "tokens_per_s", 0.0),
            ("peak resident size over an idle process with the base", "MB", "peak_mb", idle),
            ("kept for the backward pass", "MB", "kept_mb", 0.0),
        ):
            each = [run[name] - less for run in found[id]]
            alone = {"peer": None, "ratio": None, "peer_name": None}
            rows.append(
                {
                    "case": f"{id}, {told}",
                    "ours": round(statistics.median(each), 2),
                    "unit": unit,
                    "spread": [round(min(each), 2), round(max(each), 2)],
                    **alone,
                }
            )
    if {"lst", "lora"} <= found.keys():
        rows.append(_against("lst, kept for the backward pass against LoRA's", "lst", "lora", found, "kept_mb", 0.0))
    if {MEZO, INFERENCE} <= found.keys():
        rows.append(_against("mezo, peak with the base against inference", MEZO, INFERENCE, found, "peak_mb", empty))
    return rows


def _against(
    case: str, ours: str, theirs: str, found: dict[str, list[dict[str, float]]], name: str, less: float
) -> dict[str, Any]:
    mine, peers = ([run[name] - less for run in found[who]] for who in (ours, theirs))
    ratios = [other / own for own, other in zip(mine, peers, strict=True)]
    return {
        "case": case,
        "ours": round(statistics.median(mine), 2),
        "peer": round(statistics.median(peers), 2),
        "unit": "MB",
        "peer_name": theirs,
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(max(ratios) - min(ratios), 3),
        "per_round": {"ours": mine, "peer": peers},
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--one", metavar="WHAT", help="measure this in this very process; the others start such")
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="of --one")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    start(options)
    if options.one is not None:
        print(json.dumps(one(options.one, options.size)))
        return
    beside = [EMPTY, IDLE, INFERENCE, MEZO]
    names = [*beside, *(id for id in METHODS if options.only in id)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(measured(name, options))
    finish("adapter_training", rows_of(found), options, ["torch", "anabranch"])


if __name__ == "__main__":
    main()

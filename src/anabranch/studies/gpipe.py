"""Is GPipe's update that of the unsplit model, does its bubble follow the law, and what do two cores and recomputation give?

"GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", Huang et al., arXiv 1811.06965 (NeurIPS 2019): synchronous
gradients, whatever the number of partitions; a bubble of (K - 1) / (M + K - 1), negligible from M = 4 K on; activation memory of
O(N + (L / K)(N / M)) with re-materialisation against O(N L). On TPUs K = 2, 4, 8 with M = 32 gave 1.21, 1.84 and 3.48 times the throughput
of K = 2 with M = 1 on AmoebaNet-D.

Arms:

    exact-MODEL      E1. An MLP, a residual CNN with batch norms, a small language model, in float64: gradients for every K, M, mode of
                     recomputation and schedule against the unsplit model's. Of the CNN also deferred running statistics.
    bubble-K         E2. K = 2, 4, 8 processes whose stages sleep; M = 1 to 32. Sleeping stages need no processor, so this tests what the
                     schedule and its messages add, and not arithmetic.
    speed            E3. Two ranks of one thread on two cores, M = 8, against one process of one thread.
    memory           E4. Bytes kept between forward and backward over depth; how deep a model fits the bytes of a naive one.
    lm-K             E5. A language model with dropout trained on text in 1 and in 4 stages.

Scaled down from accelerators to two cores. The rule, fixed before any recorded run, each in every seed; with fewer than two seeds nothing
is resolved. E1: differences at most 1e-10, of statistics at most 1e-6. E2: time within 8 % of the law, idle share within 0.03. E3: at
least 1.5, judged only where two products at once have 0.8 of the speed of one; losses equal to 1e-4. E4: slope of always at most 0.35 of
naive's, at least 3 times as deep on one stage and 10 times on four. E5: validation losses equal to 1e-4.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import INK, MARKERS, SERIES, figure, to_png, to_svg
from anabranch.studies.gpipe_runs import Bubble, Exact, Memory, Speed, Transparency, run
from anabranch.studies.harness import Arm, Claim, Column, Results, Study
from anabranch.studies.paired import Verdict

MODELS, STAGES = ("mlp", "cnn", "lm"), (2, 4, 8)
BUBBLES = tuple(f"bubble-{count}" for count in STAGES)
LEAST_CORES = 0.8
# The same sums in another order, in float64: nothing but rounding lies between them. That tests our code, and says nothing for the paper.
EXACT = (
    *(f"E1: gradients of the unsplit {model} to 1e-10" for model in MODELS),
    "E1: deferred running statistics to 1e-6",
)
COLUMNS = (
    Column("gradient", "gradients\n(relative)", ".1e"),
    Column("statistics", "statistics\n(relative)", ".1e"),
    Column("time_off", "time off\nthe law", ".3f"),
    Column("idle_off", "idle off\nthe law", ".3f"),
    Column("speedup", "over one\nprocess", ".3f"),
    Column("cores", "two cores\nat once", ".2f"),
    Column("slope_ratio", "slope over\nnaive", ".3f"),
    Column("depth_gain_1", "depth,\none stage", ".1f"),
    Column("depth_gain_4", "depth,\nfour stages", ".1f"),
    Column("validation", "nats/token", ".4f"),
)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``steps`` are those of E5."""
    steps = changes.pop("steps", 300 if full else 20)
    chosen = arms(full, steps, **changes)
    return Study(
        name="gpipe",
        title="pipelines: exact gradients, the law of the bubble, speed on two cores, memory, the same learning",
        settings={"size": "full" if full else "smoke", "steps": steps, **changes},
        arms=list(chosen.values()),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        seeds=(0, 1, 2, 3, 4) if full else (0,),
        exact=EXACT,
    )


def arms(full: bool, steps: int, *, stages: tuple[int, ...] = STAGES) -> dict[str, Arm]:
    """All arms; ``stages`` of the bubble."""
    exact: dict[str, Any] = {} if full else {"stages": (1, 2), "micro_batches": (1, 3)}
    bubble: dict[str, Any] = {} if full else {"micro_batches": (1, 4), "sleep_s": 0.02, "repeats": 1}
    speed: dict[str, Any] = {} if full else {"width": 32, "layers": 2, "sequences": 8, "length": 8, "rounds": 1}
    memory: dict[str, Any] = (
        {} if full else {"depths": (8, 16), "width": 16, "items": 64, "micro_batches": 8, "budget_depth": 8}
    )
    small: dict[str, Any] = {} if full else {"width": 16, "layers": 4, "batch": 8, "length": 16}
    made = [
        *(Arm(f"exact-{model}", f"E1: gradients, {model}", Exact(model=model, **exact)) for model in MODELS),
        *(Arm(f"bubble-{count}", f"E2: {count} sleeping stages", Bubble(stages=count, **bubble)) for count in stages),
        Arm("speed", "E3: two ranks against one process", Speed(**speed)),
        Arm("memory", "E4: bytes kept over depth", Memory(**memory)),
        *(
            Arm(
                f"lm-{count}",
                f"E5: a language model in {count} stages",
                Transparency(stages=count, steps=steps, **small),
            )
            for count in (1, 4)
        ),
    ]
    return {arm.name: arm for arm in made}


# Judgement


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    claims = [
        _each(
            results.values(f"exact-{model}", "gradient"),
            1e-10,
            f"E1: gradients of the unsplit {model} to 1e-10",
            "equal",
        )
        for model in MODELS
    ]
    claims.append(
        _each(results.values("exact-cnn", "statistics"), 1e-6, "E1: deferred running statistics to 1e-6", "equal")
    )
    for count in STAGES:
        of = f"bubble-{count}"
        law = f"{count - 1} / (M + {count - 1})"
        claims += [
            _each(results.values(of, "time_off"), 0.08, f"E2: {count} stages take (M + K - 1) slots within 8 %", law),
            _each(results.values(of, "idle_off"), 0.03, f"E2: {count} stages idle by the law within 0.03", law),
        ]
    claims.append(_speed(results))
    held = "E4: with recomputation bytes grow by at most 0.35 of naive's"
    deep_1, deep_4 = "E4: 3 times as deep in the same bytes on one stage", "E4: 10 times as deep on four stages"
    gain_1, gain_4 = (results.values("memory", f"depth_gain_{count}") for count in (1, 4))
    claims += [
        _each(results.values("speed", "loss_off"), 1e-4, "E3: losses of one process to 1e-4", "equal"),
        _each(results.values("memory", "slope_ratio"), 0.35, held, "N + (L/K)(N/M)"),
        _each(gain_1, 3.0, deep_1, "318M of 82M parameters", is_least=True),
        _each(gain_4, 10.0, deep_4, "1.05B of 82M parameters", is_least=True),
        _equal(
            results, "E5: validation loss in 4 stages as in 1 to 1e-4", "21.99 and 22.02 % top-1 error (torchgpipe)"
        ),
    ]
    return claims


def _each(values: dict[int, float], limit: float, claim: str, paper: str, *, is_least: bool = False) -> Claim:
    """At most (or at least) ``limit`` in every seed; the worst stands in the claim."""
    if not values:
        return Claim.not_run(claim, paper)
    worst = min(values.values()) if is_least else max(values.values())
    return Claim.against(
        limit, claim, paper, worst, _verdict(values, lambda value: value >= limit if is_least else value <= limit)
    )


def _verdict(values: dict[int, float], holds: Callable[[float], bool]) -> Verdict:
    if len(values) < 2:
        return "not resolved"
    return "holds" if all(map(holds, values.values())) else "does not hold"


def _speed(results: Results) -> Claim:
    claim, paper = "E3: two ranks on two cores have 1.5 times the throughput of one process", "1.21 (K = 2, M = 32)"
    values = results.values("speed", "speedup")
    if not values:
        return Claim.not_run(claim, paper)
    cores = results.values("speed", "cores")
    # Where the machine has no second core to give, nothing was tested.
    judged = _verdict(values, lambda value: value >= 1.5)
    is_tested = all(cores.get(seed, 0.0) >= LEAST_CORES for seed in values)
    return Claim.against(1.5, claim, paper, min(values.values()), judged if is_tested else "not resolved")


def _equal(results: Results, claim: str, paper: str) -> Claim:
    one, four = results.values("lm-1", "validation"), results.values("lm-4", "validation")
    off = {seed: abs(four[seed] - one[seed]) for seed in one.keys() & four.keys()}
    return _each(off, 1e-4, claim, paper)


def draw(results: Results, path: Path) -> None:
    """Idle shares of sleeping stages beside the law, and bytes kept over depth: what has run of them."""
    parts = [part for part, names in ((draw_bubble, BUBBLES), (draw_memory, ("memory",))) if has_run(results, names)]
    if not parts:
        return
    with figure(4.5 * len(parts), 3.4, ncols=len(parts)) as (made, axes):
        for part, each in zip(parts, [axes] if len(parts) == 1 else axes, strict=True):
            part(results, each)
            each.axhline(0, color=INK, linewidth=0.8)
            each.legend()
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)


def has_run(results: Results, names: Sequence[str]) -> bool:
    """Whether any of these arms has."""
    return any(results.runs.get(name) for name in names)


def draw_bubble(results: Results, axes: Any) -> None:
    """Idle shares over micro-batches, a mark for each run, and the law."""
    made = arms(True, 1)
    for number, (count, name) in enumerate(zip(STAGES, BUBBLES, strict=True)):
        law = [(count - 1) / (m + count - 1) for m in range(1, 33)]
        axes.plot(range(1, 33), law, color=SERIES[number], linewidth=1, label=f"K = {count}")
        config = made[name].config
        for metrics in results.runs.get(name, {}).values():
            if len(metrics["seconds"]) == len(config.micro_batches):
                pairs = zip(config.micro_batches, metrics["seconds"], strict=True)
                idle = [1 - m * 2 * config.sleep_s / taken for m, taken in pairs]
                axes.plot(config.micro_batches, idle, MARKERS[number], color=SERIES[number], markersize=4)
    axes.set(xlabel="micro-batches M", ylabel="idle share", title="The bubble: measured and (K - 1) / (M + K - 1)")


def draw_memory(results: Results, axes: Any) -> None:
    """What is kept between forward and backward over depth, in the first run: bytes have no chance in them."""
    curves = next(iter(results.runs["memory"].values()))["curves"]
    depths = arms(True, 1)["memory"].config.depths[: len(curves["naive"])]
    # Without recomputation as much is kept in stages as by the unsplit model: the one is drawn through the other.
    for number, (mode, label) in enumerate(
        (("naive", "unsplit"), ("never", "stages, no recomputation"), ("always", "stages, recomputed"))
    ):
        sizes = [size / 2**20 for size in curves[mode]]
        style = {"linestyle": "--", "dashes": (3, 3)} if mode == "never" else {}
        axes.plot(depths, sizes, color=SERIES[number], marker=MARKERS[number], label=label, **style)
    axes.set(xlabel="layers", ylabel="MiB kept", xticks=depths, title="Between forward and backward")

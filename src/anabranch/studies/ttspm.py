"""Do predicted and observed saturation points of sampling agree, and does stopping by them pay?

"Scaling over Scaling: Exploring Test-Time Scaling Plateau in Large Reasoning Models", Wang et al. 2025, arXiv 2505.20522. The paper:
Pearson's r of 0.803 between predicted and observed saturation points (7B, parallel, MATH-500); 53.3 % against 30.0 % with 32 samples
(1.5B, AIME 2024).

Scaled down: character models learn sums of six kinds (`ttspm_sums`); 100 held questions of each kind have 64 samples at temperature 0.8
and 8 rounds of thinking over. Two sizes of model and six kinds are twelve settings. Curves are fitted to the first 8 samples, N* is read
for gains of 0.02, 0.01 and 0.005 off the fit and off the curve of all 64 (N* behind 64 counts as 64).

Arms:

    recovery   outcomes that were drawn with known parameters: 200 questions of 64 samples; and how long fits and decisions take
    small      64 wide, 2 layers
    large      128 wide, 4 layers
    smollm2    SmolLM2-135M-Instruct on 100 sums in words, 16 samples each; no bar on how well it answers
    humaneval  Qwen2.5-Coder-0.5B-Instruct on 40 functions of HumanEval, 16 samples each, whose tests are run
    gsm8k      the same on 40 problems of GSM8K, by exact match

The rules, fixed before any run; each verdict needs five seeds. A claim holds where what it says is so in all of them, does not hold
where it is in none, and is not resolved else. PRIMARY: over the twelve settings at a gain of 0.01, Pearson's r between ln(1 + N*) as the
mixture predicts it and as it is observed is at least 0.8. Held out: on all kinds together the mixture's mean error at 16, 32 and 64 samples
is at most half of one p's. Money: at a price of a hundredth of a right answer, stopping by question (the mixture fitted on half of the
questions, each answer verified) needs on the other half at most 60 % of the samples of the smallest fixed number that is right as often,
but for one point; and what it is worth is at least 0.95 of what adaptive consistency is worth. Recovery, of p = 0.1, 0.3 and 0.5:
p within 2 % in the mean, and N* within one in each (of 12,800 draws of one p the deviation is 2.7, 1.4 and 0.9 %, so no less can be asked).
Language models: the mixture's largest error over 16 points is at most 3 points. Rounds are told (p, q, plateau of each kind) and not
judged: that small models gain by them is not claimed.

Not run yet. It is planned for 5 seeds, some hours of two cores each, most of them of the coder. The smaller size shows that it works.
"""
# Shapes: S kinds of sums, Q questions, M samples, N points, T rounds

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import INK, SERIES, figure, horizontal_grid, to_png, to_svg
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Verdict, every_seed
from anabranch.test_time import (
    TTSPM,
    BetaTTSPM,
    BudgetController,
    Curve,
    TwoStateTTSPM,
    fit_many,
    hit_curve,
    play_fixed,
    play_question,
    play_votes,
)

Gains = (0.02, 0.01, 0.005)
SEEDS, FITTED, PRICE = 5, 8, 0.01
DRAWN = (0.1, 0.3, 0.5)
R, HALF, SHARE, WORTH, CLOSE, POINTS = 0.8, 0.5, 0.6, 0.95, 0.02, 0.03

COLUMNS = (
    Column("accuracy", "one sample\nright", ".3f"),
    Column("error_single", "one p: error\nat 16 to 64", ".4f"),
    Column("error_mixed", "mixture:\nerror", ".4f"),
    Column("samples_question", "samples by\nquestion", ".2f"),
    Column("samples_fixed", "of the same\nfixed", ".1f"),
    Column("samples_votes", "of adaptive\nconsistency", ".2f"),
    Column("fits_s", "1,000 fits,\nseconds", ".2f"),
    Column("decision_ms", "a decision,\nms", ".3f"),
)


@configclass
class Case(Config):
    """One arm.

    Attributes:
        kind: what it does.
        dim, num_layers, steps, batch: of a model that learns.
        questions: of each kind of sum.
        samples, rounds: of each question.
        temperature: of both.
    """

    kind: Literal["recovery", "sums", "smollm2", "humaneval", "gsm8k"]
    dim: int = 64
    num_layers: int = 2
    steps: int = Field(default=4000, ge=1)
    batch: int = 128
    questions: int = Field(default=100, ge=4)
    samples: int = Field(default=64, ge=2)
    rounds: int = Field(default=8, ge=2)
    temperature: float = 0.8


def make(full: bool = False) -> Study:
    """The study, or a quick look with models that have learned next to nothing."""
    quick = {} if full else {"steps": 30, "batch": 16, "questions": 6, "samples": 12, "rounds": 3}
    small = Case(kind="sums", **quick)
    arms = [
        Arm("recovery", "outcomes drawn with known parameters", Case(kind="recovery", questions=200 if full else 20)),
        Arm("small", "a character model, 64 wide, 2 layers", small),
        Arm("large", "a character model, 128 wide, 4 layers", small.replace(dim=128, num_layers=4)),
        Arm("smollm2", "SmolLM2-135M-Instruct on sums in words", Case(kind="smollm2", samples=16)),
        Arm("humaneval", "Qwen2.5-Coder-0.5B on HumanEval, run", Case(kind="humaneval", questions=40, samples=16)),
        Arm("gsm8k", "Qwen2.5-Coder-0.5B on GSM8K, exact match", Case(kind="gsm8k", questions=40, samples=16)),
    ]
    return Study(
        name="ttspm",
        title="TTSPM: predicted and observed saturation points",
        settings={"size": "full" if full else "smoke", **to_dict(small)},
        arms=arms,
        seeds=tuple(range(SEEDS)) if full else (0,),
        default_arms=None if full else ("recovery", "small"),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        inputs=read_by,
    )


def read_by(case: Case) -> str | None:
    """Digest of the questions and weights of an arm; None for what reads neither."""
    from anabranch.studies.ttspm_real import pinned

    return pinned(case.kind)


def run(case: Case, seed: int, progress: Progress) -> Metrics:
    """One arm."""
    if case.kind == "recovery":
        return _recovery(case, seed)
    if case.kind == "sums":
        return _sums(case, seed, progress)
    from anabranch.studies.ttspm_real import run_real

    return run_real(case.kind, case.questions, case.samples, case.temperature, seed, progress)


# Known parameters


def _recovery(case: Case, seed: int) -> Metrics:
    rng = np.random.default_rng(seed)
    offs, stops = [], []
    for p in DRAWN:
        found = TTSPM(f_max=1.0).fit(rng.random((case.questions, case.samples)) < p)
        offs.append(abs(found.p / p - 1))
        stops.append(abs(found.saturation(0.01) - TTSPM(p=p).saturation(0.01)))
    many_CN = np.stack([BetaTTSPM(1.0, a, 2.0).value(np.arange(1, 17)) for a in rng.uniform(0.3, 4.0, 1000)])
    began = time.perf_counter()
    fit_many(many_CN, "mixed", num_questions=100)
    fits_s = time.perf_counter() - began
    return {"p_off": float(np.mean(offs)), "stop_off": max(stops), "fits_s": fits_s, "decision_ms": _decision_ms()}


def _decision_ms() -> float:
    """Median of a look at what came and of how much more to draw."""
    rules = BudgetController(curve=BetaTTSPM(0.9, 1.0, 1.0), value=1.0, cost=0.001)
    seconds = []
    for _ in range(50):
        question = rules.begin()
        while count := question.next():
            began = time.perf_counter()
            question.told(count, verified=[False] * count)
            question.next()
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) * 1000


# Sums


def _sums(case: Case, seed: int, progress: Progress) -> Metrics:
    from anabranch.studies.ttspm_sums import KINDS, answers_of, questions_of, train

    asked_S = [questions_of(kind, case.questions, seed) for kind in KINDS]
    held = {question for asked in asked_S for question, _ in asked}
    model = train(case.dim, case.num_layers, case.steps, case.batch, held, seed, progress)
    found = answers_of(model, asked_S, case.samples, case.rounds, case.temperature, seed, progress)
    settings = [setting_of(right_QM) for right_QM in found.right_SQM]
    right_QM = found.right_SQM.reshape(-1, case.samples)
    said_QM = found.said_SQM.reshape(-1, case.samples)
    return {
        "accuracy": float(right_QM.mean()),
        "kinds": list(KINDS),
        "observed": [one["observed"] for one in settings],
        "predicted_mixed": [one["mixed"] for one in settings],
        "predicted_single": [one["single"] for one in settings],
        "curves": [one["curve"] for one in settings],
        "fits": [one["fit"] for one in settings],
        "rounds": [_rounds(round_QT) for round_QT in found.round_SQT],
        **_errors(right_QM),
        **_money(right_QM, said_QM),
    }


def setting_of(right_QM: np.ndarray) -> dict[str, Any]:
    """Observed and predicted saturation points of one setting, its curve and the mixture that was fitted to its beginning."""
    num = right_QM.shape[1]
    curve_N = hit_curve(right_QM.sum(1), num).mean(0)
    gain_N = np.diff(np.concatenate([[0.0], curve_N]))
    observed = [next((n for n in range(num) if gain_N[n] <= eps), num) for eps in Gains]
    fits: dict[str, Curve] = {"mixed": BetaTTSPM(), "single": TTSPM()}
    told: dict[str, Any] = {"observed": observed, "curve": curve_N.tolist()}
    for name, model in fits.items():
        model.fit(curve_N[:FITTED], num_questions=len(right_QM))
        told[name] = [min(num, int(model.saturation(eps))) for eps in Gains]
    mixed = fits["mixed"]
    assert isinstance(mixed, BetaTTSPM)
    told["fit"] = [float(mixed.f_max), float(mixed.a), float(mixed.b)]
    return told


def _rounds(round_QT: np.ndarray) -> list[float] | None:
    """p, q and the plateau of thinking over; None where nothing was ever wrong before another round."""
    if round_QT[:, :-1].all():
        return None
    found = TwoStateTTSPM.fit(round_QT)
    return [float(found.p), float(found.q), float(found.plateau)]


def _errors(right_QM: np.ndarray) -> Metrics:
    num = right_QM.shape[1]
    curve_N = hit_curve(right_QM.sum(1), num).mean(0)
    at = np.array([n for n in (16, 32, 64) if n <= num] or [num])
    found: Metrics = {}
    for name, model in (("single", TTSPM()), ("mixed", BetaTTSPM())):
        model.fit(curve_N[:FITTED], num_questions=len(right_QM))
        found[f"error_{name}"] = float(np.abs(model.value(at) - curve_N[at - 1]).mean())
    return found


def _money(right_QM: np.ndarray, said_QM: np.ndarray) -> Metrics:
    """Rules on every other question, with a curve of the rest."""
    curve = BetaTTSPM().fit(right_QM[::2], up_to=min(FITTED, right_QM.shape[1]))
    right_QM, said_QM = right_QM[1::2], said_QM[1::2]
    question = play_question(right_QM, curve, PRICE)
    fixed = [play_fixed(right_QM, n) for n in range(right_QM.shape[1] + 1)]
    same = next(one for one in fixed if one.accuracy >= question.accuracy - 0.01)
    votes = play_votes(said_QM, right_QM)
    return {
        "samples_question": question.mean_samples,
        "samples_fixed": same.mean_samples,
        "samples_votes": votes.mean_samples,
        "accuracy_question": question.accuracy,
        "accuracy_fixed": same.accuracy,
        "accuracy_votes": votes.accuracy,
        "worth_question": question.worth(1.0, PRICE),
        "worth_votes": votes.worth(1.0, PRICE),
    }


# Judging

_CLAIMS = (
    (
        "PRIMARY: predicted and observed saturation points of twelve settings have r of at least 0.8",
        "0.803 (one setting)",
    ),
    ("small: at 16 to 64 samples the mixture's error is at most half of one p's", "-"),
    ("large: at 16 to 64 samples the mixture's error is at most half of one p's", "-"),
    ("small: stopping by question needs at most 60 % of the samples of the same fixed number", "-"),
    ("large: stopping by question needs at most 60 % of the samples of the same fixed number", "-"),
    ("small: stopping by question is worth at least 0.95 of adaptive consistency", "-"),
    ("large: stopping by question is worth at least 0.95 of adaptive consistency", "-"),
    ("p of drawn outcomes is found to 2 %", "-"),
    ("N* of drawn outcomes is found to one", "-"),
    ("smollm2: the curve is fitted to 3 points", "-"),
    ("humaneval: the curve is fitted to 3 points", "-"),
    ("gsm8k: the curve is fitted to 3 points", "-"),
)


def judge(results: Results) -> list[Claim]:
    """The claims, by the rules in the module's docstring."""
    found = [_correlation(results)]
    for metric, other, share, is_least in (
        ("error_mixed", "error_single", HALF, False),
        ("samples_question", "samples_fixed", SHARE, False),
        ("worth_question", "worth_votes", WORTH, True),
    ):
        for arm in ("small", "large"):
            found.append(_against_share(results, arm, metric, other, share, is_least, len(found)))
    limits = [("recovery", "p_off", CLOSE), ("recovery", "stop_off", 1.0)]
    limits += [(arm, "fit_off", POINTS) for arm in ("smollm2", "humaneval", "gsm8k")]
    for arm, metric, limit in limits:
        found.append(_within(results, arm, metric, limit, len(found)))
    return found


def correlation_of(small: Metrics, large: Metrics) -> float:
    """Pearson's r of ln(1 + N*) over the settings of both, at a gain of 0.01."""
    at = Gains.index(0.01)
    predicted, observed = (
        np.log1p([one[at] for arm in (small, large) for one in arm[name]]) for name in ("predicted_mixed", "observed")
    )
    if predicted.std() == 0 or observed.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, observed)[0, 1])


def _correlation(results: Results) -> Claim:
    claim, paper = _CLAIMS[0]
    small, large = (results.runs.get(arm, {}) for arm in ("small", "large"))
    values = [correlation_of(small[seed], large[seed]) for seed in sorted(small.keys() & large.keys())]
    if not values:
        return Claim.not_run(claim, paper)
    return Claim.against(R, claim, paper, float(np.mean(values)), _verdict([value >= R for value in values]))


def _against_share(
    results: Results, arm: str, metric: str, other: str, share: float, is_least: bool, number: int
) -> Claim:
    claim, paper = _CLAIMS[number]
    ours, theirs = results.values(arm, metric), results.values(arm, other)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return Claim.not_run(claim, paper)
    so = [ours[seed] >= share * theirs[seed] if is_least else ours[seed] <= share * theirs[seed] for seed in seeds]
    mean, base = (float(np.mean([values[seed] for seed in seeds])) for values in (ours, theirs))
    return Claim(claim, paper, base, mean, mean - base, None, _verdict(so), limit=share * base)


def _within(results: Results, arm: str, metric: str, limit: float, number: int) -> Claim:
    claim, paper = _CLAIMS[number]
    values = list(results.values(arm, metric).values())
    if not values:
        return Claim.not_run(claim, paper)
    return Claim.against(limit, claim, paper, float(np.mean(values)), _verdict([value <= limit for value in values]))


def _verdict(seen: list[bool]) -> Verdict:
    return every_seed(seen) if len(seen) >= SEEDS else "not resolved"


def draw(results: Results, path: Path) -> None:
    """Curves of each kind of sum, dots, and the mixtures fitted to their first eight points, with where a gain of 0.01 is reached."""
    runs = [(arm, min(results.runs[arm])) for arm in ("small", "large") if arm in results.runs]
    with figure(11, 4.6, ncols=max(1, len(runs)), sharey=True) as (made, axes):
        made.suptitle(
            "Share solved by samples, and where one more gains 0.01", x=0.01, ha="left", fontweight="bold", color=INK
        )
        for panel, (arm, seed) in zip(np.atleast_1d(axes), runs, strict=False):
            metrics = results.runs[arm][seed]
            for number, (kind, curve, fit) in enumerate(
                zip(metrics["kinds"], metrics["curves"], metrics["fits"], strict=True)
            ):
                model, n = BetaTTSPM(*fit), np.arange(1, len(curve) + 1)
                colour, stop = SERIES[number % len(SERIES)], min(len(curve), model.saturation(0.01))
                panel.plot(n, curve, ".", color=colour, markersize=3)
                panel.plot(n, model.value(n), color=colour, label=kind)
                panel.plot([stop], [model.value(stop)], "o", color=colour)
            panel.set_xscale("log", base=2)
            panel.set_title(f"{arm}, seed {seed}", loc="left")
            panel.set_xlabel("samples")
            horizontal_grid(panel)
            panel.legend(frameon=False)
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as file:
        file.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)

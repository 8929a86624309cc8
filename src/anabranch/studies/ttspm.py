"""Do predicted and observed saturation points of sampling agree, and does stopping by them pay?

"Scaling over Scaling: Exploring Test-Time Scaling Plateau in Large Reasoning Models", Wang et al. 2025, arXiv 2505.20522. The paper:
Pearson's r of 0.803 between predicted and observed saturation points (7B, parallel, MATH-500); 53.3 % against 30.0 % with 32 samples
(1.5B, AIME 2024).

Scaled down: character models learn sums of six kinds (`ttspm_sums`); 100 held questions of each kind have 8 + 64 samples at temperature
0.8 and 8 rounds of thinking over. Two sizes of model and six kinds are twelve settings. Curves are fitted to the first 8 samples of each
question and to nothing else; what is observed is of the other 64. N* is read for gains of 0.02, 0.01 and 0.005 (N* behind 64 counts as 64).

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
is at most half of one p's. Money, at a price of a hundredth of a right answer, each answer verified, the mixture fitted on half of the
questions and played on the other half: the number after which it gives up is worth at least 0.95 of the best such number, chosen in
hindsight on the very samples that are played (both stop when one is right); and it needs at most 60 % of the samples of the smallest number
that is right as often, but for one point, where that is drawn whole, as one request for n answers is. What adaptive consistency, which
needs no verifier, spends is told and not judged. Recovery, of p = 0.1, 0.3 and 0.5: p within 4 % in the mean, and N* within one in each (of
12,800 draws of one p the deviation is 2.7, 1.4 and 0.9 %). Language models: the mixture, fitted to all 16 samples, is nowhere more than
3 points off their curve; this is how well its form describes them, and predicts nothing. Rounds are told (p, q, plateau of each kind) and
not judged: that small models gain by them is not claimed. Where a baseline is such that nothing can be said, a claim is not resolved: no
spread in observed or predicted N*, an error of one p below 0.005, a best number worth less than 0.05, one that draws fewer than 2.

The arm recovery has run, in 2 seconds, and one seed of small, in five minutes of a processor; the others have not. The coder's arms take
longest.
It was frozen anew on 2026-12-02, before that: curves were fitted to the beginning of a curve that was made of all samples, the best
number in hindsight did not stop at a right answer, the limit of p was 2 %, and baselines of nothing were held against.
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
    Spent,
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
R, HALF, SHARE, WORTH, CLOSE, POINTS = 0.8, 0.5, 0.6, 0.95, 0.04, 0.03
# What a baseline must have, or being held against it says nothing: an error of one p, samples drawn whole, a worth.
LEAST_ERROR, LEAST_DRAWN, LEAST_WORTH = 0.005, 2.0, 0.05

COLUMNS = (
    Column("accuracy", "one sample\nright", ".3f"),
    Column("error_single", "one p: error\nat 16 to 64", ".4f"),
    Column("error_mixed", "mixture:\nerror", ".4f"),
    Column("samples_question", "samples by\nquestion", ".2f"),
    Column("samples_fixed", "of the same\nfixed", ".1f"),
    Column("worth_question", "worth by\nquestion", ".3f"),
    Column("worth_hindsight", "of the best\nnumber", ".3f"),
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
        samples, rounds: of each question; of sums, 8 more samples are what curves are fitted to.
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
    drawn = FITTED + case.samples
    found = answers_of(model, asked_S, drawn, case.rounds, case.temperature, seed, progress)
    settings = [setting_of(right_QM) for right_QM in found.right_SQM]
    right_QM, said_QM = found.right_SQM.reshape(-1, drawn), found.said_SQM.reshape(-1, drawn)
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


def curve_of(right_QM: np.ndarray) -> np.ndarray:
    """Mean Hit@n over questions, float64 ``[M]``."""
    return hit_curve(right_QM.sum(1), right_QM.shape[1]).mean(0)


def setting_of(right_QM: np.ndarray) -> dict[str, Any]:
    """Predicted saturation points of one setting by its first 8 samples; observed ones and the curve by all the others."""
    first_QM, right_QM = right_QM[:, :FITTED], right_QM[:, FITTED:]
    num = right_QM.shape[1]
    curve_N = curve_of(right_QM)
    gain_N = np.diff(np.concatenate([[0.0], curve_N]))
    observed = [next((n for n in range(num) if gain_N[n] <= eps), num) for eps in Gains]
    fits: dict[str, Curve] = {"mixed": BetaTTSPM(), "single": TTSPM()}
    told: dict[str, Any] = {"observed": observed, "curve": curve_N.tolist()}
    for name, model in fits.items():
        model.fit(curve_of(first_QM), num_questions=len(first_QM))
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
    first_QM, right_QM = right_QM[:, :FITTED], right_QM[:, FITTED:]
    num, curve_N = right_QM.shape[1], curve_of(right_QM)
    at = np.array([n for n in (16, 32, 64) if n <= num] or [num])
    found: Metrics = {}
    for name, model in (("single", TTSPM()), ("mixed", BetaTTSPM())):
        model.fit(curve_of(first_QM), num_questions=len(first_QM))
        found[f"error_{name}"] = float(np.abs(model.value(at) - curve_N[at - 1]).mean())
    return found


def _money(right_QM: np.ndarray, said_QM: np.ndarray) -> Metrics:
    """Rules on the later samples of every other question, with a curve of the first samples of the rest."""
    curve = BetaTTSPM().fit(right_QM[::2, :FITTED])
    right_QM, said_QM = right_QM[1::2, FITTED:], said_QM[1::2, FITTED:]
    question = play_question(right_QM, curve, PRICE)
    caps = [play_until_right(right_QM, n) for n in range(right_QM.shape[1] + 1)]
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
        "worth_hindsight": max(one.worth(1.0, PRICE) for one in caps),
        "worth_votes": votes.worth(1.0, PRICE),
    }


def play_until_right(right_QM: np.ndarray, n: int) -> Spent:
    """At most ``n`` samples, and none after a right one."""
    right_Q = np.asarray(right_QM[:, :n].any(1))
    return Spent(np.where(right_Q, right_QM.argmax(1) + 1, n), right_Q)


# Judging

_CLAIMS = (
    (
        "PRIMARY: predicted and observed saturation points of twelve settings have r of at least 0.8",
        "0.803 (one setting)",
    ),
    ("small: at 16 to 64 samples the mixture's error is at most half of one p's", "-"),
    ("large: at 16 to 64 samples the mixture's error is at most half of one p's", "-"),
    ("small: stopping by question needs at most 60 % of the samples of the same fixed number, drawn whole", "-"),
    ("large: stopping by question needs at most 60 % of the samples of the same fixed number, drawn whole", "-"),
    ("small: where it gives up is worth at least 0.95 of the best number in hindsight", "-"),
    ("large: where it gives up is worth at least 0.95 of the best number in hindsight", "-"),
    ("p of drawn outcomes is found to 4 %", "-"),
    ("N* of drawn outcomes is found to one", "-"),
    ("smollm2: the mixture describes the curve it is fitted to, to 3 points", "-"),
    ("humaneval: the mixture describes the curve it is fitted to, to 3 points", "-"),
    ("gsm8k: the mixture describes the curve it is fitted to, to 3 points", "-"),
)


def judge(results: Results) -> list[Claim]:
    """The claims, by the rules in the module's docstring."""
    found = [_correlation(results)]
    for metric, other, share, least, is_least in (
        ("error_mixed", "error_single", HALF, LEAST_ERROR, False),
        ("samples_question", "samples_fixed", SHARE, LEAST_DRAWN, False),
        ("worth_question", "worth_hindsight", WORTH, LEAST_WORTH, True),
    ):
        for arm in ("small", "large"):
            found.append(_against_share(results, arm, (metric, other), share, least, is_least, _CLAIMS[len(found)]))
    limits = [("recovery", "p_off", CLOSE), ("recovery", "stop_off", 1.0)]
    limits += [(arm, "fit_off", POINTS) for arm in ("smollm2", "humaneval", "gsm8k")]
    for arm, metric, limit in limits:
        found.append(_within(results, arm, metric, limit, len(found)))
    return found


def correlation_of(small: Metrics, large: Metrics) -> float:
    """Pearson's r of ln(1 + N*) over the settings of both, at a gain of 0.01; NaN where all of either are the same."""
    at = Gains.index(0.01)
    predicted, observed = (
        np.log1p([one[at] for arm in (small, large) for one in arm[name]]) for name in ("predicted_mixed", "observed")
    )
    if predicted.std() == 0 or observed.std() == 0:
        return float("nan")
    return float(np.corrcoef(predicted, observed)[0, 1])


def _correlation(results: Results) -> Claim:
    claim, paper = _CLAIMS[0]
    small, large = (results.runs.get(arm, {}) for arm in ("small", "large"))
    values = [correlation_of(small[seed], large[seed]) for seed in sorted(small.keys() & large.keys())]
    if not values:
        return Claim.not_run(claim, paper)
    verdict = "not resolved" if np.isnan(values).any() else _verdict([value >= R for value in values])
    return Claim.against(R, claim, paper, float(np.nan_to_num(values).mean()), verdict)


def _against_share(
    results: Results,
    arm: str,
    metrics: tuple[str, str],
    share: float,
    least: float,
    is_least: bool,
    words: tuple[str, str],
) -> Claim:
    claim, paper = words
    ours, theirs = (results.values(arm, metric) for metric in metrics)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return Claim.not_run(claim, paper)
    so = [ours[seed] >= share * theirs[seed] if is_least else ours[seed] <= share * theirs[seed] for seed in seeds]
    mean, base = (float(np.mean([values[seed] for seed in seeds])) for values in (ours, theirs))
    # Against next to nothing, nothing is shown.
    verdict = _verdict(so) if all(theirs[seed] >= least for seed in seeds) else "not resolved"
    return Claim(claim, paper, base, mean, mean - base, None, verdict, limit=share * base)


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

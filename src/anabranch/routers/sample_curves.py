"""What recorded samples say of further ones: for each model and task the curve of `anabranch.test_time`, and where it stops to pay.

    for one in sample_curves(data, eps=0.01):
        one.curve.f_max, one.stop, one.stop_interval

Fitted is the mixture, `BetaTTSPM`, which is what `best_of` goes by; the paper's one p for all questions stands beside it (`single`). Of
questions that were drawn for until one sample was right (`ends_at_first`) no Hit@n can be counted: there the curve is that of survival.
"""
# Shapes: Q questions, N points of a curve

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.samples import RIGHT, Drawn, drawn
from anabranch.routers.score_scale import UNIT, Scale
from anabranch.routers.strategies.consistency import final_answer
from anabranch.test_time import TTSPM, BetaTTSPM, Curve, ends_at_first, survival_curve, vote_curve
from anabranch.test_time.curves import Kind
from anabranch.toml_text import toml_text

__all__ = ["SampleCurve", "config_lines", "sample_curves"]

# Gain of one more sample that is worth drawing where nobody says (that of `best_of`), and the least that is looked for.
EPS, LEAST_EPS = 0.01, 1e-6

# Of a strategy's config: the most that its a and b may be, and the most samples of a request.
MOST_SHAPE, MOST_N = 1e6, 64


@dataclass(frozen=True, kw_only=True)
class SampleCurve:
    """Of one model, on one task or on all.

    Attributes:
        model: that answered.
        task: None for all questions together.
        questions: that it was fitted to.
        left_out: questions with fewer samples than the curve has points.
        kind: ``parallel`` samples or ``sequential`` rounds.
        is_cut: they were drawn until one was right.
        observed_N: share solved with 1 to N samples.
        curve: fitted to that.
        single: the same with one p. Of nothing but wrong answers, or right ones, neither holds more than bounds (`all_same`).
        interval: of its parameters, see `Curve.interval`; of too few questions, all that can be.
        eps: gain from which one more sample is worth drawing.
        stop: samples after which one more gains no more than that.
        stop_interval: from where to where that may lie.
        single_stop: by one p.
        lost: of rounds, the chance that one makes a right answer wrong; None where that cannot be told.
        vote: share right of the commonest of so many answers, by their number; None where nobody says what they were.
    """

    model: str
    task: str | None
    questions: int
    left_out: int
    kind: Kind
    is_cut: bool
    observed_N: np.ndarray
    curve: BetaTTSPM
    single: TTSPM
    interval: dict[str, tuple[float, float]]
    eps: float
    stop: int
    stop_interval: tuple[float, float]
    single_stop: int
    lost: float | None = None
    vote: Mapping[int, float] | None = None

    @property
    def all_same(self) -> int | None:
        """0 where no answer was right, 1 where all were: both tell bounds and no curve. None otherwise."""
        return self.curve.all_same

    @property
    def too_few(self) -> bool:
        """Whether it shows the curve of these questions, and nothing of others: no interval is known, and no config is given."""
        return self.all_same is None and self.curve.too_few

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; null is what the outcomes do not tell."""
        points, is_told = np.arange(1, len(self.observed_N) + 1), self.all_same is None
        single = {"f_max": self.single.f_max, "p": self.single.p, "stop": self.single_stop}
        return {
            "model": self.model,
            "task": self.task,
            "questions": self.questions,
            "left_out": self.left_out,
            "kind": self.kind,
            "drawn_until_right": self.is_cut,
            "observed": self.observed_N.tolist(),
            "all_same": None if is_told else "right" if self.all_same else "wrong",
            "fitted": self.curve.value(points).tolist(),
            **{name: getattr(self.curve, name) if is_told else None for name in ("f_max", "a", "b")},
            "too_few_questions": self.too_few,
            "interval": None
            if self.too_few
            else {
                name: [end if np.isfinite(end) else None for end in of]
                for name, of in self.interval.items()
                if name != "saturation"
            },
            "eps": self.eps,
            "stop": self.stop,
            "stop_interval": None if self.too_few else list(self.stop_interval),
            "single": single if is_told else None,
            "lost": self.lost,
            "vote": None if self.vote is None else [[n, share] for n, share in self.vote.items()],
        }


def sample_curves(
    data: Recorded,
    *,
    eps: float | Mapping[str, float] = EPS,
    kind: Kind = "parallel",
    right: float = RIGHT,
    scale: Scale = UNIT,
    models: Sequence[str] | None = None,
    seed: int = 0,
) -> list[SampleCurve]:
    """A curve for each model, and behind it one for each of its tasks where there are several.

    Args:
        data: outcomes, each question once, with several samples (`pooled` puts copies together).
        eps: see `SampleCurve`; for all, or by model.
        kind: how samples came about.
        right, scale: see `anabranch.routers.samples.drawn`.
        models: those alone; None for all.
        seed: of intervals.

    Raises InputError for a model that is not there, DataError where no model has two samples of a question or a score is beyond.
    """
    names = data.only(models).models if models else data.models
    found = []
    for name in names:
        least = eps[name] if isinstance(eps, Mapping) else eps
        if not LEAST_EPS <= least < 1:
            raise InputError(f"eps is {shown(least)}; it must be a share of questions, from {LEAST_EPS:g} to below 1")
        of_model = drawn(data, name, right=right, scale=scale)
        found += [one for part, task in _parts(of_model) if (one := _fitted(part, task, least, kind, seed)) is not None]
    if not found:
        raise DataError(
            "each question has one sample, which shows no curve; give several of each: "
            '{"question": "...", "samples": [true, false, ...]}, scores {"MODEL": [1, 0, ...]}, or a row for each sample'
        )
    return found


def _parts(of_model: Drawn) -> Iterator[tuple[Drawn, str | None]]:
    yield of_model, None
    tasks = sorted(set(of_model.task_Q))
    for task in tasks if len(tasks) > 1 else ():
        yield of_model.take(np.flatnonzero(of_model.task_Q == task)), task


def _fitted(part: Drawn, task: str | None, eps: float, kind: Kind, seed: int) -> SampleCurve | None:
    """None where there are no questions with two samples."""
    samples_Q = part.samples_Q
    if not len(samples_Q) or samples_Q.max() < 2:
        return None
    # Where none was right, nothing says what the numbers of samples went by.
    is_cut = any(one.any() for one in part.right) and ends_at_first([one.tolist() for one in part.right])
    left_out = 0
    if is_cut:
        data: Any = _survived(part)
        more: dict[str, Any] = {"num_questions": len(samples_Q)}
    else:
        # As many as half of all questions have: fewer points would waste those, more would leave most questions out.
        points = max(2, int(np.sort(samples_Q)[len(samples_Q) // 2]))
        kept = np.flatnonzero(samples_Q >= points)
        left_out = len(samples_Q) - len(kept)
        part = part.take(kept)
        data, more = [one.tolist() for one in part.right], {"up_to": points}
    curve, single = BetaTTSPM(kind=kind), TTSPM(kind=kind)
    fits: tuple[Curve, ...] = (curve.fit(data, **more), single.fit(data, **more))
    interval = fits[0].interval(seed=seed, eps=eps)
    assert curve.observed is not None
    return SampleCurve(
        model=part.model,
        task=task,
        questions=len(part.right),
        left_out=left_out,
        kind=kind,
        is_cut=is_cut,
        observed_N=curve.observed,
        curve=curve,
        single=single,
        interval=interval,
        eps=eps,
        stop=int(curve.saturation(eps)),
        stop_interval=interval["saturation"],
        single_stop=int(single.saturation(eps)),
        lost=_lost(part) if kind == "sequential" else None,
        vote=_vote(part, curve.observed, seed) if kind == "parallel" and not is_cut else None,
    )


def _survived(part: Drawn) -> np.ndarray:
    most = int(part.samples_Q.max())
    solved_N, tried_N = np.zeros(most), np.zeros(most)
    for one in part.right:
        tried_N[: len(one)] += 1
        solved_N[len(one) - 1] += one[-1]
    return survival_curve(solved_N, tried_N)


def _vote(part: Drawn, observed_N: np.ndarray, seed: int) -> dict[int, float] | None:
    """What a vote delivers of 1, 2, 4, ... and all samples that the curve has points for: answers are the same that come to the same."""
    if not all(part.texts):
        return None
    num = len(observed_N)
    answer_QM = np.array([_numbered([final_answer(text) for text in texts[:num]]) for texts in part.texts])
    right_QM = np.stack([one[:num] for one in part.right])
    n_N = np.unique([*(2 ** np.arange(num.bit_length())), num])
    return dict(zip(n_N.tolist(), vote_curve(answer_QM, right_QM, n_N, seed=seed).tolist(), strict=True))


def _numbered(said: Sequence[str]) -> list[int]:
    """Equal numbers for equal texts."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(text, len(numbers)) for text in said]


def _lost(part: Drawn) -> float | None:
    """Of rounds that were right before, those that are wrong after."""
    before = np.concatenate([one[:-1] for one in part.right])
    after = np.concatenate([one[1:] for one in part.right])
    return float((~after)[before].mean()) if before.any() else None


def config_lines(found: Sequence[SampleCurve], **fields: Any) -> str:
    """TOML of a `best_of` for each model, which begins with its curve of all questions.

    There is none of outcomes that show no curve, nor of too few questions, whose curve says nothing of those that will be asked.

    Args:
        found: curves.
        fields: further ones of each.
    """
    whole = [one for one in found if one.task is None and one.all_same is None and not one.too_few]
    strategies = {}
    for number, one in enumerate(whole, start=1):
        name = "best-of" if len(whole) == 1 else f"best-of-{number}"
        scale = min(1.0, MOST_SHAPE / max(one.curve.a, one.curve.b))
        strategies[name] = {
            "kind": "best_of",
            "model": one.model,
            "f_max": _short(one.curve.f_max),
            "a": _short(scale * one.curve.a),
            "b": _short(scale * one.curve.b),
            "least_gain": _short(one.eps),
            "max_n": max(1, min(MOST_N, one.stop)),
            **({"rounds": True} if one.kind == "sequential" else {}),
            **fields,
        }
    return toml_text({"strategies": strategies}) if strategies else ""


def _short(value: float) -> float:
    return float(f"{value:.4g}")

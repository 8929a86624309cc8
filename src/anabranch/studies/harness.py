"""The harness of studies: arms times seeds, run pair by pair, judged, written down.

A study gives its arms (configs), ``run`` (one arm, one seed -> numbers) and ``judge`` (numbers -> claims). The harness runs what
is missing and writes each (arm, seed) as a small JSON as soon as it is finished, so that a study may be stopped at any time, goes
on where it was, and grows over sessions. Two processes may work on one study: a pair that one has under way is left to it.

    FOLDER/NAME.json                    claims with verdicts (`Claim`), config, where the runs come from
    FOLDER/NAME/frozen.json             the plan and the rule, signed before the first run: see `anabranch.studies.frozen`
    FOLDER/NAME/summary.json            one row per arm: mean and interval of every number
    FOLDER/NAME/ARM-seed0.json          one run
    FOLDER/NAME.png, NAME.svg           the picture
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_write_json
from anabranch.interrupts import Ending
from anabranch.locks import locked
from anabranch.studies.corrected import settled
from anabranch.studies.frozen import ALL, Frozen, check, differing, freeze, plan_of
from anabranch.studies.frozen import read as read_frozen
from anabranch.studies.paired import Estimate, Verdict, estimate, paired_difference
from anabranch.studies.pinned import check_corpus
from anabranch.studies.power import Bracket
from anabranch.studies.provenance import (
    Digests,
    Origin,
    device_kind,
    groups,
    here,
    joined_versions,
    listed,
    notes,
    readers,
    versions,
)
from anabranch.studies.records import Metrics, RunRecord, recorded_seeds

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One contestant.

    Attributes:
        name: short, for file names and tables.
        about: what it is, in a few words.
        config: all that decides its result beside the seed; what `to_dict` takes.
    """

    name: str
    about: str
    config: Any


@dataclass(frozen=True)
class Claim:
    """One claim of a study, as it stands in the result file: judged, or planned and not run.

    Attributes:
        claim: in our words.
        paper: the paper's number for it.
        baseline: mean of what was measured of the baseline; None where it has not run, and where ours is held against a limit alone.
        ours: mean of ours over the same seeds, or the worst of them where the claim is about each.
        difference: mean of the paired differences ours - baseline, or ours - limit where there is no baseline, or, where ``margin``
            says so, another margin.
        interval: its 95% interval ``[low, high]``; None with fewer than two seeds.
        verdict: by a rule fixed before the runs; "not run" where there is nothing to judge.
        margin: what ``difference`` is where it is neither of these; None where it is.
        limit: what ours must keep to or reach, a number or ``(low, high)``: of the claim itself, or made of the baseline ("0.2x": 0.2 of
            it); None where any difference decides.
        exact: whether chance has no part in it: a theorem, equal bits. It is a test, needs no seeds, and is no claim of the paper's.
        count: repetitions that the verdict rests on, such as seeds, splits or questions; None: the seeds of the study.
        why_void: why the study itself calls the claim void, whatever came out; None where it does not.

    Raises ConfigError where a claim that has run has neither baseline nor limit, or a difference that is not what it should be.
    """

    claim: str
    paper: str
    baseline: float | None
    ours: float | None
    difference: float | None
    interval: list[float] | None
    verdict: Verdict
    margin: str | None = None
    limit: float | tuple[float, float] | None = None
    exact: bool = False
    count: int | None = None
    why_void: str | None = None

    def __post_init__(self) -> None:
        if self.ours is None or self.margin is not None:
            return
        if self.baseline is None and self.limit is None:
            raise ConfigError(f"claim {self.claim!r} has run and has neither a baseline nor a limit")
        beside = self.limit if self.baseline is None else self.baseline
        if self.difference is None or isinstance(beside, tuple) or beside is None:
            return
        should, size = self.ours - beside, abs(self.ours) + abs(beside)
        if not math.isclose(self.difference, should, rel_tol=1e-6, abs_tol=1e-9 * size + 1e-12):
            what = "limit" if self.baseline is None else "baseline"
            raise ConfigError(
                f"claim {self.claim!r}: the difference is {self.difference}, and ours - {what} is {should}"
            )

    @classmethod
    def against(
        cls,
        limit: float | tuple[float, float],
        claim: str,
        paper: str,
        ours: float,
        verdict: Verdict,
        interval: list[float] | None = None,
        *,
        exact: bool = False,
        count: int | None = None,
    ) -> Self:
        """A claim of ours against ``limit`` alone; ``interval`` of ours, not of the difference."""
        if isinstance(limit, tuple):
            return cls(claim, paper, None, ours, None, None, verdict, limit=limit, exact=exact, count=count)
        off = None if interval is None else [end - limit for end in interval]
        return cls(claim, paper, None, ours, ours - limit, off, verdict, limit=float(limit), exact=exact, count=count)

    @classmethod
    def not_run(cls, claim: str, paper: str) -> Self:
        """A claim whose arms have not run, or not with one seed together."""
        return cls(claim, paper, None, None, None, None, "not run")


@dataclass(frozen=True)
class Column:
    """A number that tables show: its name in the metrics, the header with its unit, and how it is written."""

    metric: str
    header: str
    form: str = ".4f"


class Results:
    """Metrics of the finished runs, by arm and seed."""

    def __init__(self, runs: Mapping[str, Mapping[int, Metrics]]) -> None:
        self.runs = {arm: dict(seeds) for arm, seeds in runs.items() if seeds}

    @property
    def seeds(self) -> list[int]:
        """All seeds that any arm has."""
        return sorted({seed for seeds in self.runs.values() for seed in seeds})

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """The metric of an arm, by seed; empty if it has not run, without the seeds where it is None."""
        found = {seed: metrics.get(metric) for seed, metrics in self.runs.get(arm, {}).items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def without(self, runs: Collection[tuple[str, int]]) -> "Results":
        """These, less some runs, each an arm and a seed."""
        return Results(
            {
                arm: {seed: metrics for seed, metrics in seeds.items() if (arm, seed) not in runs}
                for arm, seeds in self.runs.items()
            }
        )

    def mean(self, arm: str, metric: str) -> Estimate:
        """Mean over the seeds of an arm."""
        return estimate(list(self.values(arm, metric).values()))

    def compare(self, metric: str, ours: str, baseline: str) -> Estimate:
        """Mean paired difference ours - baseline."""
        return paired_difference(self.values(ours, metric), self.values(baseline, metric))

    def claim(
        self,
        metric: str,
        *,
        ours: str,
        baseline: str,
        claim: str,
        paper: str,
        verdict: Callable,
        limit: Callable[[float], float | tuple[float, float]] | None = None,
    ) -> Claim:
        """A claim about one metric of two arms; ``verdict`` takes the paired difference, ``limit`` the baseline's mean."""
        ours_by_seed, baseline_by_seed = self.values(ours, metric), self.values(baseline, metric)
        common = sorted(ours_by_seed.keys() & baseline_by_seed.keys())
        difference = paired_difference(ours_by_seed, baseline_by_seed)
        if not common:
            return Claim.not_run(claim, paper)
        mean = estimate([baseline_by_seed[seed] for seed in common]).mean
        return Claim(
            claim,
            paper,
            mean,
            estimate([ours_by_seed[seed] for seed in common]).mean,
            difference.mean,
            difference.interval,
            verdict(difference),
            limit=limit(mean) if limit else None,
            count=len(common),
        )


@dataclass(frozen=True)
class Study:
    """What the harness needs to know of a study.

    Attributes:
        name: of the files.
        title: one line.
        settings: what was chosen for this size (steps, model), written into the result.
        arms: the contestants.
        run: (config of an arm, seed, progress) -> metrics, all of them JSON.
        judge: pure; its rule stands in the study's docstring.
        columns: what the table shows.
        draw: (results, path without suffix) writes the picture; None for none.
        default_arms: names of those that run if none are asked for; None for all.
        revision: raised when the code under the arms changes what comes out, so that older runs do not count.
        fit: what ``--fit`` shows, one row of numbers per law that is fitted; None for a study of no law.
        inputs: config of an arm -> digest of what its run reads beside the config (text, say), by content; None: what the parts of
            the config say they read, see `anabranch.studies.provenance`. A run counts for the same digest only.
        noted_only: whether records of arms that read something do not count where they say nothing of it, as those of older versions.
            Otherwise they count, and are named in the result.
        primary: the words of the claim that stands for the paper's headline; None: the first.
        brackets: arms at several learning rates, of which it is told where the best is an end.
        exact: words of claims that are exact, where the frozen rule does not mark them. They are judged as the others are and marked
            afterwards: the mark says that they are tests and no evidence for the paper, and frees them of nothing.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    arms: Sequence[Arm]
    run: Callable[[Any, int, Progress], Metrics]
    judge: Callable[[Results], list[Claim]]
    columns: Sequence[Column] = ()
    draw: Callable[[Results, Path], None] | None = None
    default_arms: Sequence[str] | None = None
    revision: int = 1
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    fit: Callable[[Results], list[dict[str, Any]]] | None = None
    inputs: Callable[[Any], str | None] | None = None
    noted_only: bool = False
    primary: str | None = None
    brackets: Sequence[Bracket] = ()
    exact: Collection[str] = ()

    def judged(self, results: Results) -> list[Claim]:
        """What ``judge`` says, as far as it stands up to what is asked of all studies: see `anabranch.studies.corrected`.

        Raises ConfigError for words in ``exact`` that no claim has.
        """
        claims = settled(self.judge(results), max(map(len, results.runs.values()), default=0))
        unknown = [words for words in self.exact if words not in {claim.claim for claim in claims}]
        if unknown:
            raise ConfigError(f"study {self.name!r} marks {unknown[0]!r} as exact, and has no such claim")
        return [replace(claim, exact=True) if claim.claim in self.exact else claim for claim in claims]

    def plan(self) -> dict[str, Any]:
        """What is frozen of it; see `anabranch.studies.frozen`."""
        return plan_of(self, self.judge(Results({})))


@dataclass
class Outcome:
    """What `run_study` found.

    Attributes:
        study: the study.
        results: all finished runs of its arms, those of earlier sessions too.
        claims: judged.
        path: the result file.
        missing: pairs that have not run (not asked for, or under way elsewhere).
        outdated: arm, seed and reason of each record that lies there and does not count.
        origins: where the numbers of each run that counts come from.
        frozen: the plan that was frozen; None for a study that has none, as those of the small size.
    """

    study: Study
    results: Results
    claims: list[Claim]
    path: Path
    missing: list[tuple[str, int]] = field(default_factory=list)
    outdated: list[tuple[str, int, str]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    frozen: Frozen | None = None

    @property
    def notes(self) -> list[str]:
        """In what the runs of one table are not alike, or not like this process, and which (see `anabranch.studies.provenance`); what was
        frozen anew; whose learning rate is not bracketed."""
        rates = [told for bracket in self.study.brackets if (told := bracket.told(self.results)) is not None]
        frozen = _frozen_notes(self.frozen, self.origins) if self.frozen else []
        return [*notes(self.origins, versions()), *frozen, *rates]

    def to_dict(self) -> dict[str, Any]:
        """The content of the result file: ``versions`` are those that the runs were made with, ``judged_with`` those of this process."""
        config = {**self.study.settings, "arms": {arm.name: arm.about for arm in self.study.arms}}
        return {
            "name": self.study.name,
            "seeds": self.results.seeds,
            "claims": [_rounded(asdict(claim)) for claim in self.claims],
            "config": config,
            "versions": joined_versions(self.origins),
            "runs": groups(self.origins),
            "notes": self.notes,
            "judged_with": versions(),
            "frozen": None if self.frozen is None else {"hash": self.frozen.hash, "history": list(self.frozen.history)},
        }


def run_study(
    study: Study,
    folder: str | Path,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    progress: Progress = lambda text: None,
    freezes: bool = False,
) -> Outcome:
    """Run what is missing of ``arms`` x ``seeds`` (default: those of the study), seed by seed, then judge and write everything there is.

    With ``freezes`` its plan is frozen before the first run, and the standard library that it reads is pinned, where they are not yet.
    Raises ConfigError for an unknown arm, and for a study that is not the one that was frozen; DataError for another standard library;
    KeyboardInterrupt where a signal ends it (SIGINT, SIGTERM, SIGHUP), at whatever training: the run under way does not count then.
    """
    folder = Path(folder)
    chosen = pick_arms(study, arms)
    frozen = _checked(study, folder)
    if frozen is None and freezes:
        has_run = any(recorded_seeds(folder / study.name, arm.name) for arm in study.arms)
        frozen = freeze(folder, study.plan(), "after runs were recorded" if has_run else "before the first run")
    if freezes:
        check_corpus([arm.config for arm in chosen], folder)
    digests = Digests(study.inputs)
    inputs = {arm.name: digests.of(arm.config) for arm in chosen}
    pairs = [(arm, seed) for seed in (study.seeds if seeds is None else seeds) for arm in chosen]
    missing = []
    for number, (arm, seed) in enumerate(pairs, start=1):
        label = f"{arm.name} seed {seed} ({number} of {len(pairs)})"
        place = _place(study, arm, seed, folder, inputs[arm.name])
        if place.read() is not None:
            progress(f"{label}: done before")
            continue
        place.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.lock) as alone, Ending():
            if not alone:
                progress(f"{label}: under way in another process")
                missing.append((arm.name, seed))
            elif place.read() is None:
                # Nobody finished it since we looked.
                _run_one(study, place, label, progress, frozen)
    return summarize(study, folder, missing=missing)


def summarize(study: Study, folder: str | Path, *, missing: Sequence[tuple[str, int]] = ()) -> Outcome:
    """Judge the runs that lie in ``folder`` and write the result file, the summary and the picture."""
    folder, outcome = Path(folder), outcome_of(study, folder, missing=missing)
    atomic_write_json(folder / study.name / "summary.json", summary_rows(study, outcome.results))
    if study.draw is not None:
        study.draw(outcome.results, folder / study.name)
    atomic_write_json(outcome.path, outcome.to_dict())
    return outcome


def outcome_of(study: Study, folder: str | Path, *, missing: Sequence[tuple[str, int]] = ()) -> Outcome:
    """Judge the runs that lie in ``folder``, and write nothing. Raises DataError where there are none."""
    folder = Path(folder)
    frozen = _checked(study, folder)
    results, outdated, origins = _read(study, folder)
    if not results.runs:
        told = "".join(f"; that of {arm} seed {seed} {reason}" for arm, seed, reason in outdated[:1])
        raise DataError(f"no finished run of study {study.name!r} in {folder / study.name}; run it first{told}")
    path = folder / f"{study.name}.json"
    claims = standing(study, results, frozen, origins)
    return Outcome(study, results, claims, path, list(missing), outdated, origins, frozen)


def refreeze(study: Study, folder: str | Path, why: str) -> Frozen:
    """Freeze the plan of a study anew; its verdicts are void until its arms have run again, unless only the primary claim is another.

    Raises ConfigError if nothing has changed, or no reason is given.
    """
    folder = Path(folder)
    before, plan = read_frozen(folder, study.name), study.plan()
    changed = differing(before.plan, study) if before is not None else []
    # Which claim stands for the rest says nothing about what came out of any.
    is_told_otherwise = bool(changed) and all(what.startswith("primary was ") for what in changed)
    if not why.strip():
        raise ConfigError("a plan is frozen anew for a reason, which stands on the page of the study; give it")
    if before is not None and not changed:
        raise ConfigError(f"study {study.name!r} is what was frozen ({before.hash}); there is nothing to freeze anew")
    return freeze(folder, plan, why, changed=changed, voids=[] if is_told_otherwise else [ALL])


def standing(study: Study, results: Results, frozen: Frozen | None, origins: Sequence[Origin]) -> list[Claim]:
    """The claims as judged, void where the plan was frozen anew since runs that they rest on.

    A claim rests on these runs if it comes out otherwise, in any figure, without them.
    """
    claims = study.judged(results)
    if frozen is None:
        return claims
    for words, is_older in frozen.voiding():
        older = {(origin.arm, origin.seed) for origin in origins if is_older(origin.frozen)}
        if older and words:
            pairs = zip(study.judge(results), study.judge(results.without(older)), strict=True)
            rests = [before != after for before, after in pairs]
            voided = void(claims, words)
            claims = [late if on else early for on, early, late in zip(rests, claims, voided, strict=True)]
    return claims


def void(claims: Sequence[Claim], words: Collection[str]) -> list[Claim]:
    """``claims``, void where they stand in ``words``, all where `ALL` does; what has not run has no verdict to be void."""
    return [
        replace(claim, verdict="void") if claim.verdict != "not run" and {ALL, claim.claim} & set(words) else claim
        for claim in claims
    ]


def _checked(study: Study, folder: Path) -> Frozen | None:
    """The frozen plan of a study, which is still its own; None if there is none."""
    frozen = read_frozen(folder, study.name)
    if frozen is not None:
        check(frozen, study)
    return frozen


def _frozen_notes(frozen: Frozen, origins: Sequence[Origin]) -> list[str]:
    older = [origin for origin in origins if origin.frozen is None]
    told = [
        f"frozen anew on {entry['date']}: {entry['why']}"
        for entry in frozen.history
        if entry["voids"] or any(what.startswith("primary was ") for what in entry["changed"])
    ]
    if older:
        told.append(f"ran before its plan was frozen ({frozen.history[0]['date']}): {listed(older)}")
    more = [origin for origin in origins if origin.seed not in frozen.plan["seeds"]]
    if more:
        told.append(f"seeds beyond those of the frozen plan: {listed(more)}")
    return told


def read_results(study: Study, folder: str | Path) -> Results:
    """The finished runs that lie in ``folder``; there may be none."""
    return read_records(study, Path(folder))[0]


def read_records(study: Study, folder: Path) -> tuple[Results, list[tuple[str, int, str]]]:
    """The finished runs that count, and arm, seed and reason of those that do not."""
    results, outdated, _ = _read(study, folder)
    return results, outdated


def _read(study: Study, folder: Path) -> tuple[Results, list[tuple[str, int, str]], list[Origin]]:
    """As `read_records`, and where the numbers of the runs that count come from."""
    runs: dict[str, dict[int, Metrics]] = {arm.name: {} for arm in study.arms}
    outdated, origins = [], []
    digests = Digests(study.inputs)
    for arm in study.arms:
        is_reader: bool | None = None
        for seed in recorded_seeds(folder / study.name, arm.name):
            if is_reader is None:
                is_reader = _reads(study, arm)
            place, unchecked = _place(study, arm, seed, folder, None, reads=is_reader), None
            if place.origin()["inputs"] is not None:
                try:
                    place = _place(study, arm, seed, folder, digests.of(arm.config))
                # What was read is not on this machine: its numbers can be judged all the same.
                except DataError as error:
                    unchecked = str(error)
            metrics = place.read()
            if metrics is not None:
                runs[arm.name][seed] = metrics
                origins.append(Origin(arm.name, seed, reads=is_reader, unchecked=unchecked, **place.origin()))
            elif (reason := place.why_not()) is not None:
                outdated.append((arm.name, seed, reason))
    return Results(runs), outdated, origins


def _reads(study: Study, arm: Arm) -> bool:
    """Whether runs of an arm read anything that is noted; nothing is read to tell, but where the study itself says it."""
    if study.inputs is None:
        return bool(readers(arm.config))
    try:
        return study.inputs(arm.config) is not None
    # What it reads is not on this machine.
    except DataError:
        return True


def _place(
    study: Study, arm: Arm, seed: int, folder: Path, inputs: str | None, *, reads: bool | None = None
) -> RunRecord:
    return RunRecord(
        folder=folder / study.name,
        study=study.name,
        arm=arm.name,
        seed=seed,
        revision=study.revision,
        config=arm.config,
        inputs=inputs,
        device=device_kind(arm.config),
        noted_only=study.noted_only and (inputs is not None if reads is None else reads),
    )


def fitted(study: Study, folder: str | Path) -> list[dict[str, Any]]:
    """The rows of the study's ``fit``, of what is published and of the runs that lie in ``folder``.

    Raises ConfigError for a study that fits no law.
    """
    if study.fit is None:
        raise ConfigError(f"study {study.name!r} fits no law; leave out --fit")
    return study.fit(read_results(study, folder))


def summary_rows(study: Study, results: Results) -> list[dict[str, Any]]:
    """One row per arm that has run: seeds, and ``{mean, interval}`` of each number it measured."""
    rows = []
    for arm in study.arms:
        runs = results.runs.get(arm.name, {})
        numbers = sorted({name for metrics in runs.values() for name, value in metrics.items() if _is_number(value)})
        if runs:
            values: dict[str, Any] = {}
            for name in numbers:
                mean = results.mean(arm.name, name)
                values[name] = _rounded({"mean": mean.mean, "interval": mean.interval})
            rows.append({"arm": arm.name, "about": arm.about, "seeds": sorted(runs), "metrics": values})
    return rows


def pick_arms(study: Study, names: Sequence[str] | None) -> list[Arm]:
    """The arms of these names, the study's default ones for None. Raises ConfigError for an unknown one."""
    names = study.default_arms if names is None else names
    known = {arm.name: arm for arm in study.arms}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"study {study.name!r} has no arm {unknown[0]!r}; known: {', '.join(known)}")
    return list(study.arms) if names is None else [known[name] for name in names]


def _run_one(study: Study, place: RunRecord, label: str, progress: Progress, frozen: Frozen | None) -> None:
    reason = place.why_not()
    progress(f"{label}: started" if reason is None else f"{label}: run again, since the run there {reason}")
    _check_inputs(study, place)
    started, cpu_started = time.perf_counter(), time.process_time()
    metrics = study.run(place.config, place.seed, lambda text: progress(f"{label}: {text}"))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    _check_inputs(study, place)
    facts = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": versions(),
        "where": here(),
    }
    kept = place.write(metrics, **facts, **({} if frozen is None else {"frozen": frozen.hash}))
    progress(f"{label}: finished in {seconds:.0f} s" + (f"; the run before is kept in {kept}" if kept else ""))


def _check_inputs(study: Study, place: RunRecord) -> None:
    """What lies there before a run and after it is what it read. Raises DataError if it is not what was there when the study began."""
    if place.inputs is not None and Digests(study.inputs).of(place.config) != place.inputs:
        raise DataError(
            f"what {place.arm} seed {place.seed} reads has changed since the first of these runs was started; "
            "run the same command again: what was made of the files before is made anew"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, so that files can be read and compared."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value

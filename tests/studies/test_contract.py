"""What every study keeps: all its claims stand in its result, whether their arms have run or not."""

import ast
import bisect
import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import pytest

from anabranch import studies
from anabranch.errors import ConfigError
from anabranch.studies.frozen import read
from anabranch.studies.harness import Claim, Results, _read, run_study, standing
from anabranch.studies.paired import SEEDS_NEEDED
from anabranch.studies.provenance import readers

RECORDED = Path(__file__).parents[2] / "studies" / "results"
HARNESS = "anabranch.studies.harness"
BUILT_IN = sorted(studies.STUDIES)
# Frozen and not run; their pages say so.
NOT_RUN = {
    "carl",
    "carl_highway",
    "ftp",
    "pvchat",
    "rexmoe_grown",
    "router_r1",
    "scale",
}
RAN = sorted(set(BUILT_IN) - NOT_RUN)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("full", [True, False])
def test_nothing_that_is_planned_vanishes(name, full):
    planned = studies.find(name)(full=full).judge(Results({}))
    assert planned
    assert {claim.verdict for claim in planned} == {"not run"}
    for claim in planned:
        assert (claim.baseline, claim.ours, claim.difference, claim.interval) == (None,) * 4
    told = [claim.claim for claim in planned]
    assert all(told)
    assert len(set(told)) == len(told)


def summarized(study):
    """Claims as the harness judges the recorded runs, and writes nothing."""
    results, _, origins = _read(study, RECORDED)
    return standing(study, results, read(RECORDED, study.name), origins)


@pytest.mark.parametrize("name", RAN)
def test_as_many_claims_are_recorded_as_were_planned(name):
    """Their words may name what was found, such as the baseline that came out best."""
    study = studies.find(name)(full=True)
    recorded = json.loads((RECORDED / f"{name}.json").read_text())["claims"]
    assert len(recorded) == len(study.judge(Results({})))
    judged = summarized(study)
    assert [(claim["claim"], claim["verdict"]) for claim in recorded] == [(one.claim, one.verdict) for one in judged]


@pytest.mark.parametrize("name", RAN)
def test_a_claim_is_run_or_not_as_a_whole(name):
    for claim in json.loads((RECORDED / f"{name}.json").read_text())["claims"]:
        has_run = claim["verdict"] != "not run"
        assert (claim["ours"] is not None) == has_run, claim["claim"]
        assert (claim["baseline"] is not None or claim["limit"] is not None) == has_run, claim["claim"]
        is_range = claim["baseline"] is None and isinstance(claim["limit"], list)
        assert (claim["difference"] is not None) == (has_run and not is_range), claim["claim"]


@pytest.mark.parametrize("name", RAN)
def test_a_difference_is_ours_less_the_baseline_or_says_what_it_is(name):
    for claim in json.loads((RECORDED / f"{name}.json").read_text())["claims"]:
        if claim["difference"] is not None and claim["margin"] is None:
            beside = claim["limit"] if claim["baseline"] is None else claim["baseline"]
            close = pytest.approx(claim["ours"] - beside, rel=1e-3, abs=2e-5 * max(1, abs(claim["ours"])))
            assert claim["difference"] == close, claim["claim"]


def test_a_limit_is_no_baseline():
    made = Claim.against(0.8, "a", "b", 0.9, "holds", [0.85, 0.95])
    assert (made.baseline, made.limit, made.difference) == (None, 0.8, pytest.approx(0.1))
    assert made.interval == pytest.approx([0.05, 0.15])
    between = Claim.against((0.9, 1.1), "a", "b", 1.0, "holds")
    assert (between.baseline, between.limit, between.difference) == (None, (0.9, 1.1), None)
    with pytest.raises(ConfigError, match="neither a baseline nor a limit"):
        Claim("a", "b", None, 1.0, 1.0, None, "holds")
    # Ours less a scaled baseline, beside the baseline itself.
    with pytest.raises(ConfigError, match=r"the difference is 0\.5, and ours - baseline is -0\.5"):
        Claim("a", "b", 1.5, 1.0, 0.5, None, "holds", limit=0.5)
    assert Claim("a", "b", 1.5, 1.0, 0.5, None, "holds", margin="ours - limit", limit=0.5).margin


# Of the worst arm in each seed, a mean of two metrics' differences, and a mean over questions.
MADE = {
    "expertflow": (
        "E1: B_acc is at least TLP",
        "E1: the gap to LRU",
        "E4: prediction alone",
        "E1: B_acc on another domain",
    ),
    "graphrouter": ("told the task",),
}


@pytest.mark.parametrize("name", RAN)
def test_a_baseline_is_what_was_measured(name):
    """A mean, over some of its seeds, of a number that an arm recorded: never a number of the claim's, nor a share of what was measured."""
    numbers = recorded_numbers(name)
    together = {frozenset(values) for values in numbers}
    means = sorted(itertools.chain.from_iterable(means_of(values, together) for values in numbers))
    for claim in json.loads((RECORDED / f"{name}.json").read_text())["claims"]:
        if claim["baseline"] is not None and not claim["claim"].startswith(MADE.get(name, ("\n",))):
            place = bisect.bisect(means, claim["baseline"])
            near = min(means[max(0, place - 1) : place + 1], key=lambda mean: abs(mean - claim["baseline"]))
            assert claim["baseline"] == pytest.approx(near, rel=1e-5, abs=1e-9), claim["claim"]


def recorded_numbers(name):
    """For each arm and metric, the value of each seed."""
    numbers = {}
    for path in (RECORDED / name).glob("*-seed*.json"):
        for metric, value in json.loads(path.read_text())["metrics"].items():
            if isinstance(value, int | float):
                arm, _, seed = path.stem.rpartition("-seed")
                numbers.setdefault((arm, metric), {})[seed] = float(value)
    return list(numbers.values())


def means_of(values, together):
    """Of up to six values the means of all subsets; of more the means over the seeds that another number has as well."""
    if len(values) <= 6:
        sets = [some for size in range(1, len(values) + 1) for some in itertools.combinations(values, size)]
    else:
        sets = {frozenset(values) & seeds for seeds in together} - {frozenset()}
    return [statistics.fmean(values[seed] for seed in some) for some in sets]


@pytest.mark.parametrize("name", RAN)
def test_no_verdict_stands_on_fewer_than_five_repetitions(name):
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    seeds = max(len(of) for group in recorded["runs"] for of in group["runs"].values())
    for claim in recorded["claims"]:
        if claim["verdict"] in ("holds", "does not hold") and not claim["exact"]:
            assert (claim["count"] or seeds) >= SEEDS_NEEDED, claim["claim"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_full_size_has_seeds_enough_for_a_verdict(name):
    assert len(set(studies.find(name)(full=True).seeds)) >= SEEDS_NEEDED


# By which a module of a study reads files; None: by any name of it.
READERS = {
    "anabranch.places": {"data_file", "data_folder"},
    "anabranch.graph.datasets": None,
    "anabranch.routers.data": {"SETS"},
    "anabranch.routers.data.sets": None,
    "anabranch.data": {"DataConfig"},
    "anabranch.train": {"RunConfig"},
}
SOURCE = Path(studies.__file__).parents[2]


def file_of(module):
    return SOURCE / f"{module.replace('.', '/')}.py"


def imported(module):
    """Pairs of a module and a name that another takes from it, wherever in its code."""
    nodes = ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8")))
    return [(node.module or "", part.name) for node in nodes if isinstance(node, ast.ImportFrom) for part in node.names]


def reads_by(module, seen):
    """By what a module of studies reads files, itself or by another module of studies."""
    seen.add(module)
    found = []
    for origin, name in imported(module):
        if origin in READERS and (READERS[origin] is None or name in READERS[origin]):
            found.append(f"{module}: {origin}.{name}")
        for inner in (origin, f"{origin}.{name}"):
            if inner.startswith("anabranch.studies.") and inner not in seen and file_of(inner).exists():
                found += reads_by(inner, seen)
    return found


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("full", [True, False])
def test_every_study_that_reads_says_what_it_read(name, full):
    """By content, so that runs of other text, graphs or questions are never paired: `Study.inputs`, or a part of a config says it."""
    study, module = studies.find(name)(full=full), studies.STUDIES[name].partition(":")[0]
    found = reads_by(module, {HARNESS})
    says = study.inputs is not None or any(readers(arm.config) for arm in study.arms)
    assert says or not found, found


def test_what_reads_is_found_whichever_way_it_reads():
    """The test above would hold of studies whose reading it does not see."""
    found = {name for name in BUILT_IN if reads_by(studies.STUDIES[name].partition(":")[0], {HARNESS})}
    assert found >= {
        "chain",
        "elaswave",
        "fastrp",
        "graphrouter",
        "ic_cache",
        "nanoflow",
        "routing_survey",
        "ttspm",
        "tokenring",
    }
    assert found.isdisjoint({"carl", "g_rank", "scale"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_run_of_every_study_says_where_it_ran_on_what_and_how_long(name, tmp_path):
    """Whatever the study: its runs are the harness's to write."""
    study = studies.find(name)(full=True)
    arm = study.arms[0]
    stub = {"run": lambda config, seed, progress: {}, "judge": lambda results: [], "draw": None, "exact": ()}
    made = dataclasses.replace(study, inputs=lambda config: "what it read", **stub)
    run_study(made, tmp_path, arms=[arm.name], seeds=[0])
    record = json.loads((tmp_path / study.name / f"{arm.name}-seed0.json").read_text())
    assert record["where"].keys() >= {"commit", "cpu", "isa", "threads"}
    assert record["where"]["cpu"]
    assert str(record["where"]["threads"]) >= "1"
    assert record["versions"].keys() >= {"python", "machine", "numpy", "torch"}
    assert record["seconds"] >= 0
    assert record["cpu_seconds"] >= 0
    assert record["inputs"] == "what it read"

import json
import multiprocessing
from pathlib import Path

import pytest

from anabranch import studies
from anabranch.config import Config, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.studies.corrected import settled
from anabranch.studies.harness import (
    Arm,
    Claim,
    Column,
    Results,
    Study,
    read_records,
    run_study,
    summarize,
    summary_rows,
)
from anabranch.studies.paired import verdict_below
from anabranch.studies.records import changes


@configclass
class Options(Config):
    depth: int = 1
    wide: bool = False


@configclass
class Outer(Config):
    inner: tuple[Options, ...]


@configclass
class Kinded(Config):
    kind: str
    thin: int = 1


LOSS = {"plain": 2.0, "better": 1.5}


def measured(config, seed, progress):
    progress("working")
    return {"loss": LOSS[config["kind"]] + 0.1 * seed, "curve": [1, 2], "note": "text"}


def judged(results):
    return [
        results.claim(
            "loss", ours="better", baseline="plain", claim="better is better", paper="-0.4", verdict=verdict_below
        )
    ]


def make(run=measured, **changes):
    arms = (Arm("plain", "the baseline", {"kind": "plain"}), Arm("better", "ours", {"kind": "better"}))
    values = {
        "name": "made_up",
        "title": "a study of nothing",
        "settings": {"steps": 3},
        "arms": arms,
        "run": run,
        "judge": judged,
        "columns": (Column("loss", "loss"),),
        "seeds": (0, 1),
    }
    return Study(**{**values, **changes})


def test_result_file_has_exactly_the_promised_form(tmp_path):
    outcome = run_study(make(), tmp_path)
    written = json.loads(outcome.path.read_text())
    assert outcome.path == tmp_path / "made_up.json"
    assert list(written) == ["name", "seeds", "claims", "config", "versions", "runs", "notes", "judged_with", "frozen"]
    assert written["seeds"] == [0, 1]
    assert written["config"] == {"steps": 3, "arms": {"plain": "the baseline", "better": "ours"}}
    assert written["versions"].keys() >= {"python", "torch", "anabranch"}
    assert written["versions"] == written["judged_with"]
    assert written["notes"] == []
    [alike] = written["runs"]
    assert alike["versions"] == written["versions"]
    assert alike["inputs"] is None
    assert alike["runs"] == {"plain": [0, 1], "better": [0, 1]}
    assert written["claims"] == [
        {
            "claim": "better is better",
            "paper": "-0.4",
            "baseline": 2.05,
            "ours": 1.55,
            "difference": -0.5,
            "interval": [-0.5, -0.5],
            "verdict": "not resolved",
            "margin": None,
            "limit": None,
            "exact": False,
            "count": 2,
            "why_void": None,
        }
    ]


@pytest.mark.parametrize(("seeds", "verdict"), [(4, "not resolved"), (5, "holds")])
def test_nothing_is_decided_below_five_seeds(tmp_path, seeds, verdict):
    outcome = run_study(make(seeds=range(seeds)), tmp_path)
    # What the study's own rule says, and what stands in the result.
    assert [claim.verdict for claim in make().judge(outcome.results)] == ["holds"]
    assert [claim.verdict for claim in outcome.claims] == [verdict]
    assert json.loads(outcome.path.read_text())["claims"][0]["verdict"] == verdict


def test_repetitions_other_than_seeds_count_and_what_is_exact_needs_none():
    def verdict(said, seeds=2, **more):
        (made,) = settled([Claim.against(1.0, "a", "b", 2.0, said, **more)], seeds)
        return made.verdict

    assert verdict("holds") == verdict("does not hold") == "not resolved"
    assert verdict("holds", exact=True) == "holds"
    assert verdict("holds", count=5) == "holds"
    assert verdict("holds", count=4) == "not resolved"
    assert verdict("not run") == "not run"
    assert verdict("holds", seeds=5) == "holds"
    assert verdict("holds", seeds=5, count=2) == "not resolved"


def test_a_claim_that_is_marked_exact_is_judged_as_any_other():
    def judge(results):
        return [Claim.against(1.0, words, "b", 2.0, "holds") for words in ("a", "c")]

    for seeds, verdict in ((2, "not resolved"), (5, "holds")):
        results = Results({"x": {seed: {} for seed in range(seeds)}})
        found = make(judge=judge, exact=("c",)).judged(results)
        assert [(claim.exact, claim.verdict) for claim in found] == [(False, verdict), (True, verdict)]
    marked, plain = make(judge=judge, exact=("c",)), make(judge=judge)
    assert marked.plan() == plain.plan()
    with pytest.raises(ConfigError, match="marks 'd' as exact, and has no such claim"):
        make(judge=judge, exact=("c", "d")).judged(Results({}))


def test_every_run_is_one_file_and_is_not_run_again(tmp_path):
    runs = []

    def counting(config, seed, progress):
        runs.append((config["kind"], seed))
        return measured(config, seed, progress)

    study = make(counting)
    run_study(study, tmp_path, arms=["plain"], seeds=[0])
    run_study(study, tmp_path, seeds=[0, 1])
    run_study(study, tmp_path)
    # Seed by seed, so that a study that was cut short is balanced.
    assert runs == [("plain", 0), ("better", 0), ("plain", 1), ("better", 1)]
    record = json.loads((tmp_path / "made_up" / "better-seed1.json").read_text())
    assert record["metrics"]["loss"] == 1.6
    assert record["arm"] == "better"
    assert record["seed"] == 1
    assert record["config"] == {"kind": "better"}
    assert not list(tmp_path.rglob("*.lock"))


def test_another_config_or_revision_is_run_again_and_replaces(tmp_path):
    run_study(make(), tmp_path)
    other = make(arms=(Arm("plain", "the baseline", {"kind": "better"}), make().arms[1]))
    with pytest.raises(DataError, match="no finished run"):
        summarize(make(revision=2), tmp_path)
    assert summarize(other, tmp_path).results.runs.keys() == {"better"}
    told = []
    outcome = run_study(other, tmp_path, seeds=[0], progress=told.append)
    assert outcome.results.values("plain", "loss") == {0: 1.5}
    assert any(
        "run again, since the run there is of another config: kind was 'plain' and is now 'better'" in t for t in told
    )
    # What was recorded is not lost, and what does not count is told.
    [kept] = (tmp_path / "made_up" / "earlier").glob("plain-seed0-*.json")
    assert json.loads(kept.read_text())["metrics"]["loss"] == 2.0
    assert [(arm, seed) for arm, seed, _ in outcome.outdated] == [("plain", 1)]


@pytest.mark.parametrize("noted_only", [True, False])
def test_what_a_run_reads_beside_its_config_is_part_of_its_key(tmp_path, noted_only):
    runs = []

    def counting(config, seed, progress):
        runs.append((config["kind"], seed))
        return measured(config, seed, progress)

    run_study(make(counting, seeds=(0,)), tmp_path)
    if not noted_only:  # else the older record does not count by itself
        for path in (tmp_path / "made_up").glob("*-seed0.json"):
            path.unlink()
    told = []
    for text in ("one", "one", "two"):
        study = make(counting, seeds=(0,), inputs=lambda config, text=text: text, noted_only=noted_only)
        run_study(study, tmp_path, progress=told.append)
    # Once without a digest, once with the first, once with the second.
    assert runs == [("plain", 0), ("better", 0)] * 3
    assert (
        any("written by an older version, which did not note what text it read" in text for text in told) is noted_only
    )
    assert any("read other text: the files have changed since" in text for text in told)
    assert len(list((tmp_path / "made_up" / "earlier").glob("*.json"))) == (4 if noted_only else 2)


@pytest.mark.parametrize("is_here", [True, False])
def test_an_older_record_of_what_reads_nothing_counts_where_notes_are_asked_for(tmp_path, is_here):
    """Whether what the other arm reads is on this machine or not."""

    def inputs(config):
        if config["kind"] == "plain":
            return None
        if not is_here:
            raise DataError("not here")
        return "text"

    run_study(make(seeds=(0,)), tmp_path)
    results, outdated = read_records(make(seeds=(0,), inputs=inputs, noted_only=True), tmp_path)
    assert list(results.runs) == ["plain"]
    assert [(arm, "did not note what text it read" in reason) for arm, _, reason in outdated] == [("better", True)]


def edit(path, **changes):
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


@configclass
class Reader(Config):
    """Reads a file, on a device."""

    kind: str
    path: str

    def content_digest(self):
        path = Path(self.path)
        if not path.is_file():
            raise DataError(f"no file {self.path}")
        return path.read_text()

    def device_kind(self):
        return "cpu"


@configclass
class Deep(Config):
    """So that what reads stands somewhere within."""

    inner: tuple[Reader, ...]


def reading(tmp_path, run=None, **changes):
    def arm(name):
        return Arm(name, "", Deep(inner=(Reader(kind=name, path=str(tmp_path / "text")),) * 2))

    def measure(config, seed, progress):
        return measured({"kind": config.inner[0].kind}, seed, progress)

    return make(run or measure, arms=(arm("plain"), arm("better")), **changes)


def test_a_study_cannot_forget_what_its_runs_read(tmp_path):
    """Nothing is said of it: whatever part of a config reads is found."""
    (tmp_path / "text").write_text("one")
    run_study(reading(tmp_path), tmp_path)
    record = json.loads((tmp_path / "made_up" / "plain-seed1.json").read_text())
    assert (record["inputs"], record["device"]) == ("one", "cpu")
    (tmp_path / "text").write_text("two")
    told = []
    outcome = run_study(reading(tmp_path), tmp_path, seeds=[0], progress=told.append)
    assert sum("read other text" in text for text in told) == 2
    assert [(arm, seed) for arm, seed, _ in outcome.outdated] == [("plain", 1), ("better", 1)]
    # Without the file runs can be judged; that they were not compared with it is said.
    (tmp_path / "text").unlink()
    outcome = summarize(reading(tmp_path), tmp_path)
    assert outcome.outdated == []
    [note] = outcome.notes
    assert (
        note
        == f"text not compared with that of here (no file {tmp_path / 'text'}): plain seeds 0, 1; better seeds 0, 1"
    )


def test_text_that_changes_in_the_middle_of_a_study(tmp_path):
    (tmp_path / "text").write_text("one")

    def changing(config, seed, progress):
        if (config.inner[0].kind, seed) == ("better", 0):
            (tmp_path / "text").write_text("two")
        return {"loss": 1.0}

    with pytest.raises(
        DataError, match="what better seed 0 reads has changed since the first of these runs was started"
    ):
        run_study(reading(tmp_path, changing), tmp_path)
    assert [path.name for path in (tmp_path / "made_up").glob("*-seed*.json")] == ["plain-seed0.json"]


def test_runs_that_do_not_say_what_they_read_count_and_are_named(tmp_path):
    (tmp_path / "text").write_text("one")
    run_study(reading(tmp_path), tmp_path)
    for name in ("plain-seed0", "plain-seed1", "better-seed0"):
        edit(tmp_path / "made_up" / f"{name}.json", inputs=None)
    outcome = run_study(reading(tmp_path), tmp_path)
    assert outcome.outdated == []
    assert outcome.results.seeds == [0, 1]
    assert outcome.notes == [
        "written before runs noted what text they read: plain seeds 0, 1; better seed 0",
        "seed 1: runs that note their text are paired with runs that do not; they may have read other text",
    ]
    assert json.loads(outcome.path.read_text())["notes"] == outcome.notes


def test_another_device_is_another_run(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("one")
    moved = reading(tmp_path)
    run_study(moved, tmp_path)
    monkeypatch.setattr(Reader, "device_kind", lambda self: "cuda")
    with pytest.raises(DataError, match="ran on cpu, and would now run on cuda"):
        summarize(moved, tmp_path)
    # Older records do not say where: a build of PyTorch for CPUs is known, any other counts.
    edit(tmp_path / "made_up" / "plain-seed0.json", device=None, versions={"torch": "2.9.0+cpu"})
    edit(tmp_path / "made_up" / "plain-seed1.json", device=None, versions={"torch": "2.9.0+cu128"})
    results, outdated = read_records(moved, tmp_path)
    assert results.runs.keys() == {"plain"}
    assert list(results.runs["plain"]) == [1]
    assert len(outdated) == 3


def test_versions_that_moved_are_told_run_by_run(tmp_path):
    """They do not make another run, but nobody pairs them unawares."""
    run_study(make(), tmp_path)
    here = json.loads((tmp_path / "made_up.json").read_text())["versions"]
    edit(tmp_path / "made_up" / "plain-seed0.json", versions={**here, "torch": "1.0", "python": "3.8"})
    edit(tmp_path / "made_up" / "better-seed1.json", versions=None)
    told = []
    outcome = run_study(make(), tmp_path, progress=told.append)
    assert sum("done before" in text for text in told) == 4
    first, second = outcome.notes
    assert first == (
        f"other versions than here, python 3.8 (here {here['python']}), torch 1.0 (here {here['torch']}): plain seed 0"
    )
    assert second.startswith("other versions than here, python not noted (here")
    assert second.endswith(": better seed 1")
    written = json.loads(outcome.path.read_text())
    assert written["notes"] == outcome.notes
    assert written["versions"]["torch"] == f"1.0 and {here['torch']} and not noted"
    assert [group["runs"] for group in written["runs"]] == [
        {"plain": [0]},
        {"plain": [1], "better": [0]},
        {"better": [1]},
    ]
    assert written["judged_with"] == here


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"metrics": 1, "config": {}}', '{"metrics": {}}', "[" * 99999])
def test_a_record_of_any_other_form_is_named(tmp_path, content):
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "plain-seed0.json").write_text(content)
    with pytest.raises(DataError, match=r"plain-seed0\.json is not the record of a run"):
        run_study(make(), tmp_path)


def test_arms_whose_names_are_patterns(tmp_path):
    arms = (Arm("a[1]*", "", {"kind": "plain"}), Arm("a1x", "", {"kind": "better"}))
    outcome = run_study(make(arms=arms, judge=lambda results: []), tmp_path, seeds=[0])
    assert outcome.results.values("a[1]*", "loss") == {0: 2.0}


def test_a_run_that_fails_leaves_the_finished_ones(tmp_path):
    def failing(config, seed, progress):
        if (config["kind"], seed) == ("better", 1):
            raise KeyboardInterrupt
        return measured(config, seed, progress)

    with pytest.raises(KeyboardInterrupt):
        run_study(make(failing), tmp_path)
    outcome = summarize(make(), tmp_path)
    assert {arm: sorted(runs) for arm, runs in outcome.results.runs.items()} == {"plain": [0, 1], "better": [0]}
    assert outcome.claims[0].interval is None
    assert outcome.claims[0].verdict == "not resolved"
    assert outcome.claims[0].baseline == 2.0  # of the seeds that both have, not of all


def test_two_processes_share_the_work(tmp_path):
    context = multiprocessing.get_context("fork")
    both, begun = context.Barrier(2), []

    def beside(config, seed, progress):
        # None of them has done all before the other begins.
        if not begun:
            both.wait(60)
        begun.append(seed)
        return measured(config, seed, progress) | {"process": multiprocessing.current_process().name}

    def work():
        run_study(make(beside), tmp_path)

    workers = [context.Process(target=work, name=f"worker{n}") for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    records = [json.loads(path.read_text()) for path in (tmp_path / "made_up").glob("*-seed*.json")]
    assert len(records) == 4
    assert {record["metrics"]["process"] for record in records} == {"worker0", "worker1"}


def test_pair_under_way_elsewhere_is_left_to_it(tmp_path):
    import fcntl

    folder = tmp_path / "made_up"
    folder.mkdir()
    with open(folder / ".better-seed0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = run_study(make(), tmp_path, seeds=[0])
    assert outcome.missing == [("better", 0)]
    assert outcome.results.runs.keys() == {"plain"}


def test_summary_has_a_row_per_arm(tmp_path):
    study = make()
    outcome = run_study(study, tmp_path)
    rows = summary_rows(study, outcome.results)
    assert [row["arm"] for row in rows] == ["plain", "better"]
    assert rows[0]["seeds"] == [0, 1]
    assert rows[0]["metrics"]["loss"]["mean"] == pytest.approx(2.05)
    assert rows[0]["metrics"].keys() == {"loss"}
    assert json.loads((tmp_path / "made_up" / "summary.json").read_text()) == rows


def test_unknown_arm_is_named():
    with pytest.raises(ConfigError, match=r"study 'made_up' has no arm 'beter'; known: plain, better"):
        run_study(make(), "nowhere", arms=["beter"])


def test_broken_record_is_named(tmp_path):
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "plain-seed0.json").write_text("{")
    with pytest.raises(DataError, match=r"plain-seed0\.json is not the record of a run"):
        run_study(make(), tmp_path)


def test_claim_of_an_arm_that_did_not_run():
    results = Results({"plain": {0: {"loss": 1.0}}})
    assert judged(results) == [Claim("better is better", "-0.4", None, None, None, None, "not run")]


def test_values_leave_out_what_was_not_measured():
    results = Results({"plain": {0: {"loss": 1.0, "rate": None}, 1: {"loss": 2}}, "better": {}})
    assert results.values("plain", "rate") == {}
    assert results.values("plain", "loss") == {0: 1.0, 1: 2.0}
    assert results.mean("plain", "loss").mean == 1.5
    assert results.seeds == [0, 1]
    assert "better" not in results.runs


@pytest.mark.parametrize(
    ("recorded", "current", "same"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, True),
        # Keys of a dict are what somebody wrote: one more is another config. Only fields of a config class come later.
        ({"a": 1}, {"a": 1, "new": False}, False),
        ({"b": {"c": 1}}, {"b": {"c": 1, "new": None}}, False),
        ({}, Options(), True),
        ({"depth": 2}, Options(depth=2), True),
        ({"depth": 2}, Options(depth=2, wide=True), False),
        ({"inner": [{}]}, Outer(inner=(Options(),)), True),
        ({"inner": [{}]}, Outer(inner=(Options(wide=True),)), False),
        ({"inner": [{}, {}]}, Outer(inner=(Options(),)), False),
        ({"kind": "a"}, Kinded(kind="a"), True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1, "gone": 0}, {"a": 1}, False),
        ({"a": [1]}, {"a": [1, 2]}, False),
        ({"a": None}, {"a": {"kind": "psr"}}, False),
        ({"a": 1}, {"a": True}, False),
    ],
)
def test_which_config_counts_as_the_same(recorded, current, same):
    assert (not changes(recorded, current)) is same


RESULTS = Path(__file__).parents[2] / "studies" / "results"
RECORDED = [name for name in studies.names() if any((RESULTS / name).glob("*-seed*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_counts(name, monkeypatch):
    """A field that comes later must not undo what was recorded: either its default changes nothing, or the revision is raised."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # what is recorded ran without
    results, outdated = read_records(studies.find(name)(full=True), RESULTS)
    assert outdated == []
    assert results.runs

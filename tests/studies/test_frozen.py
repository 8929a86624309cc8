"""A plan that was frozen and changed since is refused, and one that was frozen anew voids verdicts until its arms have run again."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from anabranch import studies
from anabranch.errors import ConfigError, DataError
from anabranch.studies import frozen, harness, paired
from anabranch.studies.harness import Arm, Claim, Study, refreeze, run_study, summarize
from anabranch.studies.paired import Verdict, every_seed, verdict_below
from anabranch.train import TrainConfig

RECORDED = Path(__file__).parents[2] / "studies" / "results"
LEAST = 0.1


def measured(config, seed, progress):
    return {"loss": {"plain": 2.0, "better": 1.5}[config["kind"]] + 0.1 * seed}


def verdict_of(difference) -> Verdict:
    return verdict_below(difference, -LEAST)


def judge(results):
    return [
        results.claim(
            "loss", ours="better", baseline="plain", claim="better is better", paper="-0.4", verdict=verdict_of
        )
    ]


def judge_for(least, results):
    return judge(results)


def make(**changes):
    arms = (Arm("plain", "the baseline", {"kind": "plain"}), Arm("better", "ours", {"kind": "better"}))
    values = {
        "name": "made_up",
        "title": "a study of nothing",
        "settings": {},
        "arms": arms,
        "run": measured,
        "judge": judge,
        "seeds": range(5),
    }
    return Study(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    """Of a study whose plan was frozen, and that has run."""
    run_study(make(), tmp_path, freezes=True)
    return tmp_path


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def verdicts(outcome):
    return [claim.verdict for claim in outcome.claims]


def test_a_plan_is_frozen_before_the_first_run_and_every_run_notes_it(folder):
    written = json.loads((folder / "made_up" / "frozen.json").read_text())
    [entry] = written["history"]
    assert entry["why"] == "before the first run"
    assert written["plan"]["seeds"] == [0, 1, 2, 3, 4]
    assert written["plan"]["claims"] == [["better is better", "-0.4"]]
    assert written["plan"]["primary"] == "better is better"
    assert written["plan"]["arms"]["better"] == {"kind": "better"}
    for path in (folder / "made_up").glob("*-seed*.json"):
        assert json.loads(path.read_text())["frozen"] == written["hash"] == entry["hash"]
    outcome = summarize(make(), folder)
    assert verdicts(outcome) == ["holds"]
    assert outcome.to_dict()["frozen"]["hash"] == written["hash"]
    assert not [note for note in outcome.notes if "frozen" in note]


def test_seeds_beyond_the_plan_are_told(folder):
    outcome = run_study(make(), folder, seeds=[7], arms=["plain"])
    assert [note for note in outcome.notes if "seeds beyond those of the frozen plan: plain seed 7" in note]


def test_a_run_notes_where_it_took_place(folder):
    where = json.loads((folder / "made_up" / "plain-seed0.json").read_text())["where"]
    assert set(where) == {"commit", "cpu", "isa", "threads"}
    assert where["cpu"]
    assert where["threads"]


def test_a_study_of_the_small_size_freezes_nothing(tmp_path):
    outcome = run_study(make(), tmp_path)
    assert outcome.to_dict()["frozen"] is None
    assert not (tmp_path / "made_up" / "frozen.json").exists()
    # What has run is told by the plan that comes after it.
    run_study(make(), tmp_path, freezes=True)
    assert (
        json.loads((tmp_path / "made_up" / "frozen.json").read_text())["history"][0]["why"]
        == "after runs were recorded"
    )
    assert any(
        "ran before its plan was frozen" in note and "plain seeds 0, 1" in note
        for note in summarize(make(), tmp_path).notes
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record["plan"].update(rule="0" * 16), "was edited after it was signed"),
        (lambda record: record["plan"]["seeds"].pop(), "was edited after it was signed"),
        (lambda record: record["plan"]["arms"]["plain"].update(kind="better"), "was edited after it was signed"),
        (lambda record: record.update(hash="0" * 16), "was edited after it was signed"),
        (lambda record: record["history"][-1].update(hash="0" * 16), "was edited after it was signed"),
        (lambda record: record.pop("plan"), "is no frozen plan"),
        (lambda record: record.update(history=[]), "is no frozen plan"),
    ],
)
def test_a_tampered_plan_is_refused(folder, change, told):
    edit(folder / "made_up" / "frozen.json", change)
    before = (folder / "made_up.json").read_bytes()
    for attempt in (partial(summarize, make(), folder), partial(run_study, make(), folder, seeds=[9])):
        with pytest.raises(DataError, match=told):
            attempt()
    assert not (folder / "made_up" / "plain-seed9.json").exists()
    assert (folder / "made_up.json").read_bytes() == before


def other_judge(results):
    return [replace(claim, verdict="holds") for claim in judge(results)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"judge": other_judge}, "the code of its rule is another"),
        ({"judge": partial(judge_for, 0.2)}, "the code of its rule is another"),
        ({"seeds": (0, 1)}, r"seeds was \[0, 1, 2, 3, 4\] and is now \[0, 1\]"),
        ({"revision": 2}, "revision was 1 and is now 2"),
        ({"primary": "another"}, "primary was 'better is better' and is now 'another'"),
        ({"arms": make().arms[:1]}, "arm better is gone"),
        ({"arms": (*make().arms, Arm("more", "", {}))}, "arm more is new"),
        (
            {"arms": (make().arms[0], Arm("better", "", {"kind": "plain"}))},
            "arm better: kind was 'better' and is now 'plain'",
        ),
    ],
)
def test_a_study_that_is_not_the_frozen_one_is_refused(folder, changes, told):
    before = (folder / "made_up.json").read_bytes()
    for attempt in (
        partial(summarize, make(**changes), folder),
        partial(run_study, make(**changes), folder, seeds=[9]),
    ):
        with pytest.raises(ConfigError, match=told):
            attempt()
    assert not (folder / "made_up" / "plain-seed9.json").exists()
    assert (folder / "made_up.json").read_bytes() == before


def test_a_margin_that_moves_is_another_rule(folder, monkeypatch):
    """Tampered with where it decides: in the code of this very module."""
    source = Path(__file__).read_text()
    assert "LEAST = 0.1\n" in source
    monkeypatch.setattr(frozen, "_source", lambda module: source.replace("LEAST = 0.1\n", "LEAST = 0.0\n"))
    frozen._names.cache_clear()
    try:
        with pytest.raises(ConfigError, match="the code of its rule is another"):
            summarize(make(), folder)
        # What says nothing of verdicts may change.
        monkeypatch.setattr(frozen, "_source", lambda module: source.replace("a study of nothing", "a study"))
        frozen._names.cache_clear()
        assert verdicts(summarize(make(), folder)) == ["holds"]
    finally:
        frozen._names.cache_clear()


def test_what_is_frozen_anew_is_void_until_it_has_run_again(folder):
    changed = make(arms=(make().arms[0], Arm("better", "ours", {"kind": "better", "more": 1})))
    with pytest.raises(ConfigError, match="for a reason"):
        refreeze(changed, folder, " ")
    with pytest.raises(ConfigError, match="nothing to freeze anew"):
        refreeze(make(), folder, "why not")
    made = refreeze(changed, folder, "a share was left out")
    assert made.history[-1]["changed"] == ["arm better: more was None and is now 1"] or made.history[-1]["changed"]
    assert len(made.history) == 2
    # Its baseline ran under the plan before.
    with pytest.raises(ConfigError, match="is not what was frozen"):
        summarize(make(), folder)
    outcome = run_study(changed, folder, arms=["better"])
    assert verdicts(outcome) == ["void"]
    assert any("a share was left out" in note for note in outcome.notes)
    for path in (folder / "made_up").glob("plain-seed*.json"):
        path.unlink()
    assert verdicts(run_study(changed, folder)) == ["holds"]


def two(results):
    """The claim of before, and one of other arms."""
    return [
        *judge(results),
        results.claim("loss", ours="best", baseline="other", claim="best is best", paper="-", verdict=verdict_of),
    ]


def test_only_what_rests_on_older_runs_is_void(tmp_path):
    """What was frozen anew voids every claim, until the runs that it rests on are of the new plan; others need not run again for that."""
    arms = [*make().arms, *(Arm(name, "", {"kind": kind}) for name, kind in (("other", "plain"), ("best", "better")))]
    run_study(make(arms=arms, judge=two), tmp_path, freezes=True)
    changed = make(arms=[*arms, Arm("more", "", {"kind": "plain"})], judge=two)
    refreeze(changed, tmp_path, "one more")
    assert verdicts(summarize(changed, tmp_path)) == ["void", "void"]
    for path in (tmp_path / "made_up").glob("be*-seed*.json"):
        path.unlink()
    run_study(changed, tmp_path, arms=["better", "best"])
    assert verdicts(summarize(changed, tmp_path)) == ["void", "void"]
    for path in (tmp_path / "made_up").glob("plain-seed*.json"):
        path.unlink()
    assert verdicts(run_study(changed, tmp_path, arms=["plain"])) == ["holds", "void"]


def test_another_primary_claim_voids_nothing_and_is_told(folder):
    """Which claim stands for the rest says nothing about what came out of any; that it was changed afterwards stands in the record."""
    other = make(primary="another")
    with pytest.raises(ConfigError, match="primary was"):
        summarize(other, folder)
    made = refreeze(other, folder, "the judged arm stands for the paper")
    assert made.history[-1]["voids"] == []
    outcome = summarize(other, folder)
    assert verdicts(outcome) == ["holds"]
    assert any("the judged arm stands for the paper" in note for note in outcome.notes)


def test_claims_may_be_void_one_by_one():
    claims = [Claim.against(1.0, name, "-", 2.0, "holds") for name in ("a", "b")]
    claims.append(Claim.not_run("c", "-"))
    assert [claim.verdict for claim in harness.void(claims, ["b", "c"])] == ["holds", "void", "not run"]
    assert [claim.verdict for claim in harness.void(claims, [frozen.ALL])] == ["void", "void", "not run"]
    assert [claim.verdict for claim in harness.void(claims, [])] == ["holds", "holds", "not run"]
    plan = frozen.Frozen({}, [{"hash": "1", "voids": []}, {"hash": "2", "voids": ["a"]}, {"hash": "3", "voids": ["b"]}])
    assert plan.voided(["3", "3"]) == []
    assert plan.voided(["3", "2"]) == ["b"]
    assert plan.voided(["1"]) == plan.voided([None, "3"]) == plan.voided(["of nobody"]) == ["a", "b"]


def test_a_field_that_came_later_counts_at_its_default():
    """Plans of before were refused for each new option of the trainer."""
    settings = TrainConfig(steps=7)
    study = make(arms=(Arm("plain", "the baseline", settings), Arm("better", "ours", {"kind": "better", "own": 1})))
    older = json.loads(json.dumps(study.plan()))
    for later in ("mezo_scale", "schedule"):
        del older["arms"]["plain"][later]
    assert frozen.differing(older, study) == []
    older["arms"]["plain"]["steps"] = 8
    assert frozen.differing(older, study) == ["arm plain: steps was 8 and is now 7"]
    # One that is not at its default, and a key that somebody wrote.
    del older["arms"]["plain"]["steps"]
    del older["arms"]["better"]["own"]
    told = frozen.differing(older, study)
    assert len(told) == 2
    assert told[1] == "arm better: own was None and is now 1"


def test_the_rule_is_what_it_uses_and_nothing_else():
    assert frozen.of_rule(judge) != frozen.of_rule(other_judge)
    assert frozen.of_rule(partial(judge_for, 0.1)) != frozen.of_rule(partial(judge_for, 0.2))
    assert frozen.of_rule(partial(judge_for, 0.1)) == frozen.of_rule(partial(judge_for, 0.1))
    found = {}
    frozen._follow(__name__, "judge", __name__, found)
    names = {key.split()[0] for key in found}
    assert {"judge", "verdict_of", "LEAST"} <= names
    assert names.isdisjoint({"make", "measured", "every_seed", "other_judge"})
    assert every_seed
    assert frozen.of_rule(lambda results: [])


def by_module(results):
    return paired.every_seed([True])


def test_what_is_taken_from_a_module_is_of_the_rule():
    found = {}
    frozen._follow(__name__, "by_module", "anabranch", found)
    assert {key.split()[0] for key in found} == {"by_module", "every_seed"}


@pytest.mark.parametrize("name", sorted(studies.STUDIES))
def test_every_study_is_what_was_frozen(name):
    """Where this fails: undo it, or ``anabranch study NAME --full --refreeze REASON``, and say on its page what changed and why."""
    study = studies.find(name)(full=True)
    plan = frozen.read(RECORDED, name)
    assert plan is not None, f"anabranch study {name} --full --refreeze REASON freezes it"
    assert frozen.differing(plan.plan, study) == []
    assert study.plan()["primary"] in [claim for claim, _ in plan.plan["claims"]]

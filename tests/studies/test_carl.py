"""The study of CaRL: what its arms are, its rule, and that it runs."""

import math
import signal

import pytest

from anabranch.rl.rewards import FACTORS
from anabranch.studies import carl
from anabranch.studies.carl import ARMS, FLOOR, RATES, Size, at_tuned_rates, judge, make, run_of
from anabranch.studies.harness import Results, run_study


def test_arms_differ_in_batch_and_reward_alone():
    size = Size()
    found = {name: run_of(name, size) for name in ARMS}
    batches = {name: (run.train.batch_size, run.task.collecting.num_samples) for name, run in found.items()}
    for reward in ("simple", "shaped"):
        assert [batches[f"{reward}-{each}"] for each in (256, 2048, 16384)] == [
            (256, 1024),
            (2048, 8192),
            (16384, 65536),
        ]
    assert batches["no-hint"] == batches["no-factors"] == (2048, 8192)
    gammas = {name: run.task.gamma for name, run in found.items() if name.startswith("gamma")}
    assert gammas == {"gamma-0.95": 0.95, "gamma-0.98": 0.98, "gamma-0.999": 0.999}
    assert {batches[name] for name in gammas} == {(2048, 8192)}
    assert {run.train.learning_rate for name, run in found.items() if name in gammas} == {2.5e-4 * math.sqrt(8)}
    # The square root of 64 and of 8.
    rates = [found[f"simple-{each}"].train.learning_rate / 2.5e-4 for each in (256, 2048, 16384)]
    assert rates == pytest.approx([1, math.sqrt(8), 8])
    assert rates == [found[f"shaped-{each}"].train.learning_rate / 2.5e-4 for each in (256, 2048, 16384)]
    # Both rewards have the same rates to choose from.
    for arm in (f"{reward}-{size}" for reward in ("simple", "shaped") for size in (256, 16384)):
        tried = [found[f"{arm}{rate}"].train.learning_rate / found[arm].train.learning_rate for rate in RATES]
        assert tried == [1, 0.5, 2]
    for name, run in found.items():
        world = run.task.environment.world
        assert world.shaped == name.startswith("shaped")
        assert world.reward.hint == (0 if name == "no-hint" else -1)
        assert [getattr(world.reward, factor) for factor in FACTORS] == [name != "no-factors"] * 5
        same = {"num_envs", "rollout_steps", "environment"} | ({"gamma"} if name in gammas else set())
        for field in vars(run.task).keys() - same:
            assert getattr(run.task, field) == getattr(found["simple-256"].task, field), field
        # Whole rollouts: no more than one is left over.
        samples = run.train.steps * run.train.batch_size // run.task.epochs
        assert 4_000_000 - 65_536 < samples <= 4_000_000


def runs(score, still=0.0, spread=0.3):
    return {
        seed: {"driving_score": score + spread * seed, "stands_still": still + 0.002 * seed**2} for seed in range(5)
    }


def tried(runs_of, *rewards):
    """The same by all rates."""
    return Results(
        {
            f"{arm}{rate}": runs
            for arm, runs in runs_of.items()
            for rate in (RATES if arm.partition("-")[0] in rewards or not rewards else ("",))
        }
    )


def test_the_rule():
    driven = {"simple-16384": runs(60.0, 0.01), "shaped-16384": runs(40.0, 0.3), "simple-256": runs(58.0)}
    found = judge(tried(driven))
    # Nothing is known of the shaped reward's rate where it has not run at 256.
    assert [claim.verdict for claim in found] == ["not run", "holds", "not run", "not run"]
    found = judge(tried(driven | {"shaped-256": runs(50.0, 0.3)}))
    assert [claim.verdict for claim in found] == ["holds", "holds", "holds", "holds"]
    near = {"simple-256": runs(49.0), "simple-16384": runs(49.0), "shaped-256": runs(40.0), "shaped-16384": runs(40.0)}
    assert judge(tried(near))[0].verdict == "does not hold"
    few = {arm: {seed: run for seed, run in of_arm.items() if seed < 4} for arm, of_arm in driven.items()}
    assert judge(tried(few | {"shaped-256": few["shaped-16384"]}))[0].verdict == "not resolved"


def test_each_reward_is_judged_at_its_own_rate():
    """At 256 the shaped reward drives best at twice the rate: then it is judged there at 16,384 too, whatever is best there."""
    by_arm = {arm: runs(50.0) for arm in ("simple-256", "simple-16384", "simple-256-slow", "simple-256-fast")}
    by_arm |= {"shaped-256": runs(30.0), "shaped-256-slow": runs(60.0), "shaped-256-fast": runs(61.0)}
    by_arm |= {"shaped-16384": runs(80.0), "shaped-16384-slow": runs(70.0), "shaped-16384-fast": runs(20.0)}
    found = at_tuned_rates(Results(by_arm))
    assert found.values("shaped-16384", "driving_score") == Results(by_arm).values("shaped-16384-fast", "driving_score")
    assert found.values("shaped-256", "driving_score") == Results(by_arm).values("shaped-256-fast", "driving_score")
    assert found.values("simple-16384", "driving_score") == Results(by_arm).values("simple-16384", "driving_score")
    assert judge(Results(by_arm))[0].verdict == "holds"


def test_no_seed_chooses_its_own_rate():
    """Whichever rate is best in a seed by chance alone: the others choose, and the mean is not that of the best of three."""
    by_arm = {"shaped-256": runs(50.0, spread=0.0), "shaped-256-slow": runs(50.0, spread=0.0)}
    by_arm["shaped-256-fast"] = {seed: {"driving_score": 100.0 if seed == 2 else 49.0} for seed in range(5)}
    found = at_tuned_rates(Results(by_arm)).values("shaped-256", "driving_score")
    assert found[2] == 50.0
    assert at_tuned_rates(Results({arm: {0: of_arm[0]} for arm, of_arm in by_arm.items()})).runs == {}


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("ahead", ["simple", "shaped", "both"])
@pytest.mark.parametrize(("score", "still"), [(0.0, 1.0), (0.0, 0.0), (14.0, 0.0)])
def test_no_claim_holds_where_nothing_is_learned(score, still, ahead, spread):
    """All stand, all fail at once, or drive as one does who has not learned; with a little more of it in one or the other."""
    driven = {
        arm: runs(score + 4.0 * (arm.startswith(ahead) and not arm.endswith("shaped-16384")), still, spread)
        for arm in ARMS
    }
    driven["shaped-16384"] = runs(score, still + 0.2 * (still == 0), spread)
    for claim in judge(Results(driven)):
        assert claim.verdict in ("does not hold", "not resolved"), claim.claim
    assert FLOOR > 14 + 4 + 4 * 0.3


@pytest.mark.parametrize("others", [0.0, 15.0, FLOOR - 1, FLOOR + 1, 60.0, 87.0])
def test_who_drives_the_simple_reward_without_a_fault_is_better_than_any(others):
    """Also where what it is held against has not learned to drive."""
    driven = {arm: runs(98.0 if arm.startswith("simple-16384") else others) for arm in ARMS}
    assert [claim.verdict for claim in judge(Results(driven))[:2]] == ["holds", "holds"]


def test_two_failures_beside_each_other_are_not_equal():
    driven = {arm: runs(FLOOR - 2) for arm in ARMS}
    assert "holds" not in {claim.verdict for claim in judge(Results(driven))}


def test_an_arm_runs():
    pytest.importorskip("gymnasium")
    study = make()
    assert study.seeds == (0, 1)
    arm = next(arm for arm in study.arms if arm.name == "shaped-256")
    found = study.run(arm.config, 0, lambda text: None)
    assert {column.metric for column in study.columns} <= found.keys()
    assert found["samples"] > 0
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_arm_that_is_interrupted_ends_the_study(number, tmp_path, monkeypatch):
    """A training notes signals, and comes back early without what is measured."""
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(carl, "_TOLD_EVERY_S", 0.0)

    def progress(text):
        if ": step 1 of" in text:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        run_study(make(), tmp_path, arms=["simple-256"], seeds=[0], progress=progress)
    assert not list(tmp_path.glob("carl/*-seed*.json"))


def test_both_sizes_are_made():
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    assert make(samples=1024).settings["samples"] == 1024
    with pytest.raises(ValueError, match="samples is 0"):
        Size(samples=0)

"""The study of Router-R1: what its arms are, its rule, and that it runs."""

import math

import pytest

from anabranch.errors import DataError
from anabranch.studies.harness import Results, summarize
from anabranch.studies.records import RunRecord
from anabranch.studies.router_r1 import ARMS, ArmConfig, Size, judge, make, training_of, with_costs


def test_arms_differ_in_what_they_say_alone():
    runs = {name: training_of(ArmConfig(arm=name, size=make().arms[0].config.size), 3).run for name in ARMS}
    worlds = {name: run.task.world for name, run in runs.items()}
    assert [worlds[f"alpha-{alpha}"].alpha for alpha in ("0", "0.6", "0.8", "0.95")] == [0.0, 0.6, 0.8, 0.95]
    assert [name for name, world in worlds.items() if not world.format_reward] == ["no-format"]
    assert [name for name, world in worlds.items() if world.hidden is not None] == ["hidden"]
    assert [name for name, run in runs.items() if run.task.learns_information] == ["no-mask"]
    base = runs["alpha-0"]
    for name, run in runs.items():
        assert run.train == base.train, name
        assert run.task.model == base.task.model, name
        assert worlds[name].seed == 3
        changed = {field for field in vars(run.task) if getattr(run.task, field) != getattr(base.task, field)}
        assert changed <= {"world", "learns_information"}, name


def test_the_full_size_is_what_was_planned():
    study = make(full=True)
    assert study.seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in study.arms] == list(ARMS)
    size = study.arms[0].config.size
    # 300 rollouts of 256.
    assert size.samples == 300 * size.questions == 76_800
    assert (size.entities, size.relations, size.experts) == (400, 8, 7)
    # Whoever writes all turns to their ends has room for them.
    run = training_of(study.arms[0].config, 0).run
    world = run.task.world.build()
    longest = max(len(world.play(number, seed=number).prompt) for number in range(40))
    rules = world.rules
    assert (
        longest + (rules.max_turns + 1) * world.turn_tokens + rules.max_turns * (rules.information_tokens + 2)
        <= run.task.model.max_positions
    )
    assert make(samples=24).settings["samples"] == 24
    with pytest.raises(ValueError, match="samples is 0"):
        Size(samples=0)


def runs(**values):
    """Five seeds that differ by little, of routers that are right often enough."""
    usual = {
        "exact_match": 0.8,
        "exact_match_two_hop": 0.7,
        "raw_cost": 30.0,
        "informed_exact_match": 0.95,
        "informed_two_hop": 0.94,
        "dearest_raw_cost": 81.0,
    }
    return {seed: {name: value + 0.001 * seed**2 for name, value in (usual | values).items()} for seed in range(5)}


def test_the_rule():
    ours = runs(exact_match=0.8, exact_match_two_hop=0.85, calls_two_hop=1.9, raw_cost=40.0, invalid_turns=0.01)
    for seed in ours:
        ours[seed] |= {
            "single_oracle_two_hop": 0.7,
            "to_experts": 0.9,
            "random_exact_match": 0.3,
            "calls_one_hop": 1.0,
        }
    cheap = {
        alpha: runs(raw_cost=cost, exact_match=0.79) for alpha, cost in (("0.6", 30.0), ("0.8", 20.0), ("0.95", 9.0))
    }
    hidden = runs(sent_to_hidden=0.8)
    for seed in hidden:
        hidden[seed]["thrice_by_chance"] = 3 / 7
    found = judge(
        Results(
            {
                "alpha-0": ours,
                **{f"alpha-{alpha}": each for alpha, each in cheap.items()},
                "hidden": hidden,
                "no-format": runs(invalid_turns=0.2),
                "no-mask": runs(exact_match=0.9),
                "warm": runs(exact_match_two_hop=0.2, to_experts=0.3),
            }
        )
    )
    assert [claim.verdict for claim in found] == ["holds"] * 12 + ["does not hold"]
    assert found[0].claim.startswith("PRIMARY")
    few = {seed: metrics for seed, metrics in ours.items() if seed < 4}
    assert judge(Results({"alpha-0": few}))[0].verdict == "not resolved"
    near = {seed: metrics | {"single_oracle_two_hop": 0.8} for seed, metrics in ours.items()}
    assert judge(Results({"alpha-0": near}))[0].verdict == "does not hold"


@pytest.mark.parametrize("name", ["hidden", "warm"])
def test_an_arm_runs(name):
    study = make()
    arm = next(arm for arm in study.arms if arm.name == name)
    found = study.run(arm.config, 0, lambda text: None)
    assert {column.metric for column in study.columns} <= found.keys()
    assert found["informed_two_hop"] >= found["random_two_hop"]
    assert all(math.isfinite(value) for key, value in found.items() if key != "policy_entropy")
    assert 0 <= found["routing_entropy_at_start"] <= 1
    assert (found["routing_entropy_at_start"] == found["routing_entropy"]) or name == "hidden"
    assert ("before_exact_match" in found) == (name == "hidden")


@pytest.mark.parametrize(
    ("exact_match", "two_hop", "counts_as"),
    [(0.9, 0.9, 3.0), (0.5, 0.4, 3.0), (0.49, 0.9, 81.0), (0.9, 0.39, 81.0), (0.55, 0.0, 81.0), (0.0, 0.0, 81.0)],
)
def test_who_is_hardly_ever_right_counts_as_dear(exact_match, two_hop, counts_as):
    measures = {"exact_match": exact_match, "exact_match_two_hop": two_hop, "raw_cost": 3.0}
    baselines = {"informed_exact_match": 1.0, "informed_two_hop": 1.0, "dearest_raw_cost": 81.0}
    found = with_costs({**measures, **baselines})
    assert (found["judged_cost"], found["half_raw_cost"]) == (counts_as, 1.5)


def test_runs_of_an_earlier_world_do_not_count(tmp_path):
    """They did, and their judgement failed for want of a cost that they did not measure."""
    study, measured = make(), runs()[0]
    del measured["dearest_raw_cost"]
    for arm in study.arms:
        for seed in study.seeds:
            place = tmp_path / study.name
            RunRecord(place, study.name, arm.name, seed, revision=1, config=arm.config, inputs=None).write(measured)
    with pytest.raises(DataError, match="is of revision 1 of the study, which is now 2"):
        summarize(study, tmp_path)

"""The study of LoRA-Mixer: what its arms are, and its rule."""

import pytest

from anabranch.studies.harness import Results
from anabranch.studies.lora_mixer import ARMS, ArmConfig, judge, make


def test_arms_differ_in_their_loss_alone():
    methods = {name: ArmConfig(arm=name).method(("a", "b", "c")) for name in ARMS if name != "ssm"}
    found = {name: (each.balance_loss, each.entropy_loss, each.entropy) for name, each in methods.items()}
    assert found == {
        "none": (0.0, 0.0, "minimise"),
        "balance": (1.0, 0.0, "minimise"),
        "ours": (1.0, 0.1, "minimise"),
        "printed": (1.0, 0.1, "maximise"),
    }
    assert {each.replace(balance_loss=1.0, entropy_loss=0.1, entropy="minimise") for each in methods.values()} == {
        methods["ours"]
    }


def test_the_rule():
    def runs(**values):
        return {seed: {"zero": 0.0, **{name: each[seed] for name, each in values.items()}} for seed in range(5)}

    half = [0.50, 0.52, 0.48, 0.51, 0.49]
    better = [0.56, 0.575, 0.541, 0.57, 0.55]
    found = {
        claim.claim: claim
        for claim in judge(
            Results(
                {
                    "ours": runs(accuracy_240=better, evenness=[0.5, 0.51, 0.49, 0.5, 0.52]),
                    "balance": runs(accuracy_480=half),
                }
            )
        )
    }
    assert found["PRIMARY: 240 rows do what 480 do without"].verdict == "holds"
    even = found["no expert has more than three times the load of another"]
    assert (even.verdict, even.limit) == ("holds", pytest.approx(1 / 3))
    assert found["the sign of ours is better than the printed one"].verdict == "not run"


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    # It needs an extra, which a quick run is not to fail for.
    assert set(ARMS) - set(make().default_arms) == {"ssm"}
    assert make(full=True).default_arms is None


def test_the_rule_of_a_state_space():
    def runs(**values):
        return {seed: {name: each[seed] for name, each in values.items()} for seed in range(5)}

    own = [0.90, 0.92, 0.91, 0.93, 0.90]
    near = [value - 0.005 * (seed % 2) for seed, value in enumerate(own)]
    far = [value - 0.3 - 0.01 * seed for seed, value in enumerate(own)]
    found = {claim.claim: claim for claim in judge(Results({"ssm": runs(accuracy=near, oracle=own, uniform=far)}))}
    assert found["state space: routers are better than the average of experts"].verdict == "holds"
    close = found["state space: at most 2 points below each task's own expert"]
    assert (close.verdict, close.limit) == ("holds", pytest.approx(sum(own) / 5 - 0.02))

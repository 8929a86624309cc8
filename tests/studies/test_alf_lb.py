import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.routing import BiasBalancer, SwitchLoss
from anabranch.studies import find, names
from anabranch.studies.alf_lb import (
    SMOKE,
    Online,
    Size,
    Static,
    arms,
    draw,
    judge,
    make,
    run,
    run_online,
    run_static,
)
from anabranch.studies.harness import Results, run_study
from anabranch.train import RunConfig
from claims import run_only

judge = run_only(judge)


def trained(bits, violation):
    return {n: {"bits_per_byte": b, "max_violation_mean": violation} for n, b in enumerate(bits)}


def verdicts(runs):
    return {claim.claim: claim.verdict for claim in judge(Results(runs))}


def test_ours_is_compared_with_the_best_loss_that_balances_as_well():
    runs = {
        "sign": trained([2.00, 2.10, 2.05], 0.05),
        "aux-1e-4": trained([1.95, 2.05, 2.00], 0.90),  # better, but not balanced
        "aux-1e-2": trained([2.03, 2.131, 2.08], 0.08),
        "aux-1e-1": trained([2.10, 2.20, 2.151], 0.02),
    }
    found = verdicts(runs)
    assert found["sign: costs no more than aux-1e-2"] == "holds"
    assert found["sign: balances (MaxVio below 0.15)"] == "holds"
    assert found["sign: better than a strong loss"] == "holds"
    assert not any(claim.startswith("inv_n") for claim in found)  # it did not run
    # None balances as well as ours: the one that balances best is the baseline.
    none = {**runs, "sign": trained([2.0, 2.1, 2.05], -0.04)}
    assert "sign: costs no more than aux-1e-1" in verdicts(none)


def test_a_bias_that_costs_or_does_not_balance_fails():
    runs = {"quantile": trained([2.0, 2.1, 2.05], 0.4), "aux-1e-1": trained([1.9, 2.0, 1.951], 0.1)}
    found = verdicts(runs)
    assert found["quantile: balances (MaxVio below 0.15)"] == "does not hold"
    assert found["quantile: costs no more than aux-1e-1"] == "does not hold"
    assert found["quantile: better than a strong loss"] == "does not hold"


@pytest.mark.parametrize(("broken", "verdict"), [([0, 0], "holds"), ([0, 1], "does not hold"), ([0], "not resolved")])
def test_one_broken_preference_in_one_seed_is_enough(broken, verdict):
    runs = {"static-sign": {n: {"broken_preferences": value} for n, value in enumerate(broken)}}
    assert verdicts(runs)["tokens only move to what gained bias"] == verdict


def test_a_constant_step_must_lose_more_in_every_seed():
    runs = {"online-constant": {n: {"late_growth": value} for n, value in enumerate([0.9, 0.3])}}
    claim = {c.claim: c for c in judge(Results(runs))}["regret of a constant step grows on"]
    assert (claim.verdict, claim.ours) == ("does not hold", 0.3)


@pytest.mark.parametrize("rule", ["sign", "magnitude", "inv_n", "inv_sqrt", "quantile"])
def test_the_theory_bench_counts_what_it_says(rule):
    config = Static(rule=rule, rate=0.01, steps=60, num_tokens=128, num_destinations=(4, 8), top_k=(1, 2, 4))
    found = run_static(config, 0, lambda text: None)
    assert found["cases"] == 5  # top 4 of 4 is no case
    assert found["broken_preferences"] == 0
    assert found["below_optimum"] == 0
    assert found["gap"] >= -1e-9
    assert abs(found["solver_gap"]) < 1e-8
    assert found["max_violation_mean"] < 1.0


def test_the_online_bench_tells_shrinking_from_constant_steps():
    found = {
        rule: run_online(Online(rule=rule, rate=rate, steps=200, num_tokens=128), 0, lambda text: None)
        for rule, rate in (("inv_n", 0.2), ("magnitude", 0.1))
    }
    assert found["inv_n"]["late_growth"] < found["magnitude"]["late_growth"]
    assert len(found["inv_n"]["regret_curve"]) == 100


def test_arms_of_the_training_part_differ_in_the_balance_alone():
    made = {name: arm for name, arm in arms(Size()).items() if isinstance(arm.config, RunConfig)}
    balances = {name: arm.config.model.feed_forward.router.balance for name, arm in made.items()}
    assert balances["none"] == ()
    assert balances["aux-1e-3"] == (SwitchLoss.Config(alpha=1e-3),)
    assert balances["quantile"] == (BiasBalancer.Config(rule="quantile"),)
    rest = [to_dict(arm.config) for arm in made.values()]
    for config in rest:
        config["model"]["feed_forward"]["router"].pop("balance")
    assert all(config == rest[0] for config in rest)


def test_sizes_and_names():
    assert find("alf_lb") is make
    assert "alf_lb" in names()
    smoke, full = make(), make(full=True)
    assert "static-sign" in smoke.default_arms
    assert "aux-1e-3" not in smoke.default_arms
    assert full.default_arms is None
    assert full.settings["static_steps"] == 3000
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config


def test_runs_end_to_end(tmp_path, monkeypatch):
    import anabranch.studies.training as training
    from anabranch.data import Files

    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n\n" * 20)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    monkeypatch.setattr(training, "FINAL_TOKENS", 512)
    monkeypatch.setattr(training, "CURVE_TOKENS", 128)
    size = SMOKE.replace(
        dim=16,
        hidden_dim=16,
        num_experts=4,
        top_k=2,
        sequence_length=32,
        batch_size=2,
        steps=3,
        static_steps=20,
        static_tokens=128,
        online_steps=20,
    )
    study = make(**to_dict(size))
    small = []
    for arm in study.arms:
        config = arm.config
        if isinstance(config, RunConfig):
            corpus = Files.Config(paths=(str(text),))
            config = config.replace(data=config.data.replace(corpus=corpus, validation_fraction=0.2))
        elif isinstance(config, Static):
            config = config.replace(num_destinations=(4,), top_k=(2,))
        small.append(type(arm)(arm.name, arm.about, config))
    study = type(study)(**{**vars(study), "arms": small})
    outcome = run_study(
        study, tmp_path / "out", arms=["static-quantile", "online-inv_n", "none", "quantile"], seeds=[0]
    )
    assert (tmp_path / "out" / "alf_lb.json").is_file()
    assert outcome.results.runs["quantile"][0]["max_violation_mean"] >= 0
    assert outcome.results.runs["static-quantile"][0]["broken_preferences"] == 0
    draw(outcome.results, tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({"static-sign": {0: {"gap": 0.0}}}), tmp_path / "none")  # part C has not run: no picture
    assert not (tmp_path / "none.png").exists()


def test_run_tells_the_parts_apart():
    found = run(Online(rule="sign", rate=0.01, steps=4, num_tokens=64), 1, lambda text: None)
    assert "regret" in found

import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.rmoe import MAIN, Size, arms, draw, judge, make
from anabranch.train import RunConfig
from claims import run_only

judge = run_only(judge)


def runs(bits, **others):
    """Metrics per seed of one arm; ``others`` are lists by seed."""
    return {
        seed: {"bits_per_byte": value, **{name: values[seed] for name, values in others.items()}}
        for seed, value in enumerate(bits)
    }


def verdicts(results):
    return {claim.claim: claim.verdict for claim in judge(results)}


def test_bits_are_judged_by_the_interval_of_paired_differences():
    # rmoe - np: -0.020, -0.022, -0.018: half width 4.303 * 0.002 / sqrt(3) = 0.005; rmoe - smoe changes its sign.
    results = Results(
        {"smoe": runs([1.99, 2.1, 2.03]), "rmoe": runs([1.98, 2.078, 2.032]), "np": runs([2.0, 2.1, 2.05])}
    )
    found = {claim.claim: claim for claim in judge(results)}
    held = found["handing the state on helps at equal parameters"]
    assert held.verdict == "holds"
    assert held.interval == pytest.approx([-0.02497, -0.01503], abs=1e-5)
    assert found["recurrent routers beat linear ones"].verdict == "not resolved"
    assert "gru beats lstm" not in found  # it did not run


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.5, 0.4, 0.6, 0.4, 0.5], "holds"),
        ([0.5, 0.4, 0.6, 0.4, 0.2], "not resolved"),
        ([0.1, 0.2, 0.1, 0.2, 0.1], "does not hold"),
        ([0.5, 0.4, 0.6, 0.4], "not resolved"),  # four alike come about by chance once in eight
        ([0.1, 0.2, 0.1, 0.2], "not resolved"),
    ],
)
def test_routing_is_judged_by_the_sign_in_every_seed(ours, verdict):
    bits = [2.0] * len(ours)
    results = Results({"np": runs(bits, information=[0.3] * len(ours)), "rmoe": runs(bits, information=ours)})
    assert verdicts(results)["the state ties routers together"] == verdict


def test_balance_must_fall():
    bits = [2.0] * 5
    results = Results({"smoe": runs(bits, inner_balance=[9.0] * 5), "rmoe": runs(bits, inner_balance=[2.0] * 5)})
    assert verdicts(results)["the best expert stands out less"] == "holds"
    one = Results({"smoe": runs([2.0], inner_balance=[9.0]), "rmoe": runs([2.0], inner_balance=[2.0])})
    assert verdicts(one)["the best expert stands out less"] == "not resolved"


@pytest.mark.parametrize(
    ("speed", "verdict"), [([100, 96], "holds"), ([100, 90], "not resolved"), ([90, 94], "does not hold")]
)
def test_cost_is_a_ratio_of_processor_time(speed, verdict):
    bits, speed = [2.0] * 5, [*speed, *speed, speed[0]]
    results = Results(
        {"smoe": runs(bits, tokens_per_cpu_second=[100] * 5), "rmoe": runs(bits, tokens_per_cpu_second=speed)}
    )
    assert verdicts(results)["a training step takes at most 1.05 times as long"] == verdict


def test_arms_share_one_budget():
    made = arms(Size())
    assert set(MAIN) <= made.keys()
    counts = {name: arm.config.model.count(256) for name, arm in made.items()}
    for name, count in counts.items():
        assert count.parameters == pytest.approx(counts["smoe"].parameters, rel=0.01), name
        assert count.active == pytest.approx(counts["smoe"].active, rel=0.04), name
    assert counts["np"] == counts["rmoe"] == counts["detach"]
    rest = [to_dict(arm.config) for arm in made.values()]
    for config in rest:
        config["model"]["feed_forward"]["router"].pop("score")
    assert all(config == rest[0] for config in rest)


def test_arms_differ_as_they_are_named():
    made = {name: arm.config.model.feed_forward.router.score for name, arm in arms(Size()).items()}
    assert made["smoe"].owner.kind == "linear"
    assert made["cosine"].owner.kind == "cosine"
    assert made["rmoe"].passing
    assert (made["np"].passing, made["np"].logit_residual) == (False, 0.0)
    assert (made["mlp"].cell, made["mlp"].passing) == ("rnn", False)
    assert (made["residual"].passing, made["residual"].logit_residual) == (False, 0.5)
    assert made["detach"] == made["rmoe"].replace(detach_state=True)
    assert made["shared"] == made["rmoe"].replace(shared_projector=True)
    assert made["cosine-rmoe"] == made["rmoe"].replace(gate="cosine")
    assert (made["rnn"].cell, made["lstm"].cell) == ("rnn", "lstm")


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0, 1), (0, 1, 2, 3, 4))
    assert full.settings["tokens_per_run"] == 600 * 2048
    assert full.default_arms == MAIN
    for arm in full.arms:
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "rmoe" in names()
    assert find("rmoe") is make


def test_picture_is_drawn(tmp_path):
    curve = [[1, 3.0, None], [2, 2.5, None]]
    runs = {name: {0: {"bits_per_byte": 2.5, "curve": curve}} for name in ("smoe", "rmoe")}
    draw(Results(runs), tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_end_to_end_and_measures(tiny_study, tmp_path):
    study = tiny_study(
        make(num_layers=2, dim=16, hidden_dim=16, num_experts=4, state_dim=4, sequence_length=32, batch_size=2, steps=3)
    )
    outcome = run_study(study, tmp_path / "results", arms=["smoe", "rmoe", "np"], seeds=[0])
    metrics = outcome.results.runs["rmoe"][0]
    assert metrics["tokens"] == 3 * 2 * 32
    assert metrics["inner_balance"] >= 1
    assert 0 < metrics["outer_balance"] < 1
    assert metrics["gate_entropy"] == pytest.approx(2.0, abs=0.1)  # barely trained: four experts alike
    assert metrics["information"] >= 0
    assert -1 <= metrics["key_similarity"] <= 1
    assert "handing the state on helps at equal parameters" in verdicts(outcome.results)

import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.chain import MAIN, Size, arms, draw, judge, make
from anabranch.studies.harness import Results, run_study
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
    results = Results(
        {
            "moe": runs([2.0, 2.1, 2.05]),
            "chain": runs([1.98, 2.078, 2.032]),
            "tied": runs([2.3, 2.4, 2.35]),
            "outer": runs([1.9, 2.0, 1.95]),
        }
    )
    found = verdicts(results)
    assert found["a chain beats as many calls at once"] == "holds"
    assert found["a router per pass beats one for all"] == "holds"
    assert found["an inner residual beats an outer one"] == "does not hold"
    assert "an inner residual beats one from the start" not in found


@pytest.mark.parametrize(
    ("dense_chain", "verdict"),
    [([2.01, 2.005], "holds"), ([1.9, 1.901], "does not hold"), ([2.0, 1.9], "not resolved")],
)
def test_no_gain_where_all_are_active(dense_chain, verdict):
    """chain - moe is -0.06, so a third is 0.02."""
    results = Results(
        {
            "moe": runs([2.0, 2.0]),
            "chain": runs([1.94, 1.94]),
            "dense": runs([2.0, 2.0]),
            "dense-chain": runs(dense_chain),
        }
    )
    assert verdicts(results)["no gain where all experts are active"] == verdict


def test_fewer_experts_may_lose_a_hundredth():
    results = Results({"moe": runs([2.0] * 3), "chain24": runs([2.005, 2.005, 2.006])})
    assert verdicts(results)["a chain is as good with three quarters of the experts"] == "holds"


@pytest.mark.parametrize(
    ("speed", "verdict"), [([90, 81], "holds"), ([90, 70], "not resolved"), ([60, 70], "does not hold")]
)
def test_cost_and_combinations_are_judged_in_every_seed(speed, verdict):
    """Of at least five: two agree by chance every other time."""

    def found(*firsts):
        bits = [2.0] * (2 + len(firsts))
        slow, few, many = [100] * len(bits), [500.0] * len(bits), [900.0] * len(bits)
        return verdicts(
            Results(
                {
                    "moe": runs(bits, tokens_per_cpu_second=slow, combinations_seen=few),
                    "chain": runs(bits, tokens_per_cpu_second=[*firsts, *speed], combinations_seen=many),
                }
            )
        )

    cost, combinations = "a training step takes at most 1.25 times as long", "tokens take more combinations of experts"
    assert found(*speed[:1] * 3)[cost] == verdict
    assert found(*speed[:1] * 3)[combinations] == "holds"
    assert found(*speed[:1] * 2)[cost] == found(*speed[:1] * 2)[combinations] == "not resolved"


def test_arms_share_one_budget():
    made = arms(Size())
    assert set(MAIN) <= made.keys()
    counts = {name: arm.config.model.count(256) for name, arm in made.items()}
    # The second router of each layer, and a second call of the shared expert.
    assert counts["chain"].parameters - counts["moe"].parameters == 4 * 32 * 128
    assert counts["chain"].flops - counts["moe"].flops == 4 * (2 * 32 * 128 + 6 * 128 * 96)
    assert counts["chain-bare"].flops - counts["moe-bare"].flops == 4 * 2 * 32 * 128
    assert counts["chain-bare"].active == counts["moe-bare"].active + 4 * 32 * 128
    rest = [to_dict(arm.config) for arm in made.values()]
    for config in rest:
        config["model"].pop("feed_forward")
    assert all(config == rest[0] for config in rest)


def test_arms_differ_as_they_are_named():
    made = {name: arm.config.model.feed_forward for name, arm in arms(Size()).items()}
    assert (made["moe"].num_choices, made["chain"].num_choices, made["chain"].iterations) == (4, 2, 2)
    assert made["tied"] == made["chain"].replace(independent_gates=False)
    assert made["outer"] == made["chain"].replace(residual="outer")
    assert made["init"] == made["chain"].replace(residual="init")
    assert made["once"] == made["chain"].replace(norm="once")
    assert made["chain-ref"] == made["chain"].replace(norm="reference")
    assert made["moe-ref"] == made["chain-ref"].replace(iterations=1, router=made["moe"].router)
    assert made["chain-bare"] == made["chain"].replace(shared_experts=0)
    assert made["chain24"] == made["chain"].replace(num_experts=24)
    assert made["chain-double"] == made["chain"].replace(router=made["moe"].router)
    assert (made["dense"].num_experts, made["dense"].num_choices) == (4, 4)
    assert (made["dense-chain"].num_experts, made["dense-chain"].num_choices) == (4, 4)
    normalize = {name: layer.router.select.normalize for name, layer in made.items()}
    assert {name for name, value in normalize.items() if value == "sum"} == {"moe-norm", "chain-norm"}


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0, 1), (0, 1, 2, 3, 4))
    assert full.settings["tokens_per_run"] == 800 * 2048
    assert full.default_arms == MAIN
    for arm in full.arms:
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "chain" in names()
    assert find("chain") is make


def test_picture_is_drawn(tmp_path):
    curve = [[1, 3.0, None], [2, 2.5, None]]
    runs = {name: {0: {"bits_per_byte": 2.5, "curve": curve}} for name in ("moe", "chain")}
    draw(Results(runs), tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_end_to_end_and_measures(tiny_study, tmp_path):
    study = tiny_study(
        make(num_layers=2, dim=16, hidden_dim=8, num_experts=8, sequence_length=32, batch_size=2, steps=3)
    )
    outcome = run_study(study, tmp_path / "results", arms=["moe", "chain", "tied"], seeds=[0])
    runs = {arm: seeds[0] for arm, seeds in outcome.results.runs.items()}
    assert runs["chain"]["tokens"] == 3 * 2 * 32
    assert runs["moe"]["pass_reuse"] is None
    assert runs["moe"]["combinations_seen"] >= 1
    for arm in ("chain", "tied"):
        assert 0 <= runs[arm]["pass_reuse"] <= 1
        assert runs[arm]["pass_chance"] == pytest.approx(2 / 8)
        assert runs[arm]["combinations_seen"] <= 28**2
        assert runs[arm]["foreign_share"] == 0  # passes share what one layer owns

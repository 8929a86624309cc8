import json
from dataclasses import replace

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.experts.rexmoe import ReXMoE
from anabranch.routing import LinearScore
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.rexmoe import MAIN, Size, arms, draw, judge, make
from anabranch.train import RunConfig
from claims import run_only

judge = run_only(judge)


def runs(bits, **others):
    """Metrics per seed of one arm from a list of bits per byte."""
    return {
        seed: {"bits_per_byte": value, "max_violation_pool": 1.0, "idle_fraction": 0.0, "warned": 0.0, **others}
        for seed, value in enumerate(bits)
    }


def verdicts(results):
    return {claim.claim: claim.verdict for claim in judge(results)}


def test_reuse_that_helps_in_every_seed_holds_and_psr_that_hurts_does_not():
    # reuse2 - vanilla: -0.020, -0.022, -0.018: mean -0.02, deviation 0.002, half width 4.303 * 0.002 / sqrt(3) = 0.005.
    results = Results(
        {
            "vanilla": runs([2.0, 2.1, 2.05]),
            "reuse2": runs([1.98, 2.078, 2.032]),
            "psr2": runs([2.18, 2.28, 2.229]),
            "mask2": runs([2.01, 2.05, 2.09]),
        }
    )
    found = {claim.claim: claim for claim in judge(results)}
    reuse = found["reuse 2 beats vanilla"]
    assert reuse.verdict == "holds"
    assert reuse.difference == pytest.approx(-0.02)
    assert reuse.interval == pytest.approx([-0.02497, -0.01503], abs=1e-5)
    assert found["PSR improves reuse 2"].verdict == "does not hold"
    assert found["PSR's mask helps without reuse"].verdict == "not resolved"
    assert "reuse 4 beats vanilla" not in found  # it did not run


def test_one_seed_resolves_nothing():
    results = Results({"vanilla": runs([2.0]), "reuse2": runs([1.0])})
    assert verdicts(results) == {"reuse 2 beats vanilla": "not resolved"}


@pytest.mark.parametrize(
    ("violation", "verdict"),
    [([1.0, 1.02, 1.01], "holds"), ([1.9, 2.0, 1.95], "does not hold"), ([0.5, 1.9, 1.0], "not resolved")],
)
def test_balance_may_lose_a_tenth(violation, verdict):
    psr = {seed: {"bits_per_byte": 2.0, "max_violation_pool": value} for seed, value in enumerate(violation)}
    results = Results({"reuse2": runs([2.0, 2.0, 2.0]), "psr2": psr})
    assert verdicts(results)["PSR keeps MaxVio_pool of reuse2"] == verdict


@pytest.mark.parametrize(
    ("idle", "warned", "verdict"),
    [(0.4, 1.0, "holds"), (0.0, 1.0, "not resolved"), (0.4, 0.0, "does not hold"), (-0.2, 1.0, "does not hold")],
)
def test_collapse_must_idle_experts_and_warn(idle, warned, verdict):
    collapse = {
        seed: {"bits_per_byte": 2.0, "idle_fraction": idle + 0.001 * seed - 0.001, "warned": warned}
        for seed in range(3)
    }
    results = Results({"reuse2": runs([2.0, 2.0, 2.0]), "collapse": collapse})
    assert verdicts(results)["reuse over all layers idles experts, and warns"] == verdict


def test_arms_share_one_budget():
    made = arms(Size())
    assert set(MAIN) <= made.keys()
    counts = {name: arm.config.model.count(256) for name, arm in made.items()}
    for name, count in counts.items():
        assert count.active == pytest.approx(counts["vanilla"].active, rel=0.04), name  # routers of r N rows
        if name != "upper2":
            assert count.parameters == pytest.approx(counts["vanilla"].parameters, rel=0.02), name
    rest = {name: to_dict(arm.config) for name, arm in made.items()}
    for config in rest.values():
        config["model"].pop("feed_forward")
    for name, config in rest.items():
        if name.endswith(("-slow", "-fast")):
            factor = 0.5 if name.endswith("-slow") else 2.0
            assert config["train"].pop("learning_rate") == factor * rest["vanilla"]["train"]["learning_rate"]
            config["train"]["learning_rate"] = rest["vanilla"]["train"]["learning_rate"]
    assert all(config == rest["vanilla"] for config in rest.values())


def test_arms_differ_as_they_are_named():
    made = {name: arm.config.model.feed_forward for name, arm in arms(Size()).items()}
    assert (made["reuse2"].reuse, made["reuse2"].psr) == (2, None)
    assert made["psr4"].reuse == 4
    assert (made["psr4"].psr.start, made["psr4"].psr.end, made["psr4"].psr.mask) == (0.21, 0.63, "random")
    assert made["local2"].psr.mask == "local_first"
    assert (made["mask2"].reuse, made["mask2"].psr.as_reuse) == (1, 2)
    assert (made["fine2"].num_experts, made["fine2"].hidden_dim, made["fine2"].num_choices) == (16, 64, 4)
    assert made["collapse"].reuse == 6
    assert (made["psr2-norm"].router.select.normalize, made["psr2"].router.select.normalize) == ("sum", "none")
    assert made["psr2-norm"].replace(router=made["psr2"].router) == made["psr2"]
    assert not isinstance(made["vanilla"], ReXMoE.Config)
    for name, feed_forward in made.items():  # the paper's gates are raw
        assert feed_forward.router.select.normalize == ("sum" if name.endswith("-norm") else "none")


def test_sizes():
    smoke, full = make(), make(full=True)
    assert smoke.seeds == (0, 1)
    assert full.seeds == (0, 1, 2, 3, 4)
    assert full.settings["tokens_per_run"] == 800 * 2048
    assert make(full=True, steps=3).settings["tokens_per_run"] == 3 * 2048
    assert full.default_arms == MAIN


def test_configs_of_arms_read_back_equal():
    for arm in make(full=True).arms:
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(arm.config)))) == arm.config


def test_study_is_found_by_name():
    assert "rexmoe" in names()
    assert find("rexmoe") is make


def test_picture_is_drawn_for_whatever_has_run(tmp_path):
    curve = [[1, 3.0, None], [2, 2.5, 2.4]]
    one = {"vanilla": {0: {"bits_per_byte": 2.5, "curve": curve}}}
    more = {**one, "reuse2": {0: {"bits_per_byte": 2.4, "curve": curve}}, "psr2": {3: {"bits_per_byte": 2.4}}}
    for number, found in enumerate((one, more)):
        draw(Results(found), tmp_path / f"picture{number}")
        assert (tmp_path / f"picture{number}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"picture{number}.svg").read_text()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The study at a size that takes seconds, on a little text."""
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
    study = make(num_layers=4, dim=16, hidden_dim=16, num_experts=4, sequence_length=32, batch_size=2, steps=6)
    corpus = Files.Config(paths=(str(text),))
    small = [
        type(arm)(
            arm.name,
            arm.about,
            arm.config.replace(data=arm.config.data.replace(corpus=corpus, validation_fraction=0.2)),
        )
        for arm in study.arms
    ]
    return type(study)(**{**vars(study), "arms": small})


def test_runs_end_to_end_and_measures(tiny, tmp_path):
    outcome = run_study(tiny, tmp_path / "results", arms=["vanilla", "psr2", "collapse"], seeds=[0])
    metrics = outcome.results.runs["psr2"][0]
    assert 0 < metrics["bits_per_byte"] < 10
    assert metrics["tokens"] == 6 * 2 * 32
    assert metrics["max_violation_pool"] <= metrics["max_violation_layer"] + 1e-9
    assert 0 < metrics["foreign_share"] < 1
    assert metrics["same_expert_chance"] == pytest.approx(0.25)
    steps = [point[0] for point in metrics["curve"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    # PSR opens everything at 0.63 of training, step 3.8: before it the open candidates are measured too.
    assert [point[2] is None for point in metrics["curve"]] == [False, False, False, True, True, True]
    assert outcome.results.runs["vanilla"][0]["foreign_share"] == 0
    assert all(point[2] is None for point in outcome.results.runs["vanilla"][0]["curve"])
    assert outcome.results.runs["collapse"][0]["warned"] == 0


def test_an_arm_that_leaves_experts_idle_is_recorded_as_warned_of(tiny, tmp_path, monkeypatch):
    project = LinearScore.project
    monkeypatch.setattr(LinearScore, "project", lambda self, x_ND, context: 0 * project(self, x_ND, context))
    monkeypatch.setattr("anabranch.train.idle.LASTING", 9)
    settings = {"batch_size": 8, "steps": 12, "log_every": 1}
    arms = [replace(arm, config=arm.config.replace(train=arm.config.train.replace(**settings))) for arm in tiny.arms]
    outcome = run_study(replace(tiny, arms=arms), tmp_path / "results", arms=["collapse"], seeds=[0])
    (metrics,) = outcome.results.runs["collapse"].values()
    assert metrics["warned"] == 1
    assert metrics["idle_fraction"] == 14 / 16


def test_the_same_seed_gives_the_same_numbers(tiny, tmp_path):
    first = run_study(tiny, tmp_path / "a", arms=["psr2"], seeds=[5]).results.runs["psr2"][5]
    again = run_study(tiny, tmp_path / "b", arms=["psr2"], seeds=[5]).results.runs["psr2"][5]
    other = run_study(tiny, tmp_path / "c", arms=["psr2"], seeds=[6]).results.runs["psr2"][6]
    assert first["bits_per_byte"] == again["bits_per_byte"]
    assert first["curve"] == again["curve"]
    assert first["bits_per_byte"] != other["bits_per_byte"]


def test_arms_of_one_seed_see_the_same_tokens(tiny):
    orders = []
    for arm in tiny.arms[:2]:
        stream = arm.config.data.build().train(seed=3)
        orders.append(stream.next_batch(4).token_BL)
    assert orders[0].equal(orders[1])

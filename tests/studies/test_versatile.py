"""The VersatileFFN study: verdicts on made-up numbers, arms of one budget from one dense model, a run end to end."""

import json

import numpy as np
import pytest
import torch

from anabranch.config import from_dict, to_dict
from anabranch.experts.versatile import VersatileFFN
from anabranch.nn import MoE, SwiGLU
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.versatile import (
    MAIN,
    Continued,
    Size,
    arms,
    base_model,
    converted,
    draw,
    judge,
    make,
    spearman,
)
from claims import run_only

judge = run_only(judge)


def runs(bits, flops=100.0, **others):
    return {
        seed: {"bits_per_byte": value, "nats_per_token": value * np.log(2), "ffn_flops": flops, **others}
        for seed, value in enumerate(bits)
    }


def verdicts(results):
    return {claim.claim: claim.verdict for claim in judge(results)}


NEAR_LOOP4 = "versatile is within 0.3% of four loops, at fewer FLOPs"


def test_verdicts_by_hand():
    # versatile - dense: -0.020, -0.022, -0.018: mean -0.02, half width 0.005; - loop4: +0.001 in all, 0.05% of 2, fewer FLOPs.
    versatile = runs([1.98, 2.078, 2.032], loops_vs_loss=0.1)
    for seed, correlation in enumerate((0.1, 0.12, 0.11)):
        versatile[seed]["loops_vs_loss"] = correlation
    results = Results(
        {
            "dense": runs([2.0, 2.1, 2.05]),
            "versatile": versatile,
            "loop4": runs([1.979, 2.077, 2.031], flops=150.0),
            "depth": runs([1.97, 2.09, 2.03]),
        }
    )
    found = {claim.claim: claim for claim in judge(results)}
    first = found["versatile beats training on as it is"]
    assert first.verdict == "holds"
    assert first.interval == pytest.approx([-0.02497, -0.01503], abs=1e-5)
    assert found[NEAR_LOOP4].verdict == "holds"
    assert found["versatile spends fewer feed-forward FLOPs than four loops"].verdict == "holds"
    assert found["versatile beats the depth path alone"].verdict == "not resolved"
    correlation = found["tokens with more loops are harder for the dense model"]
    assert (correlation.verdict, correlation.ours) == ("holds", pytest.approx(0.11))
    assert "real small experts beat versatile" not in found  # it did not run


@pytest.mark.parametrize(
    ("ours", "flops", "verdict"),
    [
        ([2.001, 2.002, 2.0015], 99.0, "holds"),
        ([2.001, 2.002, 2.0015], 101.0, "does not hold"),  # near enough, but not cheaper
        ([2.05, 2.06, 2.055], 99.0, "does not hold"),
        ([1.9, 2.1, 2.0], 99.0, "not resolved"),
    ],
)
def test_near_means_near_and_cheaper(ours, flops, verdict):
    results = Results({"loop4": runs([2.0, 2.0, 2.0]), "versatile": runs(ours, flops)})
    assert verdicts(results)[NEAR_LOOP4] == verdict


def test_rank_correlation_by_hand():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10.0, 20.0, 30.0, 40.0])) == pytest.approx(1.0)
    # ranks 1.5 1.5 3.5 3.5 and 1 2 3 4: deviations -1 -1 1 1 and -1.5 -.5 .5 1.5: 4 / sqrt(4 * 5)
    assert spearman(np.array([1, 1, 2, 2]), np.array([0.1, 0.2, 0.3, 0.4])) == pytest.approx(4 / np.sqrt(20))
    assert spearman(np.array([2, 2, 2]), np.array([0.1, 0.2, 0.3])) == 0.0


def test_arms_share_one_budget_and_one_dense_model():
    made = arms(Size())
    assert set(MAIN) <= made.keys()
    assert len({json.dumps(to_dict(arm.config.base)) for arm in made.values()}) == 1
    dense = made["dense"].config.run.model.count().parameters
    for name, arm in made.items():
        parameters = arm.config.run.model.count().parameters
        # eight experts of an eighth: the feed-forward's parameters twice
        assert parameters == pytest.approx(dense, rel=0.01) or (name == "moe" and 1.3 * dense < parameters < 2 * dense)
        rest = to_dict(arm.config.run)
        rest["model"].pop("feed_forward")
        rate = rest["train"].pop("learning_rate")
        assert rate == Size().learning_rate * (
            0.5 if name.endswith("-slow") else 2.0 if name.endswith("-fast") else 1.0
        )
        assert rest == {**rest, "train": {**rest["train"]}}


def test_arms_differ_as_they_are_named():
    made = {name: arm.config.run.model.feed_forward for name, arm in arms(Size()).items()}
    assert (made["versatile"].fusion, made["versatile"].gate, made["versatile"].max_loops) == ("difficulty", "hard", 4)
    assert (made["versatile"].num_experts, made["versatile"].num_choices) == (8, 2)
    assert [made[name].fusion for name in ("width", "depth", "average")] == ["width_only", "depth_only", "average"]
    assert [(made[name].max_loops, made[name].gate) for name in ("loop2", "loop4")] == [(2, "none"), (4, "none")]
    assert (made["moe"].num_experts, made["moe"].hidden_dim, made["moe"].shared_width) == (8, 48, 384)
    assert type(made["dense"]) is SwiGLU.Config
    assert made["versatile"].temperature.until == 0.55


def test_configs_of_arms_read_back_equal():
    for arm in make(full=True).arms:
        assert from_dict(Continued, json.loads(json.dumps(to_dict(arm.config)))) == arm.config


def test_sizes_and_name():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0, 1), (0, 1, 2, 3, 4))
    assert full.settings["tokens_per_run"] == 400 * 2048
    assert make(full=True, steps=3).settings["tokens_per_run"] == 3 * 2048
    assert full.default_arms == MAIN
    assert "versatile" in names()
    assert find("versatile") is make


def test_every_arm_starts_from_the_dense_model():
    size = Size(num_layers=2, dim=32, hidden_dim=32, sequence_length=16, steps=2, base_steps=2)
    base = arms(size)["dense"].config.base.model.build(seed=3).eval()
    token_BL = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base(token_BL).logits_BLV
        for name, arm in arms(size).items():
            model = converted(base, arm.config.run.model, seed=0).eval()
            assert model.config == arm.config.run.model, name
            state = model.state_dict()
            for key, value in base.state_dict().items():
                mine = state[key.replace("feed_forward.w", "feed_forward.shared.w") if name == "moe" else key]
                assert torch.equal(mine, value), (name, key)
                assert mine.data_ptr() != value.data_ptr(), (name, key)
            if name in ("dense", "moe"):  # silent experts: the same function
                torch.testing.assert_close(model(token_BL).logits_BLV, expected)
            assert isinstance(model.blocks[0].feed_forward, SwiGLU | MoE | VersatileFFN)


def test_picture_is_drawn_for_whatever_has_run(tmp_path):
    curve = [[1, 3.0, None], [2, 2.5, None]]
    draw(Results({"dense": {0: {"bits_per_byte": 2.5, "curve": curve}}, "depth": runs([2.4])}), tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The study at a size that takes seconds, on a little text."""
    import anabranch.studies.training as training
    import anabranch.studies.versatile as study
    from anabranch.data import Files

    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n\n" * 20)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    monkeypatch.setattr(training, "FINAL_TOKENS", 256)
    monkeypatch.setattr(training, "CURVE_TOKENS", 64)
    monkeypatch.setattr(study, "DIFFICULTY_TOKENS", 256)
    corpus = Files.Config(paths=(str(text),))
    found = make(num_layers=2, dim=16, hidden_dim=16, sequence_length=32, batch_size=2, steps=3, base_steps=3)
    small = []
    for arm in found.arms:
        parts = {
            name: config.replace(data=config.data.replace(corpus=corpus, validation_fraction=0.2))
            for name, config in (("base", arm.config.base), ("run", arm.config.run))
        }
        small.append(type(arm)(arm.name, arm.about, Continued(**parts)))
    return type(found)(**{**vars(found), "arms": small})


def test_runs_end_to_end_and_measures(tiny, tmp_path):
    told = []
    outcome = run_study(
        tiny, tmp_path / "results", arms=["dense", "moe", "loop4", "versatile"], seeds=[0], progress=told.append
    )
    found = {name: seeds[0] for name, seeds in outcome.results.runs.items()}
    assert sum("training the model" in text for text in told) == 1  # the arms of a seed share it
    base = 6 * 16 * 16
    assert found["dense"]["ffn_flops"] == base
    assert found["loop4"]["ffn_flops"] == 4 * base
    assert found["loop4"]["mean_loops"] == 4
    ours = found["versatile"]
    assert 1 <= ours["mean_loops"] <= 4
    assert base * ours["mean_loops"] <= ours["ffn_flops"] <= base * ours["mean_loops"] + base / 3
    assert ours["mean_lambda"] == pytest.approx((4 - ours["mean_loops"]) / 4)
    assert -1 <= ours["loops_vs_loss"] <= 1
    assert found["loop4"]["loops_vs_loss"] is None
    assert found["moe"]["max_violation_layer"] >= 0
    for metrics in found.values():
        assert 0 < metrics["bits_per_byte"] < 10
        assert metrics["tokens"] == 3 * 2 * 32


def test_the_dense_model_is_kept_and_is_the_same_again(tiny, tmp_path, monkeypatch):
    config = tiny.arms[0].config.base
    first = base_model("versatile", config, 0, print)
    kept = base_model("versatile", config, 0, lambda text: pytest.fail("trained again"))
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "other"))
    again, other = base_model("versatile", config, 0, print), base_model("versatile", config, 1, print)
    for name, value in first.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value)
        assert torch.equal(again.state_dict()[name], value)
    assert not torch.equal(other.embedding.weight, first.embedding.weight)

import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.data.corpus import Domain, Files, Mixture
from anabranch.routing import SwitchLoss, TraceBuilder, TraceLayer
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.local_routing_consistency import Size, arms, draw, judge, make, measure_consistency
from anabranch.train import RunConfig
from claims import run_only

judge = run_only(judge)


def runs(srp, **others):
    return {seed: {"srp_16": value, **others} for seed, value in enumerate(srp)}


def verdicts(runs):
    return {claim.claim: claim.verdict for claim in judge(Results(runs))}


def test_claims_about_causes_are_paired():
    found = verdicts(
        {"baseline": runs([0.49, 0.50, 0.48]), "no-lb": runs([0.63, 0.65, 0.62]), "top2": runs([0.5, 0.48, 0.49])}
    )
    assert found["E1: without balance loss routing is more consistent"] == "holds"
    assert found["E1: fewer active experts make it less consistent"] == "not resolved"
    assert "E1: a shared expert makes it less consistent" not in found
    turned = verdicts({"baseline": runs([0.63, 0.65, 0.62]), "no-lb": runs([0.49, 0.50, 0.48])})
    assert turned["E1: without balance loss routing is more consistent"] == "does not hold"


@pytest.mark.parametrize(("lru", "verdict"), [([0.3, 0.4, 0.5], "holds"), ([0.5, 0.4, 0.3], "does not hold")])
def test_prediction_must_hold_in_every_seed(lru, verdict):
    good = {"sch_by_layer": [0.5, 0.6, 0.7], "lru_by_layer": [0.3, 0.4, 0.5]}
    found = verdicts({"baseline": {0: good, 1: {**good, "lru_by_layer": lru}}})
    assert found["E2: SCH predicts the hits of LRU (correlation at least 0.8)"] == verdict
    assert (
        verdicts({"baseline": {0: good}})["E2: SCH predicts the hits of LRU (correlation at least 0.8)"]
        == "not resolved"
    )


@pytest.mark.parametrize(("words", "verdict"), [([0.1, 0.1, 0.9], "holds"), ([0.1, 0.9, 0.9], "does not hold")])
def test_domain_experts_in_two_of_three_seeds(words, verdict):
    values = {n: {"domain_correlation": 0.5, "vocabulary_correlation": word} for n, word in enumerate(words)}
    found = verdicts({"baseline": values})
    assert found["E3: experts of a domain are the consistent ones, more than those of words"] == verdict


def test_arms_keep_the_work_per_token():
    made = arms(Size())
    configs = {name: arm.config.model.feed_forward for name, arm in made.items()}
    assert (configs["shared2"].num_experts, configs["shared2"].num_choices, configs["shared2"].shared_experts) == (
        14,
        2,
        2,
    )
    assert (configs["wide"].num_experts, configs["wide"].num_choices, configs["wide"].hidden_dim) == (8, 2, 256)
    assert configs["top2"].num_choices == 2
    assert not any(isinstance(part, SwitchLoss.Config) for part in configs["no-lb"].router.balance)
    active = {name: arm.config.model.count(256).active for name, arm in made.items()}
    for name in ("no-lb", "over-lb", "shared1", "shared2", "wide"):
        assert active[name] == pytest.approx(active["baseline"], rel=0.02), name
    rest = [to_dict(arm.config) for arm in made.values()]
    for config in rest:
        config["model"].pop("feed_forward")
    assert all(config == rest[0] for config in rest)


def test_sizes_and_names():
    assert find("local_routing_consistency") is make
    assert "local_routing_consistency" in names()
    assert make().default_arms == ("baseline", "no-lb", "top2")
    assert make(full=True).settings["tokens_per_run"] == 1000 * 2048
    for arm in make(full=True).arms:
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(arm.config)))) == arm.config


def test_measures_of_a_trace_worked_by_hand():
    """One expert always, the other two in turn: what is always there is always hit, and a cache of 2 of 3 keeps it."""
    builder = TraceBuilder()
    layer = TraceLayer(layer=0, name="r", num_destinations=3, top_k=1)
    for item, domain in enumerate(["a", "b"]):
        index_NK = np.full((64, 1), item)
        builder.add(
            layer,
            index_NK,
            np.ones((64, 1)),
            item_N=np.full(64, item),
            position_N=np.arange(64),
            token_N=np.arange(64) % 2,
            domain=domain,
        )
    found = measure_consistency(builder.trace())
    assert (found["srp_16"], found["size_ratio_64"]) == (1.0, 1.0)
    assert found["lru"] == pytest.approx(1 - 2 / 128)  # the first token of each sequence misses
    assert found["sch_of_belady"] == 1.0
    assert found["recommended_ratio"] == 1.0
    assert found["activation_spread"] == pytest.approx(100 * np.std([0.5, 0.5, 0.0]))


@pytest.mark.slow
def test_runs_end_to_end(tmp_path, monkeypatch):
    import anabranch.studies.training as training

    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n\n" * 20)
        (text / f"{number}.md").write_text(f"Number {number} comes after the one before it.\n" * 30)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    monkeypatch.setattr(training, "FINAL_TOKENS", 512)
    monkeypatch.setattr(training, "CURVE_TOKENS", 128)
    study = make(num_layers=2, dim=16, hidden_dim=16, num_experts=8, sequence_length=64, batch_size=2, steps=3)
    domains = {kind: Domain(corpus=Files.Config(paths=(str(text),), pattern=f"*.{kind}")) for kind in ("py", "md")}
    small = [
        type(arm)(
            arm.name,
            arm.about,
            arm.config.replace(
                data=arm.config.data.replace(corpus=Mixture.Config(domains=domains), validation_fraction=0.2)
            ),
        )
        for arm in study.arms
    ]
    study = type(study)(**{**vars(study), "arms": small})
    outcome = run_study(study, tmp_path / "out", arms=["baseline", "shared1"], seeds=[0, 1])
    found = outcome.results.runs["baseline"][0]
    assert 0 < found["srp_16"] <= 1
    assert len(found["sch_by_layer"]) == 2
    assert found["lru"] <= found["belady"] + 0.02
    assert found["domain_correlation"] is None or -1 <= found["domain_correlation"] <= 1
    assert any(claim.claim.startswith("E2") for claim in outcome.claims)
    draw(outcome.results, tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.routers.coe.store import ExpertStore
from anabranch.studies import expert_serving, find, names
from anabranch.studies.composition_of_experts import (
    Case,
    arms,
    budgets,
    choices,
    held_out,
    host,
    judge,
    make,
    outcomes,
    programs,
    scored,
)
from anabranch.studies.expert_serving import Serving, tiny, traces
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)

MADE = Case(policy="", data="made", instances=5)


def runs(count=10, **values):
    """The same numbers in every seed, but for lists, which give one for each."""
    return {
        seed: {name: value[seed] if isinstance(value, list) else value for name, value in values.items()}
        for seed in range(count)
    }


def verdicts(**arms):
    return {
        claim.claim: claim.verdict
        for claim in judge(Results({name.replace("_", "-"): seeds for name, seeds in arms.items()}))
    }


def test_two_steps_need_half_a_point_over_ten_splits():
    for score, count, verdict in ((0.705, 10, "holds"), (0.704, 10, "does not hold"), (0.72, 9, "not resolved")):
        found = verdicts(two_step=runs(count, score=score), direct_fair=runs(count, score=0.7 - 1e-12))
        assert found == {"two steps beat the fair direct label (at least direct-fair + 0.005)": verdict}


@pytest.mark.parametrize(
    ("score", "active", "verdict"), [(0.66, 30.0, "holds"), (0.64, 30.0, "does not hold"), (0.7, 34.0, "does not hold")]
)
def test_budgeted_maps_must_keep_active_parameters_too(score, active, verdict):
    found = verdicts(two_step_auto=runs(score=score, active=active), best_single=runs(score=0.64))
    assert found == {f"two-step-auto, {active} billion active of at most 33 (at least best-single + 0.015)": verdict}


@pytest.mark.parametrize("arm", ["two-step-0.0005", "two-step-0.002"])
@pytest.mark.parametrize("score", [0.7, 0.5])
def test_what_was_chosen_on_the_same_questions_is_void_whatever_came_out(arm, score):
    results = Results({arm: runs(score=score, active=10.0), "best-single": runs(score=0.64)})
    (claim,) = make(full=True).judged(results)[2:4][["two-step-0.0005", "two-step-0.002"].index(arm) :][:1]
    assert claim.claim.startswith(arm)
    assert claim.verdict == "void"
    assert "chosen while looking" in claim.why_void
    assert claim.ours == score


def test_the_worst_budget_decides():
    """Better by 0.02 at one budget, worse by 0.01 at the other."""
    found = verdicts(
        host_chosen=runs(score_17=0.62, score_60=0.61),
        host_plain=runs(score_17=0.6, score_60=0.62),
        host_aware=runs(score_17=0.6, score_60=0.612),
        host_single=runs(score_17=0.5, score_60=0.5),
    )
    told = "the map chosen on train, at its worst budget"
    assert found == {
        f"{told} (60 billion) (at least host-plain - 0.003)": "does not hold",
        f"{told} (60 billion) (at least host-aware - 0.003)": "holds",
        f"{told} (60 billion) (at least host-single - 0.003)": "holds",
    }


def test_abstention_is_judged_on_both_kinds_of_tasks():
    found = verdicts(
        open_forced=runs(held=0.6, inside=0.65),
        open_abstain=runs(held=0.615, inside=0.644),
        open_general=runs(held=0.621, inside=0.6),
    )
    assert list(found.values()) == ["holds", "does not hold", "does not hold"]


@pytest.mark.parametrize(
    ("agreed", "seconds", "verdict"),
    [
        (1.0, 1.0, "holds"),
        (0.999, 1.0, "does not hold"),
        (1.0, 2.1, "does not hold"),
        ([1.0] * 9 + [0.5], 1.0, "not resolved"),
    ],
)
def test_programs_must_agree_everywhere_and_be_quick(agreed, seconds, verdict):
    assert list(verdicts(milp=runs(agreed=agreed, milp_s=seconds)).values()) == [verdict]


def test_serving_is_judged_in_every_seed():
    found = verdicts(
        serve_prefetch=runs(2, zipf_p95_ms=[40.0, 60.0], zipf_moved_mb=30.0),
        serve_reload=runs(2, zipf_p95_ms=100.0, zipf_moved_mb=60.0),
        serve_lru=runs(2, zipf_p95_ms=90.0, zipf_moved_mb=29.0),
    )
    assert list(found.values()) == ["not resolved", "holds", "holds", "does not hold"]


# The arms, on made outcomes


def test_policies_by_what_must_be_so():
    train, test, pool = outcomes("made", 0)
    found = {
        policy: scored(choices(MADE.replace(policy=policy), 0, train, test, pool), train, test, pool)
        for policy in ("single", "told", "oracle", "direct-first", "direct-fair", "ridge", "knn", "coe")
    }
    assert found["single"]["gain"] == 0
    assert found["oracle"]["score"] == test.score_NM.max(axis=1).mean()
    assert max(one["score"] for one in found.values()) == found["oracle"]["score"]
    assert found["told"]["gain"] > 0.1  # topics have experts
    assert found["coe"]["gain"] > 0.1
    best = train.models[int(train.score_NM.mean(0).argmax())]
    assert found["single"]["active"] == next(model.parameters for model in pool.models if model.name == best)


def test_hosts_never_pass_their_budget_and_hold_more_with_more():
    train, test, pool = outcomes("made", 0)
    assert budgets(pool) == (1.0, 5.2, 17.8, 34.6, 59.8, 85.0)  # 1 + 4 + 16 + 64
    for kind in ("single", "plain", "auto"):
        found = host(MADE.replace(policy="host", variant=kind), 0, train, test, pool)
        assert found["score_1"] == test.score_NM[:, 0].mean()  # only the smallest fits
        assert found["score_85"] >= found["score_1"]


def test_held_out_tasks_were_not_learned_from():
    train, test, pool = outcomes("made", 0)
    forced, abstain, general = (
        held_out(MADE.replace(policy="open", variant=kind), 1, train, test, pool)
        for kind in ("forced", "abstain", "general")
    )
    assert forced["held_abstained"] == 0
    assert abstain["held_abstained"] > abstain["inside_abstained"]
    assert general["inside"] < forced["inside"]


def test_programs_agree():
    train, _, pool = outcomes("made", 0)
    found = programs(MADE, 0, train, pool)
    assert (found["agreed"], found["problems"]) == (1.0, 11)


# Serving


def test_traces_are_what_they_say():
    case = Serving(requests=20_000)
    zipf, bursty = (np.array(trace) for trace in traces(case, 0).values())
    share = np.bincount(zipf, minlength=12) / len(zipf)
    harmonic = (1 / np.arange(1, 13)).sum()
    np.testing.assert_allclose(share, 1 / np.arange(1, 13) / harmonic, atol=0.01)
    repeated = [np.mean(trace[1:] == trace[:-1]) for trace in (zipf, bursty)]
    assert repeated[1] > repeated[0] + 0.2
    assert traces(case, 0) == traces(case, 0) != traces(case, 1)


@pytest.mark.parametrize("kind", ["reload", "lru", "prefetch"])
def test_serving_runs_and_counts(kind):
    found = expert_serving.run(tiny().replace(requests=12), kind, 0, lambda text: None)
    for trace in ("zipf", "bursty"):
        assert 0 < found[f"{trace}_p50_ms"] <= found[f"{trace}_p95_ms"]
        assert found[f"{trace}_moved_mb"] > 0
        assert 0 <= found[f"{trace}_hit_rate"] <= 1


def test_reloading_moves_every_expert_asked_for(tmp_path):
    case = tiny().replace(requests=10)
    experts = expert_serving.written(case, 0, tmp_path)
    size = [sum(file.stat().st_size for file in path.iterdir()) for path in experts]
    found = expert_serving.served(case, "reload", 0, experts, [0, 1, 0])
    assert found["moved_mb"] == pytest.approx((2 * size[0] + size[1]) / 1e6)
    cached = expert_serving.served(case, "lru", 0, experts, [0, 1, 0])
    assert cached["moved_mb"] == pytest.approx((size[0] + size[1]) / 1e6)
    assert cached["hit_rate"] == pytest.approx(1 / 3)


def test_loaded_experts_answer_alike(tmp_path):
    import torch

    experts = expert_serving.written(tiny(), 0, tmp_path)
    token_BL = torch.arange(4)[None]
    with ExpertStore(expert_serving.load, host_bytes=10**9) as store, torch.inference_mode():
        store.add("one", experts[0])
        with store.use("one", 20) as model:
            assert torch.equal(model(token_BL).logits_BLV, expert_serving.load(experts[0])(token_BL).logits_BLV)


# The study


def test_study_is_registered_and_its_configs_read_back():
    assert "composition_of_experts" in names()
    study = find("composition_of_experts")(full=True)
    assert len(study.seeds) == 10
    for arm in study.arms:
        assert from_dict(Case, json.loads(json.dumps(to_dict(arm.config)))) == arm.config


@pytest.mark.slow
def test_smoke_study(tmp_path):
    outcome = run_study(make(), tmp_path, seeds=(0, 1))
    assert outcome.path.exists()
    assert (tmp_path / "composition_of_experts.png").stat().st_size > 10_000
    assert {arm.name for arm in arms(Case(policy=""), tiny())} == set(outcome.results.runs)

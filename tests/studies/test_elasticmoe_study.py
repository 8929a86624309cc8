"""The rules of the ElasticMoE study on made-up numbers, and its trace."""

import gzip

import pytest

from anabranch.studies.elasticmoe import Case, judge, make, trace
from anabranch.studies.harness import Results
from claims import run_only

judge = run_only(judge)


def test_rules():
    runs = {
        "latency-ours": {"seconds": 0.5, "downtime": 0.0, "peak_mb": 105.0},
        "latency-own": {"seconds": 0.9, "peak_mb": 111.0},
        "latency-cold": {"seconds": 5.0, "downtime": 5.0, "peak_mb": 100.0},
        "latency-extravagant": {"seconds": 6.0, "peak_mb": 200.0},
        "throughput-ours": {"before": 100.0, "during": 90.0, "after": 90.0},
        "throughput-cold": {"before": 100.0, "during": 20.0, "after": 180.0},
        **{f"parts-{n}": {"seconds": [0.5, 0.6, 0.7, 5.0, 4.0][n]} for n in range(5)},
    }
    results = Results({arm: dict.fromkeys((0, 1), metrics) for arm, metrics in runs.items()})
    verdicts = {claim.claim: claim.verdict for claim in judge(results)}
    assert verdicts == {
        "a change takes less than 0.2x a cold restart": "holds",
        "nothing stops; a cold restart does": "holds",
        "peak memory is below 1.10x a cold restart's": "holds",
        "peak memory is below 0.75x the extravagant way's": "holds",
        "so with weights of its own for each device: latency": "holds",
        "so with weights of its own for each device: peak memory": "does not hold",
        "without it a change is slower: - shared arena: weights are copied into each instance": "holds",
        "without it a change is slower: - peer copies: what is new is read from disk": "holds",
        "without it a change is slower: - processes made ready: interpreters start on command": "holds",
        "without it a change is slower: - attaching: a cold restart": "does not hold",
        "throughput during a change is above 0.8x before": "holds",
        "throughput during a change is above a cold restart's": "holds",
        "two devices do more than one": "does not hold",
    }


def test_a_share_of_the_baseline_is_a_limit_beside_it():
    seconds = {"latency-ours": (1.0, 1.5), "latency-cold": (10.0, 11.0)}
    results = Results(
        {arm: {seed: {"seconds": value} for seed, value in enumerate(values)} for arm, values in seconds.items()}
    )
    found = next(claim for claim in judge(results) if claim.claim == "a change takes less than 0.2x a cold restart")
    assert (found.baseline, found.ours, found.limit) == (10.5, 1.25, pytest.approx(2.1))
    assert found.difference == -9.25


def test_arms_share_one_size():
    study = make(dim=64)
    assert len({arm.name for arm in study.arms}) == len(study.arms) == 19
    assert {arm.config.dim for arm in study.arms} == {64}


def test_trace_is_reproducible_and_within_limits():
    case = Case(kind="slo", trace_s=5.0)
    arrivals = trace(case, 0)
    assert arrivals == trace(case, 0)
    assert arrivals
    assert all(0 <= at < 5.0 and 1 <= prompt <= 480 and 1 <= new <= 480 for at, prompt, new in arrivals)


def test_a_thinned_trace_passes_as_quickly_with_fewer_requests(tmp_path, monkeypatch):
    (tmp_path / "traces").mkdir()
    with gzip.open(tmp_path / "traces" / "azure_llm_2023_conv.csv.gz", "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for second in range(1000):
            file.write(f"2023-11-16 18:{second // 60:02}:{second % 60:02}.0,{160 + 16 * (second % 7)},32\n")
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    case = Case(kind="slo", trace_s=20.0, squeeze=10.0)  # 200 seconds from second 99.9 on
    whole, thinned = trace(case, 0), trace(case.replace(thin=4), 0)
    assert [round(10 * at + 99.9) for at, _, _ in whole] == list(range(100, 300))
    assert thinned == whole[::4]
    assert thinned[1] == (pytest.approx(0.41), 10 + 104 % 7, 2)


def test_the_replay_has_a_load_that_its_devices_can_bear():
    slo = [arm.config for arm in make(full=True).arms if arm.config.kind == "slo"]
    assert {(config.thin, config.squeeze, config.pace_s) for config in slo} == {(20, 20.0, 0.2)}
    assert {arm.config.thin for arm in make(full=True).arms if arm.config.kind != "slo"} == {1}

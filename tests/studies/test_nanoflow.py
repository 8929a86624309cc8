import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.nanoflow import LARGE, SMALL, Size, arms, draw, judge, make
from anabranch.studies.nanoflow_runs import Model, table_of
from claims import run_only

judge = run_only(judge)

TINY = Size(
    model=Model(num_layers=2, dim=32, hidden_dim=48, num_heads=2, num_kv_heads=1, vocab_size=64),
    evaluations=120,
    num_requests=3,
    max_prompt=12,
    max_output=4,
    stream_mb=1,
    rows=16,
    num_decodes=4,
    context=20,
    num_prefills=20,
    rounds=1,
)


def one(metric, *values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.10, 1.25), "holds"),
        ((1.13, 1.26), "does not hold"),
        ((1.09, 1.2), "does not hold"),
        ((1.2,), "not resolved"),
    ],
)
def test_the_ratio_must_lie_within_in_every_seed(values, verdict):
    (claim,) = judge(Results({LARGE: one("full", *values)}))
    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("arm", "metric", "good", "bad"),
    [
        (LARGE, "split_only", 0.95, 1.0),
        (SMALL, "full", 1.03, 1.02),
        ("async", "ratio", 1.05, 1.04),
        ("overlap-disk", "ratio", 1.2, 1.19),
        ("overlap-attention", "ratio", 1.0, 0.99),
        ("nano-only", "ratio", 0.99, 1.01),
    ],
)
def test_the_worst_seed_decides(arm, metric, good, bad):
    for values, verdict in (((good, good), "holds"), ((good, bad), "does not hold"), ((good,), "not resolved")):
        (claim,) = judge(Results({arm: one(metric, *values)}))
        assert claim.verdict == verdict
        assert claim.ours == values[-1]


def test_ablations_are_differences_of_one_seed():
    runs = {LARGE: {seed: {"full": 1.15, "no_network": 1.02, "no_memory": 1.1 + 0.04 * seed} for seed in (0, 1)}}
    found = {claim.claim[:40]: (claim.verdict, claim.ours) for claim in judge(Results(runs))}
    assert found["E1: without overlap of the network the r"] == ("holds", pytest.approx(0.13))
    assert found["E1: without overlap of memory it is lowe"] == ("does not hold", pytest.approx(0.01))


def test_seeds_move_the_known_points_a_little():
    assert table_of(0).source == "paper"
    for seed in (1, 2):
        for resource in ("memory", "network"):
            assert table_of(seed).speed(resource, 0.2) == pytest.approx(table_of(0).speed(resource, 0.2), rel=0.0501)
            assert table_of(seed).speed(resource, 0.2) != table_of(0).speed(resource, 0.2)
        assert table_of(seed).speed("compute", 0.3) == pytest.approx(0.3)


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0, 1), (0, 1, 2, 3, 4))
    assert len(full.arms) == 7
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "nanoflow" in names()
    assert find("nanoflow") is make


def test_runs_end_to_end(tmp_path, monkeypatch):
    import gzip

    with gzip.open(tmp_path / "azure.csv.gz", "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46,374,44\n" * 9)
    for module in ("nanoflow_runs", "reading"):
        monkeypatch.setattr(f"anabranch.studies.{module}.data_file", lambda name: tmp_path / "azure.csv.gz")
    outcome = run_study(make(**to_kwargs(TINY)), tmp_path / "results", seeds=[0])
    assert not outcome.missing
    runs = outcome.results.runs
    assert set(runs) == set(arms(TINY))
    assert runs[LARGE][0]["full"] > runs[LARGE][0]["split_only"]
    assert runs["async"][0]["equal"]
    assert runs["nano-only"][0]["same_tokens"] == 1.0
    assert {claim.verdict for claim in outcome.claims} == {"not resolved"}  # one seed
    assert (tmp_path / "results" / "nanoflow.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")


def to_kwargs(size):
    return {name: getattr(size, name) for name in size.__dataclass_fields__}

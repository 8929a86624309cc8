import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.powerwalk import draw, judge, make, overlap
from claims import run_only

judge = run_only(judge)


def verdicts(runs):
    return {claim.claim: (claim.verdict, claim.ours) for claim in judge(Results(runs))}


def test_walks_needed_are_read_off_a_line_through_logarithms():
    """Full paths: error 3 / sqrt(R). End points have 0.3 at 1,000 walks, for which full paths need 100: a tenth."""
    ours = {"error_curve": [[100, 0.3], [400, 0.15], [900, 0.1]]}
    theirs = {"error_curve": [[100, 0.9], [1000, 0.3]]}
    runs = {"fullpath-ppi": {0: ours, 1: ours}, "endpoint-ppi": {0: theirs, 1: theirs}}
    verdict, needed = verdicts(runs)["ppi: full paths need fewer walks"]
    assert verdict == "holds"
    assert needed == pytest.approx(0.1)
    close = {"error_curve": [[100, 0.6], [1000, 0.2]]}  # 225 walks for 0.2
    runs["endpoint-ppi"][1] = close
    assert verdicts(runs)["ppi: full paths need fewer walks"] == ("holds", pytest.approx(0.225))
    runs["endpoint-ppi"][1] = {"error_curve": [[100, 0.6], [1000, 0.18]]}
    assert verdicts(runs)["ppi: full paths need fewer walks"][0] == "does not hold"


@pytest.mark.parametrize(
    ("halved", "verdict"), [([0.3, 0.4], "holds"), ([0.3, 0.41], "does not hold"), ([0.3], "not resolved")]
)
def test_the_worst_seed_decides(halved, verdict):
    runs = {"decompose-dblp": {seed: {"halved": value, "over_limit": 0.5} for seed, value in enumerate(halved)}}
    found = verdicts(runs)
    assert found["dblp: two rounds take the error below 0.4 of the index's"] == (verdict, max(halved))
    assert found["dblp: the error is within (1 - alpha)^T of the index's worst"][1] == 0.5
    assert not any("ppi" in claim for claim in found)


def test_a_batch_must_be_quicker_in_every_seed():
    claim = "ppi: a batch is 1.5 times quicker than one by one"
    for ratios, verdict in (([1.6, 2.0], "holds"), ([1.4, 2.0], "does not hold")):
        runs = {"batch-ppi": {seed: {"batch_ratio": ratio} for seed, ratio in enumerate(ratios)}}
        assert verdicts(runs)[claim] == (verdict, min(ratios))


def test_overlap_lets_equal_scores_stand_for_each_other():
    score_N = np.append(np.linspace(1, 0.5, 48), [0.25, 0.25, 0.25, 0.1, 0.0])
    assert overlap(score_N, np.arange(50)) == 1
    assert overlap(score_N, np.append(np.arange(48), [49, 50])) == 1
    assert overlap(score_N, np.append(np.arange(48), [50, 51])) == 0.98
    assert overlap(np.array([0.7, 0.3, 0.0]), np.array([0, 1])) == 1


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0, 1), (0, 1, 2, 3, 4))
    assert len({arm.name for arm in full.arms}) == 15
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "powerwalk" in names()
    assert find("powerwalk") is make


def test_runs_end_to_end(tmp_path):
    study = make(graphs=("karate",), walks=(20, 80), num_nodes=3, num_queries=20)
    outcome = run_study(study, tmp_path, seeds=[0, 1])
    runs = outcome.results.runs
    assert runs["decompose-karate"][0]["l1_2"] < runs["decompose-karate"][0]["l1_0"]
    assert runs["fullpath-karate"][0]["l1"] < runs["endpoint-karate"][0]["l1"]
    assert runs["batch-karate"][0]["difference"] < 1e-6
    assert runs["decompose-karate"][1]["over_limit"] <= 1
    assert len(outcome.claims) == 4
    assert (tmp_path / "powerwalk.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")

"""Claims that are asked before a run, and Holm's rule over them."""

import pytest

from anabranch.studies.asked import holm, judged, p_value
from anabranch.studies.harness import Results


def test_holm_by_hand():
    clear, weak, none = [1.0, 1.1, 0.9, 1.0, 1.05], [0.3, -0.1, 0.25, 0.3, 0.2], [0.1, -0.1, 0.0, 0.05, -0.05]
    assert p_value(weak) == pytest.approx(0.06405, abs=1e-5)
    assert p_value([0.0] * 5) == 1.0
    assert holm({0: clear, 1: none}) == {0: "holds", 1: "not resolved"}
    assert holm({0: [-value for value in clear]}) == {0: "does not hold"}
    assert holm({0: clear[:4]}) == {0: "not resolved"}
    # 0.03 alone, and not beside another that is no clearer.
    middling = [0.5, 0.1, 0.4, 0.2, 0.05]
    assert 0.025 < p_value(middling) < 0.05
    assert holm({0: middling}) == {0: "holds"}
    assert holm({0: middling, 1: list(middling)}) == {0: "not resolved", 1: "not resolved"}


def test_a_claim_is_a_difference_beyond_its_margin_over_common_seeds():
    values = {"a": [0.7, 0.72, 0.71, 0.69, 0.7], "b": [0.5, 0.51, 0.5, 0.49, 0.5, 9.0]}
    results = Results({arm: {seed: {"f1": one} for seed, one in enumerate(each)} for arm, each in values.items()})
    wide, narrow, absent = judged(
        results,
        [
            ("f1", "a", "f1", "b", 0.3, "a beats b by .3", "-"),
            ("f1", "a", "f1", "b", 0.1, "a beats b by .1", "paper"),
            ("f1", "c", "f1", "b", 0.0, "c beats b", "-"),
        ],
    )
    assert (wide.verdict, narrow.verdict, absent.verdict) == ("does not hold", "holds", "not run")
    assert narrow.difference == pytest.approx(0.204)
    assert narrow.limit == pytest.approx(0.6)

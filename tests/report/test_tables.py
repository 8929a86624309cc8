"""The tables of a report: every number stands in the column that names it."""

import math
from dataclasses import fields

import numpy as np

from anabranch.report import Summary, explain
from anabranch.report.audit import LayerAudit
from anabranch.report.summary import LayerFacts, PoolFacts
from anabranch.report.tables import of_audits, of_details, of_layers, of_passes, of_pools, of_windows, tables
from anabranch.report.windows import WindowFacts
from anabranch.routing.passes import PassFacts


def layer(**facts):
    """The facts of a layer, nan but for ``facts``."""
    return LayerFacts(**{**dict.fromkeys((field.name for field in fields(LayerFacts)), math.nan), **facts})


def summary(layers=(), passes=(), **more):
    return Summary(rows=0, items=0, domains=[], layers=list(layers), passes=list(passes), **more)


def rows(table):
    """What a terminal shows of a table, row by row; none without one."""
    return [] if table is None else [list(row) for row in zip(*(one.cells for one in table.on_terminal), strict=True)]


def test_layers():
    found = layer(layer=7, num_destinations=64, top_k=8, max_violation=1.25, idle=3, load_entropy_bits=5.5)
    assert rows(of_layers(summary([found]))) == [["7", "64", "8", "1.25", "3", "5.50"]]


def test_passes():
    facts = PassFacts(
        first="a",
        second="b",
        first_layer=2,
        second_layer=3,
        num_first=2,
        num_second=2,
        pair_P3=np.zeros((0, 3), np.int64),
        reuse=0.75,
        chance=0.125,
        combinations_seen=1234,
        information_bits=1.5,
        noise_bits=0.25,
    )
    assert rows(of_passes(summary(passes=[facts]))) == [["2 to 3", "75.0%", "12.5%", "1,234", "1.500", "0.250"]]
    assert rows(of_passes(summary())) == []


def test_details():
    known = layer(
        layer=1,
        score_entropy_bits=2.5,
        vocabulary_specialization=0.125,
        next_token_specialization=0.25,
        predicted_token_specialization=0.375,
    )
    found = rows(of_details(summary([known, layer(layer=2)])))
    assert found == [["1", "2.500", "0.125", "0.250", "0.375"], ["2", "-", "-", "-", "-"]]
    # A table without scores and predictions says nothing that the others do not.
    assert rows(of_details(summary([layer(layer=1, vocabulary_specialization=0.5)]))) == []


def test_audits():
    facts = LayerAudit(
        layer=4,
        tokens=2048,
        achieved=3.0,
        achieved_share=0.75,
        optimum=4.0,
        bound=5.0,
        max_violation=1.5,
        min_violation=-0.5,
        mean_violation=0.9,
        unbiased_max_violation=2.5,
        domain_max_violation={"code": 1.75, "prose": 1.625, "none": None},
        dual=4.5,
        duality_gap=0.0625,
        prices=[],
        correlation=0.875,
        has_bias=True,
        preference_violations=1024,
    )
    unknown = {"has_bias": False, "correlation": None, "domain_max_violation": {}, "preference_violations": None}
    plain = LayerAudit(**{**vars(facts), **unknown})
    assert rows(of_audits([facts, plain])) == [
        ["4", "2,048", "1.500", "-0.500", "1.750 code", "2.500", "0.7500", "0.0625", "0.875", "1,024"],
        ["4", "2,048", "1.500", "-0.500", "-", "2.500", "0.7500", "-", "-", "-"],
    ]


POLICIES = ("segment", "plec", "lru", "lfu", "fixed", "belady")


def window(**more):
    facts = {
        "window": 16,
        "srp": 0.5,
        "srp_interval": (0.25, 0.75),
        "srp_by_layer": {},
        "srp_interval_by_layer": {},
        "size_ratio": 1.0,
        "group": 2,
        "domains": [],
        "domain_correlation": [],
        "caches": [1.0, 2.5],
        "hits": {policy: [0.1 + 0.01 * at, 0.2 + 0.01 * at] for at, policy in enumerate(POLICIES)},
        "hits_free": {policy: [0.3 + 0.01 * at, 0.4 + 0.01 * at] for at, policy in enumerate(POLICIES)},
        "near_belady": 1.25,
        "lru_there": 0.625,
        "near_belady_free": 2.0,
    }
    return WindowFacts(**{**facts, **more})


def test_windows_have_the_hits_of_each_policy_by_each_rule_at_each_size():
    start = ["16", "0.500", "0.250 to 0.750"]
    assert rows(of_windows([window()])) == [
        [*start, "1", "miss", *(f"{0.1 + 0.01 * at:.3f}" for at in range(6))],
        [*start, "1", "free", *(f"{0.3 + 0.01 * at:.3f}" for at in range(6))],
        [*start, "2.5", "miss", *(f"{0.2 + 0.01 * at:.3f}" for at in range(6))],
        [*start, "2.5", "free", *(f"{0.4 + 0.01 * at:.3f}" for at in range(6))],
    ]
    assert [row[2] for row in rows(of_windows([window(srp_interval=None)]))] == ["-"] * 4


def test_windows_are_said_in_words():
    matrix = [[1.0, 0.5, None], [0.5, 1.0, -0.25], [None, -0.25, 1.0]]
    seen = [layer(layer=0, num_destinations=2, top_k=1, domain_distance={})]
    text = "\n".join(explain(summary(seen, windows=[window(domains=["a", "b", "c"], domain_correlation=matrix)])))
    assert (
        "A window of 16 tokens: consistency of group 2 of 4 (fairly often; groups are those of 16 tokens); SCH is"
        in text
    )
    assert "SCH is 90% of Belady from a cache of 1.25 times the active experts on (free first accesses: 2)" in text
    assert "where LRU hits 62.5%." in text
    assert "between domains by -0.25 (b and c) to 0.50 (a and b)." in text
    text = "\n".join(explain(summary(seen, windows=[window(window=8, near_belady=None, near_belady_free=None)])))
    assert "A window of 8 tokens: SCH stays below 90% of Belady at every size (free first accesses: none)." in text
    assert "correlat" not in text


def test_what_was_not_asked_for_has_no_table():
    assert [table.heading for table in tables(summary([layer(layer=0, domain_distance={})]))] == ["Every layer"]


def test_pools():
    pool = PoolFacts(name="group", layers=[0, 2], size=16, max_violation=0.5, max_violation_layer=1.25, idle=3)
    assert rows(of_pools(summary(pools=[pool]))) == [["group", "0, 2", "16", "0.50", "1.25", "3"]]

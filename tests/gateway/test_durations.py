"""Durations are told as prometheus_client's own histogram tells them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from anabranch.gateway.durations import Durations

BUCKETS = (0.001, 0.5, 2)


def told(registry):
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.4, 0.5, 0.7, 2.0, 3.0, 1e9]), st.sampled_from('ab"\n'))))
def test_it_tells_what_the_library_tells(seen):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    durations = Durations("stage_seconds", "Stages", ["stage"], BUCKETS, ours)
    histogram = Histogram("stage_seconds", "Stages", ["stage"], buckets=BUCKETS, registry=theirs)
    for seconds, stage in seen:
        durations.observe(seconds, stage)
        histogram.labels(stage).observe(seconds)
    assert told(ours) == told(theirs)


def test_it_may_have_no_labels():
    registry = CollectorRegistry()
    durations = Durations("whole_seconds", "All", [], BUCKETS, registry)
    durations.observe(0.2)
    assert 'whole_seconds_bucket{le="0.5"} 1.0' in told(registry)
    with pytest.raises(ValueError, match=r"has the labels \(\), not \('a',\)"):
        durations.observe(0.2, "a")


def test_a_name_is_taken_once():
    registry = CollectorRegistry()
    Durations("whole_seconds", "All", [], BUCKETS, registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Durations("whole_seconds", "All", [], BUCKETS, registry)

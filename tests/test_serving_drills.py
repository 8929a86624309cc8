"""What `benchmarks/serving_drills.py` says of requests that were under way when an engine was killed, by hand."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("psutil")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def drills(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module("serving_drills")
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def results(drills, *told):
    return [drills.Result(sent, status, outcome, total_s=ended - sent) for sent, ended, status, outcome in told]


def test_requests_under_way_at_a_kill_ended_whole_were_told_or_were_lost(drills):
    found = drills.ended(
        results(
            drills,
            # Over before the kill at 10, whatever became of it.
            (1.0, 9.5, 200, "whole"),
            (2.0, 9.0, 500, "error"),
            (9.0, 11.0, 200, "whole"),
            # Told by its status, and by an event of its stream.
            (9.0, 10.0, 500, "error"),
            (9.5, 10.5, 200, "error"),
            (9.9, 12.0, 503, "error"),
            # Neither whole nor told.
            (8.0, 10.1, 200, "cut"),
            (9.0, 10.1, 0, "reset"),
            # Sent afterwards.
            (10.0, 11.0, 503, "error"),
            (10.5, 10.6, 0, "refused"),
            (12.0, 13.0, 200, "whole"),
        ),
        at=10.0,
    )
    assert found == {
        "accepted": 6,
        "whole": 1,
        "told": 3,
        "lost": 2,
        "lost_later": 1,
        "outcomes": {"whole 200": 1, "error 500": 1, "error 200": 1, "error 503": 1, "cut 200": 1, "reset 0": 1},
    }
    assert found["whole"] + found["told"] + found["lost"] == found["accepted"]


def test_a_record_of_kills_has_its_denominator_and_each_part_says_when_it_was_measured(drills):
    trials = [
        {"accepted": 6, "whole": 1, "told": 3, "lost": 2, "lost_later": 1, "outcomes": {"error 500": 3}},
        {
            "accepted": 4,
            "whole": 4,
            "told": 0,
            "lost": 0,
            "lost_later": 0,
            "outcomes": {"whole 200": 4, "error 500": 1},
        },
    ]
    sums = drills.deaths(trials)
    assert sums == {"whole": 5, "told": 3, "lost_later": 1, "outcomes": {"error 500": 4, "whole 200": 4}}
    summary = drills._summary([{**trial, "back_s": second} for second, trial in enumerate(trials)], "back_s")
    kill = {**summary, **sums, "date": "2026-11-28", "commit": "abc"}
    assert (kill["trials"], kill["accepted"]) == (2, 10)
    report = {"kill": kill, "orphans": 0, "soak": {"seconds": 1.0, "outcomes": {"a": 1}, "slope_kib_per_minute": 0.0}}
    assert [(row["case"], row["ours"]) for row in drills.rows(report)][:2] == [
        ("requests told an error, of 10 under way in 2 times kill -9", 3),
        ("requests that ended neither whole nor with an error, of 10 under way in 2 times kill -9", 3),
    ]
    assert drills.note(report) == (
        "Parts of the record: kill: 2026-11-28, at commit abc; soak: date and commit not kept."
    )

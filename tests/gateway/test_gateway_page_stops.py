"""The picture of how many answers pay: what it draws, of which decisions, and that odd details break no page."""

import pytest

from anabranch.gateway.ui import Seen, Snapshot, render
from anabranch.gateway.ui.stops import stops_of
from page_html import NASTY, Parsed

CURVE = {"curve": {"f_max": 0.8, "a": 2.0, "b": 6.0}, "budget": 5, "questions": 1200}


def seen(strategy="best-of", model="small", id="req_1", **details):
    return Seen(
        request_id=id,
        time_s=0.0,
        strategy=strategy,
        chosen=model,
        candidates=[{"model": model}],
        details={**CURVE, **details},
    )


def test_the_curve_and_its_stop_are_drawn():
    text = render(Snapshot(now_s=0.0, recent=[seen()]))
    Parsed(text)
    # 0.8 (1 - B(2, 11) / B(2, 6)) = 0.8 * (1 - 42/132).
    assert "5 answers pay; about 55% of questions are solved so" in text
    assert "1,200 questions seen" in text
    assert "How many answers pay" not in render(Snapshot(now_s=0.0))


def test_the_latest_of_each_model_is_drawn_and_no_more_than_there_is_room_for():
    recent = [
        seen(budget=3),
        seen(budget=9),
        seen(model="large", questions=0),
        *[seen(model=f"m{at}") for at in range(9)],
    ]
    assert [(one.name, one.stop) for one in stops_of(recent)][:2] == [("best-of, small", 3), ("best-of, large", 5)]
    assert len(stops_of(recent)) == 4
    assert "nothing seen yet" in render(Snapshot(now_s=0.0, recent=recent))
    text = render(Snapshot(now_s=0.0, recent=[seen(strategy=NASTY, model=NASTY)]))
    assert "<script>alert" not in text


@pytest.mark.parametrize(
    "details",
    [
        {"curve": "x"},
        {"curve": {}},
        {"curve": {"f_max": 2.0, "a": 1.0, "b": 1.0}},
        {"curve": {"f_max": "1", "a": None, "b": []}},
        {"budget": "many"},
        {"budget": -1},
        {"budget": 10**9},
        {"budget": True},
        {"questions": None},
    ],
)
def test_details_that_are_no_curve_are_passed_over(details):
    assert stops_of([seen(**details)]) == []
    Parsed(render(Snapshot(now_s=0.0, recent=[seen(**details)])))

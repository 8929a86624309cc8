"""What a map of experts learns while it serves, alone and beside other processes."""

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.routers import strategies
from anabranch.routers.coe.feedback import Feedback
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Outcome, Query

CELL = ("poem", "a")


def fitted(**fields):
    vector_ND = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    task = tuple(name for name in ("chat", "maths", "poem") for _ in range(20))
    data = Recorded(
        query=tuple(f"{name} {row}" for row, name in enumerate(task)),
        models=("a", "b"),
        score_NM=np.full((60, 2), 0.5),
        task=task,
        vector_ND=vector_ND,
    )
    made = strategies.make("coe", **{"parameters": {"a": 1.0, "b": 2.0}, "head": "knn", "map": "plain", **fields})
    return made.predictor.fit(data)


def outcome(quality=1.0, model="a", vector_D=(0.0, 0.0, 1.0)):
    vector_D = None if vector_D is None else np.array(vector_D, np.float32)
    return Outcome(query=Query(text="ode", vector_D=vector_D), model=model, quality=quality)


def test_a_score_counts_in_the_category_that_the_prompt_is_taken_for():
    router = fitted()
    router.observe(outcome(0.25))
    router.observe(outcome(0.75))
    assert {cell: sums_3.tolist() for cell, sums_3 in router.own.cells.items()} == {CELL: [2.0, 1.0, 0.625]}


@pytest.mark.parametrize("fields", [{"quality": None}, {"model": "z"}, {"vector_D": None}])
def test_what_tells_nothing_counts_nothing(fields):
    router = fitted()
    router.observe(outcome(**fields))
    assert router.own.count == router._fresh.count == 0


def test_after_so_many_the_table_has_them_and_the_map_is_made_anew():
    router = fitted(refresh_every=3)
    row = router._table.categories.index("poem")
    for seen in range(3):
        assert router._fresh.count == seen
        router.observe(outcome())
    assert (router._fresh.count, router.own.count) == (0, 3)
    assert router._table.count_CE[row].tolist() == [23, 20]
    assert router._table.quality_CE[row, 0] == pytest.approx((20 * 0.5 + 3) / 23)
    # Never where it is not wanted.
    never = fitted(refresh_every=0)
    for _ in range(300):
        never.observe(outcome())
    assert never._fresh.count == 300


def part(*scores):
    return Feedback.of((*CELL, score) for score in scores).state()


def test_what_others_heard_is_taken_as_often_as_it_is_told_and_no_more():
    router = fitted()
    router.hear(*part(1.0, 1.0))
    router.hear(*part(1.0, 1.0, 0.0))
    assert router._fresh.cells[CELL].tolist() == [3.0, 2.0, 2.0]
    router.hear({}, {})
    assert router._fresh.count == router.others.count == 0
    with pytest.raises(InputError, match="no such place in the table"):
        router.hear(*Feedback.of([("none", "a", 1.0)]).state())


def test_parts_of_several_are_their_sum():
    joined = Feedback.read(*fitted().joined([part(1.0), part(0.0, 0.5)]))
    assert joined.cells[CELL].tolist() == [3.0, 1.5, 1.25]


def test_what_is_another_processs_from_here_on_is_not_ones_own():
    router = fitted()
    for score in (1.0, 0.5):
        router.observe(outcome(score))
    router.disown(*part(1.0))
    assert router.own.cells[CELL].tolist() == router._fresh.cells[CELL].tolist() == [1.0, 0.5, 0.25]
    with pytest.raises(InputError, match="not among those that were observed here"):
        router.disown(*part(1.0, 1.0))
    arrays, facts = router.part()
    assert Feedback.read(arrays, facts).count == 1

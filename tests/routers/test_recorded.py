import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool


def table() -> Recorded:
    return Recorded(
        query=("one", "two", "three"),
        models=("a", "b"),
        task=("x", None, "y"),
        score_NM=np.array([[0.0, 1.0], [0.5, np.nan], [1.0, 0.25]]),
        cost_NM=np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]),
        tokens_NM2=np.array([[[10, 1], [12, 1]], [[np.nan, 1], [np.nan, 2]], [[7, 1], [7, 1]]]),
        vector_ND=np.eye(3, dtype=np.float32),
        answers=({"a": "A"}, {}, {"b": "B"}),
    )


def test_rows_are_taken_in_the_order_asked_with_all_that_belongs_to_them():
    part = table().take([2, 0])
    assert (part.query, part.task, part.answers) == (("three", "one"), ("y", "x"), ({"b": "B"}, {"a": "A"}))
    np.testing.assert_array_equal(part.score_NM, [[1.0, 0.25], [0.0, 1.0]])
    np.testing.assert_array_equal(part.cost_NM, [[3.0, 4.0], [1.0, 2.0]])
    np.testing.assert_array_equal(part.vector_ND, np.eye(3)[[2, 0]])
    assert part.tokens_NM2[0, 0, 0] == 7


def test_models_are_taken_in_the_order_asked():
    part = table().only(["b", "a"])
    np.testing.assert_array_equal(part.score_NM[0], [1.0, 0.0])
    np.testing.assert_array_equal(part.tokens_NM2[0, :, 0], [12, 10])
    with pytest.raises(InputError, match="no model 'c'"):
        table().only(["c"])


def test_queries_carry_what_strategies_may_see():
    first, second, third = table().queries()
    assert (first.text, first.task, first.prompt_tokens, first.answers) == ("one", "x", 11, {"a": "A"})
    assert second.prompt_tokens is None
    np.testing.assert_array_equal(third.vector_D, [0, 0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ()}, "models with different names"),
        ({"models": ("a", "a")}, "models with different names"),
        ({"task": ("x",)}, "task has 1 rows; there are 3"),
        ({"answers": ({},)}, "answers has 1 rows"),
        ({"score_NM": np.zeros((2, 2))}, r"score_NM has shape \[2, 2\]; it must begin with \[3, 2\]"),
        ({"cost_NM": np.zeros((3, 1))}, "cost_NM has shape"),
        ({"vector_ND": np.zeros((2, 4), np.float32)}, "vector_ND has 2 rows"),
        ({"score_NM": np.full((3, 2), np.inf)}, "must be finite"),
        ({"cost_NM": np.full((3, 2), -1.0)}, "neither negative"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    fields = {name: getattr(table(), name) for name in table().__dataclass_fields__}
    with pytest.raises(DataError, match=message):
        Recorded(**{**fields, **change})


def test_a_pool_has_models_with_different_names():
    assert Pool((Model(name="a"), Model(name="b"))).names == ("a", "b")
    with pytest.raises(InputError, match="at least one model"):
        Pool(())
    with pytest.raises(InputError, match="'a' twice"):
        Pool((Model(name="a"), Model(name="a")))

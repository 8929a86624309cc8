"""How composition of experts learns: what is a category, what is left out, and which models join."""

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model

SIZES = {"a": 1.0, "b": 2.0}
NAMES = ("maths", "poem", "chat")

# Which model is right, by category: all of it is known.
RIGHT = {"maths": (1.0, 0.0), "poem": (0.0, 1.0), "chat": (1.0, 1.0)}


def made(rows=60, *, tasks=True, models=("a", "b"), right=RIGHT, vectors=True):
    vector_ND = np.zeros((rows, 4), np.float32)
    vector_ND[np.arange(rows), np.arange(rows) % 3] = 1.0
    task = tuple(NAMES[row % 3] for row in range(rows))
    return Recorded(
        query=tuple(f"{name} {row}" for row, name in enumerate(task)),
        models=models,
        score_NM=np.array([right[name][: len(models)] for name in task]),
        task=task if tasks else (),
        vector_ND=vector_ND if vectors else None,
    )


def coe(**fields):
    return strategies.make("coe", **{"parameters": SIZES, "head": "knn", "k": 3, "map": "plain", **fields}).predictor


def test_tasks_are_categories_and_the_table_is_of_their_scores():
    fitted = coe().fit(made())
    assert sorted(fitted.router.categories) == sorted(NAMES)
    assert fitted.models == ("a", "b")
    table = dict(zip(fitted._table.categories, fitted._table.quality_CE.tolist(), strict=True))
    assert table == {name: list(RIGHT[name]) for name in NAMES}
    assert (fitted.kind_of_map.kind, fitted.kind_of_map.m) == ("plain", 0.0)


def test_without_tasks_or_where_that_is_asked_for_there_are_clusters():
    for data, fields in ((made(tasks=False), {}), (made(), {"categories": "clusters", "num_clusters": 3})):
        names = coe(**fields).fit(data).router.categories
        assert all(name.startswith("cluster-") for name in names)
    assert len(names) == 3
    with pytest.raises(InputError, match="no recorded query has a task"):
        coe(categories="task").fit(made(tasks=False))


def test_a_text_without_a_vector_teaches_nothing_and_nothing_without_any():
    data = made()
    data.vector_ND[5] = 0.0
    assert coe().fit(data)._table.count_CE.sum() == 59 * 2
    with pytest.raises(InputError, match="embed them first"):
        coe().fit(made(vectors=False))


def test_a_confidence_that_is_fixed_stays():
    assert coe(min_confidence=0.75).fit(made()).router.min_confidence == 0.75


def test_a_trade_off_of_its_own_needs_the_size_of_every_model():
    with pytest.raises(InputError, match="add 'b' to parameters"):
        coe(trade_off_params="auto", parameters={"a": 1.0}).fit(made())
    assert coe(trade_off_params="auto").fit(made()).trade_off >= 0.0


def test_models_that_were_scored_later_join_once():
    fitted = coe(parameters={**SIZES, "c": 3.0}).fit(made())
    later = made(models=("c",), right=dict.fromkeys(NAMES, (0.5,)))
    fitted.join(Model(name="c"), later)
    assert fitted.models == ("a", "b", "c")
    assert fitted._table.quality_CE[:, 2].tolist() == [0.5] * 3
    with pytest.raises(InputError, match="'c' is known already"):
        fitted.add_experts(later)
    with pytest.raises(InputError, match="give outcomes of 'd'"):
        fitted.join(Model(name="d"))
    with pytest.raises(InputError, match="it must be fitted"):
        coe().add_experts(later)

"""Parameters as scikit-learn users know them, and neighbours as a loop over all finds them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, InputError
from anabranch.graph.estimator import Estimator, most_similar


class Half(Estimator):
    """One that checks its arguments."""

    def __init__(self, size: int, names: tuple[str, ...] = (), *, rate: float = 0.5) -> None:
        self.size, self.names, self.rate = size, names, rate
        if size < 1:
            raise InputError(f"size is {size}")


def test_parameters():
    names = ["a"]
    model = Half(3, names, rate=0.1)
    assert model.get_params() == model.get_params(deep=False) == {"size": 3, "names": ["a"], "rate": 0.1}
    assert model.get_params()["names"] is names
    assert repr(model) == "Half(size=3, names=['a'], rate=0.1)"
    assert model.set_params(rate=0.2, size=4) is model
    assert (model.size, model.rate) == (4, 0.2)
    assert model.set_params() is model
    assert type(model)(**model.get_params()).get_params() == model.get_params()


class Fitted(Half):
    _OF_FIT = ("size", "names")

    def fit(self):
        self._become()
        return self

    def ask(self):
        self._check_as_fitted()
        return self.size


def test_what_a_fit_is_of_may_not_change_behind_it():
    """Arrays of the old and of the new arguments met in kernels, which look at no bound."""
    model = Fitted(3, ("a", "b"))
    assert model.ask() == 3  # nothing was fitted
    model.fit().set_params(rate=0.1)
    assert model.ask() == 3
    for names in (["a", "b"], np.array(["a", "b"])):
        assert model.set_params(names=names).ask() == 3
    for change in ({"size": 4}, {"names": ("a", "c")}, {"names": ()}):
        before = model.get_params()
        model.set_params(**change)
        with pytest.raises(InputError, match=r"and was .* when this Fitted was fitted; fit again, or set it back"):
            model.ask()
        assert model.set_params(**before).ask() == 3
    model.size = 4
    with pytest.raises(InputError, match="size is 4, and was 3"):
        model.ask()
    assert model.fit().ask() == 4
    # Of either kind the number is the same.
    assert model.set_params(size=np.int64(4)).ask() == 4
    # What was given may be changed in place.
    model.set_params(names=["a", "b"]).fit()
    model.names[0] = "c"
    with pytest.raises(InputError, match=r"names is .*, and was .* when this Fitted was fitted"):
        model.ask()


def test_a_change_that_is_not_allowed_changes_nothing():
    model = Half(3)
    with pytest.raises(InputError, match="size is 0"):
        model.set_params(rate=0.9, size=0)
    with pytest.raises(ConfigError, match="Half has no parameter 'sizes'; it has size, names, rate"):
        model.set_params(rate=0.9, sizes=2)
    assert model.get_params() == {"size": 3, "names": (), "rate": 0.5}


def test_scikit_learn_can_clone():
    base = pytest.importorskip("sklearn.base")
    model = Half(3, rate=0.25)
    model.fitted_ = 1
    copied = base.clone(model)
    assert copied.get_params() == model.get_params()
    assert not hasattr(copied, "fitted_")


# Neighbours


def by_loop(vectors, node, k):
    def cosine(other):
        size = np.linalg.norm(vectors[node]) * np.linalg.norm(vectors[other])
        return float(vectors[node] @ vectors[other] / size) if size else 0.0

    found = sorted(
        (other for other in range(len(vectors)) if other != node), key=lambda other: (-cosine(other), other)
    )[:k]
    return found, [cosine(other) for other in found]


def test_most_similar_by_hand():
    vectors = [[1, 0], [2, 0], [0, 3], [-1, 0], [1, 1], [0, 0]]
    node, cosine = most_similar(vectors, 0, 5)
    assert node.tolist() == [1, 4, 2, 5, 3]
    assert cosine == pytest.approx([1, 2**-0.5, 0, 0, -1])
    assert (node.dtype, cosine.dtype) == (np.int64, np.float32)


@given(st.integers(0, 2**16), st.integers(1, 30), st.integers(1, 40))
def test_most_similar_is_the_loop(seed, count, k):
    vectors = np.random.default_rng(seed).integers(-2, 3, (count, 3)).astype(float)
    own = seed % count
    node, cosine = most_similar(vectors, own, k)
    assert cosine == pytest.approx(by_loop(vectors, own, k)[1], abs=1e-6)
    assert len(set(node.tolist()) - {own}) == len(node) == min(k, count - 1)
    of_all = dict(zip(*by_loop(vectors, own, count), strict=True))
    assert [of_all[other] for other in node.tolist()] == pytest.approx(cosine.tolist(), abs=1e-6)


def test_ties_go_to_the_lowest_node_also_where_they_are_cut():
    vectors = np.ones((50, 4))
    assert most_similar(vectors, 0, 3)[0].tolist() == [1, 2, 3]
    assert most_similar(vectors, 2, 3)[0].tolist() == [0, 1, 3]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_vectors_have_a_cosine(scale):
    vectors = np.array([[1.0, 0], [1, 1], [0, 1]]) * scale
    assert most_similar(vectors, 0, 2)[1] == pytest.approx([2**-0.5, 0], abs=1e-6)


def test_one_node_has_no_neighbours():
    node, cosine = most_similar([[1.0, 2.0]], 0)
    assert (node.shape, cosine.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 0), r"\(2,\)"),
        (([[1.0]], 1), "node 1 is not one of the 1 nodes"),
        (([[1.0]], -1), "node -1"),
        (([[1.0]], 0.5), "node 0.5"),
        (([[1.0]], True), "node True"),
        (([[1.0]], 0, 0), "k is 0"),
        (([[1.0]], 0, 1.5), "k is 1.5"),
        (([["a"]], 0), "numbers"),
        (([[1.0], [np.nan]], 0), "node 1 has values that are not finite"),
        ((np.empty((0, 3)), 0), "node 0 is not one of the 0 nodes"),
    ],
)
def test_what_has_no_neighbours(arguments, message):
    with pytest.raises(InputError, match=message):
        most_similar(*arguments)


def test_most_similar_by_name():
    vectors = np.random.default_rng(0).normal(size=(4, 3))
    ids, cosines = most_similar(vectors, 2, k=2)
    names = ["ann", "bob", "cay", "dan"]
    found, same = most_similar(vectors, "cay", k=2, names=names)
    assert found.tolist() == [names[place] for place in ids]
    assert same.tolist() == cosines.tolist()
    with pytest.raises(InputError, match="no vector is called 'eve'"):
        most_similar(vectors, "eve", names=names)
    with pytest.raises(InputError, match="4 vectors and names of the shape"):
        most_similar(vectors, "ann", names=names[:3])


@pytest.mark.parametrize(
    ("names", "node"),
    [
        (list(np.array(["a", "b", "c"])), "b"),
        (["a", "b", "c"], np.str_("b")),
        (list(np.array([7, 8, 9])), 8),
        ([7, 8, 9], np.int32(8)),
        (np.array(["a", "b", "c"]), "b"),
    ],
)
def test_names_are_the_same_in_numpys_types(names, node):
    vectors = np.array([[1.0, 0], [1, 0.1], [0, 1]])
    found, _ = most_similar(vectors, node, 1, names=names)
    assert found.tolist() == [names[0]]

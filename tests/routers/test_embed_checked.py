"""What embedders of others give: unit vectors of the length they say, or an error that says what it was."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from anabranch.errors import DataError
from anabranch.routers.embed import Embedder, cache, embed_cached, embed_of, unit_vectors
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import FittedRouter
from anabranch.routers.strategies import make

TEXTS = ("a", "b")


class Given(Embedder, kind=None):
    """Gives what it was made with."""

    def __init__(self, given, dim=3):
        super().__init__(Hashed.Config())
        self.given, self.said = given, dim

    @property
    def dim(self):
        if self.said is NotImplementedError:
            raise self.said
        return self.said

    def embed(self, texts):
        return self.given


def test_unit_vectors_come_as_they_are_to_the_bit():
    one = Hashed(Hashed.Config(dim=32)).fit(["a b c", "c d"])
    texts = ["a b", "c d e", ""]
    found_ND = unit_vectors(one, texts)
    np.testing.assert_array_equal(found_ND, one.embed(texts))
    assert found_ND.dtype == np.float32
    assert not found_ND[2].any()
    assert unit_vectors(one, []).shape == (0, 32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_other_lengths_are_scaled_to_one(dtype):
    found_ND = unit_vectors(Given(np.array([[3, 4, 0], [0, 0, 0]], dtype)), TEXTS)
    np.testing.assert_array_equal(found_ND, np.array([[0.6, 0.8, 0], [0, 0, 0]], np.float32))


@pytest.mark.parametrize("size", [1e300, 3e38, 1e20, 1e9, 1.01, 1e-20, 1e-300])
def test_a_huge_or_tiny_row_is_scaled_and_its_neighbour_is_not(size):
    found_ND = unit_vectors(Given([[0.0, -size, 0.0], [0.6, 0.8, 0.0]]), TEXTS)
    np.testing.assert_array_equal(found_ND, np.array([[0, -1, 0], [0.6, 0.8, 0]], np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 4)), r"shape \[2, 4\] where \[2, 3\]"),
        (np.zeros((2, 0)), r"shape \[2, 0\]"),
        (np.zeros((1, 3)), r"shape \[1, 3\]"),
        (np.zeros((3, 3)), r"shape \[3, 3\]"),
        (np.zeros(3), r"shape \[3\]"),
        (np.zeros((2, 3, 1)), r"shape \[2, 3, 1\]"),
        ([[1.0, 0.0, 0.0], [0.0, np.nan, 0.0]], "not finite, of text 1 of 2"),
        ([[np.inf, 0.0, 0.0], [0.0, 1.0, 0.0]], "not finite, of text 0 of 2"),
        ([[1.0, 0.0, 0.0], [1.0]], "no array of numbers"),
        ([["a", "b", "c"]] * 2, "values of type <U1"),
        ([[1j, 0, 0]] * 2, "complex"),
        ([[True, False, False]] * 2, "bool"),
        (None, "object"),
    ],
)
def test_what_is_no_vector_of_each_text_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        unit_vectors(Given(given), TEXTS)


def test_without_a_known_dimension_any_will_do_but_none():
    assert unit_vectors(Given(np.eye(2), NotImplementedError), TEXTS).shape == (2, 2)
    with pytest.raises(DataError, match=r"shape \[2, 0\] where \[2, dimensions\]"):
        unit_vectors(Given(np.zeros((2, 0)), None), TEXTS)
    for dim in (0, -1, "3", 3.0):
        with pytest.raises(DataError, match="must be an integer of at least 1"):
            unit_vectors(Given(np.eye(2), dim), TEXTS)


def test_the_cache_of_vectors_keeps_nothing_that_is_none(tmp_path):
    with pytest.raises(DataError, match="not finite"):
        embed_cached(Given(np.full((1, 3), np.nan)), ["a"], folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_fitted_router_and_what_strategies_are_connected_with_see_unit_vectors():
    one = Given(np.full((1, 3), 1e20))
    strategy = make("linucb")
    router = FittedRouter(strategy=strategy, models=(), embedder=one)
    wanted_D = np.full(3, 3**-0.5, np.float32)
    np.testing.assert_allclose(router.query("a").vector_D, wanted_D, rtol=1e-6)
    np.testing.assert_allclose(embed_of(one)(["a"])[0], wanted_D, rtol=1e-6)
    assert embed_of(None) is None


def test_vectors_that_an_earlier_version_kept_unscaled_or_damaged_are_made_anew(tmp_path):
    """As they lie in its files: of another length, not finite, huge; beside them two that are right."""
    rows = {"a": [3.0, 4.0, 0.0], "b": [np.nan, 0.0, 1.0], "c": [3e38, 0.0, 0.0], "d": [0.6, 0.0, 0.8], "e": [0.0] * 3}
    true = {"a": [0.6, 0.8, 0.0], "b": [0.0, 0.0, 1.0], "c": [1.0, 0.0, 0.0], "d": rows["d"], "e": rows["e"]}
    asked = []

    class Known(Given, kind=None):
        def embed(self, texts):
            asked.extend(texts)
            return [5 * np.array(true[text]) for text in texts]

    one = Known(None)
    place = tmp_path / "vectors" / cache.fingerprint(one)
    place.mkdir(parents=True)
    keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in rows]
    cache._write(place, keys, np.array(list(rows.values()), np.float32))
    for _ in range(2):
        found_ND = embed_cached(one, list(rows), folder=tmp_path)
        np.testing.assert_array_equal(found_ND, np.array(list(true.values()), np.float32))
    assert sorted(asked) == ["a", "b", "c"]


@pytest.mark.parametrize("keys", ["3", '{"a": 1}', '["a"]', "[]"])
def test_a_file_of_the_cache_whose_keys_are_none_is_passed_over(tmp_path, keys):
    one = Given(np.eye(3)[:2])
    place = tmp_path / "vectors" / cache.fingerprint(one)
    place.mkdir(parents=True)
    save_file({"vector_ND": np.ones((2, 3), np.float32)}, place / "odd.safetensors", {"keys": keys})
    np.testing.assert_array_equal(embed_cached(one, TEXTS, folder=tmp_path), np.eye(3)[:2])


def test_tensors_may_need_a_gradient():
    torch = pytest.importorskip("torch")
    row_ND = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]], requires_grad=True)
    for given in (row_ND, list(row_ND), tuple(row_ND), row_ND.double()):
        np.testing.assert_array_equal(
            unit_vectors(Given(given), TEXTS), np.array([[0.6, 0.8, 0], [0, 0, 1]], np.float32)
        )
    with pytest.raises(DataError, match="no array of numbers"):
        unit_vectors(Given(row_ND.to_sparse()), TEXTS)


def test_what_is_larger_than_any_float_is_not_finite_and_warns_nobody():
    if np.finfo(np.longdouble).max <= np.finfo(np.float64).max:
        pytest.skip("no wider float here")
    given = np.array([[1, 0, 0], [np.finfo(np.longdouble).max, 0, 0]], np.longdouble)
    with pytest.raises(DataError, match="not finite, of text 1 of 2"):
        unit_vectors(Given(given), TEXTS)

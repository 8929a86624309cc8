"""Product quantisation, against definitions in numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.graph.codes import CENTRES, ProductCodes
from anabranch.graph.workers import Workers


def drawn(count, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def parts_of(dim, parts):
    return [slice(part * dim // parts, (part + 1) * dim // parts) for part in range(parts)]


def test_codes_are_the_nearest_centres():
    vector_ND = drawn(400, 10)
    codes = ProductCodes.train(vector_ND, 4)
    code_NM = codes.encode(vector_ND[:50])
    for part, where in enumerate(parts_of(10, 4)):
        centre_KW = codes.centre_MWK[part, : where.stop - where.start].T
        square_NK = ((vector_ND[:50, None, where] - centre_KW[None]) ** 2).sum(2)
        chosen = np.take_along_axis(square_NK, code_NM[:, part : part + 1].astype(int), 1)[:, 0]
        np.testing.assert_allclose(chosen, square_NK.min(1), rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(dim=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), squared=st.booleans())
def test_what_a_table_adds_up_to_is_the_distance_to_what_the_code_stands_for(dim, share, seed, squared):
    parts = 1 + int(share * (dim - 1))
    vector_ND, query_QD = drawn(60, dim, seed), drawn(3, dim, seed + 1)
    codes = ProductCodes.train(vector_ND, parts, seed=seed)
    code_NM = codes.encode(vector_ND)
    table_QMK = codes.tables(query_QD, squared=squared)
    found_QN = table_QMK[:, np.arange(parts), code_NM].sum(2)
    held_ND = codes.decode(code_NM).astype(np.float64)
    true_QN = ((query_QD[:, None] - held_ND[None]) ** 2).sum(2) if squared else 1 - query_QD @ held_ND.T
    np.testing.assert_allclose(found_QN, true_QN, rtol=1e-4, atol=1e-4)


def test_few_vectors_are_kept_as_they_are():
    vector_ND = drawn(CENTRES // 2, 6)
    codes = ProductCodes.train(vector_ND, 3)
    np.testing.assert_allclose(codes.decode(codes.encode(vector_ND)), vector_ND, rtol=1e-6)


def test_a_centre_without_vectors_goes_to_the_farthest():
    # All but a few lie at one place, where most centres begin.
    vector_ND = np.zeros((2000, 2), np.float32)
    vector_ND[:100] = 100 + drawn(100, 2)
    codes = ProductCodes.train(vector_ND, 1)
    assert np.abs(codes.decode(codes.encode(vector_ND)) - vector_ND).max() < 1e-3


def test_more_codes_are_nearer():
    vector_ND = drawn(2000, 16)
    error = [
        ((codes.decode(codes.encode(vector_ND)) - vector_ND) ** 2).mean()
        for codes in (ProductCodes.train(vector_ND, parts) for parts in (2, 4, 8, 16))
    ]
    assert error == sorted(error, reverse=True)
    assert error[-1] < 1e-3 < error[0] < vector_ND.var()


def test_threads_change_nothing():
    vector_ND = drawn(600, 12)
    one, two = (ProductCodes.train(vector_ND, 5, seed=3, workers=number) for number in (1, 2))
    assert one.centre_MWK.tobytes() == two.centre_MWK.tobytes()
    with Workers(2) as pool:
        assert one.encode(vector_ND, pool).tobytes() == one.encode(vector_ND).tobytes()


def test_what_is_no_number_of_codes_is_told():
    for count, parts in ((0, 2), (5, 0), (5, 5)):
        with pytest.raises(InputError, match="codes of"):
            ProductCodes.train(drawn(count, 4), parts)


@pytest.mark.parametrize(
    "centre",
    [
        np.zeros((2, 2, 255), np.float32),
        np.zeros((2, 3, 256), np.float32),
        np.zeros((5, 1, 256), np.float32),
        np.zeros((2, 2, 256)),
        np.zeros((2, 256), np.float32),
        np.full((2, 2, 256), np.nan, np.float32),
    ],
)
def test_centres_that_do_not_fit_are_damage(centre):
    with pytest.raises(DataError, match="centres of codes"):
        ProductCodes(4, centre)

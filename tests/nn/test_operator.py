"""Which back end multiplies in bf16 where the CPU has matrix units; what they compute is in test_grouped."""

import pytest

from anabranch.nn.operator import MANY_PRODUCTS, _fills_matrix_units


@pytest.mark.parametrize(
    ("rows", "experts", "dim", "hidden_dim", "fills"),
    [
        (16384, 64, 256, 128, False),  # 256 rows an expert of 32 K numbers
        (4096, 8, 512, 1024, False),
        (8192, 8, 512, 1024, True),
        (8192, 16, 1024, 1024, True),
        (15, 1, 1024, 1024, False),
        (16, 1, 256, 256, True),  # one expert has as many rows in every step
        (0, 8, 256, 256, False),
    ],
)
def test_matrices_that_pay_for_code_of_their_own(rows, experts, dim, hidden_dim, fills):
    assert _fills_matrix_units(rows, experts, dim, hidden_dim) is fills


def test_the_bound_is_on_rows_of_one_expert():
    assert _fills_matrix_units(2 * MANY_PRODUCTS, 2, 1, 1)
    assert not _fills_matrix_units(2 * MANY_PRODUCTS - 1, 2, 1, 1)

"""The compiled product of routed rows with low-rank adapters, against loops written here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.nn import kernels
from anabranch.nn.kernels.low_rank import can_add, low_rank

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def made(ranks, uses, num_items, in_dim, out_dim, dtype=torch.float32, seed=0, rank=None):
    """(x, a, b, end, item, weight): ``uses`` of each adapter, sorted by item; what is beyond a rank counts for nothing."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(ranks) if rank is None else rank
    shapes = (num_items, in_dim), (len(ranks), rank, in_dim), (len(ranks), out_dim, rank)
    x, a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    items = [torch.randint(num_items, (count,), generator=generator).sort().values for count in uses]
    weight = torch.randn(sum(uses), generator=generator)
    return x, a, b, torch.tensor(uses).cumsum(0), torch.cat(items), weight


def naive(x, a, b, end, item, weight, ranks):
    """(y, z) in float64."""
    x, a, b = x.double(), a.double(), b.double()
    y, z = torch.zeros(len(x), b.shape[1], dtype=torch.float64), torch.zeros(len(item), a.shape[1], dtype=torch.float64)
    begin = 0
    for e, stop in enumerate(end.tolist()):
        for u in range(begin, stop):
            z[u, : ranks[e]] = a[e, : ranks[e]] @ x[item[u]]
            y[item[u]] += weight[u].double() * (b[e, :, : ranks[e]] @ z[u, : ranks[e]])
        begin = stop
    return y, z


def check(given, ranks):
    assert can_add(*given[:3])
    y, z = low_rank(*given, ranks=ranks, keep=True)
    wanted_y, wanted_z = naive(*given, ranks)
    # What the numbers are is exact; what is summed is float32, whatever they are kept in. Uses of a row may cancel each other, as where its
    # weights add up to next to nothing: rounding is that of the largest of them.
    used = zip(ranks, [0, *given[3].tolist()], given[3].tolist(), strict=False)
    uses = [
        given[-1][i:j, None] * (wanted_z[i:j, :r] @ given[2][e, :, :r].double().T) for e, (r, i, j) in enumerate(used)
    ]
    largest_use = max((float(one.abs().max()) for one in uses if one.numel()), default=0.0)
    for found, wanted, added in ((y, wanted_y, largest_use), (z, wanted_z, 0.0)):
        assert found.dtype == torch.float32
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=max(1e-5 * max(scale, 1e-6), 2e-6 * added))
    again, kept = low_rank(*given, ranks=ranks)
    assert kept is None
    assert torch.equal(again, y)
    x, a, b, *others = given
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)
    assert can_add(x, a, turned)
    assert torch.equal(low_rank(x, a, turned, *others, ranks=ranks)[0], y)


def test_weights_that_add_up_to_next_to_nothing():
    given = made([16], [18], 1, 25, 16, torch.float32, seed=18)
    assert abs(float(given[-1].sum())) < 0.03
    check(given, [16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "uses", "num_items", "in_dim", "out_dim"),
    [
        # Decoding: one row, and 32 rows over 16 adapters of ranks 8 to 64.
        ([16], [1], 1, 576, 1536),
        ([8, 16, 32, 64] * 4, [2] * 16, 32, 576, 192),
        # A prompt of one adapter, and one whose tokens have two of 8 each.
        ([16], [300], 300, 64, 96),
        ([16] * 8, [5, 0, 70, 33, 1, 2, 80, 9], 100, 128, 160),
    ],
)
def test_shapes_of_serving(dtype, ranks, uses, num_items, in_dim, out_dim):
    check(made(ranks, uses, num_items, in_dim, out_dim, dtype), ranks)


@pytest.mark.parametrize("rank", [64, 21])  # whole vectors, and not
def test_adding_to_some_columns_of_wider_rows_leaves_the_others(rank):
    ranks = [8, rank, 16]
    given = made(ranks, [2, 3, 4], 6, 48, 70, rank=rank)
    wide = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    before = wide.clone()
    y, _ = low_rank(*given, ranks=ranks, into=wide[:, 50:120])
    assert y.data_ptr() == wide[:, 50:].data_ptr()
    wanted = before.double()
    wanted[:, 50:120] += naive(*given, ranks)[0]
    torch.testing.assert_close(wide.double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(wide[:, :50], before[:, :50])
    assert torch.equal(wide[:, 120:], before[:, 120:])
    # The same numbers, to the bit, as in a tensor of its own.
    assert torch.equal(low_rank(*given, ranks=ranks, into=before[:, 50:120].clone())[0], wide[:, 50:120])


def test_what_is_beyond_a_rank_is_not_asked():
    """As a pool of several ranks keeps zeros there, whatever stands there changes nothing."""
    given = made([8, 64], [3, 40], 40, 32, 64, rank=64)
    plain, _ = low_rank(*given, ranks=[8, 64])
    given[1][0, 8:], given[2][0, :, 8:] = torch.nan, torch.nan
    assert torch.equal(low_rank(*given, ranks=[8, 64])[0], plain)
    x, a, b, *others = given
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(low_rank(x, a, turned, *others, ranks=[8, 64])[0], plain)


@given(
    ranks=st.lists(st.integers(1, 21), min_size=1, max_size=5),
    in_dim=st.integers(1, 70),
    out_dim=st.integers(1, 70),
    num_items=st.integers(1, 12),
    is_half=st.booleans(),
    data=st.data(),
)
def test_any_shape(ranks, in_dim, out_dim, num_items, is_half, data):
    uses = data.draw(st.lists(st.integers(0, 40), min_size=len(ranks), max_size=len(ranks)))
    dtype = torch.bfloat16 if is_half else torch.float32
    check(made(ranks, uses, num_items, in_dim, out_dim, dtype, seed=sum(uses)), ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_in_any_company_and_with_any_threads(dtype):
    ranks = [7, 16, 3]
    x, a, b, end, item, weight = made(ranks, [40, 9, 21], 30, 72, 200, dtype)
    y, _ = low_rank(x, a, b, end, item, weight, ranks=ranks)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(low_rank(x, a, b, end, item, weight, ranks=ranks)[0], y)
    finally:
        torch.set_num_threads(before)
    for number in range(0, 30, 7):
        own = item == number
        counts = [int(own[start:stop].sum()) for start, stop in zip([0, *end[:-1].tolist()], end.tolist(), strict=True)]
        ends = torch.tensor(counts).cumsum(0)
        alone, _ = low_rank(
            x[number : number + 1], a, b, ends, torch.zeros(int(own.sum()), dtype=torch.int64), weight[own], ranks=ranks
        )
        assert torch.equal(alone[0], y[number])


def test_what_is_no_number_stays_in_its_row():
    ranks = [4, 4]
    x, a, b, end, item, weight = made(ranks, [6, 6], 6, 32, 64)
    item = torch.arange(6).repeat(2)
    clean, _ = low_rank(x, a, b, end, item, weight, ranks=ranks)
    x[2] = torch.nan
    y, _ = low_rank(x, a, b, end, item, weight, ranks=ranks)
    others = torch.arange(6) != 2
    assert torch.equal(y[others], clean[others])
    assert y[2].isnan().all()


def test_nothing_to_do():
    x, a, b, _, _, _ = made([2, 3], [0, 0], 4, 8, 8)
    none = torch.zeros(0, dtype=torch.int64)
    y, z = low_rank(x, a, b, torch.zeros(2, dtype=torch.int64), none, torch.zeros(0), keep=True)
    assert y.shape == (4, 8)
    assert z.shape == (0, 3)
    assert not y.any()


def test_what_it_takes():
    x, a, b, end, item, weight = made([2, 3], [2, 2], 4, 8, 8)
    assert can_add(x, a, b)
    assert not can_add(x.double(), a.double(), b.double())
    assert not can_add(x.bfloat16(), a, b)
    assert not can_add(x, a.transpose(1, 2).contiguous().transpose(1, 2), b)
    assert not can_add(x.unsqueeze(0), a, b)
    for changed in (
        {"item_U": torch.tensor([0, 1, 2, 4])},
        {"item_U": torch.tensor([-1, 1, 2, 3])},
        {"end_E": torch.tensor([2, 5])},
        {"end_E": torch.tensor([3, 2])},
        {"ranks": [4, 2]},
        {"ranks": [-1, 2]},
    ):
        arguments = {"end_E": end, "item_U": item, "weight_U": weight, "ranks": [2, 3], **changed}
        with pytest.raises(InputError, match="out of range"):
            low_rank(x, a, b, **arguments)
    with pytest.raises(InputError, match="weight of kernel low_rank"):
        low_rank(x, a, b, end, item, weight[:3])

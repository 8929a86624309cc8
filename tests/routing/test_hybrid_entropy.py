"""`HybridEntropy`: the spec's masks, and what it becomes at the ends of its settings."""
# Shapes: N items, E destinations, K choices per item

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import HybridEntropy, TopK, uncertainty


def kept(row, **fields):
    """{destination: weight} of one item."""
    routing = HybridEntropy.Config(**fields).build(len(row))(torch.tensor([row]))
    pairs = zip(routing.index_NK[0].tolist(), routing.weight_NK[0].tolist(), strict=True)
    return {e: round(w, 6) for e, w in pairs if e >= 0}


def test_the_masks_of_the_spec():
    assert kept([0.7, 0.2, 0.1, 0, 0, 0]) == {0: 0.7, 1: 0.2}
    assert kept([0.4, 0.3, 0.1, 0.1, 0.05, 0.05]) == {0: 0.4, 1: 0.3}
    assert len(kept([0.3, 0.2, 0.15, 0.15, 0.1, 0.1])) == 6
    row = [0.25, 0.2, 0.15, 0.15, 0.15, 0.1]
    assert len(kept(row)) == 6
    assert kept(row, entropy_threshold=1.0) == {0: 0.25, 1: 0.2, 2: 0.15, 3: 0.15}


def test_the_destination_that_crosses():
    row = [0.1, 0.5, 0.3, 0.1]
    fields = {"keep_top_k": 1, "entropy_threshold": 1.0, "top_p": 0.75}
    assert kept(row, **fields) == {1: 0.5}
    assert kept(row, nucleus="inclusive", **fields) == {1: 0.5, 2: 0.3}
    # One that reaches it to the number is kept by both, and ends it.
    assert kept(row, **{**fields, "top_p": 0.8}) == kept(row, nucleus="inclusive", **{**fields, "top_p": 0.8})


def test_renormalised_weights_sum_to_1():
    assert kept([0.7, 0.2, 0.1, 0, 0, 0], normalize="sum") == {0: round(0.7 / 0.9, 6), 1: round(0.2 / 0.9, 6)}


def scores(most=8):
    return st.tuples(
        st.integers(1, 7), st.integers(1, most), st.integers(0, 999), st.sampled_from([0.1, 1.0, 5.0])
    ).map(
        lambda given: (
            torch.randn(given[0], given[1], generator=torch.Generator().manual_seed(given[2])) * given[3]
        ).softmax(-1)
    )


@given(scores(), st.data())
def test_it_is_a_naive_loop(score_NE, data):
    num = score_NE.shape[1]
    top_k, top_p = data.draw(st.integers(1, num)), data.draw(st.sampled_from([0.05, 0.4, 0.75, 1.0]))
    threshold = data.draw(st.sampled_from([0.2, 0.9, 1.0]))
    inclusive = data.draw(st.booleans())
    config = HybridEntropy.Config(
        keep_top_k=top_k, top_p=top_p, entropy_threshold=threshold, nucleus="inclusive" if inclusive else "exclusive"
    )
    routing = config.build(num)(score_NE)
    for n, row in enumerate(score_NE.tolist()):
        order = sorted(range(num), key=lambda e: (-row[e], e))
        entropy = float(uncertainty(score_NE[n : n + 1]))
        if abs(entropy - threshold) < 1e-6:
            continue
        wanted, through = [], 0.0
        for rank, e in enumerate(order):
            before, through = through, through + row[e]
            is_kept = before < top_p - 1e-6 if inclusive else through <= top_p + 1e-6
            near = min(abs(before - top_p), abs(through - top_p)) < 3e-6
            if near and rank >= top_k:
                wanted = None
                break
            if is_kept or rank < top_k or (threshold < 1 and entropy > threshold):
                wanted.append(e)
        if wanted is not None:
            assert [e for e in routing.index_NK[n].tolist() if e >= 0] == wanted
    assert bool(((routing.index_NK >= 0).sum(1) >= top_k).all())


@given(scores())
def test_the_ends_are_soft_and_top_k(score_NE):
    num = score_NE.shape[1]
    top_k = min(2, num)
    soft, wanted = (
        config.build(num)(score_NE)
        for config in (
            HybridEntropy.Config(entropy_threshold=1e-12, keep_top_k=1, top_p=1.0),
            TopK.Config(top_k=num),
        )
    )
    for one, other in ((soft.index_NK, wanted.index_NK), (soft.weight_NK, wanted.weight_NK)):
        assert torch.equal(one, other)
    for threshold in (1.0, 2.0):
        config = HybridEntropy.Config(entropy_threshold=threshold, top_p=1e-9, keep_top_k=top_k)
        few, wanted = config.build(num)(score_NE), TopK.Config(top_k=top_k).build(num)(score_NE)
        assert torch.equal(few.index_NK[:, :top_k], wanted.index_NK)
        assert torch.equal(few.weight_NK[:, :top_k], wanted.weight_NK)
        assert not (few.index_NK[:, top_k:] >= 0).any()


def test_what_is_closed_counts_neither_in_mass_nor_in_entropy():
    score_NE = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.05, 0.05]] * 2)
    open_NE = torch.tensor([[False, True, True, False, False, False], [True, True, False, True, False, True]])
    routing = HybridEntropy.Config(keep_top_k=1).build(6)(score_NE, open_NE=open_NE)
    # Two alike: undecided between all that there are.
    assert [e for e in routing.index_NK[0].tolist() if e >= 0] == [1, 2]
    # 0.4, 0.2, 0.1, 0.05 of 0.75: H 0.82, and 0.53, 0.8 of the mass.
    assert [e for e in routing.index_NK[1].tolist() if e >= 0] == [0]


def test_a_bias_changes_the_order_alone():
    score_NE = torch.tensor([[0.7, 0.2, 0.1]])
    select = HybridEntropy.Config(keep_top_k=1).build(3)
    routing = select(score_NE, bias_E=torch.tensor([0.0, 0.0, 5.0]))
    assert [e for e in routing.index_NK[0].tolist() if e >= 0] == [2]
    assert select.choose(score_NE)[0].tolist() == [0, -1, -1]


def test_a_router_of_one():
    routing = HybridEntropy.Config(keep_top_k=1).build(1)(torch.ones(2, 1))
    assert routing.index_NK.tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entropy_index": 0.0}, "entropy_index"),
        ({"entropy_index": 2.5}, "entropy_index"),
        ({"entropy_threshold": 0.0}, "entropy_threshold"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"keep_top_k": 0}, "keep_top_k"),
        ({"keep_top_k": 5}, "keep_top_k is 5, but there are 4 destinations; use 1 to 4"),
        ({"nucleus": "both"}, "nucleus"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        HybridEntropy.Config(**fields).build(4)

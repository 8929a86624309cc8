"""Where scores are looked at for NaN as they are made, and what is said of them."""

import pytest
import torch
import torch.distributed as dist

from anabranch.errors import NotFiniteError
from anabranch.routing import RoutingContext
from anabranch.routing.nan import count_nan, is_seen_at_once, refuse_nan

SCORE_NE = torch.tensor([[0.5, 0.5], [torch.nan, 0.5], [torch.nan, torch.nan]])


@pytest.mark.parametrize(
    ("is_initialized", "world_size", "is_seen"), [(False, 1, True), (True, 1, True), (True, 2, False)]
)
def test_one_of_several_processes_does_not_look(monkeypatch, is_initialized, world_size, is_seen):
    def size():
        assert is_initialized, "the size of no group was asked for"
        return world_size

    monkeypatch.setattr(dist, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(dist, "get_world_size", size)
    assert is_seen_at_once(SCORE_NE) is is_seen


def test_what_is_elsewhere_is_not_looked_at():
    assert not is_seen_at_once(SCORE_NE.to("meta"))


def test_real_items_are_counted_and_padding_is_not():
    assert int(count_nan(SCORE_NE, None)) == 2
    assert int(count_nan(SCORE_NE, torch.tensor([True, False, True]))) == 1
    with pytest.raises(NotFiniteError, match="router of layer 5 has NaN scores for 2 of 3 items"):
        refuse_nan(SCORE_NE, RoutingContext(), 5)
    refuse_nan(SCORE_NE, RoutingContext(item_mask_N=torch.tensor([True, False, False])), 5)
    refuse_nan(torch.tensor([[torch.inf, 1.0]]), RoutingContext(), 5)

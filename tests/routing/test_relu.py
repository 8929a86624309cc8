import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import Positive, ReluScore, Router, RoutingContext
from anabranch.testing import check_router

ROUTER = Router.Config(score=ReluScore.Config(init_std=1.0), select=Positive.Config(), balance=())


def test_weights_are_what_is_positive_of_the_logits():
    score = ReluScore.Config(cap=2.0).build(2, 3)
    with torch.no_grad():
        score.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        score.bias.copy_(torch.tensor([0.0, 0.5, -1.0]))
    logit_NE = score.project(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), RoutingContext())
    assert logit_NE.tolist() == [[1.0, -1.5, -2.0], [3.0, 1.0, 2.5]]
    score_NE = score.activate(logit_NE)
    assert score_NE.tolist() == [[1.0, 0.0, 0.0], [2.0, 1.0, 2.0]]
    routing = Positive.Config().build(3)(score_NE)
    assert routing.index_NK.tolist() == [[0, -1, -1], [0, 1, 2]]
    assert routing.weight_NK.tolist() == score_NE.tolist()


def test_a_floor_takes_the_gradient_of_what_is_below_it_and_none_leaves_it():
    x_ND = torch.tensor([[1.0]])
    for floor, expected in ((None, 1.0), (-1.0, 0.0)):
        score = ReluScore.Config(start=-5.0, zero=True, floor=floor).build(1, 1)
        score.project(x_ND, RoutingContext()).sum().backward()
        assert score.bias.grad.item() == expected


def test_it_starts_as_it_is_told():
    plain = ReluScore.Config(start=1.0, zero=True).build(4, 2)
    assert plain.weight.abs().sum() == 0
    assert plain.bias.tolist() == [1.0, 1.0]
    noisy = ReluScore.Config(init_std=1e-5, noisy_start=True).build(64, 8, generator=torch.Generator().manual_seed(0))
    assert 0 < noisy.bias.abs().max() < 1e-4
    assert 0.5e-5 < noisy.weight.std() < 2e-5


def test_it_is_a_router_as_any_other():
    check_router(ROUTER.build(8, 5, generator=torch.Generator().manual_seed(0)), dim=8)


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 1000))
def test_an_item_goes_to_as_many_as_are_positive(num_items, num_destinations, seed):
    value_NE = torch.randn(num_items, num_destinations, generator=torch.Generator().manual_seed(seed))
    routing = Positive.Config().build(num_destinations)(value_NE.relu(), bias_E=None)
    assert torch.equal(routing.used_NK, value_NE > 0)
    assert torch.equal(routing.weight_NK, value_NE.relu())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReluScore.Config(cap=0.0), "cap is 0.0"),
        (lambda: ReluScore.Config(floor=1.0), "floor is 1.0"),
        (lambda: ReluScore.Config(start=float("nan")), "start is nan"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

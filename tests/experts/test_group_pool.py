"""Group pools by hand: who shares with whom, under which names, and what is made once."""

from dataclasses import replace

import pytest

from anabranch.errors import ConfigError
from anabranch.experts.group_pool import Group, GroupPool
from anabranch.experts.rexmoe import ProgressiveScaling
from anabranch.nn import BuildContext, MoE
from anabranch.routing import BiasBalancer, PoolLoss, Router, SwitchLoss

N, LAYERS = 4, 5
CONFIG = MoE.Config(
    num_experts=N, hidden_dim=8, router=Router.Config(balance=(BiasBalancer.Config(), SwitchLoss.Config()))
)


def built(policy, num_layers=LAYERS):
    """What each layer of one model gets, and what the model owns."""
    context = BuildContext(6, num_layers=num_layers, num_routed_layers=num_layers)
    places = [replace(context, layer=number, routed_layer=number) for number in range(num_layers)]
    return [policy.build(CONFIG, place) for place in places], context.shared


def test_five_layers_in_groups_of_two():
    contexts = [BuildContext(6, routed_layer=number, num_routed_layers=LAYERS) for number in range(LAYERS)]
    assert [GroupPool(2).group(N, context) for context in contexts] == [
        Group(0, 2, 0, 0),
        Group(0, 2, 1, 4),
        Group(1, 2, 0, 0),
        Group(1, 2, 1, 4),
        Group(2, 1, 0, 0),
    ]
    assert [GroupPool(2).num_slots(N, context) for context in contexts] == [8, 8, 8, 8, 4]
    made, shared = built(GroupPool(2))
    assert list(shared) == ["experts_0", "experts_1", "experts_2"]
    assert [access.experts is shared[f"experts_{number // 2}"] for number, access in enumerate(made)] == [True] * 5
    assert [access.num_slots for access in made] == [8, 8, 8, 8, 4]
    assert [access.experts.num_experts for access in made] == [8, 8, 8, 8, 4]
    assert [access.is_shared for access in made] == [True, True, True, True, False]
    assert [access.experts.is_shared for access in made] == [True, True, True, True, False]
    assert [(access.destinations.pool, access.destinations.own_start) for access in made] == [
        ("experts_0", 0),
        ("experts_0", 4),
        ("experts_1", 0),
        ("experts_1", 4),
        ("experts_2", 0),
    ]
    assert all(access.router == CONFIG.router and access.destinations.balance == () for access in made)


@pytest.mark.parametrize(("calls", "names", "is_shared"), [(1, [None, None], False), (2, ["layer_0", "layer_1"], True)])
def test_a_group_of_one_owns_its_experts_and_has_a_name_where_several_calls_use_them(calls, names, is_shared):
    made, shared = built(GroupPool(1, balance_alpha=0.1, one_bias=True, calls=calls), num_layers=2)
    assert [access.experts for access in made] == [None, None]
    assert not shared
    assert [access.destinations.pool for access in made] == names
    assert [access.is_shared for access in made] == [is_shared] * 2
    assert [access.router for access in made] == [CONFIG.router] * 2


def test_a_pools_balancers_are_made_once_and_taken_from_the_layers():
    made, shared = built(GroupPool(2, balance_alpha=0.1, one_bias=True), num_layers=4)
    for number, access in enumerate(made):
        group = number // 2
        bias, loss = access.destinations.balance
        assert bias is shared[f"bias_{group}_0"]
        assert loss is shared[f"balance_{group}"]
        assert isinstance(loss, PoolLoss)
        assert bias.bias_E.shape == (8,)
        assert access.router.balance == (SwitchLoss.Config(),)


def test_candidates_are_a_layers_own_and_where_there_is_something_to_close():
    made, _ = built(GroupPool(2, schedule=ProgressiveScaling.Config()))
    assert [access.destinations.candidates is None for access in made] == [False] * 4 + [True]
    assert [access.destinations.candidates.own_start for access in made[:4]] == [0, 4, 0, 4]
    made, _ = built(GroupPool(1, schedule=ProgressiveScaling.Config(as_reuse=2)), num_layers=1)
    assert made[0].destinations.candidates.num_slots == N


def test_groups_larger_than_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"reuse is 3, but the model has 2 routed layers; use 1 to 2"):
        built(GroupPool(3), num_layers=2)

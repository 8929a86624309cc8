"""Overridden decisions, by hand: what a bias, closed destinations and forced ones make of known scores, and what balancers then see."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import ConfigError
from anabranch.routing import (
    UNUSED,
    BiasBalancer,
    Candidates,
    LinearScore,
    Override,
    Router,
    RoutingContext,
    SwitchLoss,
    TopK,
    override_routing,
)
from anabranch.routing.destinations import Destinations
from anabranch.routing.layer_overrides import LayerOverrides
from anabranch.testing import check_routing

E = 4
SCORES = [
    [0.1, 0.4, 0.3, 0.2],
    [0.7, 0.1, 0.15, 0.05],
    [0.25, 0.3, 0.2, 0.25],
]  # items pass as they are: the score is their value


class Values(LinearScore):
    """The items are the scores."""

    def project(self, x_ND, context):
        return x_ND

    def activate(self, logit_NE):
        return logit_NE.masked_fill(logit_NE == -torch.inf, 0.0)


class Always:
    """An override of every router, whatever its layer."""

    def __init__(self, override):
        self.override, self.visits = override, []

    def of(self, router, visit, x_ND, context):
        self.visits.append(visit)
        return self.override


def router(top_k=2, normalize="none", balance=(), **options):
    made = Router.Config(select=TopK.Config(top_k=top_k, normalize=normalize), balance=balance).build(E, E, **options)
    made.score = Values(LinearScore.Config(), E, E)
    return made


def decide(*overrides, made=None, **context):
    context = RoutingContext(routing=[Always(override) for override in overrides], **context)
    routing = (made or router())(torch.tensor(SCORES), context)
    check_routing(routing)
    return routing.index_NK.tolist(), routing.weight_NK, routing, context


def test_nothing_said_is_the_plain_choice():
    assert decide()[0] == [[1, 2], [0, 2], [1, 0]]


def test_a_bias_is_seen_by_selection_alone():
    index, weight_NK, *_ = decide(Override(bias_NE=[0.0, 0.0, 0.0, 0.5]))
    assert index == [[3, 1], [0, 3], [3, 1]]
    torch.testing.assert_close(weight_NK, torch.tensor([[0.2, 0.4], [0.7, 0.05], [0.25, 0.3]]))


def test_a_bias_of_each_item_and_of_some_items():
    bias_NE = torch.zeros(3, E)
    bias_NE[1, 3] = bias_NE[2, 3] = 1.0
    assert decide(Override(bias_NE=bias_NE))[0] == [[1, 2], [3, 0], [3, 1]]
    assert decide(Override(bias_NE=bias_NE, only_N=[True, True, False]))[0] == [[1, 2], [3, 0], [1, 0]]


def test_what_is_added_to_logits_changes_choice_and_weights_and_has_a_gradient():
    shift_E = torch.tensor([0.0, 0.0, 0.0, 0.25], requires_grad=True)
    index, weight_NK, *_ = decide(Override(logit_NE=shift_E))
    assert index == [[3, 1], [0, 3], [3, 1]]
    torch.testing.assert_close(weight_NK, torch.tensor([[0.45, 0.4], [0.7, 0.3], [0.5, 0.3]]))
    weight_NK.sum().backward()
    assert shift_E.grad.tolist() == [1.0, 2.0, 0.0, 3.0]  # who was chosen, and how often


def test_what_is_added_to_logits_of_some_items():
    shift_NE = torch.tensor([[0.0, 0.0, 0.0, 0.25]]).repeat(3, 1)
    index, weight_NK, *_ = decide(Override(logit_NE=shift_NE, only_N=[False, True, False]))
    assert index == [[1, 2], [0, 3], [1, 0]]
    torch.testing.assert_close(weight_NK, torch.tensor([[0.4, 0.3], [0.7, 0.3], [0.3, 0.25]]))


def test_logits_are_shifted_before_they_become_scores_and_zeros_change_no_bit():
    made = Router.Config(select=TopK.Config(top_k=2, normalize="sum"), balance=()).build(E, E)
    x_ND, shift_E = torch.randn(5, E), torch.randn(E)
    shifted = made(x_ND, RoutingContext(routing=[Always(Override(logit_NE=shift_E))]))
    torch.testing.assert_close(shifted.score_NE, (made.score.project(x_ND, RoutingContext()) + shift_E).softmax(-1))
    plain, zero = (made(x_ND, RoutingContext(routing=said)) for said in ([], [Always(Override(logit_NE=[0.0] * E))]))
    assert torch.equal(plain.score_NE, zero.score_NE)
    assert torch.equal(plain.weight_NK, zero.weight_NK)


def test_closed_destinations_are_not_selected_and_scores_stay():
    index, weight_NK, routing, _ = decide(Override(open_NE=[True, False, True, True]))
    assert index == [[2, 3], [0, 2], [0, 3]]
    torch.testing.assert_close(weight_NK, torch.tensor([[0.3, 0.2], [0.7, 0.15], [0.25, 0.25]]))
    assert torch.equal(routing.score_NE, torch.tensor(SCORES))


def test_an_item_with_too_few_open_destinations_has_unused_choices():
    open_NE = torch.tensor([[False] * 4, [False, False, True, False], [True] * 4])
    index, weight_NK, *_ = decide(Override(open_NE=open_NE))
    assert index == [[UNUSED, UNUSED], [2, UNUSED], [1, 0]]
    torch.testing.assert_close(weight_NK, torch.tensor([[0.0, 0.0], [0.15, 0.0], [0.3, 0.25]]))
    assert decide(Override(open_NE=open_NE, only_N=[False, True, False]))[0] == [[1, 2], [2, UNUSED], [1, 0]]


def test_biases_add_up_and_what_any_override_closes_is_closed():
    half = Override(bias_NE=[0.0, 0.0, 0.0, 0.1])
    assert decide(half)[0] == [[1, 2], [0, 2], [3, 1]]
    assert decide(half, half, half)[0] == [[3, 1], [0, 3], [3, 1]]
    first, second = Override(open_NE=[False, True, True, True]), Override(open_NE=[True, True, False, True])
    assert decide(first, second)[0] == [[1, 3], [1, 3], [1, 3]]


def test_forced_with_weights():
    index, weight_NK, routing, _ = decide(Override(index_NK=[3, 0], weight_NK=[0.5, 2.0]))
    assert index == [[3, 0]] * 3
    assert weight_NK.tolist() == [[0.5, 2.0]] * 3
    assert routing.score_NE.tolist() == [[2.0, 0.0, 0.0, 0.5]] * 3


@pytest.mark.parametrize("normalize", ["none", "sum", "softmax"])
def test_forced_with_the_routers_own_weights_and_their_gradient(normalize):
    x_ND = torch.tensor(SCORES, requires_grad=True)
    made, index_NK = router(normalize=normalize), torch.tensor([[3, 0], [1, UNUSED], [2, 1]])
    weight_NK = made(x_ND, RoutingContext(routing=[Always(Override(index_NK=index_NK))])).weight_NK
    by_hand = {
        "none": [[0.2, 0.1], [0.1, 0.0], [0.2, 0.3]],
        "sum": [[2 / 3, 1 / 3], [1.0, 0.0], [0.4, 0.6]],
        "softmax": [
            [1 / (1 + 2.718281828 ** (-0.1)), 1 / (1 + 2.718281828**0.1)],
            [1.0, 0.0],
            [1 / (1 + 2.718281828**0.1), 1 / (1 + 2.718281828 ** (-0.1))],
        ],
    }[normalize]
    torch.testing.assert_close(weight_NK, torch.tensor(by_hand))
    (gradient_ND,) = torch.autograd.grad((weight_NK * torch.tensor([1.0, 3.0])).sum(), x_ND)
    chosen_NE = torch.zeros(3, E, dtype=torch.bool).scatter(1, index_NK.clamp_min(0), index_NK >= 0)
    assert (gradient_ND[~chosen_NE] == 0).all()
    assert (gradient_ND[0, [0, 3]] != 0).all()


def test_forced_for_some_items_with_other_numbers_of_choices():
    index, weight_NK, *_ = decide(Override(index_NK=[0, 1, 3], weight_NK=[1.0, 2.0, 3.0], only_N=[False, True, False]))
    assert index == [[1, 2, UNUSED], [0, 1, 3], [1, 0, UNUSED]]
    torch.testing.assert_close(weight_NK, torch.tensor([[0.4, 0.3, 0.0], [1.0, 2.0, 3.0], [0.3, 0.25, 0.0]]))
    index, weight_NK, *_ = decide(Override(index_NK=[3], only_N=[True, False, False]))
    assert index == [[3, UNUSED], [0, 2], [1, 0]]
    torch.testing.assert_close(weight_NK[0], torch.tensor([0.2, 0.0]))


def test_forced_destinations_are_not_asked_whether_they_are_open():
    assert decide(Override(open_NE=[False] * 4), Override(index_NK=[2, 3]))[0] == [[2, 3]] * 3


def test_the_last_of_several_forced_decisions_holds():
    first, last = Override(index_NK=[0], weight_NK=[1.0]), Override(index_NK=[1, 2], only_N=[True, False, True])
    assert decide(first, last)[0] == [[1, 2], [0, UNUSED], [1, 2]]
    assert decide(last, first)[0] == [[0]] * 3


def test_padding_goes_nowhere_however_it_is_forced():
    mask_N = torch.tensor([True, False, True])
    for override in (
        Override(index_NK=[3, 0], weight_NK=[0.5, 2.0]),
        Override(index_NK=[3, 0]),
        Override(index_NK=[3, 0], weight_NK=[0.5, 2.0], only_N=[True, True, True]),
        Override(bias_NE=[9.0, 0.0, 0.0, 0.0], open_NE=[True] * 4),
    ):
        _, _, routing, _ = decide(override, item_mask_N=mask_N)
        assert routing.index_NK[1].tolist() == [UNUSED, UNUSED]
        assert routing.used_NK[[0, 2]].all()


class Closed(Candidates):
    stage = "pre_softmax"

    def open_NE(self, num_items, context):
        return torch.tensor([True, True, True, False])


@pytest.mark.parametrize("normalize", ["none", "sum", "softmax"])
def test_forced_where_candidates_are_closed_weighs_nothing_of_its_own(normalize):
    made = router(normalize=normalize, destinations=Destinations(candidates=Closed()))
    x_ND = torch.tensor(SCORES, requires_grad=True)
    weight_NK = made(x_ND, RoutingContext(routing=[Always(Override(index_NK=[3, 0]))])).weight_NK
    assert (weight_NK[:, 0] == 0).all()
    assert (weight_NK[:, 1] > 0).all()
    weight_NK = made(x_ND, RoutingContext(routing=[Always(Override(index_NK=[3]))])).weight_NK
    assert (weight_NK == 0).all()
    weight_NK.sum().backward()
    assert torch.isfinite(x_ND.grad).all()


def test_a_router_that_is_told_everything_does_not_run(monkeypatch):
    made = router()
    monkeypatch.setattr(made.score, "project", None)
    whole = Override(index_NK=[3, 0], weight_NK=[0.5, 2.0])
    assert decide(whole, made=made)[0] == [[3, 0]] * 3
    made.score.hands_on = True  # a state for the routers behind it
    with pytest.raises(TypeError):
        decide(whole, made=made)
    whole = Override(index_NK=[3, 0], weight_NK=[0.5, 2.0], of_all_routers=True)
    assert decide(whole, made=made)[0] == [[3, 0]] * 3


BALANCE = (SwitchLoss.Config(alpha=1.0), BiasBalancer.Config())


def loads(context):
    return [load_E.tolist() for _, load_E, _ in context.loads]


@pytest.mark.parametrize(
    "changes",
    [
        {"index_NK": [3, 0]},
        {"index_NK": [3, 0], "weight_NK": [0.5, 2.0]},
        {"bias_NE": [0.0, 0.0, 0.0, 1.0]},
        {"logit_NE": [0.0, 0.0, 0.0, 1.0]},
        {"open_NE": [True] * 4},
    ],
)
def test_balancers_see_nothing_of_overridden_items_unless_asked(changes):
    *_, context = decide(Override(**changes), made=router(balance=BALANCE), training=True)
    assert not context.losses
    assert not context.loads
    *_, routing, context = decide(Override(**changes, learn=True), made=router(balance=BALANCE), training=True)
    assert loads(context) == [routing.load_E().tolist()]
    assert context.losses.keys() == {"load_balancing"}


def test_balancers_see_the_items_that_are_left():
    made = router(balance=BALANCE)
    *_, context = decide(Override(index_NK=[3, 0], only_N=[True, False, False]), made=made, training=True)
    *_, alone = decide(made=made, training=True, item_mask_N=torch.tensor([False, True, True]))
    assert loads(context) == loads(alone) == [[2, 1, 1, 0]]
    assert torch.equal(context.mean_losses()["load_balancing"], alone.mean_losses()["load_balancing"])
    masked = torch.tensor([True, False, True])
    *_, context = decide(
        Override(index_NK=[3, 0], only_N=[True, False, False]), made=made, training=True, item_mask_N=masked
    )
    assert loads(context) == [[1, 1, 0, 0]]


def test_balancers_see_no_item_that_any_override_is_for():
    first = Override(index_NK=[3, 0], only_N=[True, False, False])
    second = Override(bias_NE=[0.0] * 4, only_N=[False, True, False])
    asked = Override(bias_NE=[0.0] * 4, only_N=[False, False, True], learn=True)
    *_, context = decide(first, second, asked, made=router(balance=BALANCE), training=True)
    assert loads(context) == [[1, 1, 0, 0]]


def test_a_bias_comes_beside_the_routers_own():
    made = router(balance=(BiasBalancer.Config(),))
    made.balance[0].expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.3]))
    assert decide(made=made)[0] == [[3, 1], [0, 3], [3, 1]]
    assert decide(Override(bias_NE=[0.0, 0.0, 0.5, 0.0]), made=made)[0] == [[2, 3], [0, 2], [2, 3]]


def test_visits_count_in_a_pass_and_again_where_it_is_repeated():
    said, made, x_ND = Always(None), router(), torch.tensor(SCORES)
    context = RoutingContext(routing=[said])
    carry = dict(context.carry)
    for _ in range(2):
        made(x_ND, context)
    made(x_ND, context.fork(carry))  # a recomputation begins with what was carried to it
    made(x_ND, RoutingContext(routing=[said]))
    assert said.visits == [0, 1, 0, 0]


@given(st.data())
def test_closing_and_forcing_keep_their_word_for_any_items(data):
    num, top_k = data.draw(st.integers(0, 5)), data.draw(st.integers(1, E))
    bools = st.lists(st.booleans(), min_size=E, max_size=E)
    open_NE = torch.tensor(data.draw(st.lists(bools, min_size=num, max_size=num)), dtype=torch.bool).view(num, E)
    only_N = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num, max_size=num)), dtype=torch.bool)
    forced_N = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num, max_size=num)), dtype=torch.bool)
    index_K = data.draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=E, unique=True))
    x_NE = torch.rand(num, E)
    made = router(top_k)
    plain = made(x_NE, RoutingContext())
    sources = [Always(Override(open_NE=open_NE, only_N=only_N)), Always(Override(index_NK=index_K, only_N=forced_N))]
    routing = made(x_NE, RoutingContext(routing=sources))
    check_routing(routing)
    for item in range(num):
        used = routing.index_NK[item][routing.used_NK[item]].tolist()
        if forced_N[item]:
            assert used == index_K
        elif only_N[item]:
            best = sorted((e for e in range(E) if open_NE[item, e]), key=lambda e: -x_NE[item, e])
            assert used == best[:top_k]
        else:
            assert used == plain.index_NK[item].tolist()
        assert torch.equal(routing.weight_NK[item][routing.used_NK[item]], x_NE[item][used])


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.routers = nn.ModuleList(router(layer=2 * n) for n in range(2))

    @property
    def routing_order(self):
        first, last = self.routers
        return first, last, last

    def forward(self, x_ND, context):
        return [made(x_ND, context).index_NK[0].tolist() for made in self.routing_order]


def test_layers_by_number_and_by_name_and_nothing_stays_behind():
    model, x_ND, plain, forced = Tower(), torch.tensor(SCORES), [1, 2], [3, 0]
    override = Override(index_NK=forced)
    for layers, expected in (
        ({0: override}, [forced, plain, plain]),
        ({"routers.0": override}, [forced, plain, plain]),
        ({"routers.1": override}, [plain, forced, forced]),
        ({"routers.1.pass1": override}, [plain, plain, forced]),
        ({0: override, 1: override}, [forced, forced, plain]),
        (LayerOverrides(model, {2: override}), [plain, plain, forced]),
    ):
        with override_routing(model, layers):
            assert model(x_ND, RoutingContext()) == model(x_ND, context=RoutingContext()) == expected
        assert model(x_ND, RoutingContext()) == [plain] * 3
        assert not any(module._forward_pre_hooks for module in model.modules())
    with (
        override_routing(model, {0: Override(open_NE=[True, False, True, True])}),
        override_routing(model, {0: Override(open_NE=[True, True, False, True])}),
    ):
        assert model(x_ND, RoutingContext())[0] == [3, 0]


def test_a_block_in_which_no_router_was_called_says_so():
    model = Tower()
    with (
        pytest.warns(UserWarning, match="none of the 2 routers of this Tower was called") as told,
        override_routing(model, {}),
    ):
        pass
    assert told[0].filename == __file__
    with pytest.raises(ZeroDivisionError), override_routing(model, {}):
        raise ZeroDivisionError


def test_messages():
    for values, message in (
        ({}, "an override changes nothing; give it index_NK, bias_NE, open_NE or logit_NE"),
        ({"index_NK": [0.5]}, "index_NK is torch.float32; destinations are int64"),
        ({"index_NK": [[0, 1], [2, 2]]}, "index_NK names destination 2 twice for one item"),
        ({"index_NK": [-2]}, "index_NK has -2; destinations are 0 and up"),
        ({"index_NK": torch.zeros(3, 0, dtype=torch.int64)}, "index_NK has no choices"),
        ({"index_NK": 3}, r"index_NK has shape \[\]; it must have 1 or 2 dimensions"),
        ({"index_NK": [1], "weight_NK": [1.0, 2.0]}, r"weight_NK has shape \[2\], but index_NK \[1\]"),
        ({"open_NE": [True], "weight_NK": [1.0]}, "there is no index_NK"),
        ({"index_NK": [-1], "weight_NK": [1.0]}, "has a weight at a choice whose index_NK is -1"),
        ({"index_NK": [1], "weight_NK": [float("nan")]}, "weight_NK has a number that is not finite"),
        ({"bias_NE": [1, 2]}, "bias_NE is torch.int64; it must be finite floats"),
        ({"bias_NE": [0.0, -float("inf")]}, r"open_NE closes destinations"),
        ({"logit_NE": [0.0, float("nan")]}, "logit_NE has a number that is not finite"),
        ({"open_NE": [1, 0]}, "open_NE is torch.int64; it must be bool"),
        ({"open_NE": [True], "only_N": [[True]]}, r"only_N has shape \[1, 1\]; it must have 1 dimension"),
    ):
        with pytest.raises(ConfigError, match=message):
            Override(**values)
    for override, message in (
        (Override(index_NK=[4]), "index_NK names destination 4 of the router of layer 0; it has 0 to 3"),
        (
            Override(index_NK=[[1], [2]]),
            r"index_NK has shape \[2, 1\]; the router of layer 0 routes 3 items to 4 .* must be \[3, K\]",
        ),
        (Override(bias_NE=[1.0]), r"bias_NE has shape \[1\].* must be \[4\]"),
        (Override(logit_NE=[1.0]), r"logit_NE has shape \[1\].* must be \[4\]"),
        (Override(open_NE=[[True] * 4]), r"open_NE has shape \[1, 4\].* must be \[3, 4\]"),
        (Override(index_NK=[1], only_N=[True]), r"only_N has shape \[1\].* must be \[3\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            decide(override)
    with pytest.raises(ConfigError, match=r"no routed layer 7; it has 0 \(routers.0\), 1 \(routers.1.pass0\), 2 "):
        LayerOverrides(Tower(), {7: Override(index_NK=[1])})
    with (
        pytest.raises(ConfigError, match="Linear has no Router, so there is no decision to override"),
        override_routing(nn.Linear(2, 2), {}),
    ):
        pass


class Routers(nn.Module):
    """Routers one after the other."""

    def __init__(self, count=3):
        super().__init__()
        self.parts = nn.ModuleList([router(top_k=1) for _ in range(count)])

    def forward(self, context):
        return [part(torch.tensor(SCORES), context).index_NK[0].item() for part in self.parts]


@pytest.mark.parametrize("is_whole_inside", [False, True])
def test_the_inner_block_holds_whichever_of_them_a_pass_reaches_first(is_whole_inside):
    model = Routers()
    whole, part = (model, ["parts.0", "parts.1", "parts.2"]), (model.parts[1], [""])

    def always(names, index):
        return {name or 0: Override(index_NK=[index], weight_NK=[1.0]) for name in names}

    outer, inner = (part, whole) if is_whole_inside else (whole, part)
    with override_routing(outer[0], always(outer[1], 2)), override_routing(inner[0], always(inner[1], 3)):
        found = model(RoutingContext())
    assert found == ([3, 3, 3] if is_whole_inside else [2, 3, 2])
    # And again, in the other order, after both have been left.
    with override_routing(inner[0], always(inner[1], 3)), override_routing(outer[0], always(outer[1], 2)):
        found = model(RoutingContext())
    assert found == ([3, 2, 3] if is_whole_inside else [2, 2, 2])

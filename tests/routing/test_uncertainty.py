"""Entropies of scores: the spec's golden values, their bounds and limits, and the losses that are made of them."""
# Shapes: N items, E destinations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import HybridEntropy, LinearScore, Router, RoutingContext, SoftLoss, TopK, UncertaintyLoss
from anabranch.routing.uncertainty import shares, uncertainty

UNIFORM, ONE_HOT = [1 / 6] * 6, [1.0, 0, 0, 0, 0, 0]
GOLDEN = [
    (UNIFORM, 1.0),
    (ONE_HOT, 0.0),
    ([0.7, 0.2, 0.1, 0, 0, 0], 0.456144),
    ([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], 0.829505),
    ([0.3, 0.2, 0.15, 0.15, 0.1, 0.1], 0.955472),
]
KINDS = ["tsallis", "renyi", "shannon"]


def distributions(most=9):
    """Rows that sum to 1, with zeros among them."""
    numbers = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=most).filter(lambda row: sum(row) > 0.1)
    return numbers.map(lambda row: torch.tensor([row]) / sum(row))


def naive(row, q):
    """Tsallis' formula as it is printed, in double precision."""
    most = (1 - len(row) ** (1 - q)) / (q - 1)
    return (1 - sum(p**q for p in row if p > 0)) / (q - 1) / most


@pytest.mark.parametrize(("row", "expected"), GOLDEN)
def test_golden_values(row, expected):
    for dtype in (torch.float32, torch.float64):
        assert float(uncertainty(torch.tensor([row], dtype=dtype))) == pytest.approx(expected, abs=2e-6)


@given(distributions(), st.sampled_from([0.3, 0.9, 1.1, 1.5, 2.0]))
def test_it_is_the_printed_formula(share_NE, q):
    if share_NE.shape[1] == 1:
        return
    expected = naive(share_NE[0].double().tolist(), q)
    assert float(uncertainty(share_NE.double(), "tsallis", q)) == pytest.approx(min(max(expected, 0), 1), abs=1e-6)


@given(distributions(), st.sampled_from(KINDS), st.floats(0.05, 2), st.randoms())
def test_between_0_and_1_whatever_the_order(share_NE, kind, q, random):
    found = float(uncertainty(share_NE, kind, q))
    assert 0 <= found <= 1
    order = list(range(share_NE.shape[1]))
    random.shuffle(order)
    assert float(uncertainty(share_NE[:, order], kind, q)) == pytest.approx(found, abs=2e-6)


@given(distributions(), st.sampled_from(KINDS), st.sampled_from([0.5, 1.1, 2.0]), st.data())
def test_mass_that_moves_from_a_lesser_to_a_greater_entry_lessens_it(share_NE, kind, q, data):
    share_NE = share_NE.double()
    if share_NE.shape[1] == 1:
        return
    pair = data.draw(st.permutations(range(share_NE.shape[1])))[:2]
    low, high = sorted(pair, key=lambda e: float(share_NE[0, e]))
    amount = 0.5 * float(share_NE[0, low])
    moved = share_NE.clone()
    moved[0, low] -= amount
    moved[0, high] += amount
    if amount > 1e-3:
        assert float(uncertainty(moved, kind, q)) < float(uncertainty(share_NE, kind, q))


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("gap", [1e-4, -1e-4, 1e-7, 0.0])
def test_at_1_it_is_shannons(kind, gap):
    for row, _ in GOLDEN:
        share_NE = torch.tensor([row])
        found, wanted = (float(uncertainty(share_NE, *given)) for given in ((kind, 1 + gap), ("shannon", 1.5)))
        assert found == pytest.approx(wanted, abs=1e-4)
    nats = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1)) / math.log(6)
    assert float(uncertainty(torch.tensor([GOLDEN[2][0]]), "shannon")) == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_leads_out_of_it_nowhere(kind):
    """An even choice is 1 and a certain one 0, of any number of destinations; one of them would be 1 + 1e-7 in fp32 as it is summed."""
    for number in range(2, 80):
        even_NE = torch.ones(3, number).softmax(-1)
        for q in (0.5, 1.1, 2.0):
            found = uncertainty(torch.cat([even_NE, torch.eye(number)]), kind, q)
            assert float(found.min()) >= 0
            assert float(found.max()) <= 1
            assert float(found[0]) == pytest.approx(1, abs=1e-5)


def test_renyi_by_hand():
    share_NE = torch.tensor([[0.5, 0.25, 0.25]])
    expected = -math.log(0.25 + 0.125) / math.log(3)
    assert float(uncertainty(share_NE, "renyi", 2.0)) == pytest.approx(expected, abs=1e-6)


def test_one_destination_leaves_nothing_to_be_unsure_of():
    share_NE = torch.tensor([[1.0]], requires_grad=True)
    for kind in KINDS:
        found = uncertainty(share_NE, kind)
        assert float(found.detach()) == 0
        assert torch.isfinite(torch.autograd.grad(found.sum(), share_NE)[0]).all()
    open_NE = torch.tensor([[True, False], [True, True], [False, False]])
    made = shares(torch.tensor([[0.6, 0.4]] * 3), open_NE)
    assert uncertainty(made, num_open=open_NE.sum(-1)).tolist() == pytest.approx([0, uncertainty(made)[1].item(), 0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    logit_NE = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: uncertainty(z.softmax(-1), kind, 1.1), logit_NE)


def test_gradients_are_finite_where_scores_are_none():
    logit_NE = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    for kind in KINDS:
        for q in (0.2, 1.0, 2.0):
            (gradient,) = torch.autograd.grad(uncertainty(logit_NE.softmax(-1), kind, q).sum(), logit_NE)
            assert torch.isfinite(gradient).all()


# Losses


def routed(losses, select=None, num_items=12, seed=0, mask_N=None, weight=None, double=True):
    """(router, context after it routed, its routing)."""
    router = Router.Config(
        score=LinearScore.Config(init="kaiming_uniform"), select=select or HybridEntropy.Config(), balance=losses
    ).build(4, 6, generator=torch.Generator().manual_seed(seed))
    if weight is not None:
        router.load_state_dict(weight)
    router = router.double() if double else router
    x_ND = 3 * torch.randn(num_items, 4, generator=torch.Generator().manual_seed(1)).to(router.score.weight.dtype)
    context = RoutingContext(training=True, item_mask_N=mask_N)
    return router, context, router(x_ND, context)


def test_losses_by_hand():
    mask_N = torch.arange(12) % 3 > 0
    losses = (SoftLoss.Config(alpha=0.5, scope="layer"), UncertaintyLoss.Config(coefficient=0.25))
    _, context, routing = routed(losses, mask_N=mask_N)
    score_NE = routing.score_NE[mask_N]
    weight_NE = torch.zeros(12, 6, dtype=torch.float64)
    for n, (index, weight) in enumerate(zip(routing.index_NK.tolist(), routing.weight_NK.tolist(), strict=True)):
        for e, w in zip(index, weight, strict=True):
            weight_NE[n, e] += w if e >= 0 else 0
    expected = 0.5 * 6 * (weight_NE[mask_N].mean(0) * score_NE.mean(0)).sum()
    found = context.mean_losses()
    torch.testing.assert_close(found["soft_balancing"], expected)
    torch.testing.assert_close(found["uncertainty"], 0.25 * uncertainty(score_NE).mean())
    metrics = context.mean_metrics()
    assert float(metrics["active_experts"]) == pytest.approx(float((routing.index_NK >= 0).sum() / mask_N.sum()))
    assert float(metrics["dropped_mass"]) == pytest.approx(float(1 - weight_NE[mask_N].sum(1).mean()))
    assert float(metrics["routing_entropy"]) == pytest.approx(float(uncertainty(score_NE).mean().detach()))


def test_padding_may_hold_anything():
    mask_N = torch.arange(12) < 9
    losses = (SoftLoss.Config(), UncertaintyLoss.Config())
    router, context, _ = routed(losses, mask_N=mask_N)
    found = context.mean_losses()
    x_ND = 3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()
    context = RoutingContext(training=True)
    router(x_ND[:9], context)
    for name, loss in context.mean_losses().items():
        torch.testing.assert_close(found[name], loss)


def test_the_items_of_all_layers_are_one_set():
    """One loss of layers that have the same, equal to that of their items together; other numbers of destinations have another."""
    routers = [routed((SoftLoss.Config(alpha=2.0),), seed=seed)[0] for seed in (0, 1)]
    x_ND = torch.randn(10, 4, generator=torch.Generator().manual_seed(2)).double()
    context = RoutingContext(training=True)
    routings = [router(x_ND, context) for router in routers]
    weight_NE = torch.cat(
        [
            torch.zeros(10, 6, dtype=torch.float64).scatter_add(1, each.index_NK.clamp_min(0), each.weight_NK)
            for each in routings
        ]
    )
    score_NE = torch.cat([each.score_NE for each in routings])
    expected = 2.0 * 6 * (weight_NE.mean(0) * score_NE.mean(0)).sum()
    torch.testing.assert_close(context.mean_losses()["soft_balancing"], expected)
    apart = sum(
        2.0 * 6 * (w.mean(0) * p.mean(0)).sum() for w, p in zip(weight_NE.chunk(2), score_NE.chunk(2), strict=True)
    )
    assert float(expected.detach()) != pytest.approx(float(apart.detach()) / 2, rel=1e-6)


def test_an_even_choice_of_all_costs_alpha():
    router, context, _ = routed((SoftLoss.Config(alpha=0.3),), TopK.Config(top_k=6))
    with torch.no_grad():
        router.score.weight.zero_()
    context = RoutingContext(training=True)
    router(torch.randn(5, 4).double(), context)
    assert float(context.mean_losses()["soft_balancing"].detach()) == pytest.approx(0.3)


def test_micro_batches_by_their_tokens_are_the_batch():
    """The entropy term is a mean over tokens: that of parts, each by its number of real tokens, is that of all."""
    router, _, _ = routed((UncertaintyLoss.Config(coefficient=1.0),))
    x_ND = torch.randn(10, 4, generator=torch.Generator().manual_seed(3)).double()
    mask_N = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 1]).bool()

    def gradient(part, share):
        context = RoutingContext(training=True, item_mask_N=mask_N[part])
        router(x_ND[part], context)
        loss = context.mean_losses()["uncertainty"]
        return share * torch.autograd.grad(loss, router.score.weight)[0]

    whole = gradient(slice(0, 10), 1.0)
    parts = [(slice(0, 4), 3 / 6), (slice(4, 10), 3 / 6)]
    torch.testing.assert_close(sum(gradient(*part) for part in parts), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UncertaintyLoss.Config(coefficient=-1), "coefficient"),
        (lambda: UncertaintyLoss.Config(entropy_index=0), "entropy_index"),
        (lambda: UncertaintyLoss.Config(entropy_index=2.1), "entropy_index"),
        (lambda: UncertaintyLoss.Config(entropy="gini"), "entropy"),
        (lambda: SoftLoss.Config(alpha=-1e-3), "alpha"),
    ],
)
def test_configs_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_scores_that_are_not_finite_are_told_with_the_layer():
    from anabranch.errors import NotFiniteError

    router = Router.Config(select=HybridEntropy.Config(), check_finite=True).build(4, 6)
    router.matrix = "blocks.3.feed_forward.up"
    with pytest.raises(NotFiniteError, match=r"layer blocks\.3\.feed_forward\.up has NaN or infinite logits"):
        router(torch.full((2, 4), torch.inf), RoutingContext())

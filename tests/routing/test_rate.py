import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import (
    HeadActivation,
    Positive,
    RateBalance,
    ReluScore,
    ReMoEController,
    Router,
    RoutingContext,
    SmoothProximity,
    sync_loads,
)
from anabranch.routing.balance import Observation, discard_loads
from anabranch.train.hooks import StepHooks
from ranks import run_ranks

CONFIG = Router.Config(score=ReluScore.Config(), select=Positive.Config(), balance=(RateBalance.Config(),))


def observed(logit_NE, mask_N=None):
    """What a ReLU router of these logits shows."""
    routing = Positive.Config().build(logit_NE.shape[1])(logit_NE.relu())
    if mask_N is not None:
        routing = routing.drop(~mask_N.unsqueeze(-1))
    return Observation(logit_NE, routing)


def losses(balance, logit_NE, mask_N=None):
    context = RoutingContext(training=True, item_mask_N=mask_N)
    balance(observed(logit_NE, mask_N), context)
    context.commit()
    return context.mean_losses()


def logits(num_items=6, num_destinations=3, seed=0):
    return torch.randn(num_items, num_destinations, generator=torch.Generator().manual_seed(seed))


# The coefficient


@given(st.floats(0, 1), st.floats(0.05, 0.95), st.sampled_from(["smooth", "remoe"]))
def test_beta_grows_where_more_is_on_than_is_wanted_and_stays_at_equality(rate, target, kind):
    control = SmoothProximity(0.8, 1e-4, target) if kind == "smooth" else ReMoEController(1.2, 1e-4, target)
    before = float(control.beta)
    control.update(rate)
    difference = float(torch.tensor(rate) - target)
    if difference == 0:
        assert float(control.beta) == before
    elif abs(difference) > 1e-4:
        assert (float(control.beta) > before) == (difference > 0)
    control = SmoothProximity(0.8, 1e-4, 0.5)
    control.update(0.5)
    assert float(control.beta) == float(torch.tensor(1e-4))


def test_beta_moves_as_the_papers_say():
    control = SmoothProximity(k=0.8, beta0=1e-8, target=0.5)
    control.update(0.75)
    # T - R = 0.5 - 0.25.
    assert float(control.beta) == pytest.approx(1e-8 * math.exp(0.8 * 0.25), rel=1e-6)
    control = ReMoEController(mult=1.2, beta0=1e-8, target=0.5)
    for rate, factor in ((0.9, 1.2), (0.6, 1.44), (0.1, 1.2), (0.5, 1.2)):
        control.update(rate)
        assert float(control.beta) == pytest.approx(1e-8 * factor, rel=1e-6)


@pytest.mark.parametrize("kind", [SmoothProximity, ReMoEController])
def test_beta_stays_within_its_limits(kind):
    low, high = kind(beta0=1e-15), kind(beta0=10.0)
    for _ in range(5):
        low.update(0.0)
        high.update(1.0)
    assert float(low.beta) == pytest.approx(1e-15)
    assert float(high.beta) == 10.0


def test_controllers_do_not_move_in_evaluation_and_are_saved():
    control = SmoothProximity(beta0=0.1).eval()
    control.update(1.0)
    assert float(control.beta) == pytest.approx(0.1)
    control.train().update(1.0)
    other = SmoothProximity()
    other.load_state_dict(control.state_dict())
    assert torch.equal(other.beta, control.beta)
    # Half precision could not hold a step of half a percent.
    assert control.bfloat16().beta.dtype == torch.float32
    assert control.double().beta.dtype == torch.float32


def test_the_pressure_is_that_of_the_code_or_that_of_the_paper():
    logit_NE = torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True)
    share_E = torch.tensor([1.0, 0.5])
    code = SmoothProximity(beta0=0.5).loss(logit_NE, logit_NE.relu(), share_E)
    # 0.5 (1 * mean(1, 3) + 0.5 * mean(0, 4))
    assert code.item() == pytest.approx(0.5 * (2.0 + 0.5 * 2.0))
    code.backward()
    assert logit_NE.grad.tolist() == [[0.25, 0.0], [0.25, 0.125]]
    paper = SmoothProximity(beta0=0.5, form="logits").loss(logit_NE, logit_NE.relu(), share_E)
    assert paper.item() == pytest.approx(0.5 * (1 + 2 + 3 + 4) / 4)


# What draws up


@given(st.floats(0, 1), st.floats(0.05, 0.95))
def test_the_floor_is_zero_where_as_many_are_on_as_wanted(rate, target):
    found = HeadActivation(0.5, 0.1, target).loss(torch.zeros(4, 3), torch.tensor(rate))
    gap = target - float(torch.tensor(rate))
    if gap > 1e-6:
        assert found.item() == pytest.approx(0.5 * math.expm1(2 * gap), rel=1e-3, abs=1e-6)
    elif gap < 0:
        assert found.item() == 0


@pytest.mark.parametrize("off", [-0.5, -3.0, -20.0, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_destinations_have_a_gradient_that_raises_them_and_had_none_as_released(off, dtype):
    logit_NE = torch.full((5, 4), off, dtype=dtype, requires_grad=True)
    found = HeadActivation(target=0.5).loss(logit_NE, torch.tensor(0.0))
    assert found.item() == pytest.approx(0.5 * math.expm1(1.0))
    found.backward()
    # w d/dR exp(2 (R - T)) of each of the 20 pairs, times the least slope: far above what Adam's epsilon swallows.
    least = 0.5 * 2 * math.exp(1.0) * 0.02 / 0.1 / 20
    assert (logit_NE.grad <= -0.99 * least).all()
    released = HeadActivation(target=0.5, gradient="none").loss(logit_NE, torch.tensor(0.0))
    assert released.item() == pytest.approx(0.5 * math.expm1(1.0))
    assert not released.requires_grad


def test_the_value_is_of_the_hard_rate_and_the_gradient_of_the_soft_one():
    logit_NE = logits().requires_grad_()
    control = HeadActivation(0.5, 0.1, 0.9)
    rate = (logit_NE > 0).float().mean()
    found = control.loss(logit_NE, rate)
    assert found.item() == pytest.approx(0.5 * math.expm1(2 * (0.9 - rate.item())))
    (got,) = torch.autograd.grad(found, logit_NE)
    soft = (logit_NE / 0.1).sigmoid().sum()
    (sigmoid,) = torch.autograd.grad(soft, logit_NE)
    # Below 0 it is never flatter than this.
    assert ((logit_NE < 0) & (sigmoid < 0.2)).any()
    steepness = torch.where(logit_NE < 0, sigmoid.clamp_min(0.02 / 0.1), sigmoid) / logit_NE.numel()
    torch.testing.assert_close(got, -0.5 * 2 * math.exp(2 * (0.9 - rate.item())) * steepness)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12), st.floats(0.01, 5), st.floats(0, 0.9))
def test_whatever_is_off_is_raised_and_the_nearer_not_less_than_the_further(values, tau, share):
    logit_NE = torch.tensor([sorted(values)], requires_grad=True)
    target = share + 0.05
    found = HeadActivation(0.5, tau, target).loss(logit_NE, torch.tensor(share))
    assert (
        found.item() == HeadActivation(0.5, target=target, gradient="none").loss(logit_NE, torch.tensor(share)).item()
    )
    found.backward()
    # The furthest first.
    off = logit_NE.grad[0][logit_NE[0] < 0].tolist()
    assert all(slope < 0 for slope in off)
    assert off == sorted(off, reverse=True)


def test_closed_destinations_of_minus_infinity_and_padding_are_left_out():
    logit_NE = torch.tensor([[-3.0, -torch.inf], [-3.0, -torch.inf], [-2.0, -torch.inf]], requires_grad=True)
    open_E, mask_N = torch.tensor([True, False]), torch.tensor([True, True, False])
    found = HeadActivation().loss(logit_NE, torch.tensor(0.0), mask_N, open_E)
    found.backward()
    assert found.item() == pytest.approx(0.5 * math.expm1(1.0))
    assert (logit_NE.grad[:2, 0] < 0).all()
    assert logit_NE.grad[2, 0] == 0
    assert (logit_NE.grad[:, 1] == 0).all()


def test_the_weight_grows_while_all_are_dead_and_goes_back():
    control = HeadActivation(w=0.5)
    for expected in (0.6, 0.72):
        control.update(0.0)
        assert float(control.weight) == pytest.approx(expected)
    control.update(0.01)
    assert float(control.weight) == pytest.approx(0.5)
    for _ in range(40):
        control.update(0.0)
    assert float(control.weight) == 10.0


# As the balancer of a router


def test_losses_of_layers_add_up():
    balance = RateBalance.Config(target=0.9, beta0=0.1).build(3)
    one, other = logits(seed=1), logits(seed=2)
    context = RoutingContext(training=True)
    for logit_NE in (one, other):
        balance(observed(logit_NE), context)
    together = context.mean_losses()
    apart = [losses(balance, logit_NE) for logit_NE in (one, other)]
    assert together.keys() == {"activation_pressure", "activation_floor"}
    for name, total in together.items():
        torch.testing.assert_close(total, apart[0][name] + apart[1][name])


def test_it_is_the_naive_loss_of_the_equations():
    balance = RateBalance.Config(target=0.9, beta0=0.25, w=0.5).build(3)
    logit_NE = logits(8, 3, seed=4)
    found = losses(balance, logit_NE)
    pressure = 0.0
    for column in logit_NE.T:
        on = [max(value, 0.0) for value in column.tolist()]
        pressure += sum(value > 0 for value in on) / 8 * sum(on) / 8
    rate = sum(value > 0 for value in logit_NE.flatten().tolist()) / 24
    assert found["activation_pressure"].item() == pytest.approx(0.25 * pressure)
    assert found["activation_floor"].item() == pytest.approx(0.5 * (math.exp(2 * (0.9 - rate)) - 1))


def test_padding_counts_for_nothing():
    balance, alone = (RateBalance.Config(target=0.7, beta0=0.3).build(3) for _ in range(2))
    logit_NE, mask_N = logits(), torch.tensor([True, False, True, True, False, True])
    padded = losses(balance, logit_NE, mask_N)
    for name, loss in losses(alone, logit_NE[mask_N]).items():
        torch.testing.assert_close(padded[name], loss)
    assert float(balance.rate()) == pytest.approx(float(alone.rate()))


def step(balance, parts):
    for logit_NE in parts:
        losses(balance, logit_NE)
    StepHooks(balance, 1).run_after(1)


def test_micro_batches_move_the_controllers_as_one_batch_does():
    whole, parts = (RateBalance.Config(beta0=0.1, pressure="smooth").build(3) for _ in range(2))
    logit_NE = logits(12, 3, seed=3)
    step(whole, [logit_NE])
    # Of different sizes, and each alone on another side of the target.
    step(parts, [logit_NE[:2], logit_NE[2:]])
    assert torch.equal(whole.pressure.beta, parts.pressure.beta)
    rate = (logit_NE > 0).double().mean().item()
    assert float(whole.pressure.beta) == pytest.approx(0.1 * math.exp(0.8 * (rate - 0.5)), rel=1e-5)
    assert float(whole.num_pairs) == 0


def test_a_step_without_items_or_whose_update_was_skipped_moves_nothing():
    balance = RateBalance.Config(beta0=0.1).build(3)
    StepHooks(balance, 1).run_after(1)
    losses(balance, logits())
    discard_loads(balance)
    StepHooks(balance, 1).run_after(2)
    assert float(balance.pressure.beta) == pytest.approx(0.1)
    losses(balance, torch.ones(4, 3))
    balance.eval()
    StepHooks(balance, 1).run_after(3)
    assert float(balance.pressure.beta) == pytest.approx(0.1)


RANKS = """
import torch
from anabranch.routing import Positive, RateBalance, RoutingContext, sync_loads
from anabranch.routing.balance import Observation
balance = RateBalance.Config(beta0=0.1).build(2)
# Of 2 and of 6 items: 1 and 1/6 of the pairs are on, 6 of 16 in all.
logit_NE = torch.ones(2, 2) if rank == 0 else -torch.ones(6, 2)
if rank:
    logit_NE[0] = 1.0
context = RoutingContext(training=True)
balance(Observation(logit_NE, Positive.Config().build(2)(logit_NE.relu())), context)
context.commit()
sync_loads(balance)
print("rate", float(balance.rate()))
balance.on_step(1, 1.0)
print("beta", float(balance.pressure.beta))
"""


def test_ranks_move_together_by_the_rate_over_all(tmp_path):
    found = run_ranks(RANKS, 2)
    expected = 0.1 * math.exp(0.8 * (6 / 16 - 0.5))
    for told in found:
        words = told.split()
        assert float(words[1]) == 6 / 16
        assert float(words[3]) == pytest.approx(expected, rel=1e-5)
    assert found[0] == found[1]


@pytest.mark.parametrize("start", [-3.0, -20.0])
def test_heads_that_are_far_off_come_back(start):
    bias_E, control = torch.nn.Parameter(torch.full((4,), start)), HeadActivation()
    optimizer = torch.optim.AdamW([bias_E], lr=0.1, weight_decay=0.0)
    for _ in range(300):
        logit_NE = bias_E.expand(8, 4)
        rate = (logit_NE > 0).float().mean()
        optimizer.zero_grad()
        control.loss(logit_NE, rate).backward()
        optimizer.step()
        control.update(rate)
    assert (bias_E > 0).all()


def test_a_router_learns_back_to_its_target_from_a_dead_start_and_as_released_it_does_not():
    x_ND = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    ends = {}
    for floor in ("soft", "released", "none"):
        config = CONFIG.replace(
            score=ReluScore.Config(start=-0.5, init_std=1e-3), balance=(RateBalance.Config(floor=floor),)
        )
        router = config.build(8, 4, generator=torch.Generator().manual_seed(1))
        optimizer, hooks = torch.optim.AdamW(router.parameters(), lr=5e-3), StepHooks(router, 120)
        for number in range(120):
            context = RoutingContext(training=True)
            router(x_ND, context)
            context.commit()
            optimizer.zero_grad()
            sum(context.mean_losses().values()).backward()
            optimizer.step()
            sync_loads(router)
            hooks.run_after(number + 1)
        ends[floor] = float(router(x_ND, RoutingContext()).used_NK.float().mean())
    assert abs(ends["soft"] - 0.5) <= 0.1
    assert ends["released"] == ends["none"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmoothProximity(target=0.0), "target is 0.0; it must be above 0 and below 1"),
        (lambda: SmoothProximity(target=1.0), "target is 1.0; it must be above 0 and below 1"),
        (lambda: SmoothProximity(target=float("nan")), "target is nan"),
        (lambda: SmoothProximity(target="half"), "target is 'half'; it must be a number"),
        (lambda: SmoothProximity(k=0), "k is 0; it must be above 0"),
        (lambda: SmoothProximity(beta0=11.0), "beta0 is 11.0; it must be at least 1e-15 and at most 10"),
        (lambda: SmoothProximity(form="l2"), "form is 'l2'; it must be 'load' or 'logits'"),
        (lambda: ReMoEController(mult=1.0), "mult is 1.0; it must be above 1"),
        (lambda: HeadActivation(w=11.0), "w is 11.0; it must be above 0 and at most 10"),
        (lambda: HeadActivation(tau=0.0), "tau is 0.0; it must be above 0"),
        (lambda: HeadActivation(gradient="hard"), "gradient is 'hard'; it must be 'soft' or 'none'"),
        (lambda: SmoothProximity().update(1.5), "rate is 1.5; it is a share, from 0 to 1"),
        (lambda: RateBalance.Config(target=1.0), "target is 1.0"),
        (lambda: RateBalance.Config(pressure="l1"), "pressure is 'l1'"),
        (lambda: RateBalance.Config(mult=0.5), "mult is 0.5"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

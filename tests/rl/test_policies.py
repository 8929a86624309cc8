"""Distributions of actions against torch's, against what is drawn of them, and what is refused."""

import math

import pytest
import torch
import torch.distributions as td

from anabranch.errors import ConfigError
from anabranch.rl import Actions, Beta, Categorical, Kind, Normal
from anabranch.rl.policies import Categoricals, kind_of

BOX = Actions(0, (-1.0, 0.0), (1.0, 3.0))
ROWS = 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(name, seed=0):
    """Ours and torch's, of the same parameters."""
    parameter_BP = torch.randn(ROWS, 4, generator=generator(seed), dtype=torch.float64)
    if name == "categorical":
        return Categorical(parameter_BP), td.Categorical(logits=parameter_BP)
    first, second = parameter_BP.chunk(2, -1)
    if name == "normal":
        return Normal(first, second), td.Independent(td.Normal(first, second.exp()), 1)
    alpha, beta = 1 + first.exp(), 1 + second.exp()
    return Beta(alpha, beta), td.Independent(td.Beta(alpha, beta), 1)


def drawn(name, theirs):
    action = theirs.sample()
    return (action[:, None].double(), action) if name == "categorical" else (action, action)


@pytest.mark.parametrize("name", ["categorical", "normal", "beta"])
def test_log_probabilities_and_entropies_are_torchs(name):
    torch.manual_seed(1)
    ours, theirs = pair(name)
    mine, action = drawn(name, theirs)
    torch.testing.assert_close(ours.log_prob(mine), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


@pytest.mark.parametrize("name", ["categorical", "normal", "beta"])
def test_divergences_are_torchs(name):
    (ours, theirs), (other, other_theirs) = pair(name, 0), pair(name, 1)
    expected = td.kl_divergence(theirs, other_theirs)
    torch.testing.assert_close(ours.divergence(other), expected)
    torch.testing.assert_close(ours.divergence(ours), torch.zeros_like(expected), atol=1e-12, rtol=0)


def test_beta_by_hand():
    # Beta(2, 1) has the density 2u: log 2 + log 0.25 at 0.25; its mean is 2/3. Uniform has entropy 0 and density 1.
    two, one = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert Beta(two, one).log_prob(torch.tensor([[0.25]])).item() == pytest.approx(math.log(0.5), abs=1e-6)
    assert Beta(two, one).mode().item() == pytest.approx(2 / 3)
    assert Beta(one, one).log_prob(torch.tensor([[0.9]])).item() == pytest.approx(0.0, abs=1e-6)
    assert Beta(one, one).entropy().item() == pytest.approx(0.0, abs=1e-6)


def test_the_ends_of_betas_support_stay_finite():
    log_prob = Beta(torch.tensor([[3.0]] * 2), torch.tensor([[1.5]] * 2)).log_prob(torch.tensor([[0.0], [1.0]]))
    assert torch.isfinite(log_prob).all()


def test_the_scale_of_actions_cancels_in_ratios():
    # A density per unit of the environment's range, 2 x 3 times as wide as (0, 1) squared, is 6 times smaller.
    kind = Kind("beta", BOX)
    parameter_BP = torch.randn(ROWS, 4, generator=generator())
    action_BA = torch.rand(ROWS, 2, generator=generator())
    made = kind.distribution(parameter_BP)
    assert isinstance(made, Beta)
    plain = Beta(made.alpha_BA, made.beta_BA)
    torch.testing.assert_close(made.log_prob(action_BA), plain.log_prob(action_BA) - math.log(6))
    torch.testing.assert_close(made.entropy(), plain.entropy() + math.log(6))
    other = kind.distribution(parameter_BP + 0.1)
    plain_other = Beta(other.alpha_BA, other.beta_BA)
    torch.testing.assert_close(
        other.log_prob(action_BA) - made.log_prob(action_BA),
        plain_other.log_prob(action_BA) - plain.log_prob(action_BA),
    )
    torch.testing.assert_close(made.divergence(other), plain.divergence(plain_other))


def test_betas_parameters_are_at_least_one():
    made = Kind("beta", BOX).distribution(torch.tensor([[-50.0, 0.0, 50.0, -3.0]]))
    assert isinstance(made, Beta)
    assert made.alpha_BA.min() >= 1
    assert made.beta_BA.min() >= 1
    assert made.beta_BA[0, 0] == pytest.approx(51, abs=1e-3)


@pytest.mark.parametrize("name", ["categorical", "normal", "beta"])
def test_what_is_drawn_is_distributed_so(name):
    """20,000 draws of one row: frequencies, or mean and deviation, within 5 standard errors."""
    actions = Actions(4) if name == "categorical" else BOX
    kind, number = Kind(name, actions), 20_000
    parameter_1P = torch.tensor([[0.3, -1.0, 0.8, 0.1]])
    noise = kind.noise(generator(3), number)
    drawn = kind.distribution(parameter_1P.expand(number, -1)).sample(noise)
    row = kind.distribution(parameter_1P)
    if name == "categorical":
        share = torch.bincount(drawn[:, 0].long(), minlength=4) / number
        expected = row.log_prob_BE.exp()[0]
        assert ((share - expected).abs() < 5 * (expected * (1 - expected) / number).sqrt()).all()
        return
    if name == "normal":
        mean, deviation = row.mean_BA[0], row.log_deviation_BA.exp()[0]
    else:
        theirs = td.Beta(row.alpha_BA[0], row.beta_BA[0])
        mean, deviation = theirs.mean, theirs.stddev
        # Not only the first two moments: the share below the mean is that of torch's draws.
        torch.manual_seed(0)
        below = (theirs.sample((100_000,)) < mean).float().mean(0)
        assert ((drawn < mean).float().mean(0) - below).abs().max() < 0.02
    assert ((drawn.mean(0) - mean).abs() < 5 * deviation / number**0.5).all()
    assert ((drawn.std(0) / deviation - 1).abs() < 0.03).all()


def test_gamma_draws_have_the_shape_of_scipys():
    stats = pytest.importorskip("scipy.stats")
    kind = Kind("beta", Actions(0, (0.0,), (1.0,)))
    noise = kind.noise(generator(5), 20_000)
    drawn = Beta(torch.full((20_000, 1), 1.3), torch.full((20_000, 1), 4.0)).sample(noise)
    assert stats.kstest(drawn[:, 0].numpy(), stats.beta(1.3, 4.0).cdf).pvalue > 0.001


def test_the_same_noise_gives_the_same_actions_for_any_part_of_the_rows():
    for name, actions in (("categorical", Actions(4)), ("normal", BOX), ("beta", BOX)):
        kind = Kind(name, actions)
        parameter_BP = torch.randn(ROWS, 4, generator=generator())
        noise = kind.noise(generator(2), ROWS)
        whole = kind.distribution(parameter_BP).sample(noise)
        part = kind.distribution(parameter_BP[2:5]).sample(noise[2:5])
        assert torch.equal(whole[2:5], part)


def test_where_every_try_fails_the_mode_stands():
    noise = torch.zeros(1, 1, 2, 6, 2)
    noise[..., 0] = -100.0
    found = Beta(torch.tensor([[2.0]]), torch.tensor([[3.0]])).sample(noise)
    assert found.item() == pytest.approx((2 - 1 / 3) / (5 - 2 / 3))


def test_actions_as_the_environment_takes_them():
    assert Kind("categorical", Actions(3)).to_environment(torch.tensor([[2.0], [0.0]])).tolist() == [2, 0]
    half = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert Kind("beta", BOX).to_environment(half).tolist() == [[0.0, 1.5], [-1.0, 3.0]]
    # -1 and 1 are the bounds of a normal policy, and beyond them it is clipped.
    wide = torch.tensor([[0.0, 1.0], [-9.0, 9.0]])
    assert Kind("normal", BOX).to_environment(wide).tolist() == [[0.0, 3.0], [-1.0, 3.0]]
    free = Actions(0, (-math.inf,), (2.0,))
    assert Kind("normal", free).to_environment(torch.tensor([[-50.0], [7.0]])).tolist() == [[-50.0], [2.0]]


def test_several_choices_are_one_row_of_independent_ones():
    """2 and 3 choices, as one of 6: log probabilities add up, and so do entropies and divergences."""
    parameter_BP, other_BP = (torch.randn(ROWS, 5, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))

    def joint(logit_BE):
        first, second = logit_BE.split((2, 3), dim=-1)
        return td.Categorical(logits=(first.log_softmax(-1)[:, :, None] + second.log_softmax(-1)[:, None]).flatten(1))

    ours, other = (Categoricals(each, (2, 3)) for each in (parameter_BP, other_BP))
    action_BA = torch.tensor([[row % 2, row % 3] for row in range(ROWS)]).double()
    whole_B = 3 * action_BA[:, 0] + action_BA[:, 1]
    torch.testing.assert_close(ours.log_prob(action_BA), joint(parameter_BP).log_prob(whole_B))
    torch.testing.assert_close(ours.entropy(), joint(parameter_BP).entropy())
    torch.testing.assert_close(ours.divergence(other), td.kl_divergence(joint(parameter_BP), joint(other_BP)))
    best_B = joint(parameter_BP).probs.argmax(-1)
    assert ours.mode().tolist() == [[int(best) // 3, int(best) % 3] for best in best_B]


def test_several_choices_are_drawn_each_by_its_own_noise():
    kind, number = Kind("categorical", Actions(several=(2, 3))), 20_000
    assert (kind.num_parameters, kind.actions.num_numbers) == (5, 2)
    noise = kind.noise(generator(3), number)
    row = torch.tensor([[0.3, -1.0, 0.8, 0.1, 0.0]])
    drawn = kind.distribution(row.expand(number, -1)).sample(noise)
    first, second = (each.softmax(-1) for each in row[0].split((2, 3)))
    expected = first[:, None] * second
    share = torch.bincount((3 * drawn[:, 0] + drawn[:, 1]).long(), minlength=6).view(2, 3) / number
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / number).sqrt()).all()
    assert kind.to_environment(drawn[:2]).tolist() == drawn[:2].long().tolist()


def test_auto_takes_what_fits():
    assert kind_of("auto", Actions(3)).name == "categorical"
    assert kind_of("auto", Actions(several=(3, 2))).name == "categorical"
    assert kind_of("auto", BOX).name == "beta"
    assert kind_of("auto", Actions(0, (0.0,), (math.inf,))).name == "normal"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kind("beta", Actions(3)), "one of 3 choices; use categorical"),
        (lambda: Kind("categorical", BOX), "use normal or beta"),
        (lambda: Kind("beta", Actions(0, (0.0,), (math.inf,))), "have no bounds; use normal"),
        (lambda: Kind("gamma", BOX), "use one of categorical, normal, beta"),
        (lambda: Kind("normal", Actions(several=(3, 2))), "one each of 3, 2 choices; use categorical"),
        (lambda: Actions(), "one of some choices, several of these, or a vector"),
        (lambda: Actions(2, (0.0,), (1.0,)), "one of some choices, several of these, or a vector"),
        (lambda: Actions(2, several=(2,)), "one of some choices, several of these, or a vector"),
        (lambda: Actions(several=(2, 0)), "each needs at least one choice"),
        (lambda: Actions(0, (1.0,), (1.0,)), "which is nothing"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

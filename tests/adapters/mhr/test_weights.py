"""How numbers of a routing table become weights, by hand, and tables on their way to the average."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.mhr import RoutingTable, Weights
from anabranch.adapters.mhr.penalties import Penalties, information, orthogonality, sparsity
from anabranch.errors import ConfigError

Z = torch.tensor([[[0.0, 1.0, -2.0], [3.0, 3.0, 3.0]]])
ON = torch.sigmoid(Z)


def test_sigmoid_by_hand():
    half, e = 0.5, 1 / (1 + math.exp(-1))
    third = 1 / (1 + math.exp(2))
    total = half + e + third
    found = Weights().of(Z)
    torch.testing.assert_close(found[0, 0], torch.tensor([half / total, e / total, third / total]))
    torch.testing.assert_close(found[0, 1], torch.full((3,), 1 / 3))


# Below that the EPS of the formula is a millionth of what it stands beside.
@given(st.lists(st.floats(-13, 50), min_size=1, max_size=9), st.booleans())
def test_weights_add_up_to_one(numbers, shared):
    alpha_UqK = Weights(shared_skill=shared).of(torch.tensor(numbers).view(1, 1, -1))
    assert float(alpha_UqK.sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(alpha_UqK.min()) >= 0


def test_rounded_straight_through():
    z = Z.clone().requires_grad_(True)
    found = Weights(straight_through=True).of(z)
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 1.0, 0.0], [1 / 3] * 3]))
    found[0, 0, 1].backward()
    assert float(z.grad.abs().sum()) > 0


def test_sampled_in_training_alone():
    weights = Weights(relaxed=True)
    assert torch.equal(weights.of(Z), Weights().of(Z))
    torch.manual_seed(0)
    many = Weights(relaxed=True, average_correction=True).of(Z.expand(20_000, 2, 3), training=True) * math.sqrt(3 / 2)
    # As torch's own distribution has it.
    torch.manual_seed(1)
    theirs = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=Z.expand(20_000, 2, 3)).rsample()
    for ours, other in ((many.mean(0), theirs.mean(0)), (many.std(0), theirs.std(0))):
        torch.testing.assert_close(ours, other, rtol=0, atol=0.02)
    z = Z.clone().requires_grad_(True)
    weights.of(z, training=True)[0, 0, 0].backward()
    assert float(z.grad.abs().sum()) > 0


def test_sharper_at_a_lower_temperature():
    torch.manual_seed(0)
    made = Weights(relaxed=True, temperature=0.01, average_correction=True).of(Z.expand(500, 2, 3), training=True)
    on = made * math.sqrt(3 / 2)
    assert float(((on < 0.02) | (on > 0.98)).float().mean()) > 0.9


def test_other_forms_by_hand():
    torch.testing.assert_close(Weights(form="l2").of(Z)[0, 0], Z[0, 0] / math.sqrt(5))
    torch.testing.assert_close(Weights(average_correction=True).of(Z), ON * math.sqrt(2) / math.sqrt(3))
    shared = Weights(shared_skill=True).of(Z)[0, 0]
    total = ON[0, 0, 0] + ON[0, 0, 1] + 1
    torch.testing.assert_close(shared, torch.stack([ON[0, 0, 0], ON[0, 0, 1], torch.tensor(1.0)]) / total)
    torch.manual_seed(0)
    dropped = Weights(dropout=0.5).of(Z.expand(400, 2, 3), training=True)
    assert 0.35 < float((dropped == 0).float().mean()) < 0.65
    assert torch.equal(Weights(dropout=0.5).of(Z), Weights().of(Z))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"straight_through": True, "relaxed": True}, "straight_through and relaxed are both set"),
        ({"form": "l2", "relaxed": True}, "no sigmoid for relaxed"),
        ({"form": "softmax"}, "form is 'softmax'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_what_cannot_be(given, told):
    with pytest.raises(ConfigError, match=told):
        Weights(**given)


def test_a_table_begins_even():
    table = RoutingTable(["a", "b"], 4, 8, generator=torch.Generator().manual_seed(0))
    assert table.sizes == (2, 4, 8)
    assert float(table.z.detach().abs().max()) <= 1e-3
    assert float(table.z.detach().std()) > 2e-4
    torch.testing.assert_close(table.evaluated(), torch.full((2, 4, 8), 1 / 8), rtol=0, atol=1e-4)


def test_annealed_to_the_average_by_a_cosine():
    table = RoutingTable(["a"], 1, 4)
    with torch.no_grad():
        table.z.copy_(torch.tensor([[[4.0, 0.0, -4.0, 1.0]]]))
    own = table.evaluated()
    for done, share in ((-1.0, 1.0), (0.0, 1.0), (0.5, math.cos(math.pi / 4)), (1.0, 0.0), (2.0, 0.0)):
        table.anneal(done)
        torch.testing.assert_close(table.evaluated(), share * own + (1 - share) / 4, rtol=1e-5, atol=1e-6)
    assert "share" in table.state_dict()


# What may be added to the loss


def test_penalties_by_hand():
    expected = ((ON - 1 / 3).clamp_min(0)).mean()
    torch.testing.assert_close(sparsity(Z), expected)
    apart = torch.eye(2).view(2, 1, 2)
    torch.testing.assert_close(information(apart), torch.tensor(-math.log(2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(information(torch.full((2, 3, 4), 0.25)), torch.tensor(0.0), rtol=0, atol=1e-6)
    skills = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 3.0]]]])  # cosines 0, 1/sqrt2, 1/sqrt2
    torch.testing.assert_close(orthogonality(skills), torch.tensor((0 + 0.5 + 0.5) * 2 / 6))
    assert float(orthogonality(skills[:, :1])) == 0.0


def test_orthogonality_of_skills_that_are_zero_has_a_gradient_of_zero():
    b = torch.zeros(1, 2, 3, 4, requires_grad=True)
    orthogonality(b).backward()
    assert bool((b.grad == 0).all())


def test_each_term_is_its_weight_times_what_the_top_of_the_file_says():
    """Two tasks with a skill each, A of one direction, B of two at right angles; a head that knows nothing of the task."""
    table = RoutingTable(["a", "b"], 1, 2, predicts_task=True)
    with torch.no_grad():
        table.z.copy_(torch.tensor([[[40.0, -40.0]], [[-40.0, 40.0]]]))
        for parameter in table.head.parameters():
            parameter.zero_()
    a, b = torch.ones(1, 2, 3, 4), torch.eye(2).view(1, 2, 1, 2)
    made = Penalties(sparsity=2.0, prediction=3.0, information=5.0, orthogonality=7.0).of(table, a, b)
    wanted = {
        "sparsity": 2 * 0.25,
        "prediction": 3 * math.log(2),
        "information": -5 * math.log(2),
        "orthogonality": 7 / 2,
    }
    assert {name: float(loss.detach()) for name, loss in made.items()} == pytest.approx(
        {f"mhr_{name}": value for name, value in wanted.items()}, rel=1e-5
    )


def test_only_what_has_a_weight_is_added():
    table = RoutingTable(["a", "b"], 1, 2, predicts_task=True)
    a, b = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 3)
    assert Penalties().of(table, a, b) == {}
    made = Penalties(sparsity=2.0, prediction=1.0, information=1.0, orthogonality=1.0).of(table, a, b)
    assert set(made) == {"mhr_sparsity", "mhr_prediction", "mhr_information", "mhr_orthogonality"}
    torch.testing.assert_close(made["mhr_sparsity"], 2 * sparsity(table.z))
    assert float(made["mhr_prediction"].detach()) == pytest.approx(math.log(2), abs=1e-2)
    made["mhr_prediction"].backward()
    assert table.head.weight.grad is not None

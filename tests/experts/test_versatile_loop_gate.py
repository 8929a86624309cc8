"""The loop gate by itself: what it gives with overrides, for padding, and in training, number by number."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from anabranch.experts.versatile import LoopGate, VersatileFFN
from anabranch.routing import Override, RoutingContext
from anabranch.routing.relax import gumbel_softmax

ITEMS, DIM, LOOPS = 6, 8, 3


@dataclass
class Always:
    """The same override whoever asks."""

    override: Override

    def of(self, *asked: Any) -> Override:
        return self.override


@pytest.fixture
def gate() -> LoopGate:
    config = VersatileFFN.Config(hidden_dim=8, num_experts=2, max_loops=LOOPS)
    made = LoopGate(config, DIM, layer=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.score.weight.mul_(50)
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(1))


def probabilities(gate, x):
    return (x @ gate.score.weight.T).softmax(-1)


def context(*overrides, **options):
    return RoutingContext(routing=[Always(override) for override in overrides], **options)


def test_the_likeliest_number_by_its_probability(gate, x):
    found, soft = gate(x, context()), probabilities(gate, x)
    assert len(set(found.index_NK[:, 0].tolist())) > 1
    torch.testing.assert_close(found.score_NE, soft)
    assert torch.equal(found.index_NK, soft.argmax(-1, keepdim=True))
    torch.testing.assert_close(found.weight_NK, soft.max(-1, keepdim=True).values)
    assert found.propensity_NK is None
    assert (gate.layer, gate.num_destinations, gate.num_choices) == (4, LOOPS, 1)
    assert LoopGate(VersatileFFN.Config(), DIM).layer == 0


def test_padding_takes_one_loop(gate, x):
    mask = torch.tensor([True, False, True, True, False, True])
    plain, found = gate(x, context()), gate(x, context(item_mask_N=mask))
    assert plain.index_NK[~mask].any()
    assert not found.index_NK[~mask].any()
    torch.testing.assert_close(found.weight_NK[~mask], probabilities(gate, x)[~mask, :1])
    assert torch.equal(found.index_NK[mask], plain.index_NK[mask])


def test_training_takes_the_largest_of_a_noisy_sample(gate, x):
    gate.train()
    gate.temperature.value.fill_(0.7)
    torch.manual_seed(3)
    found = gate(x, context(training=True))
    torch.manual_seed(3)
    soft = gumbel_softmax(x @ gate.score.weight.T, 0.7)
    torch.testing.assert_close(found.score_NE, soft)
    assert torch.equal(found.index_NK, soft.argmax(-1, keepdim=True))
    torch.testing.assert_close(found.propensity_NK, probabilities(gate, x).gather(-1, found.index_NK))
    assert found.score_NE.requires_grad
    assert not found.propensity_NK.requires_grad


@pytest.mark.parametrize("number", [-1, 0, 1, 2])
def test_a_forced_number_weighs_what_the_gate_thinks_of_it(gate, x, number):
    """None is one loop."""
    taken = max(number, 0)
    found = gate(x, context(Override(index_NK=[number])))
    assert (found.index_NK == taken).all()
    torch.testing.assert_close(found.weight_NK, probabilities(gate, x)[:, taken : taken + 1])
    torch.testing.assert_close(found.score_NE, probabilities(gate, x))


@pytest.mark.parametrize("first", [True, False])
def test_of_two_forced_numbers_the_inner_one_holds(gate, x, first, monkeypatch):
    complete, partial = Override(index_NK=[1], weight_NK=[0.25]), Override(index_NK=[2])
    found = gate(x, context(*((complete, partial) if first else (partial, complete))))
    if first:
        assert (found.index_NK == 2).all()
        torch.testing.assert_close(found.weight_NK, probabilities(gate, x)[:, 2:])
    else:
        assert (found.index_NK == 1).all()
        assert (found.weight_NK == 0.25).all()
    assert found.score_NE.shape == (ITEMS, LOOPS)


def test_biases_add_up_and_what_either_closes_is_closed(gate, x):
    far = [0.0, 0.0, 9.0]
    both = gate(x, context(Override(bias_NE=far), Override(bias_NE=[0.0, 9.5, 0.0])))
    assert (
        both.index_NK == torch.where(probabilities(gate, x)[:, 2:] > probabilities(gate, x)[:, 1:2] + 0.5, 2, 1)
    ).all()
    # Weights are the gate's own.
    torch.testing.assert_close(both.weight_NK, probabilities(gate, x).gather(-1, both.index_NK))
    closed = gate(x, context(Override(open_NE=[True, True, False]), Override(open_NE=[False, True, True])))
    assert (closed.index_NK == 1).all()
    torch.testing.assert_close(closed.score_NE, probabilities(gate, x))


def test_some_items_alone(gate, x):
    only = torch.arange(ITEMS) % 2 == 0
    plain, found = gate(x, context()), gate(x, context(Override(index_NK=[1], only_N=only)))
    assert (found.index_NK[only] == 1).all()
    assert torch.equal(found.index_NK[~only], plain.index_NK[~only])
    torch.testing.assert_close(found.weight_NK, probabilities(gate, x).gather(-1, found.index_NK))

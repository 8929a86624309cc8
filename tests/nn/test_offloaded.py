import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedPool
from anabranch.routing.decision import Routing


class Slots:
    """Two places, which experts of a pool take in turn."""

    def __init__(self, pool, packed=None):
        self.pool, self.packed = pool, packed
        self.w13_SFD, self.w2_SDF = (weight.detach()[:2].clone().zero_() for weight in (pool.w13, pool.w2))
        self.used = []

    def mark_used(self, numbers):
        self.used.append(list(numbers))

    def waves(self, layer, experts, x, index, carry):
        for at in range(0, len(experts), 2):
            slot_of = {expert: slot for slot, expert in enumerate(experts[at : at + 2])}
            for expert, slot in slot_of.items():
                self.w13_SFD[slot], self.w2_SDF[slot] = self.pool.w13[expert], self.pool.w2[expert]
            yield slot_of


def made(num_experts=5):
    pool = ExpertPool(num_experts, 8, 6, init_std=0.5, generator=torch.Generator().manual_seed(0))
    slots = Slots(pool)
    return pool, slots, OffloadedPool(0, num_experts, 8, 6, "auto", slots, slots.waves, is_watched=False)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_two_slots_give_what_all_five_experts_give(weight_on):
    pool, slots, offloaded = made()
    g = torch.Generator().manual_seed(1)
    score = torch.rand(10, 5, generator=g)
    weight, index = score.topk(3, dim=-1)
    x, routing = torch.randn(10, 8, generator=g), Routing(index, weight, score)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(x, routing, weight_on=weight_on), pool(x, routing, weight_on=weight_on))
    # Every wave was reported before the next one took its places.
    assert slots.used == [[0, 1], [0, 1], [0]]


def test_items_that_go_nowhere_are_zero_and_ask_for_no_expert():
    _, slots, offloaded = made()
    none = Routing(torch.full((3, 2), -1), torch.zeros(3, 2), torch.zeros(3, 5))
    with torch.no_grad():
        assert torch.equal(offloaded(torch.ones(3, 8), none), torch.zeros(3, 8))
    assert slots.used == []


def test_gradients_are_refused():
    _, _, offloaded = made()
    routing = Routing(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.zeros(1, 5))
    with pytest.raises(ConfigError, match="offloaded experts cannot be trained"):
        offloaded(torch.ones(1, 8, requires_grad=True), routing)


def test_it_owns_no_weights_and_shows_its_slots():
    _, slots, offloaded = made()
    assert list(offloaded.parameters()) == []
    assert offloaded.w13_SFD is slots.w13_SFD
    assert offloaded.w2_SDF is slots.w2_SDF
    assert offloaded.packed is None
    assert "offloaded" in repr(offloaded)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_experts_in_few_bits_run_from_packed_slots(bits):
    pool = ExpertPool(2, 64, 64, init_std=0.5, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedPool.of(pool, bits)
    slots = Slots(pool, packed=quantized.packed)
    offloaded = OffloadedPool(0, 2, 64, 64, "auto", slots, lambda *_: iter([{0: 0, 1: 1}]), is_watched=False)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[0, 1]] * 4), torch.tensor([[0.75, 0.25]] * 4), torch.zeros(4, 2))
    with torch.no_grad():
        torch.testing.assert_close(offloaded(x, routing), quantized(x, routing))

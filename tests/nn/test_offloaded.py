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

    def waves(self, layer, experts, x, index, carry, together=False):
        for at in range(0, len(experts), 2):
            slot_of = {expert: slot for slot, expert in enumerate(experts[at : at + 2])}
            for expert, slot in slot_of.items():
                self.w13_SFD[slot], self.w2_SDF[slot] = self.pool.w13[expert], self.pool.w2[expert]
            yield slot_of


def made(num_experts=5, activation="swiglu", has_bias=False):
    generator = torch.Generator().manual_seed(0)
    pool = ExpertPool(
        num_experts, 8, 6, init_std=0.5, generator=generator, activation=activation, bias=has_bias
    ).requires_grad_(False)
    biases = (pool.b13.normal_(generator=generator), pool.b2.normal_(generator=generator)) if has_bias else None
    slots = Slots(pool)
    options = {"is_watched": False, "activation": activation, "biases": biases}
    return pool, slots, OffloadedPool(0, num_experts, 8, 6, "auto", slots, slots.waves, **options)


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
        # Nor does a pass without items, or without choices.
        for items, choices in ((0, 2), (3, 0)):
            empty = Routing(
                torch.zeros(items, choices, dtype=torch.long), torch.zeros(items, choices), torch.zeros(items, 5)
            )
            assert torch.equal(offloaded(torch.ones(items, 8), empty), torch.zeros(items, 8))
    assert slots.used == []


KINDS = [("swiglu", False), ("swiglu", True), ("clamped_swiglu", True), ("gelu", False), ("gelu", True)]


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(("activation", "has_bias"), KINDS)
def test_gradients_of_items_and_weights_are_those_of_all_experts_in_memory(activation, has_bias, weight_on):
    """Experts come a second time, two by two; some choices go nowhere."""
    pool, slots, offloaded = made(activation=activation, has_bias=has_bias)
    assert offloaded.is_plain == pool.is_plain
    g = torch.Generator().manual_seed(1)
    score = torch.rand(10, 5, generator=g)
    weight, index = score.topk(3, dim=-1)
    index[3, 1] = index[7] = -1
    x, dy = torch.randn(10, 8, generator=g), torch.randn(10, 8, generator=g)
    found = []
    for layer in (pool, offloaded):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = layer(leaves[0], Routing(index, leaves[1], score), weight_on=weight_on)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    used = index >= 0
    for (wanted, wanted_dx, wanted_dw), (got, dx, dw) in [found]:
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(dx, wanted_dx)
        torch.testing.assert_close(dw[used], wanted_dw[used])
        assert not dw[~used].any()
    assert len(slots.used) == 6


@pytest.mark.parametrize("num_choices", [2, 3, 5])
def test_what_was_in_memory_before_changes_no_bit_of_gradients(num_choices):
    """Rows of an item were added as waves came, which rounds otherwise from three choices on."""
    g = torch.Generator().manual_seed(1)
    score = torch.rand(64, 8, generator=g)
    weight, index = score.topk(num_choices, dim=-1)
    x, dy = torch.randn(64, 8, generator=g), torch.randn(64, 8, generator=g)
    found = []
    for turned in (False, True):
        _, slots, offloaded = made(8)
        if turned:
            offloaded._waves = lambda layer, experts, *rest, slots=slots: slots.waves(layer, experts[::-1], *rest)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = offloaded(leaves[0], Routing(index, leaves[1], score))
        found.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_choices_in_bfloat16_are_added_in_float32():
    """1 + 2^-8 + 2^-8: in bfloat16 neither of the two is more than half of the last place of 1, and both together are all of it."""
    pool, _, _ = made(3, "gelu", has_bias=True)
    pool.bfloat16()
    with torch.no_grad():
        for weight in (pool.w13, pool.w2, pool.b13):
            weight.zero_()
        # So each gives its bias.
        pool.b2.copy_(torch.tensor([1.0, 2**-8, 2**-8])[:, None].expand(3, 8))
        slots = Slots(pool)
        offloaded = OffloadedPool(
            0, 3, 8, 6, "auto", slots, slots.waves, False, activation="gelu", biases=(pool.b13, pool.b2)
        )
        everybody = Routing(torch.arange(3).expand(4, 3), torch.ones(4, 3), torch.zeros(4, 3))
        found = offloaded(torch.zeros(4, 8, dtype=torch.bfloat16), everybody)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1 + 2**-7] * 8] * 4


def test_slots_that_are_filled_meanwhile_do_not_matter():
    """What brings experts fills free places while others are differentiated."""
    _, slots, offloaded = made(2)
    routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1), torch.zeros(2, 2))

    class Meddling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            # A place of the same tensor, though none that is read.
            slots.w13_SFD[1].add_(0)
            return dy

    run = offloaded._run
    offloaded._run = lambda x, *more: Meddling.apply(run(x, *more))
    x = torch.randn(2, 8, requires_grad=True)
    offloaded(x, routing).sum().backward()
    assert x.grad.isfinite().all()


def test_gradients_through_experts_in_few_bits_are_refused():
    pool = ExpertPool(2, 64, 64, init_std=0.5, generator=torch.Generator().manual_seed(0))
    slots = Slots(pool, packed=QuantizedPool.of(pool, "int8").packed)
    offloaded = OffloadedPool(0, 2, 64, 64, "auto", slots, lambda *_: iter([{0: 0, 1: 1}]), is_watched=False)
    routing = Routing(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="no gradient goes through experts in few bits"):
        offloaded(torch.ones(1, 64, requires_grad=True), routing)


def test_it_owns_no_weights_and_shows_its_slots():
    _, slots, offloaded = made()
    assert list(offloaded.parameters()) == []
    assert offloaded.w13_SFD is slots.w13_SFD
    assert offloaded.w2_SDF is slots.w2_SDF
    assert offloaded.packed is None
    assert "offloaded" in repr(offloaded)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize(("activation", "has_bias"), KINDS)
def test_experts_in_few_bits_run_from_packed_slots(activation, has_bias, bits):
    generator = torch.Generator().manual_seed(0)
    pool = ExpertPool(
        3, 64, 64, init_std=0.5, generator=generator, activation=activation, bias=has_bias
    ).requires_grad_(False)
    biases = (pool.b13.normal_(generator=generator), pool.b2.normal_(generator=generator)) if has_bias else None
    quantized = QuantizedPool.of(pool, bits)
    # The second expert has no rows; the third is where it would be.
    slots = Slots(pool, packed=tuple(packed.with_data(packed.data[[0, 2]]) for packed in quantized.packed))
    options = {"is_watched": False, "activation": activation, "biases": biases}
    offloaded = OffloadedPool(0, 3, 64, 64, "auto", slots, lambda *_: iter([{0: 0, 2: 1}]), **options)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[0, 2]] * 4), torch.tensor([[0.75, 0.25]] * 4), torch.zeros(4, 3))
    with torch.no_grad():
        torch.testing.assert_close(offloaded(x, routing), quantized(x, routing))

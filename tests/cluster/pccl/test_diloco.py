"""DiLoCo: rounds apart and steps together, against a plain loop that knows no network."""

import re
import threading

import pytest
import torch
from torch import nn

from anabranch.cluster.pccl import DiLoCo, Mismatch, PeerLost
from anabranch.errors import InputError
from pccl_peers import BOUND_S, Killed, Peer, a_master, together, until_somebody_waits
from waiting import until

EVERY = 3


@pytest.fixture(scope="module")
def master():
    with a_master() as found:
        yield found


# Peers are threads here, and draw from one generator.
DRAWING = threading.Lock()


def made(seed=0, width=4):
    with DRAWING:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1)).double()


def inner_step(model, optimizer, number, step):
    generator = torch.Generator().manual_seed(1000 * number + step)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    model(x).square().mean().add(model(x).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def naive(world, rounds, *, asynchronous=False):
    """Weights after ``rounds``, of workers in one process."""
    models = [made() for _ in range(world)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    outer = [value.detach().clone() for value in models[0].parameters()]
    moments = [torch.zeros_like(value) for value in outer]
    begun = [[value.clone() for value in outer] for _ in models]
    late = None
    for number in range(rounds):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for step in range(EVERY):
                inner_step(model, optimizer, worker, number * EVERY + step)
        own = [
            [held - value.detach() for held, value in zip(begun[worker], model.parameters(), strict=True)]
            for worker, model in enumerate(models)
        ]
        deltas = [sum(parts) / world for parts in zip(*own, strict=True)]
        deltas, late = (late, deltas) if asynchronous else (deltas, None)
        if deltas is not None:
            outer_step(outer, moments, deltas)
        for worker, model in enumerate(models):
            # What is not in the outer weights yet a worker keeps of its own.
            begun[worker] = [
                held - part if asynchronous else held.clone() for held, part in zip(outer, own[worker], strict=True)
            ]
            for value, held in zip(model.parameters(), begun[worker], strict=True):
                value.data.copy_(held)
    if late is not None:
        outer_step(outer, moments, late)
    return outer


def outer_step(outer, moments, deltas):
    """SGD with Nesterov momentum, by hand."""
    for value, moment, delta in zip(outer, moments, deltas, strict=True):
        moment.mul_(0.9).add_(delta)
        value.sub_(0.7 * (delta + 0.9 * moment))


def trained(rounds, *, after=None, **settings):
    """A peer's work: ``rounds`` rounds, or as many as are left of them."""

    def work(number, peers):
        model = made(number)
        if number in (0, 1, 2):
            model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        outer = DiLoCo(model, peers, **{"every": EVERY, **settings})
        told = []
        while True:
            outer.begin_step()
            if outer.steps >= rounds * EVERY:
                break
            inner_step(model, optimizer, number, outer.steps)
            if (done := outer.end_step()) is not None:
                told.append(done)
            if after is not None:
                after(number, peers, outer)
            if outer.steps >= rounds * EVERY:
                break
        outer.finish()
        outer.close()
        return [value.detach().clone() for value in model.parameters()], told, outer

    return work


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_rounds_are_those_of_a_plain_loop(master, world, asynchronous):
    found = together(master.address, world, trained(4, asynchronous=asynchronous))
    expected = naive(world, 4, asynchronous=asynchronous)
    for weights, told, outer in found:
        assert all(torch.equal(one, other) for one, other in zip(weights, found[0][0], strict=True))
        assert all((one - other).abs().max() < 1e-12 for one, other in zip(weights, expected, strict=True))
        assert [one.number for one in told] == [1, 2, 3, 4]
        assert [one.peers for one in told] == ([0, world, world, world] if asynchronous else [world] * 4)
        # All compute the same, so nothing was ever fetched.
        assert outer.received_bytes == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_dies_and_one_comes_and_all_end_with_the_same_bits(master, asynchronous):
    arrived, late = threading.Event(), []

    def after(number, peers, outer):
        if number == 2 and outer.steps == 2 * EVERY + 1:
            raise Killed
        if number == 0 and outer.steps == 3 * EVERY + 1 and not late:
            late.append(Peer(master.address, trained(8, asynchronous=asynchronous), 7))
            # It is let in when the others meet next.
            until(lambda: any(not member.is_accepted and member.vote for member in list(master.state.members.values())))
            arrived.set()
        if number == 1 and outer.steps == 3 * EVERY + 1:
            assert arrived.wait(60)

    peers = [Peer(master.address, trained(8, after=after, asynchronous=asynchronous), number, 3) for number in range(3)]
    for peer in (*(one.wait() for one in peers), *(one.wait() for one in late)):
        assert peer.error is None, peer.error
    assert peers[2].is_killed
    weights = [peer.value[0] for peer in (*peers[:2], *late)]
    assert all(torch.equal(one, other) for other in weights for one, other in zip(weights[0], other, strict=True))
    # It was given all there was to know, once, and counted its steps from there.
    newcomer = late[0].value[2]
    assert newcomer.received_bytes == 2 * 8 * sum(value.numel() for value in weights[0])
    assert newcomer.steps == peers[0].value[2].steps == 8 * EVERY
    assert {one.peers for one in peers[0].value[1]} >= {2, 3}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_is_left_when_the_last_other_dies_in_a_reduction_goes_on(asynchronous):
    """Its own deltas are then the mean."""

    def dies_in_the_second_ring(number, peers, outer):
        if number == 1 and outer.steps == EVERY + 1:

            def before(name):
                if name == "ring":
                    peers._die()
                    raise Killed

            peers._before = before

    work = trained(4, after=dies_in_the_second_ring, asynchronous=asynchronous)
    with a_master() as master:
        first, second = (Peer(master.address, work, number, 2) for number in range(2))
        first.wait()
        assert first.error is None, first.error
    assert second.value is None
    weights, told, outer = first.value
    assert outer.steps == 4 * EVERY
    assert [one.number for one in told] == [1, 2, 3, 4]
    # A reduction under way may have been the one.
    assert [one.peers for one in told] in ([[0, 2, 1, 1], [0, 1, 1, 1]] if asynchronous else [[2, 1, 1, 1]])
    assert all(value.isfinite().all() for value in weights)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_loop_by_steps_does_as_many_and_ends_with_a_round(master, asynchronous):
    """As the page has it: ``while outer.steps < N``."""

    def work(number, peers):
        model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        outer = DiLoCo(model, peers, every=EVERY, asynchronous=asynchronous, rounds=5)
        counted, begun = [outer.steps], []
        while outer.steps < 7 * EVERY:
            begun.append(outer.begin_step())
            inner_step(model, optimizer, number, outer.steps)
            outer.end_step()
            counted.append(outer.steps)
        outer.finish()
        outer.close()
        return counted, begun, [value.detach().clone() for value in model.parameters()]

    first, second = together(master.address, 2, work)
    assert first[0] == second[0] == list(range(5 * EVERY, 7 * EVERY + 1))
    if not asynchronous:
        assert first[1] == [True, False, False] * 2
    assert all(torch.equal(one, other) for one, other in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"every": 6}, r"'every': peer \d+ has 3, peer \d+ 6"),
        ({"learning_rate": 0.1}, r"'learning_rate': peer \d+ has 0\.7, peer \d+ 0\.1"),
        ({"momentum": 0.5}, r"'momentum': peer \d+ has 0\.9, peer \d+ 0\.5"),
        ({"nesterov": False}, r"'nesterov': peer \d+ has True, peer \d+ False"),
        ({"asynchronous": True}, r"'asynchronous': peer \d+ has False, peer \d+ True"),
        ({"quantise": "min_max"}, r"'quantise': peer \d+ has None, peer \d+ min_max of 8 bits"),
    ],
)
def test_a_newcomer_with_other_settings_is_told_which_and_the_others_go_on(other, told):
    late = []

    def after(number, peers, outer):
        if outer.steps == 1:
            late.append(Peer(master.address, trained(3, **{"every": EVERY, **other}), 2))
            until(lambda: any(not member.is_accepted and member.vote for member in list(master.state.members.values())))

    with a_master() as master:
        first = Peer(master.address, trained(3, after=after)).wait()
        newcomer = late[0].wait()
    assert first.error is None, first.error
    assert first.value[2].steps == 3 * EVERY
    assert isinstance(newcomer.error, Mismatch)
    assert re.search(told, str(newcomer.error)), newcomer.error


def test_peers_that_begin_with_different_settings_are_told_which(master):
    def work(number, peers):
        outer = DiLoCo(made(), peers, every=EVERY + number)
        with pytest.raises(Mismatch, match=r"'every': peer .* has [34], peer .* [34]"):
            outer.begin_step()
        return True

    assert together(master.address, 2, work) == [True, True]


def test_who_is_told_to_stop_waits_for_nobody_at_the_end_of_a_round():
    """One still trains its round; the other gives up, with what it has learned, and leaves."""
    stop, gone = threading.Event(), threading.Event()

    def stops(number, peers):
        model = made()
        outer = DiLoCo(model, peers, every=1)
        outer.begin_step()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1.0)
        own = [value.detach().clone() for value in model.parameters()]
        stop.set()
        with pytest.raises(PeerLost):
            outer.end_step()
        return all(torch.equal(one, value) for one, value in zip(own, model.parameters(), strict=True))

    def trains_on(number, peers):
        outer = DiLoCo(made(), peers, every=1)
        outer.begin_step()
        assert gone.wait(BOUND_S)
        return outer.end_step().peers

    with a_master() as master:
        first = Peer(master.address, stops, 0, 2, gives_up=stop.is_set)
        second = Peer(master.address, trains_on, 1, 2)
        first.wait(BOUND_S / 2)
        gone.set()
        second.wait()
    assert first.error is None, first.error
    assert first.value
    assert second.error is None, second.error
    assert second.value == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_goes_on_in_the_midst_of_a_round(master, asynchronous):
    def work(number, peers):
        model = made()
        outer = DiLoCo(model, peers, every=EVERY, asynchronous=asynchronous, rounds=1, done=2 * (number == 0))
        begun = outer.begin_step() and outer.steps
        counted = []
        while outer.steps < 3 * EVERY:
            outer.begin_step()
            outer.end_step()
            counted.append(outer.steps)
        outer.finish()
        outer.close()
        return begun, counted

    assert together(master.address, 1, work) == [(5, [6, 7, 8, 9])]
    first, second = together(master.address, 2, work)
    # Of two that have come to other steps of one round, where the one is that has come furthest.
    assert first == second == (5, [6, 7, 8, 9])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_of_another_program_is_sent_away_alone_also_in_the_first_round(master, asynchronous):
    """Asynchronous rounds reduce nothing before the second."""
    late = []

    def work(number, peers):
        outer = DiLoCo(made(), peers, every=1, asynchronous=asynchronous)
        outer.begin_step()
        if number == 0:
            late.append(Peer(master.address, lambda _, mine: mine.all_reduce(torch.ones(2)), 9))
            until_somebody_waits(master)
        while outer.steps < 4:
            outer.end_step()
            outer.begin_step()
        outer.finish()
        outer.close()
        return outer.steps

    assert together(master.address, 2, work) == [4, 4]
    assert isinstance(late[0].wait().error, Mismatch)


def test_quantised_deltas_are_near(master):
    def work(number, peers):
        model = made(width=400)
        outer = DiLoCo(model, peers, every=1, quantise="min_max")
        outer.begin_step()
        with torch.no_grad():
            for value in model.parameters():
                value.sub_(torch.rand(value.shape, generator=torch.Generator().manual_seed(number), dtype=value.dtype))
        outer.end_step()
        return [value.detach().clone() for value in model.parameters()]

    found = together(master.address, 2, work)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for place, value in enumerate(made(width=400).parameters()):
        drawn = [
            torch.rand(value.shape, generator=torch.Generator().manual_seed(number), dtype=value.dtype)
            for number in range(2)
        ]
        exact = value.detach() - 0.7 * 1.9 * sum(drawn) / 2
        off = (found[0][place] - exact).abs().max()
        # Small tensors go as they are.
        assert off < (1e-12 if value.numel() < 1024 else 0.7 * 1.9 * 2 / 255)
        assert value.numel() < 1024 or off > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 3, "done": 3}, "done is 3; use 0 to 2"),
        ({"done": -1}, "done is -1"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"momentum": 0.0}, "nesterov is True"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_what_cannot_be_is_told(settings, told):
    with pytest.raises(InputError, match=told):
        DiLoCo(made(), None, **settings)
    with pytest.raises(InputError, match="no floating-point parameters that learn"):
        DiLoCo(nn.Identity(), None)


def test_where_memory_runs_out_at_a_round_s_end_weights_are_what_was_trained():
    """A trainer saves them then; half of them at the outer weights would be a mixture."""
    model = torch.nn.Linear(3, 2)
    outer = DiLoCo(model, None, every=1, asynchronous=True)
    before = [value.detach().clone() for value in model.parameters()]

    class Own(dict):
        def __getitem__(self, name):
            if name == "bias":
                raise MemoryError("no memory")
            return super().__getitem__(name)

    with pytest.raises(MemoryError):
        outer._go_ahead(Own(weight=torch.ones(2, 3)))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    outer.close()

"""A step of a rank that is alone: as torch makes it, and until it is decided nothing is changed."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.cluster.elastic.clocks import StageClock
from anabranch.cluster.elastic.execution import StepSettings, Work
from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.links import CalledAwayError
from anabranch.cluster.elastic.state import PARAM, Slice, State, flat_of, install, learning
from anabranch.cluster.elastic.stepping import Stepping
from anabranch.cluster.elastic.updating import Updater
from anabranch.errors import PeerError


def layers_of():
    torch.manual_seed(0)
    return [nn.Linear(4, 4), nn.Linear(4, 3)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)


class Alone:
    """The parts that a step needs of a rank that is alone, and what was told."""

    def __init__(self, loss=F.cross_entropy, **settings):
        self.layers, self.told, self.states_seen, self.answer = layers_of(), [], [], None
        layout = Layout(Grid.full(replicas=1, stages=1), (), 2)
        own = StepSettings(5, 2, 1, True, loss, 0, (False, False))
        sizes = [sum(p.numel() for p in learning(layer)) for layer in self.layers]
        flat = {n: flat_of(layer) for n, layer in enumerate(self.layers)}
        state = State(flat, {n: Slice(0, size, {PARAM: flat[n]}) for n, size in enumerate(sizes)})
        self.member = SimpleNamespace(
            work=Work(layout, 0, own, "1f1b", [1.0, 1.0]),
            settings=own,
            sizes=sizes,
            version=0,
            state=state,
            stream=None,
            updater=Updater(sgd),
            layout_epoch=1,
            rank=0,
            clock=StageClock(None),
            take_live_news=lambda: None,
            commit=self.commit,
        )
        control = SimpleNamespace(
            epoch=1, tell=lambda kind, **more: self.told.append((kind, more)), decided=self.decided
        )
        snapshots = SimpleNamespace(wait=lambda *told: None)
        given = {"clip": None, "skips_infinite": False, "gathers": None, "at_step": None, **settings}
        self.made = Stepping(self.member, None, control, snapshots, self.layers, probe=self.states_seen.append, **given)
        self.made.batches = {step: batch(step) for step in range(9)}

    def decided(self, kind):
        assert kind == "commit"
        if self.answer is not None:
            raise self.answer
        return {"step": self.member.version, "loss": {"": (2.5).hex(), "z": (0.5).hex()}}

    def commit(self, step, shadow):
        self.member.version, self.member.state = step + 1, shadow
        for layer, flat in shadow.flat.items():
            install(self.layers[layer], flat)


def test_steps_are_those_of_torch():
    alone, model = Alone(), nn.Sequential(*layers_of())
    optimizer = sgd(model.parameters())
    for step in range(3):
        x, target = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        alone.made.make()
    for mine, theirs in zip(alone.layers, model, strict=True):
        assert torch.allclose(mine.weight, theirs.weight, rtol=1e-5, atol=1e-7)
    assert (alone.made.last.loss, alone.made.last.terms, alone.made.last.norm) == (2.5, {"z": 0.5}, None)


def test_a_vote_tells_the_loss_of_its_samples_and_what_layers_took():
    alone = Alone()
    alone.made.make()
    ((kind, vote),) = alone.told
    assert kind == "vote"
    assert (vote["epoch"], vote["step"], vote["blocks"], vote["absent"]) == (1, 0, 5, [])
    ((name, *node, value),) = vote["loss"]
    assert (name, node) == ("", [3, 0])
    x, target = batch(0)
    assert float.fromhex(value) == pytest.approx(
        float(F.cross_entropy(nn.Sequential(*layers_of())(x), target).detach()), rel=1e-6
    )
    assert set(vote["costs"]) == {"0", "1"}
    assert all(seconds > 0 for seconds in vote["costs"].values())
    assert alone.states_seen[-4:] == ["update", "vote", "voted", "commit"]


def test_what_layers_took_is_told_as_at_the_usual_clock(monkeypatch):
    """Or a plan would take a stage for a fast one whose clock was raised because it is slow."""
    told = []
    for factor in (1.0, 1.25):
        alone, ticks = Alone(), iter(range(1000))
        alone.member.clock.factor = factor
        monkeypatch.setattr(
            "anabranch.cluster.elastic.execution.time.perf_counter", lambda ticks=ticks: float(next(ticks))
        )
        alone.made.make()
        told.append(alone.told[0][1]["costs"])
    # Each layer takes a tick for a sample, of five; the backward twice as much.
    assert told[0] == {"0": 3.0, "1": 3.0}
    assert told[1] == {"0": 3.75, "1": 3.75}


def test_until_it_is_decided_nothing_is_changed():
    alone = Alone()
    alone.answer = CalledAwayError()
    before = {n: flat.clone() for n, flat in alone.member.state.flat.items()}
    for _ in range(2):
        with pytest.raises(CalledAwayError):
            alone.made.make()
    assert alone.member.version == 0
    assert all(torch.equal(flat_of(alone.layers[n]), flat) for n, flat in before.items())
    # Done again it is what it would have been, without what was left of the first time.
    alone.answer, other = None, Alone()
    alone.made.make()
    other.made.make()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone.layers, other.layers, strict=True))


def test_a_gradient_is_clipped_to_its_norm_and_one_that_is_not_finite_changes_nothing():
    free, clipped = Alone(clip=1e9), Alone(clip=0.01)
    free.made.make()
    clipped.made.make()
    assert free.made.last.norm == clipped.made.last.norm > 0.01
    start = layers_of()[0].weight.detach()
    ratio = (clipped.layers[0].weight - start).norm() / (free.layers[0].weight - start).norm()
    assert float(ratio.detach()) == pytest.approx(0.01 / free.made.last.norm, rel=1e-3)
    spoiled = Alone(loss=lambda output, target: F.cross_entropy(output, target) * math.inf, skips_infinite=True)
    spoiled.made.make()
    assert spoiled.made.last.norm == math.inf
    assert spoiled.member.version == 1
    assert torch.equal(spoiled.layers[0].weight, start)


def test_where_a_step_gathers_all_is_here_after_it():
    alone = Alone(gathers=lambda version: version == 2)
    alone.made.make()
    assert alone.made.gathered is None
    alone.made.make()
    version, whole = alone.made.gathered
    assert (version, alone.made.gathered_at) == (2, (2, 1))
    assert torch.equal(whole[0].tensors[PARAM], flat_of(alone.layers[0]))
    assert "momentum_buffer" in whole[0].tensors


def test_a_step_whose_batch_is_not_there_any_more_is_told():
    alone = Alone()
    alone.made.batches = {1: batch(1)}
    with pytest.raises(PeerError, match="step 0 was taken back, and this rank does not have its batch any more"):
        alone.made.make()


def test_a_step_that_is_made_again_stands_where_it_did():
    """What a schedule sets after each step was that of the step after it."""
    set_for = []
    alone = Alone(at_step=set_for.append)
    alone.made.stands_at = 1
    alone.member.version = 1
    alone.made.make()
    assert set_for == []
    alone.member.version = 0
    alone.made.make()
    alone.made.make()
    alone.made.stand_at(2)
    assert set_for == [0, 1, 2]


def test_a_vote_is_of_its_batch():
    alone, other = Alone(), Alone()
    other.made.batches = {0: (batch(0)[0], batch(1)[1])}
    alone.made.make()
    other.made.make()
    again = Alone()
    again.made.make()
    words = [one.told[0][1]["batch"] for one in (alone, other, again)]
    assert words[0] == words[2] != words[1]

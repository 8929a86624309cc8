"""Episodes played by the serving engine: tokens in and out, log probabilities as in training, weights in their place, routes."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, DataError, InputError, LimitError
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.nn.moe import MoE
from anabranch.rl.tokens import Drawn, Outcome, PolicyEngine, TokenPolicy, Told, padded
from anabranch.routing import Router
from anabranch.serving.fast import FastDecoder
from rl_token_worlds import ASK, END, INFO, VOCABULARY, Echo
from waiting import until

DRAWN = Drawn(turn_tokens=4)


def decoder(*, experts=False, seed=0, **fields):
    made = {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "num_layers": 2,
        "max_positions": 64,
        "init_std": 0.3,
        "attention": SelfAttention.Config(num_heads=2),
        "feed_forward": MoE.Config(num_experts=4, hidden_dim=32, router=Router.Config(balance=()))
        if experts
        else SwiGLU.Config(hidden_dim=64),
    }
    return Decoder.Config(**(made | fields)).build(seed=seed)


def played(engine, count=6, turns=2, drawn=DRAWN, first=0):
    world = Echo(Echo.Config(turns=turns))
    plays = [world.play(number, seed=0) for number in range(count)]
    return engine.play(plays, list(range(first, first + count)), drawn)


def scored(model, samples, **how):
    with torch.no_grad():
        return TokenPolicy(model)(
            samples.token_BL, samples.own_BL, real_BL=samples.real_BL, route_BLAK=samples.route_BLAK, **how
        )


def test_an_episode_is_the_prompt_turns_and_what_the_world_told():
    engine = PolicyEngine(decoder(), slots=4)
    for number, each in enumerate(played(engine)):
        play = Echo(Echo.Config(turns=2)).play(number, seed=0)
        assert each.prompt == play.prompt
        told = (INFO, play.prompt[0], ASK)
        at = each.own.index(False)
        assert tuple(each.tokens[at : at + 3]) == told
        assert each.own == [True] * at + [False] * 3 + [True] * (len(each.tokens) - at - 3)
        for turn in (each.tokens[:at], each.tokens[at + 3 :]):
            # Up to the end, or as many as a turn may have; nothing behind the end.
            assert turn[-1] == END or len(turn) == 4
            assert END not in turn[:-1]
        assert each.turns == 2
        assert not each.is_cut
        assert each.outcome.measures["right"] == float(each.tokens[at + 3 :][:2] == [play.prompt[0], END])
    engine.close()


@pytest.mark.parametrize("experts", [False, True])
def test_log_probabilities_of_engine_and_training_are_the_same(experts):
    model = decoder(experts=experts)
    engine = PolicyEngine(model, slots=3, records=experts)
    model.train()
    samples = padded(played(engine), engine.layers)
    assert model.training
    found = scored(model, samples, is_replayed=experts)
    assert torch.allclose(found.log_prob_BL[samples.own_BL], samples.rollout_BL[samples.own_BL], atol=1e-5)
    assert not found.log_prob_BL[~samples.own_BL].any()
    # And of plain arithmetic on the logits.
    logits_BLV = model(samples.token_BL).logits_BLV
    expected_BL = logits_BLV[:, :-1].log_softmax(-1).gather(-1, samples.token_BL[:, 1:, None]).squeeze(-1)
    own_BL = samples.own_BL[:, 1:]
    assert torch.allclose(found.log_prob_BL[:, 1:][own_BL], expected_BL[own_BL], atol=1e-5)
    entropy_BL = torch.distributions.Categorical(logits=logits_BLV[:, :-1]).entropy()
    assert torch.allclose(found.entropy_BL[:, 1:][own_BL], entropy_BL[own_BL], atol=1e-5)


@pytest.mark.parametrize("experts", [False, True])
def test_the_engine_acts_with_the_weights_as_they_are(experts):
    model = decoder(experts=experts)
    engine = PolicyEngine(model, slots=4, records=experts)
    played(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.refresh()
    after = padded(played(engine), engine.layers)
    found = scored(model, after)
    assert torch.allclose(found.log_prob_BL[after.own_BL], after.rollout_BL[after.own_BL], atol=1e-5)
    # As an engine that is made of these weights.
    fresh = padded(played(PolicyEngine(model, slots=4, records=experts)), engine.layers)
    assert torch.equal(fresh.token_BL, after.token_BL)
    assert torch.equal(fresh.rollout_BL, after.rollout_BL)


def test_without_the_compiled_step_it_plays_and_learns_alike(monkeypatch):
    monkeypatch.setattr(FastDecoder, "supports", staticmethod(lambda model: "not here"))
    model = decoder()
    engine = PolicyEngine(model, slots=4)
    assert engine._engine.runner.fast is None
    samples = padded(played(engine))
    model.train()
    found = TokenPolicy(model)(samples.token_BL, samples.own_BL)
    assert torch.allclose(found.log_prob_BL[samples.own_BL], samples.rollout_BL[samples.own_BL], atol=1e-5)
    # Nothing that the engine left in the model stands in the way of a gradient.
    found.log_prob_BL.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)
    engine.refresh()
    after = padded(played(engine))
    again = scored(model, after)
    assert torch.allclose(again.log_prob_BL[after.own_BL], after.rollout_BL[after.own_BL], atol=1e-5)


def test_what_is_drawn_follows_from_the_seed_of_the_episode():
    engine = PolicyEngine(decoder(), slots=2)
    first, again, other = (played(engine, first=seed) for seed in (0, 0, 100))
    assert [each.tokens for each in first] == [each.tokens for each in again]
    assert [each.tokens for each in first] != [each.tokens for each in other]
    greedy = [played(engine, drawn=Drawn(temperature=0, turn_tokens=4), first=seed) for seed in (0, 7)]
    assert [each.tokens for each in greedy[0]] == [each.tokens for each in greedy[1]]


def test_every_token_is_recorded_with_its_experts_and_replay_flips_none():
    model = decoder(experts=True)
    engine = PolicyEngine(model, slots=4, records=True)
    episodes = played(engine)
    assert engine.layers == (0, 1)
    for each in episodes:
        # All but the last token, which nothing was drawn from.
        assert sorted(each.routes) == list(range(len(each.ids) - 1))
        assert all(len(of[0]) == len(of[1]) == 2 for of in each.routes.values())
    samples = padded(episodes, engine.layers)
    flipped, of = scored(model, samples).flipped
    assert (flipped, of) == (0, sum(len(each.ids) - 1 for each in episodes) * 2 * 2)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.score.weight.mul_(-1)
    # The router goes other ways now: told without replay, none with it; and what it says is learned from.
    assert scored(model, samples).flipped[0] > of / 4
    assert scored(model, samples, is_replayed=True).flipped == (0, of)
    policy = TokenPolicy(model)
    found = policy(
        samples.token_BL, samples.own_BL, real_BL=samples.real_BL, route_BLAK=samples.route_BLAK, is_replayed=True
    )
    found.log_prob_BL.sum().backward()
    assert float(model.blocks[0].feed_forward.router.score.weight.grad.abs().sum()) > 0


class Hostile:
    """A world that never ends, and says a lot."""

    def __init__(self, told=(INFO,) * 30, error=None):
        self.prompt, self._told, self._error, self.steps = (0, 1, ASK), told, error, 0

    def ends(self, turn):
        return False

    def step(self, turn):
        self.steps += 1
        if self._error is not None:
            raise self._error
        return Told(self._told, is_done=False)

    def outcome(self):
        return Outcome(0.0, {"steps": self.steps})


class Saying:
    """Says these, one after another, and then is done."""

    def __init__(self, prompt, told):
        self.prompt, self._told = (0,) * prompt, [(INFO,) * one for one in told]

    def ends(self, turn):
        return len(turn) >= 2

    def step(self, turn):
        told = self._told.pop(0)
        return Told(told, is_done=not self._told)

    def outcome(self):
        return Outcome(0.0, {})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 23), st.lists(st.integers(0, 30), min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_no_episode_is_longer_than_the_model_has_positions(worlds):
    """Whatever a world asks and says: policy, critic and reference have no places beyond, and room was counted for no more."""
    engine = _SHORT.setdefault(0, PolicyEngine(decoder(max_positions=24), slots=2))
    plays = [Saying(*world) for world in worlds]
    for (prompt, told), each in zip(worlds, engine.play(plays, list(range(len(plays))), DRAWN), strict=True):
        whole = prompt + sum(told) + 2 * len(told)
        assert len(each.ids) == min(24, whole)
        assert each.is_cut == (whole > 24)
        assert len(each.own) == len(each.log_probs) == len(each.tokens)


_SHORT = {}


@pytest.mark.parametrize("tokens", [24, 25, 200])
def test_a_prompt_that_leaves_no_room_for_a_turn_is_refused_and_not_cut(tokens):
    """Its end was cut off, where the question stands, and an empty episode was played."""
    engine = _SHORT.setdefault(0, PolicyEngine(decoder(max_positions=24), slots=2))
    with pytest.raises(InputError, match=f"the prompt of episode 1 has {tokens} tokens, and the policy reads 24"):
        engine.play([Saying(3, [1]), Saying(tokens, [1])], [0, 1], DRAWN)
    [whole] = engine.play([Saying(23, [1])], [0], DRAWN)
    assert whole.turns == 1


def test_a_world_that_never_ends_is_cut_where_there_is_no_room():
    engine = PolicyEngine(decoder(), slots=2, max_positions=40)
    endless, silent = engine.play([Hostile(), Hostile(told=())], [0, 1], DRAWN)
    assert endless.is_cut
    # What the world says beyond that is no part of it.
    assert len(endless.ids) == 40
    assert endless.own == [True] * 4 + [False] * 30 + [True] * 3
    assert silent.is_cut
    assert len(silent.ids) == 40
    # The engine is whole.
    assert len(played(engine)) == 6


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "error",
    [DataError("no more questions"), LimitError("nobody may be asked"), ValueError("odd")],
    ids=lambda one: type(one).__name__,
)
def test_a_world_that_fails_says_so_itself_and_the_engine_goes_on(caplog, waits, error):
    """It ended the engine's loop, which told a traceback, and by a race it was an AnabranchError that said the same in words."""
    engine = PolicyEngine(decoder(), slots=3)
    for failing in range(3):
        plays = [Hostile(error=error if place == failing else None, told=()) for place in range(3)]
        with pytest.raises(type(error)) as raised:
            engine.play(plays, [0, 1, 2], DRAWN, waits=waits)
        assert raised.value is error
    assert not caplog.records
    assert len(played(engine)) == 6


@pytest.mark.parametrize("waits", [False, True])
def test_an_interruption_of_the_engine_is_told_as_one(caplog, monkeypatch, waits):
    """Where it came while the model wrote, it was an error of the engine, with a traceback, and the command's exit code was 2."""
    engine = PolicyEngine(decoder(), slots=2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._loop, "_schedule_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.play([Hostile(), Hostile()], [0, 1], DRAWN, waits=waits)
    assert not caplog.records


@pytest.mark.parametrize("waits", [False, True])
def test_an_engine_that_fails_says_so_and_by_what(monkeypatch, waits):
    """What it had failed by came bare, once an interruption was told as one."""
    engine, error = PolicyEngine(decoder(), slots=2), RuntimeError("out of memory")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(engine._loop, "_schedule_step", fails)
    with pytest.raises(AnabranchError, match=r"^the engine failed: RuntimeError: out of memory$") as raised:
        engine.play([Hostile(), Hostile()], [0, 1], DRAWN, waits=waits)
    assert raised.value.__cause__ is error
    # It stays so.
    with pytest.raises(AnabranchError, match="the engine has ended: RuntimeError: out of memory"):
        engine.play([Hostile()], [0], DRAWN, waits=waits)


def test_an_interruption_does_not_wait_for_whoever_is_in_a_world():
    """A Ctrl-C was held up for as long as a model that hangs may take."""
    inside, is_over, left = threading.Event(), threading.Event(), []

    class Waits(Hostile):
        def step(self, turn):
            inside.set()
            left.append(is_over.wait(600))
            return Told((), True)

    class Interrupted(Hostile):
        def step(self, turn):
            inside.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PolicyEngine(decoder(), slots=2).play([Waits(), Interrupted()], [0, 1], DRAWN, waits=True)
    assert left == []
    is_over.set()
    until(lambda: left)


@pytest.mark.parametrize(
    "error", [LimitError("nobody may be asked"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_whoever_waits_in_a_world_does_not_where_the_episodes_end_early(error):
    over, waiting, waited = threading.Event(), threading.Barrier(2), []

    class Waits(Hostile):
        def step(self, turn):
            waiting.wait(60)
            waited.append(over.wait(60))
            return Told((), True)

    class Fails(Hostile):
        def step(self, turn):
            waiting.wait(60)
            raise error

    engine = PolicyEngine(decoder(), slots=2)
    with pytest.raises(type(error)):
        engine.play([Waits(), Fails()], [0, 1], DRAWN, waits=True, over=over)
    # An interruption does not wait for whoever is in a world.
    until(lambda: waited)
    assert waited == [True]
    # Episodes that end by themselves set nothing.
    over.clear()
    PolicyEngine(decoder(), slots=2).play([Hostile(told=())], [0], DRAWN, waits=True, over=over)
    assert not over.is_set()


def test_worlds_that_wait_are_answered_side_by_side_and_nothing_is_mixed_up():
    class Slow(Hostile):
        running, most = 0, 0
        lock = threading.Lock()
        # Where none goes on alone: each is met by another in its first step.
        both = None

        def step(self, turn):
            self.steps += 1
            with self.lock:
                Slow.running += 1
                Slow.most = max(Slow.most, Slow.running)
            if Slow.both is not None and self.steps == 1:
                Slow.both.wait(60)
            with self.lock:
                Slow.running -= 1
            return Told((INFO,), self.steps == 3)

    engine = PolicyEngine(decoder(), slots=6)
    plays = [Slow() for _ in range(6)]
    Slow.both = threading.Barrier(2)
    waited = engine.play(plays, list(range(6)), DRAWN, waits=True)
    Slow.both = None
    assert Slow.most > 1
    at_once = engine.play([Slow() for _ in range(6)], list(range(6)), DRAWN)
    assert [each.tokens for each in waited] == [each.tokens for each in at_once]
    assert all(each.turns == 3 for each in waited)
    failing = [Hostile(error=DataError("gone")), *(Slow() for _ in range(3))]
    with pytest.raises(DataError, match="gone"):
        engine.play(failing, list(range(4)), DRAWN, waits=True)

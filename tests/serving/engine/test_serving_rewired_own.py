"""What a request says of its routers for itself: where it begins, how they are turned, and that this is nobody else's matter."""

from dataclasses import fields as fields_of

import pytest
import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.adapters.rewiring.state import MOST_SHIFT
from anabranch.errors import ConfigError, InputError
from anabranch.lm import SamplingConfig
from anabranch.serving import LLM, Output, Request, Sampling
from anabranch.serving.core.client import FieldInputError
from anabranch.serving.core.rewires import SETTINGS, Rewires
from anabranch.serving.core.stream import joined
from anabranch.serving.engine.messages import Add
from anabranch.serving.rewiring import LIMITED, RewiringConfig

PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 16, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 3, "long_prefill_chunk": 5}
QUICK = {"interval": 4, "steps": 2, "eta": 0.5, "scale_step": False, "least_tail": 4}
SAMPLING = Sampling(temperature=0.0, max_tokens=11, ignore_eos=True, logprobs=5)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=11)


def prompt_of(length, seed):
    return tuple(torch.randint(31, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


PROMPTS = {"one": prompt_of(20, 0), "two": prompt_of(9, 1), "three": prompt_of(33, 2), "four": prompt_of(1, 3)}


def serve(model, requests, settings=QUICK, limits=None, **config):
    """{id: what came of it} of (prompt, rewires) that come all at once."""
    rewiring = RewiringConfig(on=True, settings=dict(settings), limits=limits or {})
    llm = LLM(model, rewiring=rewiring, **{**PLENTY, **config})
    try:
        for id, (prompt, rewires) in requests.items():
            llm._loop.put(Add(Request(id=id, prompt=prompt, sampling=SAMPLING, rewires=rewires)))
        llm._loop.run(until_idle=True)
        made = {}
        for event in llm._events:
            if isinstance(event, Output):
                made[event.id] = joined(made[event.id], event) if event.id in made else event
        return made
    finally:
        llm.close()


def rerouter_of(model, **changes):
    return Rerouter(model, RewiringConfig(on=True, settings={**QUICK, **changes}).rewiring)


def alone(rerouter, prompt, state=None):
    """(tokens, state) of what a rerouter makes of it."""
    state = state or rerouter.new_state()
    [tokens] = rerouter.generate([prompt], GREEDY, states=[state])
    return tuple(tokens), state


def told_without_time(told):
    return {**told, "seconds": 0}


@pytest.mark.parametrize("memory", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_conversation_goes_on_with_what_it_was_told(tiny_model, memory):
    """In the next request, beside others, as a rerouter goes on with its state."""
    model, rerouter = tiny_model(), rerouter_of(tiny_model())
    back = {"return_state": True}
    first = serve(model, {name: (prompt, back) for name, prompt in PROMPTS.items()}, **memory)
    longer = {name: (*prompt, *first[name].tokens, 3, 1, 4, 1, 5) for name, prompt in PROMPTS.items()}
    requests = {name: (prompt, {**back, "state": first[name].rewire_state}) for name, prompt in longer.items()}
    requests |= {f"anew {name}": (prompt, True) for name, prompt in longer.items()}
    second, differs = serve(model, requests, **memory), 0
    for name, prompt in PROMPTS.items():
        tokens, state = alone(rerouter, prompt)
        assert (first[name].tokens, told_without_time(first[name].rewire_state)) == (
            tokens,
            told_without_time(rerouter.told_state(state)),
        )
        state.go_on()
        tokens, state = alone(rerouter, longer[name], state)
        assert second[name].tokens == tokens, name
        assert told_without_time(second[name].rewire_state) == told_without_time(rerouter.told_state(state))
        assert second[name].rewire_state["seconds"] > first[name].rewire_state["seconds"]
        assert second[f"anew {name}"].rewire_state is None
        differs += second[name].tokens != second[f"anew {name}"].tokens
    assert differs


def extreme(model, way):
    """A state that takes routers as far as a state may."""
    rerouter = rerouter_of(model)
    state = rerouter.new_state()
    random = torch.Generator().manual_seed(0)
    for delta_E in state.delta:
        if way == "one":
            delta_E[:] = torch.tensor([MOST_SHIFT] + [-MOST_SHIFT] * (len(delta_E) - 1))
        elif way == "all":
            delta_E[:] = MOST_SHIFT
        else:
            delta_E[:] = (torch.rand(delta_E.shape, generator=random) - 0.5) * 2 * MOST_SHIFT
    return rerouter.told_state(state)


@pytest.mark.parametrize("memory", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_hostile_state_changes_no_bit_of_others(tiny_model, memory):
    """Of the same prompts, plain and turned, in the same steps; and of the first of them what it makes of itself are numbers."""
    model = tiny_model()
    own = {
        f"{kind} {name}": (prompt, kind == "turned") for name, prompt in PROMPTS.items() for kind in ("plain", "turned")
    }
    wild = {"guard": False, "eta": 1e37, "steps": 2, "return_state": True}
    hostile = {
        f"hostile {way} {name}": (prompt, {**wild, "state": extreme(model, way)})
        for name, prompt in PROMPTS.items()
        for way in ("one", "all", "random")
    }
    single = {}
    for id, request in own.items():
        single |= serve(model, {id: request}, deterministic=True, **memory)
    for requests in (own | hostile, hostile | own):
        beside = serve(model, requests, deterministic=True, scheduling="async", **memory)
        for id in own:
            assert (beside[id].tokens, beside[id].logprobs) == (single[id].tokens, single[id].logprobs), id
        for id in hostile:
            assert len(beside[id].tokens) == SAMPLING.max_tokens, beside[id].error
            assert all(one.logprob > -float("inf") for one in beside[id].logprobs)
            rerouter_of(model).state_from_told(beside[id].rewire_state)


def test_a_state_counts_where_nothing_is_fitted(tiny_model):
    """A prompt too short for the guard, a limit of no step at all: the vectors that came are those that it runs with."""
    model = tiny_model()
    rerouter = rerouter_of(model, most_steps=0)
    _, state = alone(rerouter_of(model, eta=5.0, guard=False), PROMPTS["three"])
    told = rerouter.told_state(state)
    wanted = {"state": told, "most_steps": 0, "return_state": True}
    made = serve(model, {"with": (PROMPTS["two"], wanted), "without": (PROMPTS["two"], {"most_steps": 0})})
    state.go_on()
    assert made["with"].tokens == alone(rerouter, PROMPTS["two"], state)[0]
    assert made["with"].logprobs != made["without"].logprobs
    assert made["with"].rewire_state == told


def test_chains_that_begin_alike_are_fitted_once_and_others_are_not(tiny_model):
    model = tiny_model()
    [told] = [one.rewire_state for one in serve(model, {"x": (PROMPTS["three"], {"return_state": True})}).values()]
    more = {**told, "steps": told["steps"] + 1}
    rewiring = RewiringConfig(on=True, settings={**QUICK, "interval": None})
    llm = LLM(model, rewiring=rewiring, **PLENTY)
    later = {**told, "seconds": told["seconds"] + 1}
    each = [
        {"state": told},
        {"state": told},
        {"state": more},
        {"state": later},
        {},
        True,
        {"steps": 1},
        {"steps": 1},
        {"eta": 0.25},
    ]
    for number, rewires in enumerate(each):
        llm._loop.put(
            Add(Request(id=str(number), prompt=PROMPTS["one"], sampling=Sampling(max_tokens=1), rewires=rewires))
        )
    llm._loop.run(until_idle=True)
    assert llm.engine.rewired.stats().counters["rewiring_phases"] == 6
    llm.close()


@pytest.mark.parametrize("cut", [False, True])
def test_a_state_is_read_once_and_told_as_the_request_ends(tiny_model, monkeypatch, cut):
    """Behind each phase too, where whoever reads may end it at any token."""
    calls = {"state_from_told": [], "told_state": []}
    for name, seen in calls.items():
        real = getattr(Rerouter, name)
        monkeypatch.setattr(Rerouter, name, lambda *args, real=real, seen=seen: seen.append(args[1]) or real(*args))
    model = tiny_model()
    llm = LLM(model, rewiring=RewiringConfig(on=True, settings=QUICK), **PLENTY)
    rerouter = rerouter_of(model)
    begun = 7
    told = {**rerouter.told_state(rerouter.new_state()), "steps": begun}
    calls["told_state"].clear()
    wanted = Rewires(state=told, returns_state=True, may_be_cut=cut)
    [made] = llm.generate([PROMPTS["one"]], SAMPLING, rewires=wanted)
    # Of this request, whatever the conversation has taken before.
    counted = llm.engine.rewired.stats().counters["rewiring_steps"]
    assert counted == sum(phase["steps"] for phase in made.output.rewiring)
    phases = len(made.output.rewiring)
    assert phases > 2
    assert made.output.rewire_state["steps"] == begun + sum(phase["steps"] for phase in made.output.rewiring)
    assert len(calls["state_from_told"]) == 1
    assert len(calls["told_state"]) == (phases + 1 if cut else 1)
    # Whoever begins with the same words begins where they say, and not where the first has come.
    [again] = llm.generate([PROMPTS["one"]], SAMPLING, rewires=wanted)
    assert told_without_time(again.output.rewire_state) == told_without_time(made.output.rewire_state)
    llm.close()


OWN = {
    "as the server": {},
    "one step": {"steps": 1},
    "longer": {"interval": 7},
    "the prompt alone": {"interval": None},
    "a window": {"window": 8, "least_tail": 2},
    "no guard": {"guard": False, "eta": 0.1},
    "a part of the layers": {"select": "decisive", "r": 0.5},
    "softly": {"select": "uncertain", "choice": "soft", "optimizer": "sgd"},
    "scaled": {"scale_step": True, "full_step_at": 64, "tail": 0.2},
    "three steps in all": {"most_steps": 3},
}


@pytest.mark.parametrize("memory", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_each_request_has_the_settings_that_it_asks_for(tiny_model, memory):
    """All in one batch: what a rerouter with these settings makes of each alone."""
    model = tiny_model()
    asked = {f"{way} {name}": (PROMPTS[name], own) for way, own in OWN.items() for name in ("one", "three")}
    made = serve(model, asked, **memory)
    for id, (prompt, own) in asked.items():
        tokens, state = alone(rerouter_of(model, **own), prompt)
        assert made[id].tokens == tokens, id
        told = [(phase["length"], phase["steps"], phase["scale"]) for phase in made[id].rewiring]
        assert told == [(phase.length, phase.steps, phase.scale) for phase in state.phases], id
    assert len({made[f"{way} three"].tokens for way in OWN}) > 1


LIMITS = {"steps": 4, "interval": 2, "window": 64, "most_steps": 10, "most_seconds": 100.0}


@pytest.mark.parametrize(
    ("own", "field", "says"),
    [
        ({"steps": 5}, "rewire.steps", "rewire.steps is 5; it may be 4 or less here"),
        ({"interval": 1}, "rewire.interval", "rewire.interval is 1; it may be 2 or more, or left out here"),
        ({"window": 65}, "rewire.window", "rewire.window is 65; it may be 64 or less"),
        ({"window": None}, "rewire.window", "rewire.window is null; it may be 64 or less"),
        ({"most_steps": 11}, "rewire.most_steps", "is 11; it may be 10 or less"),
        ({"most_steps": None}, "rewire.most_steps", "is null; it may be 10 or less"),
        ({"most_seconds": 100.5}, "rewire.most_seconds", "is 100.5; it may be 100.0 or less"),
        ({"most_seconds": None}, "rewire.most_seconds", "is null"),
        ({"eta": 0}, "rewire.eta", "rewire.eta is 0"),
        ({"eta": float("nan")}, "rewire.eta", "eta is nan"),
        ({"steps": True}, "rewire.steps", "rewire.steps is true|rewire.steps is True"),
        ({"steps": "3"}, "rewire.steps", "rewire.steps"),
        ({"select": "some"}, "rewire.select", "rewire.select"),
        ({"window": 3}, "rewire.window", "window is 3, of which the guard holds back 4"),
        ({"state": 3}, "rewire.state", "rewire.state cannot be gone on with: it is no state of a rewired request"),
    ],
)
def test_what_a_request_may_not_have(tiny_model, own, field, says):
    settings = {**QUICK, "window": 32, "most_steps": 6, "most_seconds": 50.0}
    llm = LLM(tiny_model(), rewiring=RewiringConfig(on=True, settings=settings, limits=LIMITS), **PLENTY)
    with pytest.raises(FieldInputError, match=says) as raised:
        llm.generate([PROMPTS["one"]], SAMPLING, rewires=own)
    assert raised.value.field == field
    # As far as it may go.
    assert len(llm.generate([PROMPTS["one"]], SAMPLING, rewires=LIMITS)[0].output.rewiring) == 6
    llm.close()


def test_names_that_there_are_not():
    with pytest.raises(InputError, match="rewire has no field 'stepz'; did you mean 'steps'"):
        Request(id="x", prompt=(1,), rewires={"stepz": 3})
    with pytest.raises(InputError, match="rewire has no field 'cache'; it takes eta, steps"):
        Request(id="x", prompt=(1,), rewires={"cache": "keep"})
    with pytest.raises(InputError, match="rewire has no field 3"):
        Request(id="x", prompt=(1,), rewires={3: 4})
    with pytest.raises(InputError, match=r"rewire\.return_state is 1; it must be true or false"):
        Request(id="x", prompt=(1,), rewires={"return_state": 1})
    assert Request(id="x", prompt=(1,), rewires={}).rewires == Rewires()


def test_every_setting_is_a_requests_or_the_servers():
    names = {field.name for field in fields_of(Rewiring)}
    assert set(SETTINGS) == names - {"cache", "checkpointing"}
    assert set(LIMITED) < set(SETTINGS)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"stepz": 3}, "limits has no 'stepz'; did you mean 'steps'"),
        ({"eta": 3.0}, "limits has no 'eta'; it has steps, interval"),
        ({"steps": 0}, "limits.steps is 0"),
        ({"steps": 1}, r"settings.steps is 2; it may be 1 or less here \(limits\)"),
        ({"interval": 5}, "settings.interval is 4; it may be 5 or more, or null here"),
        ({"interval": None}, "settings.interval is 4; it may be null here"),
        ({"window": 100}, "settings.window is 512; it may be 100 or less"),
        # Too little for the guard, which is no matter of the limits.
        ({"window": 5}, "settings.window is 512; it may be 5 or less"),
        ({"most_steps": 3}, "settings.most_steps is null; it may be 3 or less"),
    ],
)
def test_limits_that_cannot_be(limits, says):
    with pytest.raises(ConfigError, match=says):
        RewiringConfig(on=True, settings=QUICK, limits=limits)
    with pytest.raises(ConfigError, match="limits is given, but on is not"):
        RewiringConfig(limits=limits)


def test_without_limits_a_request_may_ask_for_less_alone():
    config = RewiringConfig(on=True, settings={**QUICK, "interval": None})
    assert config.of_request({"steps": 1, "window": 100, "most_steps": 1}).steps == 1
    for own in ({"steps": 3}, {"interval": 10**6}, {"window": None}):
        with pytest.raises(ConfigError, match=r"engine\.rewiring\.limits"):
            config.of_request(own)

"""Requests whose routers are turned to their text: what a `Rerouter` makes of each alone, whoever is beside it."""

import threading
import time

import pytest
import torch

from anabranch.adapters.rewiring import Rerouter
from anabranch.errors import ConfigError, InputError
from anabranch.lm import SamplingConfig, generate, save_model
from anabranch.nn import MoE, SwiGLU
from anabranch.serving import LLM, Finish, Output, Request, Sampling
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.client import FieldInputError
from anabranch.serving.engine.messages import Abort, Add, Pause, Resume
from anabranch.serving.engine.rewired import check_rewired
from anabranch.serving.load import load_weights
from anabranch.serving.rewiring import WINDOW, RewiringConfig

PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 16, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 3, "long_prefill_chunk": 5}
QUICK = {"interval": 4, "steps": 2, "eta": 0.5, "scale_step": False, "least_tail": 4}
SAMPLING = Sampling(temperature=0.0, max_tokens=11, ignore_eos=True, logprobs=5)
PLAIN = Sampling(temperature=0.8, seed=3, max_tokens=11, ignore_eos=True, logprobs=5)


def prompt_of(length, seed):
    return tuple(torch.randint(31, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


PROMPTS = {"one": prompt_of(20, 0), "two": prompt_of(9, 1), "three": prompt_of(33, 2), "four": prompt_of(1, 3)}


def engine(model, settings=QUICK, **config):
    return LLM(model, rewiring=RewiringConfig(on=True, settings=dict(settings)), **config)


def gathered(llm):
    """{id: what came of it} of all outputs."""
    made = {}
    for event in (event for event in llm._events if isinstance(event, Output)):
        whole = made.setdefault(event.id, {"tokens": (), "logprobs": (), "rewiring": (), "finish": None, "error": None})
        for name in ("tokens", "logprobs", "rewiring"):
            whole[name] += getattr(event, name)
        whole["finish"], whole["error"] = event.finish, event.error
    return made


def serve(model, requests, settings=QUICK, **config):
    """{id: what came of it} of requests that come all at once, those that say it rewired: {id: (prompt, sampling)}."""
    llm = engine(model, settings, **config)
    try:
        for id, (prompt, sampling) in requests.items():
            llm._loop.put(Add(Request(id=id, prompt=prompt, sampling=sampling, rewires=id.startswith("turned"))))
        llm._loop.run(until_idle=True)
        return gathered(llm)
    finally:
        llm.close()


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("memory", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_each_request_is_what_a_rerouter_makes_of_it_alone(tiny_model, memory, scheduling):
    """All at once, in chunks, preempted, beside plain ones of the same prompts."""
    model = tiny_model()
    requests = {
        f"{kind} {name}": (prompt, SAMPLING) for name, prompt in PROMPTS.items() for kind in ("turned", "plain")
    }
    outputs = serve(model, requests, scheduling=scheduling, **memory)
    greedy = SamplingConfig(temperature=0.0, max_tokens=SAMPLING.max_tokens)
    differs = 0
    for name, prompt in PROMPTS.items():
        turned = Rerouter(model, RewiringConfig(on=True, settings=QUICK).rewiring)
        state = turned.new_state()
        expected = tuple(turned.generate([prompt], greedy, states=[state])[0])
        assert outputs[f"turned {name}"]["tokens"] == expected, name
        told = outputs[f"turned {name}"]["rewiring"]
        assert [phase["length"] for phase in told] == [phase.length for phase in state.phases]
        assert [phase["scale"] for phase in told] == [phase.scale for phase in state.phases]
        plain = tuple(generate(model, [prompt], greedy)[0])
        assert outputs[f"plain {name}"]["tokens"] == plain, name
        assert outputs[f"plain {name}"]["rewiring"] == ()
        differs += plain != expected
    assert differs


@pytest.mark.parametrize("memory", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_hostile_neighbour_changes_no_bit(tiny_model, memory):
    """Neighbours have the same prompts and turn their routers as far as they can; what each gets is what it gets alone."""
    model = tiny_model()
    wild = {**QUICK, "eta": 50.0, "guard": False, "interval": 1}
    own = {f"plain {name}": (prompt, PLAIN) for name, prompt in PROMPTS.items()}
    turned = {f"turned {name}": (prompt, PLAIN) for name, prompt in PROMPTS.items()}
    alone = {}
    for id, request in (own | turned).items():
        alone |= serve(model, {id: request}, wild, deterministic=True, **memory)
    for requests in (own | turned, turned | own):
        beside = serve(model, requests, wild, deterministic=True, scheduling="async", **memory)
        for id in requests:
            without_time = [[{**phase, "seconds": 0.0} for phase in one[id]["rewiring"]] for one in (beside, alone)]
            assert without_time[0] == without_time[1], id
            assert {**beside[id], "rewiring": ()} == {**alone[id], "rewiring": ()}, id
    assert any(alone[f"plain {name}"]["logprobs"] != alone[f"turned {name}"]["logprobs"] for name in PROMPTS)


def test_chains_of_one_prompt_are_fitted_once_and_go_on_apart(tiny_model):
    llm = engine(tiny_model(), **PLENTY)
    samplings = [Sampling(temperature=1.0, seed=seed, max_tokens=9, ignore_eos=True) for seed in range(4)]
    made = llm.generate([PROMPTS["one"]] * 4, samplings, rewires=True)
    counts = llm.engine.rewired.stats().counters
    llm.close()
    assert len({one.tokens for one in made}) > 1
    # One of the prompt, two more of each chain.
    assert counts["rewiring_phases"] == 1 + 4 * 2
    assert all(len(one.output.rewiring) == 3 for one in made)
    for one, sampling in zip(made, samplings, strict=True):
        alone = engine(tiny_model(), **PLENTY)
        assert alone.generate([one.prompt], sampling, rewires=True)[0].tokens == one.tokens
        alone.close()


def test_others_with_another_salt_are_fitted_for_themselves(tiny_model):
    llm = engine(tiny_model(), **PLENTY)
    for number, salt in enumerate(("", "a", "b")):
        llm._loop.put(
            Add(
                Request(
                    id=str(number),
                    prompt=PROMPTS["one"],
                    cache_salt=salt,
                    rewires=True,
                    sampling=Sampling(max_tokens=1),
                )
            )
        )
    llm._loop.run(until_idle=True)
    assert llm.engine.rewired.stats().counters["rewiring_phases"] == 3
    llm.close()


def test_a_phase_of_the_prompt_alone_and_seeds_and_stops(tiny_model):
    """Without an interval nothing waits; what a request has sampled before a phase is sampled by no other numbers behind it."""
    model, settings = tiny_model(), {**QUICK, "interval": None}
    [told] = serve(model, {"turned": (PROMPTS["one"], SAMPLING)}, settings, **PLENTY).values()
    assert len(told["rewiring"]) == 1
    assert len(told["tokens"]) == SAMPLING.max_tokens
    # Vectors that are never changed, with phases between: the same numbers are drawn.
    still = {**QUICK, "most_steps": 0}
    outputs = serve(model, {"turned": (PROMPTS["one"], PLAIN), "plain": (PROMPTS["one"], PLAIN)}, still, **PLENTY)
    assert outputs["turned"]["tokens"] == outputs["plain"]["tokens"]
    assert len(outputs["turned"]["rewiring"]) == 3
    stop = outputs["plain"]["tokens"][4]
    short = serve(
        model, {"turned": (PROMPTS["one"], Sampling(**{**fields(PLAIN), "stop_tokens": (stop,)}))}, still, **PLENTY
    )
    assert short["turned"]["finish"] is Finish.STOP


def fields(sampling):
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}


def test_one_that_is_aborted_or_paused_while_it_is_turned(tiny_model):
    """Its phase ends at its next step, others are not held up, and its id may come again."""
    llm = engine(tiny_model(), {**QUICK, "steps": 10**6, "guard": False}, **PLENTY)
    fast = Request(id="plain", prompt=PROMPTS["two"], sampling=SAMPLING)
    llm._loop.put(Add(Request(id="turned", prompt=PROMPTS["one"], sampling=SAMPLING, rewires=True)))
    llm._loop.put(Add(fast))
    running = threading.Thread(target=lambda: llm._loop.run(until_idle=True))
    running.start()
    deadline = time.monotonic() + 120
    while not any(isinstance(event, Output) and event.id == "plain" and event.finish for event in list(llm._events)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any(isinstance(event, Output) and event.id == "turned" and not event.is_bare for event in llm._events)
    llm._loop.put(Pause("turned"))
    llm._loop.put(Resume("turned"))
    llm._loop.put(Abort("turned"))
    running.join(120)
    assert not running.is_alive()
    assert gathered(llm)["turned"]["finish"] is Finish.ABORT
    # The thread is free again.
    llm.engine.rewired.config, llm.engine.rewired._rerouter.config = [
        RewiringConfig(on=True, settings=QUICK).rewiring
    ] * 2
    again = llm.generate([PROMPTS["two"]], SAMPLING, rewires=True)
    assert len(again[0].tokens) == SAMPLING.max_tokens
    assert not llm.engine.rewired._requests
    assert not llm.engine.rewired._first
    llm.close()


def test_a_reader_that_is_slow_holds_a_turned_request_and_no_other(tiny_model):
    """Paused by its reader in the midst of a phase, it goes on when both have an end."""
    llm = engine(tiny_model(), **PLENTY)
    llm._loop.put(Add(Request(id="turned", prompt=PROMPTS["one"], sampling=SAMPLING, rewires=True)))
    loop, scheduler, seen = llm._loop, llm.engine.scheduler, []
    turn = loop._turn_of

    def slow(output):
        future = turn(output)
        if future is not None:
            seen.append(output.id)
            loop.put(Pause(output.id))
        return future

    loop._turn_of = slow
    running = threading.Thread(target=lambda: loop.run(until_idle=True))
    running.start()
    deadline = time.monotonic() + 120
    while running.is_alive():
        assert time.monotonic() < deadline
        states = scheduler.states()
        if states and states[0].holds == {"reader"}:
            length = len(states[0].tokens)
            time.sleep(0.02)
            assert len(states[0].tokens) == length
            loop.put(Resume("turned"))
        time.sleep(0.002)
    assert seen == ["turned"] * 2
    alone = serve(tiny_model(), {"turned": (PROMPTS["one"], SAMPLING)}, **PLENTY)
    assert gathered(llm)["turned"]["tokens"] == alone["turned"]["tokens"]
    llm.close()


def test_a_phase_that_fails_ends_its_request_alone(tiny_model):
    model = tiny_model()
    alone = serve(model, {"plain": (PROMPTS["two"], SAMPLING)}, deterministic=True, **PLENTY)
    llm = engine(model, deterministic=True, **PLENTY)
    adapt, calls = llm.engine.rewired._rerouter.adapt, []

    def failing(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room for gradients")
        return adapt(*arguments, **more)

    llm.engine.rewired._rerouter.adapt = failing
    llm._loop.put(Add(Request(id="turned", prompt=PROMPTS["one"], sampling=SAMPLING, rewires=True)))
    llm._loop.put(Add(Request(id="plain", prompt=PROMPTS["two"], sampling=SAMPLING)))
    llm._loop.run(until_idle=True)
    made = gathered(llm)
    assert (made["turned"]["finish"], made["turned"]["error"]) == (Finish.ERROR, "no room for gradients")
    assert len(made["turned"]["tokens"]) == QUICK["interval"]
    assert made["plain"] == alone["plain"]
    calls[:] = [1]
    llm._events.clear()
    with pytest.raises(InputError, match="no room for gradients"):
        llm.generate([PROMPTS["one"]], SAMPLING, rewires=True)
    llm.close()


def test_what_cannot_be_is_refused(tiny_model):
    model = tiny_model()
    plain = LLM(model, **PLENTY)
    with pytest.raises(InputError, match="turns no routers"):
        plain.generate([PROMPTS["one"]], rewires=True)
    plain.close()
    llm = engine(model, **PLENTY)
    for more, name in (
        ({"num_streams": 1}, "num_streams"),
        ({"path": (0, 1)}, "depth"),
        ({"task": "law"}, "task"),
        ({"adapters": {"law": 1.0}}, "adapters"),
    ):
        with pytest.raises(InputError, match=f"rewire is set, which does not go with {name}"):
            llm.generate([PROMPTS["one"]], rewires=True, **more)
    with pytest.raises(InputError, match="rewires is 1"):
        llm.generate([PROMPTS["one"]], rewires=1)
    llm.close()
    with pytest.raises(ConfigError, match="has no router that chooses experts"):
        engine(tiny_model(feed_forward=SwiGLU.Config(hidden_dim=8)), **PLENTY)


@pytest.mark.parametrize("bits", ["int8", "int4", "nf4"])
def test_models_in_few_bits_are_turned_as_a_rerouter_turns_them(bits, tiny_model, tmp_path):
    model = tiny_model(dim=64, feed_forward=MoE.Config(num_experts=4, hidden_dim=32))
    save_model(tmp_path / "m", model, None)
    requests = {f"{kind} {name}": (PROMPTS[name], SAMPLING) for name in ("one", "two") for kind in ("turned", "plain")}
    outputs = serve(str(tmp_path / "m"), requests, quantize=bits, dtype="float32", process=False, **PLENTY)
    few = load_weights(tmp_path / "m", dtype=torch.float32, quantize=bits).model
    greedy = SamplingConfig(temperature=0.0, max_tokens=SAMPLING.max_tokens)
    for name in ("one", "two"):
        turned = Rerouter(few.eval(), RewiringConfig(on=True, settings=QUICK).rewiring)
        state = turned.new_state()
        assert outputs[f"turned {name}"]["tokens"] == tuple(turned.generate([PROMPTS[name]], greedy, states=[state])[0])
        assert [phase["length"] for phase in outputs[f"turned {name}"]["rewiring"]] == [
            one.length for one in state.phases
        ]
        assert sum(phase.steps for phase in state.phases) > 0
        assert outputs[f"plain {name}"]["tokens"] == tuple(generate(few, [PROMPTS[name]], greedy)[0])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"expert_budget": "1GiB"}, "does not go with expert_budget"),
        ({"memory": "1GiB"}, "does not go with memory"),
        ({"nano_batches": True}, "does not go with nano_batches"),
        ({"num_streams": 2}, "does not go with num_streams"),
        ({"prompt_lookup": 3}, "does not go with prompt_lookup"),
    ],
)
def test_engines_that_cannot_be(config, says):
    with pytest.raises(ConfigError, match=says):
        ServingConfig(rewiring=RewiringConfig(on=True), **config)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="settings is given, but on is not"):
        RewiringConfig(settings={"steps": 3})
    with pytest.raises(ConfigError, match=r"settings.*no field 'step'|settings.step"):
        RewiringConfig(on=True, settings={"step": 3})
    with pytest.raises(ConfigError, match=r"settings\.steps is 0"):
        RewiringConfig(on=True, settings={"steps": 0})
    with pytest.raises(ConfigError, match="always computes keys and values again"):
        RewiringConfig(on=True, settings={"cache": "keep"})
    assert RewiringConfig(on=True).rewiring.window == WINDOW
    assert RewiringConfig(on=True, settings={"window": None}).rewiring.window is None


class SetsAside:
    """A lock behind which this thread is set aside until all phases have ended, as an operating system may."""

    def __init__(self, rewired):
        self._lock, self._of, self._worker = threading.Lock(), threading.current_thread(), rewired._worker

    def __enter__(self):
        return self._lock.__enter__()

    def __exit__(self, *error):
        self._lock.__exit__(*error)
        if threading.current_thread() is self._of:
            self._worker.submit(int).result(timeout=60)


def test_a_phase_that_ends_before_its_request_goes_on_tells_it(tiny_model):
    llm = engine(tiny_model(), **PLENTY)
    rewired = llm.engine.rewired
    usual, rewired._lock = rewired._lock, SetsAside(rewired)
    future = rewired.prepare(Request(id="a", prompt=PROMPTS["two"], sampling=SAMPLING, rewires=True))
    rewired._lock = usual
    assert future.done()
    llm.close()


@pytest.fixture
def held(tiny_model):
    """(an engine's rewired requests, a gate behind which all phases wait)."""
    llm = engine(tiny_model(), {**QUICK, "guard": False}, **PLENTY)
    rewired, gate = llm.engine.rewired, threading.Event()
    rewired._worker.submit(gate.wait, 60)
    yield rewired, gate
    gate.set()
    llm.close()


def asked(id, name, **more):
    return Request(id=id, prompt=PROMPTS[name], sampling=SAMPLING, **{"rewires": True, **more})


def test_an_id_that_comes_again_has_nothing_of_the_phase_of_the_one_before(held):
    """Others that began alike go on with that."""
    rewired, gate = held
    gone, other = rewired.prepare(asked("a", "one")), rewired.prepare(asked("b", "one"))
    assert rewired._requests["a"].phase is rewired._requests["b"].phase
    rewired.release("a")
    assert gone.cancelled()
    again = rewired.prepare(asked("a", "two"))
    gate.set()
    assert other.result(60).id == "b"
    assert again.result(60).prompt == PROMPTS["two"]
    assert [phase.length for phase in rewired._requests["a"].state.phases] == [len(PROMPTS["two"])]
    assert rewired._requests["a"].turns == 1


def test_who_begins_alike_does_not_join_a_phase_that_nobody_waits_for(held):
    rewired, gate = held
    rewired.prepare(asked("a", "one"))
    left = rewired._requests["a"].phase
    rewired.release("a")
    future = rewired.prepare(asked("b", "one"))
    assert rewired._requests["b"].phase is not left
    gate.set()
    assert future.result(60).id == "b"


def test_phases_wait_by_priority_and_whoever_takes_more_steps_waits_more_often(held):
    rewired, _ = held
    rewired.prepare(asked("a", "one", priority=5))
    rewired.prepare(asked("b", "two", rewires={"steps": 1}))
    phases = {id: one.phase for id, one in rewired._requests.items()}
    assert {id: phase.rank[0] for id, phase in phases.items()} == {"a": 5, "b": 0}
    assert {id: phase.cost for id, phase in phases.items()} == {
        "a": len(PROMPTS["one"]) * QUICK["steps"],
        "b": len(PROMPTS["two"]),
    }


def test_an_engine_that_ends_drops_the_phase_under_way(tiny_model):
    llm = engine(tiny_model(), {**QUICK, "steps": 10**6, "guard": False}, **PLENTY)
    rewired = llm.engine.rewired
    # Its request still waits.
    future = rewired.prepare(asked("a", "one"))
    llm.close()
    deadline = time.monotonic() + 60
    while not future.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert future.cancelled()


def test_behind_the_last_token_nothing_is_fitted(tiny_model):
    llm = engine(tiny_model(), **PLENTY)
    sampling = Sampling(temperature=0.0, max_tokens=2 * QUICK["interval"], ignore_eos=True)
    [made] = llm.generate([PROMPTS["one"]], sampling, rewires=True)
    llm.engine.rewired._worker.submit(int).result(60)
    assert llm.engine.rewired.stats().counters["rewiring_phases"] == len(made.output.rewiring) == 2
    llm.close()


def test_the_model_wants_no_gradient_and_is_fitted_beside_itself(tiny_model):
    model = tiny_model().requires_grad_(True)
    llm = engine(model, **PLENTY)
    assert not any(one.requires_grad for one in model.parameters())
    beside = llm.engine.rewired._rerouter.model
    assert not {*beside.modules()} & {*model.modules()}
    assert {*map(id, beside.parameters())} == {*map(id, model.parameters())}
    llm.close()


def test_a_vector_of_a_text_is_of_no_turned_request(held):
    with pytest.raises(FieldInputError, match="rewire is set, which does not go with pooling"):
        check_rewired(asked("a", "one", pooling="mean"), held[0])

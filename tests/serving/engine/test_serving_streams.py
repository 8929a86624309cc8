"""Requests with other numbers of parallel streams: each gets what `generate` gives with that number, whoever is beside it."""

import re

import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.experts.parscale import ParScale
from anabranch.lm import SamplingConfig, generate
from anabranch.nn import SwiGLU
from anabranch.routing import Override, record_routing
from anabranch.serving import LLM, Finish, Output, Request, Sampling
from anabranch.serving.core.hooks import RequestOverride
from anabranch.serving.core.scheduler import SchedulerConfig
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.runner import ModelRunner

PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 8, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=5)
PROMPTS = {
    "one": (1, 2, 3, 4, 5, 6),
    "two": (7,),
    "three": (8, 9, 10, 11, 12, 13, 14, 15, 16),
    "four": (3, 1, 4, 1, 5, 9, 2, 6),
}
STREAMS = (1, 2, 3, None)  # None for the engine's number
MIXED = {f"{number} {which}": number for which in PROMPTS for number in STREAMS}


@pytest.fixture(scope="module")
def config():
    return ParScale.Config(num_streams=3, switchable=(2,), prefix_len=3, prefix="direct", prefix_std=1.0)


@pytest.fixture(scope="module")
def model(tiny_model, config):
    return tiny_model().config.replace(streams=config).build(seed=0).eval()


def serve(model, requests, *, hooks=(), options=(), **config):
    """{id: what its outputs say together} of requests that come all at once: {id: number of streams}."""
    llm = LLM(model, hooks=list(hooks), **config)
    for id, number in requests.items():
        llm._loop.put(
            Add(
                Request(
                    id=id,
                    prompt=PROMPTS[id.split()[1]],
                    sampling=SAMPLING,
                    num_streams=number,
                    options=options,
                    record_routing=True,
                )
            )
        )
    llm._loop.run(until_idle=True)
    outputs = {}
    for event in (event for event in llm._events if isinstance(event, Output)):
        said = outputs.setdefault(
            event.id, {"tokens": (), "logprobs": (), "routing": (), "finish": None, "error": None}
        )
        for name in ("tokens", "logprobs", "routing"):
            said[name] += getattr(event, name)
        said["finish"], said["error"] = event.finish, event.error
    llm.close()
    return outputs


def by_generate(model, which, number):
    sampling = SamplingConfig(temperature=0.0, max_tokens=SAMPLING.max_tokens)
    return tuple(generate(model, [PROMPTS[which]], sampling, num_streams=number)[0])


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("kernel", [True, False])
def test_requests_of_all_numbers_at_once_get_what_generation_gives(model, limits, scheduling, kernel):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=kernel, **more)

    outputs = serve(model, MIXED, scheduling=scheduling, num_streams=2, make_runner=make_runner, **limits)
    for id, number in MIXED.items():
        wanted = by_generate(model, id.split()[1], number or 2)
        assert outputs[id]["tokens"] == wanted, id
        assert len(outputs[id]["routing"]) == len(wanted)
    assert len({outputs[f"{number} three"]["tokens"] for number in (1, 2, 3)}) == 3  # the number makes a difference


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_neighbour_of_another_number_changes_no_bit(model, limits):
    """The neighbours' prompts are the same, so that their keys and values would be taken for ours if anyone confused them."""
    for number in (1, 2):
        own = {id: asked for id, asked in MIXED.items() if asked == number}
        alone = serve(model, own, deterministic=True, **limits)
        others = {id: asked for id, asked in MIXED.items() if asked not in (number, None)}
        for requests in ({**others, **own}, {**own, **others}):
            beside = serve(model, requests, deterministic=True, **limits)
            for id in own:
                assert beside[id] == alone[id], id


def test_keys_and_values_are_found_again_by_requests_of_the_same_number_alone(model):
    llm = LLM(model, num_streams=2, **PLENTY)
    prompt, found = PROMPTS["three"], []
    for number in (3, 1, 2, 3, 1, None, 2):
        [answer] = llm.generate([prompt], SAMPLING, num_streams=number)
        found.append(answer.output.cached_tokens)
        assert answer.tokens == by_generate(model, "three", number or 2)
    assert found == [0, 0, 0, 8, 8, 8, 8]  # None is two
    llm.close()


def test_one_who_does_not_say_the_number_shares_nothing_where_nobody_knows_it():
    for known, is_shared in ((None, False), (2, True)):
        tables = SchedulerConfig(num_blocks=8, max_positions=32, num_streams=known).build()._tables
        keys = {
            tables.root_of(Request(id="a", prompt=(1,), num_streams=number, options=(("x", "y"),)))
            for number in (None, 2)
        }
        assert (len(keys) == 1) == is_shared


def test_a_trace_has_the_tokens_of_every_stream(model):
    asked = {"1 one": 1, "3 three": 3, "2 four": 2}
    with record_routing(model) as recorder:
        serve(model, asked, **SCARCE)
    seen = sum(len(decided.token_N) for _, decided in recorder.trace())
    expected = sum(number * (len(PROMPTS[id.split()[1]]) + SAMPLING.max_tokens - 1) for id, number in asked.items())
    assert seen == expected * model.config.num_layers


@pytest.mark.parametrize("number", [0, 4, 5, True, 2.0, "2", [2]])
def test_a_number_without_a_gate_is_refused(model, number):
    llm = LLM(model, **PLENTY)
    with pytest.raises(InputError, match=rf"num_streams is {re.escape(repr(number))}; the model runs with 1, 2, 3"):
        llm.generate([PROMPTS["one"]], SAMPLING, num_streams=number)
    assert llm.generate([PROMPTS["one"]], SAMPLING)[0].tokens == by_generate(model, "one", 3)
    llm.close()
    with pytest.raises((ConfigError, InputError)):
        LLM(model, num_streams=number, **PLENTY)


def test_a_model_without_streams_takes_one_alone(tiny_model):
    plain = tiny_model()
    llm = LLM(plain, **PLENTY)
    one, said = (llm.generate([PROMPTS["one"]], SAMPLING, num_streams=number)[0].tokens for number in (None, 1))
    assert one == said
    with pytest.raises(InputError, match="num_streams is 2, but the model has no parallel streams; leave it out"):
        llm.generate([PROMPTS["one"]], SAMPLING, num_streams=2)
    llm.close()
    with pytest.raises(ConfigError, match="num_streams is 2, but the model has no streams"):
        LLM(plain, num_streams=2, **PLENTY)


class Says:
    """Says of each request the number in its id."""

    def __init__(self, routing=None):
        self.routing = routing or {}

    def before_step(self, batch, tokens):
        pass

    def override(self, batch, tokens):
        return {
            chunk.id: RequestOverride(num_streams=self.number(batch, chunk), routing=self.routing)
            for chunk in batch.chunks
            if chunk.id[0] != "N"
        }

    def number(self, batch, chunk):
        return int(chunk.id.split()[0])

    def after_step(self, batch, sampled):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_hook_says_the_number_beside_the_routing(model, limits):
    options = (("routing", "by hook"),)
    asked = dict.fromkeys(MIXED, 3)  # the hook's number counts
    outputs = serve(model, asked, hooks=[Says()], options=options, prefix_cache=False, **limits)
    for id in asked:
        assert outputs[id]["tokens"] == by_generate(model, id.split()[1], MIXED[id] or 3), id
    closed = {0: Override(open_NE=[True, False, True, False])}
    outputs = serve(model, asked, hooks=[Says(closed)], options=options, prefix_cache=False, **limits)
    for id in asked:
        experts = {expert for route in outputs[id]["routing"] for expert in route[0]}
        assert experts <= {0, 2} or id[0] == "N"


def test_a_dense_model_may_have_such_a_hook(tiny_model, config):
    dense = tiny_model(feed_forward=SwiGLU.Config(hidden_dim=8)).config.replace(streams=config).build(seed=0).eval()
    outputs = serve(dense, {"2 one": None}, hooks=[Says()], options=(("routing", "two"),), **PLENTY)
    assert outputs["2 one"]["tokens"] == by_generate(dense, "one", 2)


class Changes(Says):
    def number(self, batch, chunk):
        return 1 if chunk.start == 0 else 2


@pytest.mark.parametrize(
    ("hook", "options", "message"),
    [
        (Says(), (), "shares keys and values with requests that are not"),
        (
            Changes(),
            (("routing", "x"),),
            "hooks say num_streams 1 and 2 of request '2 one'; say one for all its steps",
        ),
    ],
)
def test_what_a_hook_may_not_say_ends_its_request_alone(model, hook, options, message):
    outputs = serve(model, {"2 one": None, "None two": None}, hooks=[hook], options=options, **PLENTY)
    assert outputs["2 one"]["finish"] is Finish.ERROR
    assert message in outputs["2 one"]["error"]
    assert outputs["None two"]["tokens"] == by_generate(model, "two", 3)


@pytest.mark.parametrize("number", [True, 2.0, [2]])
def test_what_a_hook_says_that_is_no_number_ends_the_request(model, number):
    class Wrong(Says):
        def number(self, batch, chunk):
            return number

    requests = {"7 one": None, "None two": None}
    outputs = serve(model, requests, hooks=[Wrong()], options=(("routing", "x"),), **PLENTY)
    assert f"num_streams is {number!r}; it must be a whole number" in outputs["7 one"]["error"]
    assert outputs["None two"]["tokens"] == by_generate(model, "two", 3)


def test_a_number_that_a_hook_says_and_the_model_has_not_ends_the_request(model):
    outputs = serve(model, {"7 one": None, "None two": None}, hooks=[Says()], options=(("routing", "x"),), **PLENTY)
    assert "num_streams is 7, but the model has gates for 1, 2, 3" in outputs["7 one"]["error"]
    assert outputs["None two"]["tokens"] == by_generate(model, "two", 3)

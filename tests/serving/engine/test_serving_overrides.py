"""Requests that a hook routes otherwise: they get what `override_routing` gives, and those beside them what they always got."""

from dataclasses import replace

import pytest
import torch

from anabranch.lm import SamplingConfig, generate
from anabranch.nn import SwiGLU
from anabranch.routing import Override, override_routing
from anabranch.serving import LLM, Finish, Output, Request, Sampling
from anabranch.serving.core.hooks import OverrideHook, RequestOverride
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.nanoflow.runtime import NanoRunner

PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 8, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=5)
PROMPTS = {
    "one": (1, 2, 3, 4, 5, 6),
    "two": (7,),
    "three": (8, 9, 10, 11, 12, 13, 14, 15, 16),
    "four": (3, 1, 4, 1, 5, 9, 2, 6),
}
LAYERS = {
    "closed": {0: Override(open_NE=[True, False, True, False]), 1: Override(open_NE=[False, True, True, False])},
    "preferred": {
        0: Override(bias_NE=[0.0, 0.0, 0.0, 1e3]),
        "blocks.1.feed_forward.router": Override(bias_NE=[1e3, 0.0, 0.0, 0.0]),
    },
    "shifted": {0: Override(logit_NE=[0.0, 2.0, 0.0, 1.0]), 1: Override(logit_NE=[0.5, 0.0, 0.0, 3.0])},
    "forced": {0: Override(index_NK=[3, 1], weight_NK=[0.75, 0.5]), 1: Override(index_NK=[2])},
}


class Otherwise:
    """Says of each request that has one in its id the layers of that name."""

    def __init__(self, layers=LAYERS):
        self.layers, self.steps = layers, 0

    def before_step(self, batch, tokens):
        self.steps += 1

    def override(self, batch, tokens):
        return {
            chunk.id: RequestOverride(routing=self.of(chunk, name))
            for chunk in batch.chunks
            for name in self.layers
            if name in chunk.id
        }

    def of(self, chunk, name):
        return self.layers[name]

    def after_step(self, batch, sampled):
        pass

    def close(self):
        pass


class ByToken(Otherwise):
    """The same, said of each token of a chunk."""

    def of(self, chunk, name):
        num = len(chunk.tokens)

        def rows(value):
            return None if value is None else value.expand(num, -1)

        return {
            layer: replace(
                one,
                index_NK=rows(one.index_NK),
                weight_NK=rows(one.weight_NK),
                bias_NE=rows(one.bias_NE),
                open_NE=rows(one.open_NE),
                logit_NE=rows(one.logit_NE),
                only_N=torch.ones(num, dtype=torch.bool),
            )
            for layer, one in self.layers[name].items()
        }


def serve(model, requests, hook, *, options=True, make_runner=ModelRunner, **config):
    """{id: output} of requests that come all at once: {id: prompt}."""
    llm = LLM(model, hooks=[hook], make_runner=make_runner, **config)
    for id, prompt in requests.items():
        said = tuple(("routing", name) for name in LAYERS if name in id and options)
        llm._loop.put(Add(Request(id=id, prompt=prompt, sampling=SAMPLING, options=said, record_routing=True)))
    llm._loop.run(until_idle=True)
    outputs = {}
    for event in (event for event in llm._events if isinstance(event, Output)):
        whole = outputs.setdefault(
            event.id, {"tokens": (), "logprobs": (), "routing": (), "error": None, "finish": None}
        )
        for name in ("tokens", "logprobs", "routing"):
            whole[name] += getattr(event, name)
        whole["error"], whole["finish"] = event.error, event.finish
    llm.close()
    return outputs


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("hook", [Otherwise, ByToken])
def test_an_overridden_request_is_what_override_routing_makes_of_generation(tiny_model, hook, scheduling):
    """All at once, in chunks, preempted and computed again: each as if it were alone."""
    model = tiny_model()
    requests = {f"{name} {which}": prompt for name in ("plain", *LAYERS) for which, prompt in PROMPTS.items()}
    outputs = serve(model, requests, hook(), scheduling=scheduling, **SCARCE)
    sampling = SamplingConfig(temperature=0.0, max_tokens=SAMPLING.max_tokens)
    for id, prompt in requests.items():
        with override_routing(model, LAYERS.get(id.split()[0], {})):
            assert [outputs[id]["tokens"]] == [tuple(row) for row in generate(model, [prompt], sampling)], id
    allowed = {"closed": ({0, 2}, {1, 2}), "forced": ({1, 3}, {2})}
    for name, layers in allowed.items():
        for which in PROMPTS:
            for route in outputs[f"{name} {which}"]["routing"]:
                assert set(route[0]) <= layers[0]
                assert set(route[1]) <= layers[1]
    assert len({outputs[f"{name} three"]["tokens"] for name in ("plain", *LAYERS)}) > 2


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("config", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_hostile_neighbour_changes_no_bit(tiny_model, config, streams):
    """The neighbour's prompts are the same, so that its keys and values would be taken for ours if anyone confused them."""
    model = tiny_model(streams)
    own = {f"plain {which}": prompt for which, prompt in PROMPTS.items()}
    alone = serve(model, own, Otherwise(), deterministic=True, **config)
    hostile = {f"{name} {which}": prompt for name in LAYERS for which, prompt in PROMPTS.items()}
    for requests in ({**hostile, **own}, {**own, **hostile}):
        beside = serve(model, requests, Otherwise(), deterministic=True, **config)
        for id in own:
            assert beside[id] == alone[id], id
        assert any(beside[f"closed {which}"]["logprobs"] != alone[f"plain {which}"]["logprobs"] for which in PROMPTS)


def test_a_request_that_shares_its_prefix_is_refused_alone(tiny_model):
    model = tiny_model()
    own = {f"plain {which}": prompt for which, prompt in PROMPTS.items()}
    alone = serve(model, own, Otherwise(), deterministic=True, **SCARCE)
    hostile = {f"closed {which}": prompt for which, prompt in PROMPTS.items()}
    outputs = serve(
        model, {**hostile, **own}, Otherwise(), options=False, deterministic=True, scheduling="async", **SCARCE
    )
    for id in own:
        assert outputs[id] == alone[id], id
    for id in hostile:
        assert outputs[id]["finish"] is Finish.ERROR
        assert not outputs[id]["tokens"]
        assert f"request '{id}' is to be routed otherwise, but shares keys and values" in outputs[id]["error"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({7: Override(index_NK=[1])}, r"no routed layer 7; it has 0 (blocks.0.feed_forward.router), 1 "),
        ({0: Override(index_NK=[4])}, "names destination 4 of the router of layer 0; it has 0 to 3"),
        ({0: Override(open_NE=[[True] * 4] * 99)}, "must be [6, 4]"),
    ],
)
def test_an_override_that_does_not_fit_ends_its_request_alone(tiny_model, layers, message):
    model, requests = tiny_model(), {"closed one": PROMPTS["one"], "plain two": PROMPTS["two"]}
    outputs = serve(model, requests, Otherwise({"closed": layers}), **PLENTY)
    assert message in outputs["closed one"]["error"]
    assert outputs["plain two"]["finish"] is Finish.LENGTH


def test_an_engine_with_such_a_hook_takes_no_compiled_or_cut_step(tiny_model):
    model, hook = tiny_model(), Otherwise()
    assert isinstance(hook, OverrideHook)
    assert ModelRunner(model, num_blocks=4, hooks=[hook]).fast is None
    made = []

    def make_runner(*given, **options):
        made.append(NanoRunner(*given, min_tokens=2, tile=1, **options))
        return made[0]

    requests = {"closed one": PROMPTS["one"], "plain two": PROMPTS["two"]}
    cut = serve(model, requests, hook, make_runner=make_runner, deterministic=False, **PLENTY)
    assert made[0].num_cut == 0
    assert {id: one["tokens"] for id, one in cut.items()} == {
        id: one["tokens"] for id, one in serve(model, requests, hook, **PLENTY).items()
    }


def test_a_model_that_does_not_route_has_no_decision_to_override(tiny_model):
    model = tiny_model(feed_forward=SwiGLU.Config(hidden_dim=8))
    outputs = serve(model, {"closed one": PROMPTS["one"], "plain two": PROMPTS["two"]}, Otherwise(), **PLENTY)
    assert outputs["closed one"]["error"] == "the model has no Router, so there is no decision to override"
    assert outputs["plain two"]["finish"] is Finish.LENGTH


class Paths(Otherwise):
    """Says of a request the path that is in ``paths`` under its id."""

    def __init__(self, **paths):
        super().__init__()
        self.paths = paths

    def override(self, batch, tokens):
        return {
            chunk.id: RequestOverride(path=self.paths[chunk.id]) for chunk in batch.chunks if chunk.id in self.paths
        }


def test_two_hooks_that_name_two_paths_refuse_the_request_and_two_that_name_one_do_not(tiny_model):
    model = tiny_model()
    llm = LLM(model, hooks=[Paths(a=(0,), b=(0,), c=(1,)), Paths(a=(1, 0), b=(0,))], **PLENTY)
    for id in "abc":
        llm._loop.put(Add(Request(id=id, prompt=(1, 2), sampling=SAMPLING, options=(("routing", id),))))
    llm._loop.run(until_idle=True)
    ends = {event.id: event for event in llm._events if isinstance(event, Output) and event.finish is not None}
    assert ends["a"].error == "hooks say path (0,) and (1, 0) of request 'a'; say one for all its steps"
    assert ends["b"].finish is ends["c"].finish is Finish.LENGTH
    llm.close()


def test_an_id_that_comes_again_has_no_path_of_before(tiny_model):
    model = tiny_model()
    hook = Paths(a=(1,))
    llm = LLM(model, hooks=[hook], prefix_cache=False, **PLENTY)

    def tokens():
        llm._events.clear()
        llm._loop.put(Add(Request(id="a", prompt=PROMPTS["one"], sampling=SAMPLING, options=(("routing", "a"),))))
        llm._loop.run(until_idle=True)
        outputs = [event for event in llm._events if isinstance(event, Output)]
        assert outputs[-1].finish is Finish.LENGTH, outputs[-1].error
        return tuple(token for output in outputs for token in output.tokens)

    of_path = tokens()
    hook.paths.clear()
    usual = tokens()
    sampling = SamplingConfig(temperature=0.0, max_tokens=SAMPLING.max_tokens)
    assert usual == tuple(generate(model, [PROMPTS["one"]], sampling)[0]) != of_path
    llm.close()

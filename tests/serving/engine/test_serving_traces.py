"""`record_routing` around an engine: whatever path its steps take, the trace is that of `generate`, each position once."""

import asyncio
import copy
import itertools
from functools import partial

import pytest
import torch

from anabranch import presets
from anabranch.errors import AnabranchError
from anabranch.experts.versatile import record_difficulty
from anabranch.lm import SamplingConfig, generate
from anabranch.nn import kernels
from anabranch.registry import BUILTIN
from anabranch.routing import Router, record_routing, replay_routing
from anabranch.routing.context import RoutingContext, argument_of
from anabranch.routing.discovery import find_routers
from anabranch.serving import LLM, Request, Sampling, ServingConfig
from anabranch.serving.engine import Engine, LocalEngine, ModelRunner
from anabranch.serving.fast import FastDecoder
from anabranch.serving.nanoflow.runtime import NanoRunner

PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 6, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}
GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
LENGTHS = (6, 1, 9, 13)
DESIGNS = ("moe", "moe-lossfree", "rexmoe", "rmoe", "chain", "versatile")  # that have a compiled step
PATHS = {
    "compiled": ModelRunner,
    "plain": partial(ModelRunner, use_kernel=False),
    "cut": partial(NanoRunner, min_tokens=2, tile=1),
}


def small(name):
    model = presets.find(name)("tiny").model.replace(init_std=0.2, num_layers=2).build(seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    return model, [
        tuple(torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()) for length in LENGTHS
    ]


def kind_of(name):
    """Of a preset's feed-forward."""
    return type(presets.find(name)("tiny").model.feed_forward).owner.kind


def sequences(trace):
    """The decisions of each item, as a set of items; no decision is there twice."""
    found = {}
    for layer, decided in trace:
        columns = decided.item_N, decided.position_N, decided.token_N, decided.index_NK
        for item, position, token, index_K in zip(*(column.tolist() for column in columns), strict=True):
            assert (layer.layer, position) not in found.setdefault(item, {})
            found[item][layer.layer, position] = token, tuple(index_K)
    return {frozenset(decided.items()) for decided in found.values()}


def by_generate(model, prompts):
    """What `generate` routes, one prompt after the other."""
    with record_routing(model) as recorder:
        for prompt in prompts:
            generate(model, [prompt], SamplingConfig(temperature=0.0, max_tokens=GREEDY.max_tokens))
    return sequences(recorder.trace())


def test_every_compiled_design_is_among_these():
    if kernels.load() is None:
        pytest.skip("no C++ compiler")
    others = {"duo"}
    assert {kind_of(name) for name in {*DESIGNS, *others}} == set(BUILTIN["feed_forward"]) - {"swiglu", "mlp"}
    assert {name for name in {*DESIGNS, *others} if FastDecoder.supports(small(name)[0]) is None} == set(DESIGNS)


@pytest.mark.parametrize(
    ("name", "path", "scheduling"),
    [
        *((name, "compiled", "async") for name in DESIGNS if name != "moe"),
        *itertools.product(("moe",), PATHS, ("sync", "async")),
        *itertools.product(("chain", "duo"), ("plain", "cut"), ("async",)),
    ],
)
def test_the_trace_is_that_of_generate(name, path, scheduling):
    """Blocks are few, so requests are preempted and computed again."""
    model, prompts = small(name)
    llm = LLM(model, make_runner=PATHS[path], scheduling=scheduling, **SCARCE)
    with record_routing(model) as recorder:
        llm.generate(prompts, GREEDY)
    assert llm.engine.scheduler.stats().counters["preemptions"] > 0
    llm.close()
    assert sequences(recorder.trace()) == by_generate(model, prompts)


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("name", ["moe", "chain"])
def test_what_an_engine_did_is_replayed_by_an_engine_and_by_generation(name, scheduling):
    """Requests come in the order of the recording; batches, chunks and preemptions may be others, and routers that know nothing."""
    model, prompts = small(name)
    with record_routing(model) as recorder:
        expected = [tuple(row) for row in generate(model, prompts, SamplingConfig(temperature=0.0, max_tokens=6))]
    blind = copy.deepcopy(model)
    for module in blind.modules():
        if isinstance(module, Router):
            torch.nn.init.normal_(module.score.weight)
    for config in (SCARCE, PLENTY):
        llm = LLM(blind, scheduling=scheduling, prefix_cache=False, **config)
        free = [answer.tokens for answer in llm.generate(prompts, GREEDY)]
        with replay_routing(blind, recorder.trace()):
            assert [answer.tokens for answer in llm.generate(prompts, GREEDY)] == expected != free
        assert [answer.tokens for answer in llm.generate(prompts, GREEDY)] == free  # the compiled step again
        llm.close()


@pytest.mark.parametrize("path", PATHS)
def test_who_listens_for_a_while_changes_no_token(path):
    """A request may begin on one path, go on on the other, and come back."""
    model, prompts = small("moe")
    seen = []

    class Listen:
        """Listens to one part of the model in every other three steps."""

        handle = None

        def before_step(self, batch, tokens):
            if batch.step % 6 == 0:
                self.handle = model.blocks[1].attention.qkv.register_forward_pre_hook(lambda *_: seen.append(1))
            elif batch.step % 6 == 3 and self.handle is not None:
                self.handle.remove()

        def after_step(self, batch, sampled):
            pass

        def close(self):
            pass

    listening = Listen()
    llm = LLM(model, make_runner=PATHS[path], hooks=[listening], scheduling="sync", **SCARCE)
    steps = [answer.tokens for answer in llm.generate(prompts, GREEDY)]
    num_steps = llm.engine.scheduler.stats().counters["steps"]
    llm.close()
    listening.handle.remove()
    free = LLM(model, **PLENTY)
    assert steps == [answer.tokens for answer in free.generate(prompts, GREEDY)]
    free.close()
    assert num_steps // 3 <= len(seen) <= num_steps


def test_half_precision_goes_from_one_path_to_the_other():
    model, prompts = small("moe")
    model.bfloat16()
    llm = LLM(model, **PLENTY)
    with record_routing(model) as recorder:
        (recorded,) = llm.generate(prompts[:1], GREEDY)
    runner = llm.engine.runner
    hidden = torch.randn(3, model.config.dim).bfloat16()
    # What the layers gave when a listener came or left before the head.
    free = runner._head.plain(hidden)
    with record_routing(model):
        assert (free - runner._head.plain(hidden.float()).float()).abs().max() < 0.1
        llm.generate(prompts[:1], GREEDY)
    llm.close()
    assert {len(one) for one in sequences(recorder.trace())} == {
        len(find_routers(model)) * (len(prompts[0]) + len(recorded.tokens) - 1)
    }


def test_a_recording_that_begins_late_has_each_position_once():
    """Requests that were under way, unheard, and are computed again, are told from their beginning."""
    model, prompts = small("moe")
    parts = []

    class Late:
        """Begins to record in the fourth step."""

        def before_step(self, batch, tokens):
            if batch.step == 4:
                parts.append(record_routing(model))
                parts.append(parts[0].__enter__())

        def after_step(self, batch, sampled):
            pass

        def close(self):
            pass

    llm = LLM(model, hooks=[Late()], scheduling="sync", **SCARCE)
    llm.generate(prompts, GREEDY)
    parts[0].__exit__(None, None, None)
    llm.close()
    whole = by_generate(model, prompts)
    found = sequences(parts[1].trace())
    assert all(any(one <= full for full in whole) for one in found)
    assert 0 < sum(map(len, found)) < sum(map(len, whole))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["embedding", "blocks.0.feed_forward", "blocks.1.feed_forward"])
def test_a_neighbour_that_fails_takes_no_decision_along_and_adds_none(path, where, caplog):
    """Before, between and behind the routers."""
    model, prompts = small("moe")
    bad = model.config.vocab_size - 1
    assert not any(bad in prompt for prompt in prompts)

    def fail(module, args, kwargs):
        context = argument_of(RoutingContext, args, kwargs)
        token = args[0] if context is None else context.token_BL
        if (token == bad).any():
            raise ValueError("a fault")

    llm = LLM(model, make_runner=PATHS[path], **SCARCE)
    handle = model.get_submodule(where).register_forward_pre_hook(fail, with_kwargs=True)
    with record_routing(model) as recorder, pytest.raises(AnabranchError, match="failed in a step"):
        llm.generate([*prompts[:2], (1, bad, 2), *prompts[2:]], GREEDY)
    handle.remove()
    llm.close()
    assert sequences(recorder.trace()) == by_generate(model, prompts)


def test_an_engine_in_a_thread_is_recorded_without_its_warm_up():
    model, prompts = small("moe")

    async def ask():
        client = LocalEngine(lambda: Engine.of(model, ServingConfig(**PLENTY)))
        with record_routing(model) as recorder:
            await client.start()
            for number, prompt in enumerate(prompts):
                async for _ in client.submit(Request(id=f"{number}", prompt=prompt, sampling=GREEDY)):
                    pass
        await client.close()
        return recorder.trace()

    assert sequences(asyncio.run(ask())) == by_generate(model, prompts)


def test_gates_of_loops_are_heard():
    model, prompts = small("versatile")
    with record_difficulty(model) as recorder:
        generate(model, prompts[:1], SamplingConfig(temperature=0.0, max_tokens=GREEDY.max_tokens))
    llm = LLM(model, **PLENTY)
    with record_difficulty(model) as served:
        llm.generate(prompts[:1], GREEDY)
    llm.close()
    assert sequences(served.trace()) == sequences(recorder.trace())


def test_a_trace_on_disk_is_that_in_memory(tmp_path):
    model, prompts = small("rexmoe")
    llm = LLM(model, **SCARCE)
    with record_routing(model) as kept, record_routing(model, path=tmp_path / "trace.parquet") as streamed:
        kept.domain = streamed.domain = "served"
        llm.generate(prompts, GREEDY)
    llm.close()
    assert streamed.trace().table.equals(kept.trace().table)
    assert streamed.trace().domains == ["served"]


def test_requests_served_by_another_copy_of_the_model_are_missed_aloud(tmp_path):
    model, prompts = small("moe")
    llm = LLM(small("moe")[0], **PLENTY)
    with (
        pytest.warns(UserWarning, match="heard none of the 2 routers of this Decoder"),
        record_routing(model, path=tmp_path / "trace.parquet") as recorder,
    ):
        llm.generate(prompts[:1], GREEDY)
    llm.close()
    assert len(recorder.trace()) == 0

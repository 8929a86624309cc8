"""A head that routes is told which items its rows are: of kept positions, merged streams, cached passes and steps of an engine."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from anabranch.config import configclass
from anabranch.data import ByteTokenizer
from anabranch.errors import AnabranchError
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import Count, Linear
from anabranch.nn.linear import Dense
from anabranch.routing import Override, Router, TopK, override_routing, record_routing, replay_routing
from anabranch.routing.discovery import find_routers
from anabranch.routing.hash_score import HashScore
from anabranch.serving import LLM, Sampling
from anabranch.serving.core.hooks import RequestOverride
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.nanoflow.runtime import NanoRunner
from anabranch.testing.model import _check_head

GREEDY = SamplingConfig(max_tokens=5, temperature=0)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]


class RoutedRows(Linear):
    """Added to W x: the rows of the one of three matrices that a router picks."""

    @configclass
    class Config(Linear.Config):
        is_added: ClassVar[bool] = True
        router: Router.Config = Router.Config(select=TopK.Config(top_k=1))

        def count(self, projection, context):
            return Count.dense(3 * projection.in_dim * (projection.out_dim + 1))

    def __init__(self, config, projection, context):
        nn.Module.__init__(self)
        self.router = config.router.build(projection.in_dim, 3, generator=context.generator, share=context.share)
        self.weight_EDC = nn.Parameter(torch.empty(3, projection.out_dim, projection.in_dim))
        nn.init.normal_(self.weight_EDC, std=0.3, generator=context.generator)

    def forward(self, x, context=None):
        routing = self.router(x.flatten(0, -2), context)
        weight_NDC = self.weight_EDC[routing.index_NK[:, 0].clamp_min(0)]
        y_ND = torch.einsum("ndc,nc->nd", weight_NDC, x.flatten(0, -2)) * routing.weight_NK
        return y_ND.view(*x.shape[:-1], -1)


def model_of(streams=None, **linears):
    linears = linears or {"head": RoutedRows.Config()}
    return Decoder.Config(dim=32, num_layers=2, linears=linears, streams=streams).build().eval()


def nano(*args, **options):
    return NanoRunner(*args, min_tokens=2, tile=1, **options)


STREAMS = [None, ParScale.Config(num_streams=2)]


@pytest.mark.parametrize("streams", STREAMS, ids=["plain", "streams"])
def test_kept_positions_are_items_of_the_whole_pass(streams):
    _check_head(model_of(streams))


@pytest.mark.parametrize("streams", STREAMS, ids=["plain", "streams"])
def test_ragged_prompts_generate_what_each_generates_alone(streams):
    model = model_of(streams)
    with record_routing(model) as recorder:
        both = generate(model, PROMPTS, GREEDY)
    assert both == [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    trace = recorder.trace()
    decisions = trace.decisions(trace.layers[-1].layer)
    found = sorted(zip(decisions.item_N.tolist(), decisions.position_N.tolist(), strict=True))
    assert found == [(row, place) for row, first in enumerate((6, 2)) for place in range(first, first + 5)]
    with replay_routing(model, trace):
        assert generate(model, PROMPTS, GREEDY) == both


@pytest.mark.parametrize("streams", STREAMS, ids=["plain", "streams"])
@pytest.mark.parametrize("make_runner", [ModelRunner, nano], ids=["whole", "cut"])
def test_the_engine_gives_what_generate_gives_and_records_the_same_items(streams, make_runner):
    model = model_of(streams, **{"head": RoutedRows.Config(), "blocks.*.q": RoutedRows.Config()})
    expected = [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    sampling = Sampling(temperature=0, max_tokens=5, ignore_eos=True)
    scored = Sampling(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=0)
    llm = LLM(model, ByteTokenizer(), make_runner=make_runner)
    try:
        assert [list(made.tokens) for made in llm.generate(PROMPTS, sampling)] == expected
        made = llm.generate(PROMPTS, scored)
        assert [list(each.tokens) for each in made] == expected
        for prompt, each in zip(PROMPTS, made, strict=True):
            with torch.no_grad():
                wanted_LV = model(torch.tensor([prompt])).logits_BLV[0].log_softmax(-1)
            wanted = [float(wanted_LV[at, token]) for at, token in enumerate(prompt[1:])]
            got = [entry.logprob for entry in each.output.prompt_logprobs if entry is not None]
            assert got[-len(wanted) :] == pytest.approx(wanted, abs=1e-4)
    finally:
        llm.close()


def engine_outputs(model, prompts=PROMPTS, *, hooks=(), sampling=None, **options):
    """(tokens, outputs) of an engine that is closed again."""
    llm = LLM(model, ByteTokenizer(), hooks=list(hooks))
    try:
        made = llm.generate(prompts, sampling or Sampling(temperature=0, max_tokens=5, ignore_eos=True), **options)
        return [list(each.tokens) for each in made], made, llm.engine.info.routed_layers
    finally:
        llm.close()


def decided(trace, part):
    """{(item, position): destinations} of the layer of a trace whose name has ``part`` in it."""
    (layer,) = [layer.layer for layer in trace.layers if part in layer.name]
    found = trace.decisions(layer)
    return {
        (int(item), int(place)): tuple(index_K.tolist())
        for item, place, index_K in zip(found.item_N, found.position_N, found.index_NK, strict=True)
    }


@pytest.mark.parametrize("streams", STREAMS, ids=["plain", "streams"])
def test_what_an_engine_records_of_a_head_is_what_generate_records(streams):
    model = model_of(streams, **{"head": RoutedRows.Config(), "blocks.*.q": RoutedRows.Config()})
    with record_routing(model) as one:
        expected = generate(model, PROMPTS, GREEDY)
    with record_routing(model) as other:
        tokens, _, _ = engine_outputs(model)
    assert tokens == expected
    assert decided(other.trace(), "head") == decided(one.trace(), "head") != {}
    with replay_routing(model, other.trace()):
        assert engine_outputs(model)[0] == expected


def test_a_hook_overrides_the_head_of_a_request():
    model = model_of(**{"head": RoutedRows.Config(), "blocks.*.q": RoutedRows.Config()})
    (name,) = [name for name in find_routers(model) if name.startswith("head")]
    always = {name: Override(index_NK=[1], weight_NK=[1.0])}
    with override_routing(model, always):
        expected = generate(model, PROMPTS, GREEDY)
    plain = generate(model, PROMPTS, GREEDY)

    class Hook:
        def before_step(self, batch, tokens): ...

        def after_step(self, batch, sampled): ...

        def close(self): ...

        def override(self, batch, tokens):
            # Of the rows of a request in the step, of which the head sees the last alone.
            return {
                chunk.id: RequestOverride(
                    routing={name: Override(index_NK=[[1]] * len(chunk.tokens), weight_NK=[[1.0]] * len(chunk.tokens))}
                )
                for chunk in batch.chunks
                if chunk.id in chosen
            }

    for chosen in (("llm-0", "llm-1"), ("llm-1",)):
        wanted = [expected[0] if "llm-0" in chosen else plain[0], expected[1]]
        assert engine_outputs(model, hooks=[Hook()], options=(("routing", "a"),))[0] == wanted


def test_layers_of_a_request_leave_the_head_out():
    model = model_of(**{"head": RoutedRows.Config(), "blocks.*.q": RoutedRows.Config()})
    _, made, layers = engine_outputs(model, record_routing=True)
    assert set(layers) == set(made[0].output.routing[0]) != set()


def test_training_replays_the_blocks_of_a_rollout():
    model = model_of(**{"head": RoutedRows.Config(), "blocks.*.q": RoutedRows.Config()})
    some = {name: router for name, router in find_routers(model).items() if not name.startswith("head")}
    with record_routing(model, routers=some) as recorder:
        rollouts = generate(model, PROMPTS, GREEDY)
    with replay_routing(model, recorder.trace(), weights="own", routers=some):
        for prompt, made in zip(PROMPTS, rollouts, strict=True):
            text_BL = torch.tensor([prompt + made])
            model(text_BL[:, :-1], text_BL[:, 1:]).loss.backward()
    assert all(router.score.weight.grad.abs().sum() > 0 for router in some.values())


class ByToken(Dense):
    """W x and a row that the token picks: no module inside, but it looks at the context."""

    @configclass
    class Config(Dense.Config):
        pass

    def __init__(self, config, projection, context):
        super().__init__(config, projection, context)
        self.bank = nn.Parameter(torch.randn(5, projection.out_dim, generator=context.generator))

    def forward(self, x, context=None):
        return super().forward(x, context) + self.bank[context.token_BL % 5]


HASH = Router.Config(score=HashScore.Config(spread=1.0), select=TopK.Config(top_k=1))
LOOKS = {"hash": RoutedRows.Config(router=HASH), "dense": ByToken.Config()}


@pytest.mark.parametrize("streams", STREAMS, ids=["plain", "streams"])
@pytest.mark.parametrize("kind", LOOKS)
def test_a_head_that_looks_at_tokens_is_told_them(kind, streams):
    model = model_of(streams, head=LOOKS[kind])
    expected = [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, GREEDY) == expected
    assert engine_outputs(model)[0] == expected
    with torch.no_grad():
        whole_BLV = model(torch.tensor([PROMPTS[0]])).logits_BLV
        last_BLV = model(torch.tensor([PROMPTS[0]]), last_only=True).logits_BLV
    torch.testing.assert_close(last_BLV, whole_BLV[:, -1:])


def test_positions_of_a_head_are_those_that_are_given():
    model, token_BL = model_of(head=LOOKS["hash"]), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        context = model.context(token_BL)
        x_BLD = model.hidden(token_BL, context)
        whole_BLV = model.logits(x_BLD, context.trial())
        last_BLV = model.logits(x_BLD[:, -1:], context.trial(), keep_L=torch.tensor([-1]))
        torch.testing.assert_close(last_BLV, whole_BLV[:, -1:])
        for keep_L in (None, torch.tensor([1, 2, 3])):
            with pytest.raises(AnabranchError, match="x has 2 positions"):
                model.logits(x_BLD[:, :2], context.trial(), keep_L=keep_L)

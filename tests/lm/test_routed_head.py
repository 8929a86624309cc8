"""A head that routes is told which items its rows are: of kept positions, merged streams, cached passes and steps of an engine."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from anabranch.config import configclass
from anabranch.data import ByteTokenizer
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import Count, Linear
from anabranch.routing import Router, TopK, record_routing, replay_routing
from anabranch.serving import LLM, Sampling
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

"""Where tokens go, told by a batch of requests of different lengths, is where each goes alone: per request, and as a trace."""

from functools import partial

import pytest
import torch

from anabranch.routing import record_routing
from anabranch.serving import LLM, Sampling
from anabranch.serving.engine import ModelRunner

PROMPTS = [(7,), (1, 2, 3, 4, 5, 6, 7, 8, 9), (8, 9, 10), (11, 12, 13, 14), (3,)]
ENDS = [3, 9, 1, 6, 4]  # tokens of each
FEW = {
    "num_blocks": 60,
    "block_tokens": 4,
    "max_batched_tokens": 7,
    "max_seqs": 3,
}  # chunks of prompts beside tokens of others
PLAIN = partial(ModelRunner, use_kernel=False)  # steps through the model's own modules
EACH = [Sampling(temperature=0.0, max_tokens=count, ignore_eos=True) for count in ENDS]


def expected(model, tokens):
    """{(layer, position): destinations} of one sequence, by one pass over it."""
    with record_routing(model) as recorder, torch.inference_mode():
        model(torch.tensor([tokens]))
    return by_item(recorder.trace())


def by_item(trace):
    """{item: {(layer, position): (token, destinations)}}, each decision once."""
    found = {}
    for layer, decided in trace:
        columns = decided.item_N, decided.position_N, decided.token_N, decided.index_NK
        for item, position, token, index_K in zip(*(column.tolist() for column in columns), strict=True):
            assert (layer.layer, position) not in found.setdefault(item, {})
            found[item][layer.layer, position] = token, tuple(index_K)
    return found


@pytest.mark.parametrize("make_runner", [ModelRunner, PLAIN], ids=["compiled", "plain"])
@pytest.mark.parametrize("streams", [1, 2])
def test_each_request_is_told_its_own_routes(tiny_model, make_runner, streams):
    model = tiny_model(streams)
    llm = LLM(model, make_runner=make_runner, **FEW)
    answers = llm.generate(PROMPTS, EACH, record_routing=True)
    llm.close()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        alone = expected(model, [*prompt, *answer.tokens])
        assert len(answer.output.routing) == len(answer.tokens)
        for number, route in enumerate(answer.output.routing):
            for layer, destinations in route.items():
                of_streams = [found[layer, len(prompt) - 1 + number][1] for found in alone.values()]
                assert set(destinations) == {index for index_K in of_streams for index in index_K}
                if streams == 1:
                    assert destinations == of_streams[0]


@pytest.mark.parametrize("streams", [1, 2])
def test_a_trace_of_the_engines_model_keeps_requests_apart(tiny_model, streams):
    model = tiny_model(streams)
    llm = LLM(model, make_runner=PLAIN, **FEW)
    with record_routing(model) as recorder:
        answers = llm.generate(PROMPTS, EACH)
        second = LLM(model, make_runner=PLAIN, **FEW)  # whose requests have the same ids
        answers += second.generate(PROMPTS[:2], EACH[:2])
    llm.close()
    second.close()
    found = {frozenset(decided.items()) for decided in by_item(recorder.trace()).values()}
    wanted = [expected(model, [*answer.prompt, *answer.tokens[:-1]]) for answer in answers]
    assert found == {frozenset(decided.items()) for alone in wanted for decided in alone.values()}
    assert (
        len(recorder.trace().decisions(0).item_N)
        == sum(len(one.prompt) + len(one.tokens) - 1 for one in answers) * streams
    )

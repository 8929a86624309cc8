"""What is told of a request that got several tokens in one step."""

from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Request, Sampling, TokenLogprob
from anabranch.serving.core.state import RequestState


def test_tokens_of_one_step_are_told_in_order_and_what_adds_up_as_it_is_behind_the_last():
    request = Request(id="a", prompt=(1, 2), sampling=Sampling(max_tokens=9))
    state = RequestState(request, serial=0, now=0.0, stop_tokens=frozenset(), max_positions=100)
    items = [
        Sampled(
            id="a",
            token=10 + at,
            logprob=TokenLogprob(token=10 + at, logprob=-float(at)),
            routing={"q": (str(at),)},
            explained={"pool": {"tokens": 1 + at}},
        )
        for at in range(3)
    ]
    output = state.output(items)
    assert output.tokens == (10, 11, 12)
    assert [one.logprob for one in output.logprobs] == [0, -1, -2]
    assert output.routing == ({"q": ("0",)}, {"q": ("1",)}, {"q": ("2",)})
    assert output.explained == {"pool": {"tokens": 3}}

"""Best of N in the engine: each prompt has as many answers as pay, drawn together, and the same whoever is beside it."""

import pytest

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import InputError
from anabranch.serving import LLM, Sampling
from anabranch.test_time import BetaTTSPM, BudgetController, logprob_weighted


@pytest.fixture(scope="module")
def llm(tiny_model):
    made = LLM(tiny_model(vocab_size=257), ByteTokenizer.Config().build(), num_blocks=200, block_tokens=4, seed=3)
    yield made
    made.close()


def rules(**fields):
    return BudgetController(
        **{"curve": BetaTTSPM(1, 1, 1), "value": 1.0, "cost": 0.01, "batch": 2, "max_n": 8, **fields}
    )


SHORT = Sampling(max_tokens=2, seed=5)


def test_answers_are_those_of_their_seeds_whoever_is_beside(llm):
    one, other = llm.best_of(["hello", "goodbye"], rules(decides="posterior", max_n=4), SHORT)
    assert [len(found.samples) for found in (one, other)] == [4, 4]
    alone = llm.generate(["hello"] * 4, [Sampling(max_tokens=2, seed=5 + number) for number in range(4)])
    assert [sample.body.tokens for sample in one.samples] == [answer.tokens for answer in alone]
    [again] = llm.best_of(["hello"], rules(decides="posterior", max_n=4), SHORT)
    assert [sample.text for sample in again.samples] == [sample.text for sample in one.samples]
    assert again.reason == "budget"


def test_a_verified_prompt_stops_and_the_others_go_on(llm):
    seen = []

    def verify(at, samples):
        seen.append((at, len(samples)))
        return [at == 0] * len(samples)

    first, second = llm.best_of(["a", "b"], rules(decides="posterior"), SHORT, verify=verify)
    assert (first.reason, len(first.samples), first.chosen.place) == ("verified", 2, 0)
    assert (second.reason, len(second.samples)) == ("budget", 8)
    assert seen == [(0, 2), (1, 2), (1, 2), (1, 2), (1, 2)]


def test_what_nobody_could_verify_is_not_wrong(llm):
    first, second = llm.best_of(
        ["a", "a"],
        rules(decides="posterior", max_n=2),
        SHORT,
        verify=lambda at, samples: [None, bool(at)][: len(samples)],
    )
    assert (first.verified, first.reason == "verified") == ([None, False], False)
    # What may be right is given before what is wrong.
    assert first.chosen.place == 0
    assert (second.reason, second.chosen.place) == ("verified", 1)


def test_a_vote_ends_it_and_weights_may_choose(llm):
    [found] = llm.best_of(["a"], rules(decides="posterior"), SHORT, same=lambda text: "all alike")
    assert (found.reason, len(found.samples)) == ("agreement", 4)
    [found] = llm.best_of(["a"], rules(max_n=3), Sampling(max_tokens=2, seed=1, logprobs=0), select=logprob_weighted)
    assert all(sample.logprob < 0 for sample in found.samples)
    assert found.answer in found.samples


def test_what_makes_no_sense_is_refused(llm):
    with pytest.raises(InputError, match="temperature is 0"):
        llm.best_of(["a"], rules(), Sampling(temperature=0.0))
    with pytest.raises(InputError, match="verify said 1 things of 2 answers"):
        llm.best_of(["a"], rules(), SHORT, verify=lambda at, samples: [True])
    assert llm.best_of([], rules(), SHORT) == []

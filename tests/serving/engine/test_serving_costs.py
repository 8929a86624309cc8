"""Cost models of `anabranch.test_time` against what the engine counts: samples that share a prompt, rounds that read what came before."""

import pytest

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.serving import LLM, Sampling
from anabranch.test_time import ParallelCost, SequentialCost

BLOCK, ANSWER = 4, 6


@pytest.fixture(scope="module")
def llm(tiny_model):
    made = LLM(tiny_model(vocab_size=257), ByteTokenizer.Config().build(), num_blocks=200, block_tokens=BLOCK, seed=3)
    yield made
    made.close()


def asked(llm, tokens, seed):
    [answer] = llm.generate([tuple(tokens)], Sampling(temperature=1.0, max_tokens=ANSWER, seed=seed))
    return answer


def counted(answers):
    return (
        sum(len(answer.prompt) for answer in answers),
        sum(answer.output.cached_tokens for answer in answers),
        sum(len(answer.tokens) for answer in answers),
    )


def told(model, n):
    tokens = model.tokens(n)
    return tokens.prompt, tokens.cached, tokens.completion


@pytest.mark.parametrize("prompt", [b"how many apples are there?", b"twelve bytes", b"a"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_samples_share_their_prompt(llm, prompt, n):
    # Nothing of another test is in the cache of these.
    tokens = bytes([n]) + prompt
    answers = [asked(llm, tokens, seed) for seed in range(n)]
    assert counted(answers) == told(ParallelCost(prompt=len(tokens), answer=ANSWER, block=BLOCK), n)


@pytest.mark.parametrize("feedback", [b"", b"check it", b"again, please"])
def test_rounds_read_all_that_was_said_before(llm, feedback):
    tokens = list(b"%d is how it begins: " % len(feedback))
    first, answers = len(tokens), []
    for seed in range(4):
        answers.append(asked(llm, tokens, seed))
        tokens += [*answers[-1].tokens, *feedback]
    model = SequentialCost(prompt=first, answer=ANSWER, feedback=len(feedback), block=BLOCK)
    assert counted(answers) == told(model, 4)

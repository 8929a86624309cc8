"""Cost models: by hand, and the mix that is worth most against trying all."""

import pytest

from anabranch.errors import InputError
from anabranch.test_time import (
    TTSPM,
    ParallelCost,
    SequentialCost,
    best_mix,
)


def test_samples_share_their_prompt_and_rounds_read_it_again():
    # 100 + 4 * 10; 100 + 110 + 120 + 130 read, of answers alone, and 4 * 10 written.
    samples, rounds = ParallelCost(prompt=100, answer=10), SequentialCost(prompt=100, answer=10)
    assert samples(4) == 140
    assert rounds(4) == 100 + 110 + 120 + 130 + 40
    assert SequentialCost(prompt=100, answer=10, feedback=5)(3) == 100 + 115 + 130 + 30
    assert samples(0) == rounds(0) == 0
    for n in (1, 2, 5):
        # n prompts, n answers, and all that was said before each round.
        assert SequentialCost(prompt=100, answer=10, feedback=5)(n) == n * 100 + n * (n - 1) / 2 * 15 + n * 10


def test_prices_and_blocks_of_a_cache():
    # A prompt of 100 in blocks of 16: 96 are kept, 6 blocks; 3 further samples read 4 tokens each and 96 at a tenth.
    model = ParallelCost(prompt=100, answer=10, read=1.0, cached=0.1, write=3.0, block=16)
    told = model.tokens(4)
    assert (told.prompt, told.cached, told.completion) == (400, 288, 40)
    assert model(4) == pytest.approx(112 + 28.8 + 120)
    # A prompt of whole blocks: its last token is read again, so the last block is not kept.
    assert ParallelCost(prompt=96, answer=1, block=16).tokens(2).cached == 80
    # Rounds: the second reads 100 + 15, of which 100 + 9 were there: 6 blocks; the third 130, 124 there: 7 blocks.
    rounds = SequentialCost(prompt=100, answer=10, feedback=5, block=16).tokens(3)
    assert (rounds.prompt, rounds.cached, rounds.completion) == (345, 96 + 112, 30)


@pytest.mark.parametrize(
    "fields",
    [{"prompt": -1, "answer": 1}, {"prompt": 1, "answer": float("nan")}, {"prompt": 1, "answer": 1, "read": -1}],
)
def test_negative_tokens_and_prices_are_refused(fields):
    with pytest.raises(InputError):
        ParallelCost(**fields)


def test_the_mix_that_is_worth_most_is_that_of_trying_all():
    parallel, sequential = TTSPM("parallel", 0.9, 0.2), TTSPM("sequential", 1.0, 0.5)

    def cost(chains, depth):
        return 0.01 * chains * depth

    found = best_mix(parallel, sequential, cost, 1.0, most=12)
    worth = {
        (chains, depth): 0.9 * (1 - (0.8 * 0.5 ** (depth - 1)) ** chains) - cost(chains, depth)
        for chains in range(1, 13)
        for depth in range(1, 13)
        if chains * depth <= 12
    }
    assert found.worth == pytest.approx(max(worth.values()))
    assert worth[found.chains, found.depth] == pytest.approx(found.worth)
    # Rethinking is better than another chain here, so there is one chain only.
    assert (found.chains, found.depth) == (1, found.depth)
    # Where rethinking never helps, all is side by side; where nothing pays, nothing is drawn.
    assert best_mix(parallel, TTSPM("sequential", p=1e-9), cost, 1.0).depth == 1
    assert best_mix(parallel, sequential, lambda chains, depth: 5.0, 1.0).chains == 0
    with pytest.raises(InputError, match="both curves are parallel"):
        best_mix(parallel, TTSPM("parallel", p=0.5), cost, 1.0)

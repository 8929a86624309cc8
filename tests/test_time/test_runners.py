"""Runners and selectors: what is drawn, which is chosen, and models that fail, say nothing, or say too much."""

import asyncio
import math
from functools import partial

import pytest

from anabranch.errors import InputError
from anabranch.test_time import (
    BetaTTSPM,
    BudgetController,
    Sample,
    best_judged,
    first_verified,
    logprob_weighted,
    majority,
    mixed,
    parallel,
    sequential,
)


class Model:
    """Says these texts one after another, and then the last again; None for an answer that does not come."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    async def __call__(self, histories):
        self.asked.append(list(histories))
        return [self._say() for _ in histories]

    def _say(self):
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        return None if text is None else Sample(text=text, cost=0.01)


def rules(**fields):
    return BudgetController(**{"curve": BetaTTSPM(1, 1, 1), "value": 1.0, "cost": 0.01, "batch": 2, **fields})


async def is_four(samples):
    return [one.text == "4" for one in samples]


def test_the_commonest_is_given_and_the_first_of_ties():
    samples = [Sample(text=text) for text in ("a", "b", "B ", "")]
    assert majority(samples, str.strip).place == 0
    chosen = majority(samples, lambda text: text.strip().lower())
    assert (chosen.place, chosen.sure) == (1, 0.5)
    assert majority([]) is None
    # What says nothing has no vote, but it is better than none.
    assert (majority([Sample(text="")]).place, majority([Sample(text="")]).sure) == (0, 0.0)


def test_votes_are_weighed_by_how_likely_their_tokens_were():
    samples = [
        Sample(text="a", logprob=-2.0, tokens=1),
        Sample(text="a", logprob=-2.0, tokens=1),
        Sample(text="b", logprob=-1.0, tokens=10),
    ]
    # exp(-2) + exp(-2) against exp(-1/10).
    chosen = logprob_weighted(samples)
    assert chosen.place == 2
    assert chosen.sure == pytest.approx(math.exp(-0.1) / (math.exp(-0.1) + 2 * math.exp(-2)))
    with pytest.raises(InputError, match="sample 0 has no log-probability"):
        logprob_weighted([Sample(text="a")])


def test_verified_and_judged():
    samples = [Sample(text="a"), Sample(text="b"), Sample(text="c")]
    assert first_verified(samples, [False, True, True]).place == 1
    assert (first_verified(samples, [False] * 3).place, first_verified(samples, [False] * 3).sure) == (0, 0.0)
    assert best_judged(samples, [0.1, 0.7, 0.7]).place == 1
    assert best_judged(samples, [math.nan, math.nan, 0.0]).place == 2
    assert best_judged([], []) is first_verified([], []) is None
    for wrong in (lambda: first_verified(samples, [True]), lambda: best_judged(samples, [1.0])):
        with pytest.raises(InputError, match="there are 3 samples"):
            wrong()


def test_so_many_are_drawn_side_by_side():
    model = Model("4", "5", "5")
    found = asyncio.run(parallel(model, 3))
    assert ([one.text for one in found.samples], found.answer.text, found.reason) == (["4", "5", "5"], "5", None)
    assert model.asked == [[(), (), ()]]
    assert found.cost == pytest.approx(0.03)


def test_rules_end_it_as_soon_as_one_is_verified():
    model = Model("3", "5", "7", "4")
    found = asyncio.run(parallel(model, rules(decides="posterior"), verify=is_four))
    assert (found.reason, found.answer.text, found.verified) == ("verified", "4", [False, False, False, True])
    assert [len(batch) for batch in model.asked] == [2, 2]


def test_rules_end_it_as_soon_as_the_vote_is_decided():
    found = asyncio.run(parallel(Model("5"), rules(decides="posterior")))
    assert (found.reason, len(found.samples)) == ("agreement", 4)


def test_a_pool_that_fails_ends():
    """Nothing comes, or one of each batch, for ever."""
    dead = Model(None)
    found = asyncio.run(parallel(dead, rules()))
    assert (found.chosen, found.failures, len(dead.asked)) == (None, 2, 1)
    assert asyncio.run(parallel(Model(None), 5)).failures == 5

    class Half(Model):
        async def __call__(self, histories):
            await super().__call__(histories)
            return [Sample(text=str(len(self.asked)), cost=0.0), *[None] * (len(histories) - 1)]

    half = Half("x")
    found = asyncio.run(parallel(half, rules(decides="posterior", max_n=10, cost=1e-6)))
    assert len(half.asked) == 5
    assert (found.reason, found.failures) == ("budget", 5)


def test_what_nobody_could_verify_has_a_vote_and_is_not_wrong():
    async def says(verdicts, samples):
        return [verdicts.pop(0) for _ in samples]

    # Of none is anything known: as without a verifier.
    found = asyncio.run(parallel(Model("4"), rules(decides="posterior"), verify=partial(says, [None] * 99)))
    assert (found.reason, found.verified, found.answer.text) == ("agreement", [None] * 4, "4")
    # Those that may be right are chosen from, and failures that are known count.
    verdicts = [False, None, False, False]
    found = asyncio.run(parallel(Model("a", "b", "a", "a"), 4, verify=partial(says, verdicts)))
    assert (found.answer.text, found.chosen.place, found.verified) == ("b", 1, [False, None, False, False])
    found = asyncio.run(parallel(Model("a", "b", "a"), 3, verify=partial(says, [False] * 3)))
    assert found.answer.text == "a"
    allowance = rules(decides="posterior").begin()
    allowance.told(4, verified=[False, None, False, None])
    # Two failures: 1 / (2 + 2); of all four it would be 1 / 6.
    assert allowance.gain == pytest.approx(1 / 4)


def test_money_that_draws_took_may_be_told_apart_from_that_of_samples():
    spent = [0.0]

    class Failing(Model):
        async def __call__(self, histories):
            spent[0] += 0.1 * len(histories)
            return await super().__call__(histories)

    model = Failing("1", None, "2", None, "3", None)
    capped = rules(decides="posterior", value=10.0, max_cost=0.35)
    found = asyncio.run(parallel(model, capped, spent=lambda: spent[0]))
    # Three at a tenth, where samples say a hundredth.
    assert (len(found.samples), found.failures, found.reason) == (2, 1, "budget")
    spent[0] = 0.0
    capped = rules(value=10.0, max_cost=0.15)
    found = asyncio.run(sequential(Failing("1", "2", "3"), capped, lambda sample: "", spent=lambda: spent[0]))
    assert (len(found.samples), found.reason) == (1, "budget")


def test_rounds_read_the_last_answer_and_what_was_said_to_it():
    model = Model("3", "5", "4")
    found = asyncio.run(sequential(model, 3, lambda sample: f"{sample.text} is wrong"))
    assert found.answer.text == "4"
    assert model.asked == [[()], [(("3", "3 is wrong"),)], [(("3", "3 is wrong"), ("5", "5 is wrong"))]]
    # One that is verified ends it.
    model = Model("4", "5")
    found = asyncio.run(sequential(model, 3, lambda sample: "again", verify=is_four))
    assert (found.reason, found.answer.text, len(model.asked)) == ("verified", "4", 1)
    assert asyncio.run(sequential(Model("4", "5"), 2, lambda sample: "again", majority)).answer.text == "4"
    assert asyncio.run(sequential(Model(None), 3, lambda sample: "again")).chosen is None


def test_rules_end_rounds_too():
    # The curve gains 1/2, 1/6, 1/12, 1/20 ...: four of them are more than 0.04, whatever the batch.
    found = asyncio.run(sequential(Model("1", "2", "3", "4", "5"), rules(cost=0.04, batch=3), lambda sample: "again"))
    assert ([one.text for one in found.samples], found.reason, found.answer.text) == (
        ["1", "2", "3", "4"],
        "saturated",
        "4",
    )
    found = asyncio.run(sequential(Model("1", "4", "5"), rules(), lambda sample: "again", verify=is_four))
    assert (found.reason, found.answer.text, len(found.samples)) == ("verified", "4", 2)
    found = asyncio.run(sequential(Model("1"), rules(max_n=2), lambda sample: "again"))
    assert (found.reason, len(found.samples)) == ("budget", 2)
    dead = Model(None)
    found = asyncio.run(sequential(dead, rules(), lambda sample: "again"))
    assert (found.chosen, len(dead.asked)) == (None, 1)


def test_chains_side_by_side_give_the_commonest_of_their_last_answers():
    model = Model("1", "1", "1", "5", "7", "5")
    found = asyncio.run(mixed(model, chains=3, depth=2, critic=lambda sample: "again"))
    assert [one.text for one in found.samples] == ["1", "1", "1", "5", "7", "5"]
    assert found.answer.text == "5"
    assert found.chosen.place == 3
    # A chain that breaks off has its last answer's vote.
    model = Model("1", "1", "5", None, None, "5")
    found = asyncio.run(mixed(model, chains=3, depth=2, critic=lambda sample: "again"))
    assert (found.answer.text, found.failures) == ("1", 2)
    # It is not gone on with.
    model = Model("1", "1", "5", None, None, "5", "6")
    asyncio.run(mixed(model, chains=3, depth=3, critic=lambda sample: "again"))
    assert [len(batch) for batch in model.asked] == [3, 3, 1]


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_numbers_that_are_none_are_refused(count):
    with pytest.raises(InputError):
        asyncio.run(parallel(Model("a"), count))
    with pytest.raises(InputError):
        asyncio.run(mixed(Model("a"), chains=1, depth=count, critic=lambda sample: ""))


def test_what_draws_or_verifies_another_number_is_told():
    async def one(histories):
        return [Sample(text="a")]

    async def nothing(samples):
        return []

    with pytest.raises(InputError, match="draw gave 1 answers to 2 histories"):
        asyncio.run(mixed(one, chains=2, depth=1, critic=lambda sample: ""))
    with pytest.raises(InputError, match="draw gave 1 answers to 2 histories"):
        asyncio.run(parallel(one, 2))
    with pytest.raises(InputError, match="verify said 0 things of 1 answers"):
        asyncio.run(parallel(one, 1, verify=nothing))

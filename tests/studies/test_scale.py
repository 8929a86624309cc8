"""The study of SCALE: its world by hand, that its model is asked what SCALE says, that both arms run at the small size, and its rule."""

import asyncio
import random

import pytest

from anabranch.routers.scale.prompts import Prompts
from anabranch.studies.harness import Results
from anabranch.studies.scale import ARMS, PROMPTS, SHARES, ArmConfig, Bench, Size, judge, make, run
from anabranch.studies.scale_model import FAST, SLOW, answer_of, asked, batch, decoded, encoded, read_prompt, told
from anabranch.studies.scale_world import EASY, HARD, MOST, Chain, Link, draw

TINY = make().arms[0].config.size
CHAIN = Chain(4785, (Link("mul", 7), Link("mod", 13), Link("inc", 5)))


def test_the_world_by_hand():
    assert CHAIN.text == "inc(mod(mul(4785,7),13),5)"
    assert CHAIN.steps == ("mul 4785 7", "mod r1 13", "inc r2 5")
    # 4785 x 7 = 33495 = 13 x 2576 + 7; its last digit and 5 more.
    assert CHAIN.results == (33495, 7, 12)
    assert answer_of(CHAIN.links[0], 4785, 33495, SLOW) == "5>53 8>95 7>45 4>33 =33495"
    assert answer_of(CHAIN.links[1], 33495, 7, SLOW) == "3>03 3>07 4>09 9>08 5>07 =7"
    assert answer_of(Link("add", 987), 4785, 5772, SLOW) == "5+7>21 8+8>71 7+9>71 4+0>50 =5772"
    assert answer_of(CHAIN.links[2], 7, 12, SLOW) == "7>7 7+5>21 =12"
    assert answer_of(Link("low", None), 4785, 5, SLOW) == "4>4 7>7 8>8 5>5 =5"
    assert answer_of(Link("max", 55), 4785, 4785, SLOW) == "4,0>2 7,0>2 8,5>2 5,5>2 =4785"
    assert answer_of(Link("max", 57), 51, 57, SLOW) == "5,5>0 1,7>1 =57"
    assert answer_of(CHAIN.links[0], 4785, 33495, FAST) == "33495"


def test_leaving_easy_kinds_to_system_1_spares_what_is_asked():
    """Or nothing could fulfil the primary claim that tells kinds apart; all in System 1 spares far more, and is wrong at hard ones."""
    rng, tokens = random.Random(0), {"all": 0, "kinds": 0}
    for _ in range(500):
        chain = draw(rng, (*EASY, *HARD))
        values = (chain.start, *chain.results)
        for link, value, result in zip(chain.links, values, values[1:], strict=False):
            slow, fast = (len(answer_of(link, value, result, mode)) + 1 for mode in (SLOW, FAST))
            tokens["all"] += slow
            tokens["kinds"] += fast if link.kind in EASY else slow
    assert 0.35 < 1 - tokens["kinds"] / tokens["all"] < 0.45


def test_numbers_stay_small_and_seeds_are_kept():
    rng = random.Random(0)
    chains = [draw(rng, (*EASY, *HARD)) for _ in range(300)]
    assert all(0 <= value < MOST for chain in chains for value in chain.results)
    assert {len(chain.links) for chain in chains} == set(range(3, 9))
    assert {link.kind for chain in chains for link in chain.links} == {*EASY, *HARD}
    assert draw(random.Random(1), EASY) == draw(random.Random(1), EASY) != draw(random.Random(2), EASY)


def test_the_model_is_asked_what_scale_says():
    prompts, bar = Prompts.read(str(PROMPTS)), "====="
    parts = []
    for number, (step, value) in enumerate(zip(CHAIN.steps, CHAIN.results, strict=True), start=1):
        answer = rf"x \boxed{{{value}}}"
        parts.append(prompts.fill("done", "m", number=number, step=step, answer=answer, bar=bar))
    done = "".join(f"\n{one}\n" for one in parts)
    for earlier, results in (("", []), (done, list(CHAIN.results))):
        text = prompts.fill("solve", "m", bar=bar, problem=CHAIN.text, earlier=earlier, step="inc r2 5")
        assert read_prompt(text) == ("S", results, "inc r2 5")
    text = prompts.fill("outline", "m", bar=bar, problem=CHAIN.text, most=8)
    assert read_prompt(text) == ("O", [], CHAIN.text)
    assert asked([33495, 7], "inc r2 5", FAST) == "r1:33495 r2:7 inc r2 5!"
    assert told("5>53 =33495", "S") == r"\boxed{33495}"
    assert (told("no", "S"), told("a;b", "O")) == ("?", '{"step1": "a", "step2": "b"}')
    assert decoded(encoded(CHAIN.text)) == CHAIN.text


def test_only_answers_are_learned():
    token_BL, target_BL = batch(random.Random(0), (*EASY, *HARD), 0.2, 64)
    for row in range(64):
        learned = target_BL[row] >= 0
        assert 0 < learned.sum() < learned.numel()
        whole = decoded(token_BL[row].tolist())
        said = decoded(target_BL[row][learned].tolist())
        assert said.endswith("\n")
        # What comes after each token is the next one.
        start = int(learned.nonzero()[0])
        assert whole[start + 1 : start + len(said)] == said[:-1]
        assert whole[start] in "!~?"


@pytest.fixture(scope="module")
def measured():
    return {name: run(ArmConfig(arm=name, size=TINY), 0, lambda text: None) for name in ARMS}


def test_both_arms_run(measured):
    for found in measured.values():
        assert all(
            0 <= found[f"acc_{name}"] <= 1 for name in ("all1", "all2", "chosen", "vote", "predicted", "entropy_50")
        )
        assert (found["hard_all1"], found["hard_all2"]) == (0, 1)
        for share in SHARES:
            assert found[f"hard_scale_{share}"] == found[f"hard_random_{share}"]
        assert found["hard_scale_25"] < found["hard_scale_50"] <= found["hard_scale_75"]
        assert found["tau"] in (0.1, 0.3, 0.5, 0.7, 0.9)
        assert found["samples"] >= 1
        hard = [found[f"hard_tau_{tau}"] for tau in (10, 30, 50, 70, 90)]
        assert hard == sorted(hard, reverse=True)


def test_a_seed_has_its_own_model_and_problems_and_is_the_same_again():
    size = TINY.replace(steps=1, probed=10)
    one, again, other = (Bench(ArmConfig(arm="mixed", size=size), seed, lambda text: None) for seed in (0, 0, 1))
    assert one.judged == again.judged != other.judged
    assert not set(one.judged) & set(one.tried)
    texts = list(CHAIN.steps)
    assert one.probe.predict(texts) == again.probe.predict(texts)
    assert asyncio.run(_written(one)) == asyncio.run(_written(again))


async def _written(bench):
    from anabranch.studies.scale_model import ModelAsk

    return await ModelAsk(bench.model, most=12).write("mul 4785 7!")


def test_the_frozen_size():
    size = Size()
    assert (size.steps, size.tried, size.judged) == (3000, 200, 400)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)


def test_the_rule():
    def runs(**metrics):
        return {seed: {name: values[seed] for name, values in metrics.items()} for seed in range(5)}

    found = {
        claim.claim: claim.verdict
        for claim in judge(
            Results(
                {
                    "mixed": runs(
                        acc_chosen=[0.90, 0.91, 0.89, 0.92, 0.90],
                        acc_all2=[0.90, 0.905, 0.89, 0.915, 0.90],
                        spared=[0.45, 0.46, 0.44, 0.45, 0.47],
                        third=[0.33] * 5,
                        acc_scale_50=[0.80, 0.81, 0.79, 0.80, 0.82],
                        acc_random_50=[0.79, 0.80, 0.785, 0.79, 0.81],
                        acc_scale_25=[0.7, 0.5, 0.9, 0.6, 0.8],
                        acc_random_25=[0.6, 0.6, 0.7, 0.6, 0.5],
                        deliberation=[0.3] * 5,
                        kept=[0.0, 0.005, 0.0, 0.005, 0.0],
                    )
                }
            )
        )
    }
    assert found["PRIMARY: the chosen threshold is within a point of all System 2"] == "holds"
    assert found["PRIMARY: it spares at least 33% of all System 2's tokens"] == "holds"
    assert found["50% of steps by the probe beat random ones by 5 points"] == "does not hold"
    assert found["25% of steps by the probe beat random ones by 5 points"] == "not resolved"
    assert found["SCALE beats a vote at equal tokens"] == "not run"


@pytest.mark.parametrize(
    ("changes", "holding"),
    [
        ({}, {"within", "spares"}),
        # A model that has learned nothing; one whose thinking is of no use; one half of the claim without the other.
        ({"acc_all2": 0.01, "acc_chosen": 0.01}, set()),
        ({"deliberation": 0.05}, set()),
        ({"spared": 0.3}, set()),
        ({"kept": -0.2, "acc_chosen": 0.7}, set()),
    ],
)
def test_the_primary_claim_needs_a_model_that_has_two_systems_and_both_of_its_halves(changes, holding):
    made = {
        "acc_all2": 0.9,
        "acc_chosen": 0.9,
        "spared": 0.4,
        "third": 0.33,
        "deliberation": 0.3,
        "kept": 0.0,
    } | changes
    runs = {seed: {**made, "acc_chosen": made["acc_chosen"] + 0.001 * seed} for seed in range(5)}
    found = judge(Results({"mixed": runs}))[:2]
    assert {
        word for word, claim in zip(("within", "spares"), found, strict=True) if claim.verdict == "holds"
    } == holding


def test_equal_steps_of_a_model_that_has_learned_nothing_are_no_control():
    made = {"acc_random_50": 0.0, "acc_scale_50": 0.0, "acc_all2": 0.0, "deliberation": 0.0}
    runs = {seed: {**made, "acc_random_50": 0.001 * seed} for seed in range(5)}
    assert judge(Results({"equal": runs}))[-1].verdict == "not resolved"
    able = {seed: {**run, "acc_all2": 0.6, "deliberation": 0.2} for seed, run in runs.items()}
    assert judge(Results({"equal": able}))[-1].verdict == "holds"

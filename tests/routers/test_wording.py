"""Two texts are one question only if case and white space alone tell them apart; an answer is right only if it says what is wanted."""

import asyncio
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anabranch.routers.contract.ask import Answered
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.data import deduplicated, groups, split
from anabranch.routers.judges import ReferenceJudge
from anabranch.routers.strategies.consistency import commonest
from anabranch.routers.wording import answer_form, is_same_answer, letters_and_digits, normal_form, says


@pytest.mark.parametrize(
    ("text", "same"),
    [("What is  2+2?", "what is 2+2?"), ("Straße\n1.", "strasse 1."), ("", ""), (" !? ", "!?"), ("a\u00a0b", "a b")],
)
def test_normal_form_is_case_and_white_space(text, same):
    assert normal_form(text) == same


def test_who_changes_which_questions_are_the_same_sees_that_splits_of_studies_change():
    """Without any data: made questions that differ in one thing each, and which of them are put together and tested on.

    Where this fails, the splits of recorded outcomes are others, and what GraphRouter, Composition of Experts and the routing survey
    recorded is of other questions. Their runs note what they read, so that those of before do not count: run the three again
    (``anabranch study NAME --full``), and write the numbers of questions that `tests/routers/test_sets.py` finds to docs/scales.toml and to
    the docstrings that name them. Only then write the new digest here.
    """
    endings = ("", " ", "\t", ".", "?", "!", " .", "\u00a0", "\n", "\u200b", "%", "\u0301", "s")
    words = ("What is", "what  IS", "what-is", "Straße", "strasse", "\ufb01x", "fix")
    parts = itertools.product(("", "-", "A", "a"), words, ("5", "-5", "5.2", "\u0665"), endings)
    texts = [f"{start}{what} {number}{end}" for start, what, number, end in parts]
    task = tuple("ab"[len(text) % 2] for text in texts)
    made = Recorded(query=tuple(texts), models=("a",), score_NM=np.zeros((len(texts), 1)), task=task)
    tested = deduplicated(split(made, seed=3)[1]).query
    told = repr((groups(made).tolist(), tested)).encode()
    assert (len(texts), len(deduplicated(made)), hashlib.sha256(told).hexdigest()[:16]) == (
        1456,
        432,
        "45dce5e805eebea3",
    )


TEXT = st.text(st.one_of(st.sampled_from("aAbZß 1290+-<>=*/#%!?.,\t\n"), st.characters()), max_size=20)


@given(TEXT, TEXT)
def test_one_question_only_if_case_and_white_space_alone_differ(first, second):
    """The signs of both in their order, letters in any case: what is neither is lost nor changed."""

    def naive(text):
        words, word = [], ""
        for sign in text:
            if sign.isspace():
                words, word = [*words, word], ""
            else:
                word += sign.casefold()
        return [word for word in [*words, word] if word]

    assert (normal_form(first) == normal_form(second)) == (naive(first) == naive(second))


@given(
    TEXT,
    TEXT,
    st.characters(exclude_categories=("Lu", "Ll", "Lt", "Lo", "Lm", "Mn", "Nl", "So", "Zs", "Cc", "Zl", "Zp", "Cs")),
)
def test_a_sign_or_a_digit_more_makes_another_question(before, after, sign):
    assume(not sign.isspace())
    assert normal_form(f"{before}{sign}{after}") != normal_form(f"{before}{after}")


@given(TEXT)
def test_forms_are_their_own_forms(text):
    for form in (normal_form, letters_and_digits, answer_form):
        assert form(form(text)) == form(text)


PAIRS = [
    ("7 + 2", "7 - 2"),
    ("x < 4", "x > 4"),
    ("C++?", "C?"),
    ("-5", "5"),
    ("a.b", "a b"),
    ("50%", "50"),
    ("x²", "x2"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_signs_tell_questions_and_answers_apart(one, other):
    assert normal_form(one) != normal_form(other)
    assert not is_same_answer(one, other)
    assert not is_same_answer(other, one)


@pytest.mark.parametrize(
    ("answer", "wanted", "is_same", "holds"),
    [
        ("42.", "42", True, True),
        ("It is 42!", "42", False, True),
        ("**Forty Two**", "forty two.", True, True),
        ("(B)", "b", True, True),
        ("5", "-5", False, False),
        ("-5", "5", False, False),
        ("it is -5.", "5", False, False),
        ("it is -5.", "-5", False, True),
        ("it is 5.2", "5", False, False),
        ("it is 15", "5", False, False),
        ("about 5%", "5", False, False),
        ("x=5, so", "5", False, True),
        (r"so \boxed{5}", "5", False, True),
        ("12:5", "5", False, False),
        ("5!", "5!", True, True),
        ("5", "5!", False, False),
        ("it is 'C++'.", "C++", False, True),
        ("it is C++.", "C", False, False),
        (".5", "5", False, False),
        ("f(x)", "f(x)", True, True),
        ("", "x", False, False),
        ("...", "x", False, False),
    ],
)
def test_what_an_answer_says(answer, wanted, is_same, holds):
    assert (is_same_answer(answer, wanted), says(answer, wanted)) == (is_same, holds)


@given(
    st.decimals(-1000, 1000, allow_nan=False, places=2).map(str),
    st.decimals(-1000, 1000, allow_nan=False, places=2).map(str),
)
def test_a_number_is_no_other_number(said, wanted):
    assert is_same_answer(said, wanted) == (said == wanted)
    for sentence in (f"It is {said}.", f"it is **{said}**", f"({said})", f"= {said}, so"):
        assert says(sentence, wanted) == (said == wanted)


def test_the_exact_judge_and_votes_mind_the_sign():
    judge = ReferenceJudge({"what is 2 - 7?": "-5"})
    assert judge.knows("What is 2 - 7?")
    assert not judge.knows("What is 2 + 7?")
    assert asyncio.run(judge.scores("What is 2 - 7?", {"a": "5", "b": "-5"}, None)) == {"a": 0, "b": 1}
    assert commonest([Answered.saying("x > 4"), Answered.saying("x < 4")])[0] == 0.5

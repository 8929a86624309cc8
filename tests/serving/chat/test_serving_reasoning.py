"""Reasoning told apart from answers: whole, and in any pieces."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.serving.chat.reasoning import Reasoning
from anabranch.serving.core.request import Preamble

# (format, end of the prompt, text): reasoning, answer, marks that belong to it included.
CASES = {
    ("think", "assistant\n", "<think>\nLet me see.\n</think>\n\nIt is 5."): ("Let me see.", "It is 5."),
    ("think", "assistant\n", "\n <think>a</think>b"): ("a", "b"),
    ("think", "assistant\n", "It is <think>5</think>."): ("", "It is <think>5</think>."),
    ("think", "assistant\n", "  It is 5."): ("", "  It is 5."),
    ("think", "assistant\n", "<thin"): ("", "<thin"),
    ("think", "assistant\n", " \n"): ("", " \n"),
    ("think", "assistant\n", "<think></think>"): ("", ""),
    ("think", "assistant\n", "<think> a <b> </thin </think >\n</think>\n c </think>"): (
        "a <b> </thin </think >",
        "c </think>",
    ),
    ("think", "assistant\n<think>\n", "Let me see.\n</think>\n\nIt is 5.\n"): ("Let me see.", "It is 5.\n"),
    ("think", "assistant\n<think>\n", "cut off </thi"): ("cut off </thi", ""),
    ("think", "assistant\n<think>\n", "cut off \n"): ("cut off", ""),
    ("think", "assistant\n<think>\n", "a</think>\n\n"): ("a", ""),
    ("think", "assistant\n<think>\n\n</think>\n\n", "It is <think>5</think>."): ("", "It is <think>5</think>."),
    ("magistral", "[/INST]", "[THINK]a[/THINK]b"): ("a", "b"),
    (
        "harmony",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>5",
    ): (
        "Let me see.",
        "<|start|>assistant<|channel|>final<|message|>5",
    ),
    (
        "harmony",
        "<|start|>assistant<|channel|>analysis<|message|>",
        "a<|end|><|start|>assistant<|channel|>final<|message|>b",
    ): (
        "a",
        "<|start|>assistant<|channel|>final<|message|>b",
    ),
    (
        "harmony",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>analysis<|message|>b<|en",
    ): (
        "ab<|en",
        "",
    ),
    ("harmony", "<|start|>assistant", " to=functions.f<|channel|>commentary json<|message|>{}"): (
        "",
        " to=functions.f<|channel|>commentary json<|message|>{}",
    ),
    ("harmony", "<|start|>assistant", "<|channel|>analysis to=functions.f<|message|>{}"): (
        "",
        "<|channel|>analysis to=functions.f<|message|>{}",
    ),
    ("harmony", "<|start|>assistant", "Plain text."): ("", "Plain text."),
}


def split(case, pieces):
    splitter = Reasoning.after(*case[:2]).splitter()
    parts = [part for piece in pieces for part in splitter.push(piece)]
    held = splitter.held
    parts += splitter.end()
    assert splitter.held == 0
    assert all(text for _, text in parts)
    thought, said = ("".join(text for kind, text in parts if (kind == "reasoning") == is_it) for is_it in (True, False))
    return thought, said, held


@pytest.mark.parametrize("case", CASES)
def test_whole_and_character_by_character(case):
    assert split(case, [case[2]])[:2] == CASES[case]
    assert split(case, list(case[2]))[:2] == CASES[case]


@given(st.sampled_from(list(CASES)), st.data())
@settings(max_examples=200, deadline=None)
def test_any_cut_tells_the_same(case, data):
    text = case[2]
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert split(case, [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]) == split(case, [text])


PARTS = [
    "<think>",
    "</think>",
    "<thi",
    "nk>",
    "</",
    " ",
    "\n",
    "a",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "analysis",
    "final",
    "assistant",
    "to=functions.f",
    "<|return|>",
    "<|call|>",
    "commentary",
]
PROMPTS = ["", "<think>\n", "</think>", "<|start|>assistant", "<|start|>assistant<|channel|>analysis<|message|>"]


@given(
    st.sampled_from(["think", "harmony"]),
    st.sampled_from(PROMPTS),
    st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_mixture_tells_the_same_in_pieces_and_holds_back_little(format, prompt, text, data):
    case = (format, prompt, text)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole = split(case, [text])
    assert split(case, [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]) == whole
    assert split(case, list(text)) == whole
    assert whole[2] <= len(text)


def test_what_is_thought_is_told_as_it_comes():
    splitter = Reasoning.after("think", "<think>").splitter()
    assert splitter.push("\n") == []
    assert splitter.push("Let me") == [("reasoning", "Let me")]
    assert splitter.push(" see. \n") == [("reasoning", " see.")]
    assert splitter.push("So <") == [("reasoning", " \nSo")]
    assert splitter.push("/thin") == []
    assert splitter.push("g>") == [("reasoning", " </thing>")]
    assert (splitter.is_reasoning, splitter.held) == (True, 0)
    assert splitter.push("</think>\n\n") == []
    assert not splitter.is_reasoning
    assert splitter.push("5 ") == [("text", "5 ")]


def test_marks_of_messages_are_no_text():
    splitter = Reasoning.after("harmony", "<|start|>assistant").splitter()
    assert splitter.push("<|channel|>final<|message|>It is 5.<|return|>") == [
        ("mark", "<|channel|>final<|message|>"),
        ("text", "It is 5."),
        ("mark", "<|return|>"),
    ]


def test_what_may_come_before_a_grammar():
    tokenizer = ByteTokenizer()

    def preamble(format, prompt):
        return Reasoning.after(format, prompt).preamble(tokenizer)

    assert preamble("think", "x<think>\n") == Preamble(close=("</think>",))
    assert preamble("think", "x<think>\n\n</think>\n\n") is None
    assert preamble("think", "x") == Preamble(open=tuple(b"<think>"), close=("</think>",))
    assert preamble("harmony", "<|start|>assistant").close[0] == "<|channel|>final<|message|>"
    assert preamble("harmony", "<|start|>assistant<|channel|>final<|message|>") is None

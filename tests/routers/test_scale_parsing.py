r"""What models write is read in every documented shape, and nothing else is taken for it; hostile texts take no time."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.routers.scale.parsing import boxed, choice, final_content, outline, score

TWO = ("Find a.", "Find b.")
OBJECT = '{"step1": "Find a.", "step2": "Find b."}'


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        f"```json\n{OBJECT}\n```",
        f"Here is the plan [1]:\n{OBJECT}\nGood luck!",
        f"<think>{{}} not this</think>{OBJECT}",
        f'not {{this}} but {OBJECT} and not {{"step1": "x"}}',
        '{"step2": "Find b.", "step1": "Find a."}',
        '{"Step 1": " Find a. ", "STEP_2": "Find b."}',
        '["Find a.", "Find b."]',
        '{"steps": ["Find a.", "Find b."]}',
    ],
)
def test_outlines_in_every_shape(text):
    assert outline(text, most=16) == TWO


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "no plan",
        "{'step1': 'Find a.'}",
        '{"step1": "Find a."',
        '{"step1": "a", "step3": "b"}',
        '{"step1": "a", "step1": "b"}',
        '{"step1": "a", "Step 1": "b"}',
        '{"step0": "a", "step1": "b"}',
        '{"step1": ""}',
        '{"step1": 5}',
        '{"step1": {"do": "x"}}',
        '{"step1": "a", "why": "b"}',
        '{"steps": []}',
        '{"steps": {"step1": "a"}}',
        '{"plan": "a"}',
        "[1, 2]",
        '{"step1": NaN}',
        json.dumps({f"step{n}": "x" for n in range(1, 501)}),
        json.dumps(["x"] * 17),
        json.dumps({"step1": "x" * 5000}),
        f"<think>{OBJECT}",
        f"{OBJECT}</think>",
        "[" * 100_000,
        '{"a":' * 100_000,
        "{" * 200_000,
    ],
)
def test_what_is_no_outline(text):
    assert outline(text, most=16) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("version2", 1),
        (" Version 2.", 1),
        ("**version3**", 2),
        ("2", 1),
        ("I take version_1", 0),
        ("<think>version1</think>version2", 1),
    ],
)
def test_choices(text, number):
    assert choice(text, 3) == number


@pytest.mark.parametrize(
    "text", ["", "none", "version4", "version0", "version1 or version2", "1 2", "version99999", "2.5", "-"]
)
def test_what_is_no_choice(text):
    assert choice(text, 3) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0),
        ("1", 1.0),
        ("0.35", 0.35),
        (".35", 0.35),
        ("0,35", 0.35),
        ("Score: 0.35", 0.35),
        ("**0.35**", 0.35),
        ("0.35/1", 0.35),
        ("0.35 / 1.0.", 0.35),
        ("0.7, since it takes long thought", 0.7),
        ("<think>0.9 or 0.8?</think>\n0.35\n", 0.35),
        ("1.0", 1.0),
        ("step-by-step difficulty: 0.2", 0.2),
    ],
)
def test_scores(text, value):
    assert score(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NaN",
        "inf",
        "hard",
        "-0.3",
        "\u22120.3",
        "1.5",
        "2",
        "70%",
        "7/10",
        "0.3 or 0.4",
        "0.3 0.3",
        "1e-1",
        "0.5e-1",
        "1.0.5",
        "<think>0.3",
        "0.3</think>",
        "0.3" + "x" * 5000,
    ],
)
def test_what_is_no_score(text):
    assert score(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {x}", "x"),
        (r"\fbox{x}", "x"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{ \boxed{5}", "5"),
        (r"\boxed{a \boxed{b}}", r"a \boxed{b}"),
        (r"}} \boxed{3} }", "3"),
        (r"\boxed{}", ""),
        (r"\\boxed{3}", None),
        ("", None),
        ("boxed{3}", None),
        (r"\boxed 3", None),
    ],
)
def test_boxes(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a", "a"),
        ("<think>x</think> a ", "a"),
        ("x</think>a", "a"),
        ("a<think>x", "a"),
        ("<think>x", ""),
        ("a</think>", ""),
        ("<think>x</think>y</think>z", "z"),
    ],
)
def test_thoughts_are_no_answer(text, rest):
    assert final_content(text) == rest


@given(st.text(alphabet="{}[]()\\boxed\"':,.0123456789 stepvrin<>/th k\n", max_size=300))
def test_nothing_is_raised_whatever_comes(text):
    found = outline(text, most=4)
    assert found is None or (0 < len(found) <= 4 and all(found))
    assert choice(text, 3) in (None, 0, 1, 2)
    assert (number := score(text)) is None or 0 <= number <= 1
    box = boxed(text)
    assert box is None or box in text


@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_an_outline_that_is_written_is_read(steps):
    steps = [step.replace("think>", "").strip() or "x" for step in steps]
    text = json.dumps({f"step{number}": step for number, step in enumerate(steps, start=1)})
    assert outline(text, most=8) == tuple(steps)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        "{" * 500_000,
        "version " * 100_000,
        "0." * 200_000,
        "<think>" * 100_000,
        "=" * 500_000,
        '"' * 300_000,
    ],
)
def test_hostile_texts_take_no_longer_than_reading_them(text):
    """Linear is a tenth of a second here; what is quadratic would take minutes."""
    assert outline(text, most=16) is None
    assert score(text) is None
    assert boxed(text) is None
    assert choice(text, 8) is None
    assert len(final_content(text)) <= len(text)

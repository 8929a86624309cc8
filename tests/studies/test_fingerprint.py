"""What counts as other code."""

import ast

import pytest

from anabranch.studies.fingerprint import of_code, of_tree

CODE = '''
"""A module."""
LIMIT = 0.5


def judge(x, *, by=LIMIT):
    """By hand."""
    return [f"{x:.2f} of {by!r}" if x > by else None]  # why


class Two:
    """Two."""

    y: int = 2
'''


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""A module."""\n', ""),
        ('"""By hand."""', '"""By hand, and by eye."""'),
        ("  # why", ""),
        ("def judge(x, *, by=LIMIT):", "def judge(x: list[float], *, by: float = LIMIT) -> list[str | None]:"),
        ('    """Two."""\n\n', ""),
        ("LIMIT = 0.5", "LIMIT = (\n    0.5\n)"),
        ('f"{x:.2f} of', "f'{x:.2f} of"),
    ],
)
def test_how_it_is_written_changes_nothing(before, after):
    assert before in CODE
    # Of a string that is quoted otherwise the end is, too.
    other = CODE.replace(before, after).replace('{by!r}"', "{by!r}'" if "'" in after else '{by!r}"')
    assert of_code(other) == of_code(CODE)


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.5", "0.50001"), ("x > by", "x >= by"), (".2f", ".3f"), ("None", "0"), ("*, by", "by"), ("y: int", "z: int")],
)
def test_what_it_does_changes_it(before, after):
    assert before in CODE
    assert of_code(CODE.replace(before, after, 1)) != of_code(CODE)


def test_it_is_the_same_for_every_python():
    """Recorded with Python 3.11: another digest by another version would void what is frozen."""
    code = "def f(x: int) -> str | None:\n    return f'{x:+.1f}' if x > 0.5 else None\n"
    assert of_code(code) == "619e51a33d2d2402"
    # A tree of its own has no module around it.
    assert of_tree(ast.parse(code).body[0]) == of_tree(ast.parse("\n\n" + code).body[0]) != of_code(code)
    with pytest.raises(SyntaxError):
        of_code("def (")

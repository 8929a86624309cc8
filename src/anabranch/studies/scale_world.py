"""A made world in which some steps are easy and some are not: chains of arithmetic, with what a careful solver writes down at each step.

    problem    inc(mod(mul(4785,7),13),5)
    steps      mul 4785 7;  mod r1 13;  inc r2 5
    System 1   33495                                       at once
    System 2   5>53 8>95 7>45 4>33 =33495                  digit by digit: digit, what is written, what is carried

Easy kinds: the last digit of a number (``low``), the larger of two (``max``), the last digit and a digit more (``inc``). Hard ones: sums of
four to six digits (``add``), products with a digit (``mul``), remainders (``mod``), digit by digit from the left. System 2 goes through the
digits of easy ones too, as a model that thinks at everything does: that is what is spared where they are told from hard ones.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

EASY, HARD = ("low", "max", "inc"), ("add", "mul", "mod")
# Numbers stay below it.
MOST = 10**6


@dataclass(frozen=True)
class Link:
    """A step of a chain.

    Attributes:
        kind: what is done with the result before (of the first, with ``start``).
        other: the second operand; None where there is none.
    """

    kind: str
    other: int | None

    def text(self, operand: str) -> str:
        """As it is asked."""
        return f"{self.kind} {operand}" + ("" if self.other is None else f" {self.other}")


@dataclass(frozen=True)
class Chain:
    """A problem.

    Attributes:
        start: the first operand.
        links: steps, in order.
    """

    start: int
    links: tuple[Link, ...]

    @property
    def text(self) -> str:
        """The problem as one expression."""
        text = str(self.start)
        for link in self.links:
            text = f"{link.kind}({text}" + (")" if link.other is None else f",{link.other})")
        return text

    @property
    def steps(self) -> tuple[str, ...]:
        """The outline: each step uses the result before."""
        operands = [str(self.start), *(f"r{number}" for number in range(1, len(self.links)))]
        return tuple(link.text(operand) for link, operand in zip(self.links, operands, strict=True))

    @property
    def results(self) -> tuple[int, ...]:
        """Of each step."""
        found, value = [], self.start
        for link in self.links:
            value = done(link, value)
            found.append(value)
        return tuple(found)


def draw(rng: random.Random, kinds: Sequence[str], least: int = 3, most: int = 8) -> Chain:
    """A chain of ``least`` to ``most`` steps whose numbers stay below `MOST`."""
    value = start = rng.randrange(1000, 10_000)
    links: list[Link] = []
    for _ in range(rng.randint(least, most)):
        usable = [kind for kind in kinds if kind != "mul" or value < MOST // 10]
        link = _linked(rng, rng.choice(usable))
        links.append(link)
        value = done(link, value) % MOST
    return Chain(start, tuple(links))


def _linked(rng: random.Random, kind: str) -> Link:
    if kind == "low":
        return Link(kind, None)
    ranges = {"max": (10, 100), "inc": (1, 10), "add": (1000, 10_000), "mul": (3, 10), "mod": (7, 20)}
    return Link(kind, rng.randrange(*ranges[kind]))


def done(link: Link, value: int) -> int:
    """The result of a step."""
    other = link.other or 0
    found = {
        "low": lambda: value % 10,
        "max": lambda: max(value, other),
        "inc": lambda: value % 10 + other,
        "add": lambda: (value + other) % MOST,
        "mul": lambda: value * other,
        "mod": lambda: value % other,
    }
    return found[link.kind]()


def written(link: Link, value: int) -> str:
    """What System 2 writes before the result, easy steps included."""
    other = link.other or 0
    if link.kind == "mul":
        parts, carry = [], 0
        for digit in reversed(str(value)):
            carry, out = divmod(int(digit) * other + carry, 10)
            parts.append(f"{digit}>{out}{carry}")
        return " ".join(parts)
    if link.kind == "add":
        length = max(len(str(value)), len(str(other)))
        parts, carry = [], 0
        for one, two in zip(reversed(str(value).zfill(length)), reversed(str(other).zfill(length)), strict=True):
            carry, out = divmod(int(one) + int(two) + carry, 10)
            parts.append(f"{one}+{two}>{out}{carry}")
        return " ".join(parts)
    if link.kind == "mod":
        parts, rest = [], 0
        for digit in str(value):
            rest = (rest * 10 + int(digit)) % other
            parts.append(f"{digit}>{rest:02d}")
        return " ".join(parts)
    if link.kind == "max":
        # How the numbers compare up to each digit: 0 alike, 1 the first is less, 2 it is more.
        length = max(len(str(value)), len(str(other)))
        parts, sign = [], 0
        for one, two in zip(str(value).zfill(length), str(other).zfill(length), strict=True):
            sign = sign or (one < two) + 2 * (one > two)
            parts.append(f"{one},{two}>{sign}")
        return " ".join(parts)
    # ``low`` and ``inc``: all digits up to the last, which is what counts.
    read = " ".join(f"{digit}>{digit}" for digit in str(value))
    if link.kind == "low":
        return read
    carry, out = divmod(value % 10 + other, 10)
    return f"{read} {value % 10}+{other}>{out}{carry}"

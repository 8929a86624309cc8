"""Which of two answers is better: a judge asked in both orders, as the paper asks its one (section 6).

A judge says -3 (the second is much better) to 3 (the first is). It is asked ``rounds`` times in each order, so that a liking for what comes
first cancels; a mean within 0.3 of 0 is a tie.
"""

from collections.abc import Callable, Iterable

# Request, first answer, second answer -> -3 to 3.
Judge = Callable[[str, str, str], float]

TIE = 0.3


def compare(judge: Judge, request: str, first: str, second: str, *, rounds: int = 8) -> float:
    """Mean over both orders, from -3 to 3; above 0 the first answer is better."""
    total = 0.0
    for _ in range(rounds):
        total += judge(request, first, second) - judge(request, second, first)
    return total / (2 * rounds)


def outcome(score: float) -> float:
    """1 where the first answer won, 0 where the second did, 1/2 for a tie."""
    return 0.5 if -TIE <= score <= TIE else float(score > 0)


def win_rate(scores: Iterable[float]) -> float:
    """(wins + ties / 2) / all, of the first. NaN of nothing."""
    outcomes = [outcome(score) for score in scores]
    return sum(outcomes) / len(outcomes) if outcomes else float("nan")

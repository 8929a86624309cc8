"""What an answer is worth beside another, by a judge who saw both in either order.

A win counts 1, a tie 1/2. Judges favour a place: one that always likes the first says 1/2 of everything where both orders count alike,
and a pair that it saw in one order alone says nothing (Zheng et al. 2023, arXiv 2306.05685, section 3.4).
"""

WIN, TIE, LOSS = 1.0, 0.5, 0.0


def of_both_orders(shown_first: float | None, shown_second: float | None) -> float | None:
    """Mean of what one answer was found worth when it was shown first, and second; None unless both were found."""
    if shown_first is None or shown_second is None:
        return None
    return (shown_first + shown_second) / 2

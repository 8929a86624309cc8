"""Texts of words that nothing else has."""

import random


def made_topics(count=12, *, words=200, seed=0):
    """Long texts, none like another."""
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(words)) for _ in range(count)]

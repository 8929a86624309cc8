"""Worlds of tokens that tests play: small enough to be learned in a second."""

import numpy as np

from anabranch.config import configclass
from anabranch.rl.tokens import Outcome, Told, TokenWorld

# Tokens 0 to 5 are letters.
LETTERS, ASK, END, INFO = 6, 6, 7, 8
VOCABULARY = 9


class _EchoPlay:
    def __init__(self, first, second, turns):
        self.prompt, self._first, self._turns, self._said = (first, second, ASK), first, turns, []

    def ends(self, turn):
        return turn[-1] == END

    def step(self, turn):
        self._said.append(turn)
        done = len(self._said) == self._turns
        return Told((INFO, self._first, ASK) if not done else (), done)

    def outcome(self):
        right = bool(self._said) and self._said[-1][:2] == (self._first, END)
        return Outcome(float(right), {"right": float(right)})


class Echo(TokenWorld, kind="echo_for_tests"):
    """Say the first letter again, and end; in the last of ``turns`` turns."""

    @configclass
    class Config(TokenWorld.Config):
        turns: int = 1

    vocab_size, turn_tokens, num_questions, num_tests = VOCABULARY, 4, 24, 12

    def play(self, question, *, seed, split="train"):
        draw = np.random.default_rng([question, split == "test"])
        first, second = (int(one) for one in draw.integers(0, LETTERS, 2))
        return _EchoPlay(first, second, self.config.turns)

    def traces(self, count, *, seed):
        draw = np.random.default_rng(seed)
        made = []
        for _ in range(count):
            first, second, said = (int(one) for one in draw.integers(0, LETTERS, 3))
            made.append(((first, second, ASK), (((said, END), True),)))
        return made

"""Worlds of tokens that tests play: small enough to be learned in seconds. Found by the entry point in rl_worlds-0.dist-info."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from anabranch.config import configclass
from anabranch.rl.tokens import Outcome, TokenWorld, Told
from anabranch.train import Trainer

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
        turn = self._said[-1] if self._said else ()
        right = turn[:2] == (self._first, END)
        return Outcome(0.5 * (turn[:1] == (self._first,)) + 0.5 * right, {"right": float(right)})


class Echo(TokenWorld, kind="echo"):
    """Say the first letter again, which is worth a half, and end; in the last of ``turns`` turns."""

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


def train_rank(rank, run, folder, ranks):
    """A process of a training; writes its weights, and the tokens of its last rollout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    trainer = Trainer(run, Path(folder) / "run")
    trainer.fit()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.save({"tokens": trainer.stream.rollout.samples.token_BL, "weights": weights}, Path(folder) / f"{rank}.pt")
    # Threads of gloo may still let go of tensors; see `Workers.close`.
    time.sleep(0.2)
    dist.destroy_process_group()

"""Sums of six kinds for `ttspm`, a small character model that learns them, and its answers, side by side and thought over again.

A question is "12+34=", its answer "46" and a line's end. Thought over, it is "12+34=45?", and the answer again. What is asked is never
among what is learned.
"""
# Shapes: S kinds of sums, Q questions of each, M samples, T rounds

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import SelfAttention, SwiGLU

Asked = tuple[str, str]

# From easy to hard; each has thousands of questions, or hundreds.
KINDS: dict[str, Callable[[random.Random], Asked]] = {
    "2-1": lambda draw: _minus(draw.randint(10, 99), draw.randint(0, 9)),
    "2+1": lambda draw: _plus(draw.randint(10, 99), draw.randint(0, 9)),
    "2+2": lambda draw: _plus(draw.randint(10, 99), draw.randint(10, 99)),
    "2x1": lambda draw: _times(draw.randint(10, 99), draw.randint(2, 9)),
    "2+2+2": lambda draw: _plus(*(draw.randint(10, 99) for _ in range(3))),
    "3+3": lambda draw: _plus(draw.randint(100, 999), draw.randint(100, 999)),
}
LONGEST = 32
ROWS = 2048


def _plus(*numbers: int) -> Asked:
    return "+".join(map(str, numbers)), str(sum(numbers))


def _minus(one: int, other: int) -> Asked:
    return f"{one}-{other}", str(one - other)


def _times(one: int, other: int) -> Asked:
    return f"{one}x{other}", str(one * other)


def questions_of(kind: str, count: int, seed: int) -> list[Asked]:
    """Different questions of a kind."""
    draw = random.Random(f"{kind} {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = KINDS[kind](draw)
        found[question] = answer
    return list(found.items())


def attempt_of(answer: str, draw: random.Random) -> str:
    """An answer to think over: the right one half of the time, else with a digit that is another."""
    if draw.random() < 0.5:
        return answer
    place = draw.randrange(len(answer))
    return (
        answer[:place] + draw.choice([digit for digit in "0123456789" if digit != answer[place]]) + answer[place + 1 :]
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model said.

    Attributes:
        right_SQM: bool, of samples side by side.
        said_SQM: int64, a number for each answer, equal where answers are.
        round_SQT: bool, of rounds; the first is the first sample.
    """

    right_SQM: np.ndarray
    said_SQM: np.ndarray
    round_SQT: np.ndarray


def train(
    dim: int, num_layers: int, steps: int, batch: int, held: set[str], seed: int, progress: Callable[[str], None]
) -> Decoder:
    """A model that has learned sums of all kinds alike, but for those held back; half of its rows are thought over."""
    model = Decoder.Config(
        vocab_size=257,
        dim=dim,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=dim * 8 // 3 // 8 * 8),
        max_positions=2 * LONGEST,
    ).build(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw, tokenizer = random.Random(seed), ByteTokenizer.Config().build()
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        token_BL, target_BL = _batch(draw, batch, held, tokenizer)
        logits_BLV = model(token_BL).logits_BLV
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            progress(f"step {step} of {steps}, loss {loss.item():.3f}")
    return model.eval()


def _batch(draw: random.Random, batch: int, held: set[str], tokenizer: ByteTokenizer) -> tuple[Tensor, Tensor]:
    token_BL = torch.zeros(batch, LONGEST, dtype=torch.long)
    target_BL = torch.full((batch, LONGEST), -100)
    kinds = list(KINDS.values())
    for row in range(batch):
        question = answer = ""
        while not question or question in held:
            question, answer = draw.choice(kinds)(draw)
        again = f"{attempt_of(answer, draw)}?" if draw.random() < 0.5 else ""
        asked = tokenizer.encode(f"{question}={again}")
        ids = torch.tensor([*asked, *tokenizer.encode(f"{answer}\n")])
        token_BL[row, : len(ids) - 1] = ids[:-1]
        target_BL[row, len(asked) - 1 : len(ids) - 1] = ids[len(asked) :]
    return token_BL, target_BL


def answers_of(
    model: Decoder,
    asked_S: Sequence[Sequence[Asked]],
    samples: int,
    rounds: int,
    temperature: float,
    seed: int,
    progress: Callable[[str], None],
) -> Answers:
    """Samples and rounds of every question."""
    rights, said, thought = [], [], []
    for number, asked in enumerate(asked_S):
        progress(f"sampling kind {number + 1} of {len(asked_S)}")
        answers = [answer for _, answer in asked]
        prompts = [f"{question}=" for question, _ in asked for _ in range(samples)]
        texts = np.array(_say(model, prompts, temperature, seed + 1000 * number)).reshape(len(asked), samples)
        rights.append(texts == np.array(answers)[:, None])
        said.append(np.unique(texts, return_inverse=True)[1].reshape(texts.shape))
        last = list(texts[:, 0])
        states = [rights[-1][:, 0]]
        for turn in range(1, rounds):
            again = [f"{question}={answer[:8]}?" for (question, _), answer in zip(asked, last, strict=True)]
            last = _say(model, again, temperature, seed + 1000 * number + turn)
            states.append(np.array(last) == np.array(answers))
        thought.append(np.stack(states, axis=1))
    return Answers(right_SQM=np.stack(rights), said_SQM=np.stack(said).astype(np.int64), round_SQT=np.stack(thought))


def _say(model: Decoder, prompts: Sequence[str], temperature: float, seed: int) -> list[str]:
    tokenizer = ByteTokenizer.Config().build()
    end = tuple(tokenizer.encode("\n"))
    found: list[str] = []
    for at in range(0, len(prompts), ROWS):
        ids = [tokenizer.encode(prompt) for prompt in prompts[at : at + ROWS]]
        sampling = SamplingConfig(max_tokens=6, temperature=temperature, stop=end, seed=seed * 64 + at // ROWS)
        found += [tokenizer.decode(answer) for answer in generate(model, ids, sampling)]
    return found

"""One small decoder that has both systems, and how SCALE asks it: mode tokens, batches of whatever is asked at one time, tokens counted.

r1:55 r2:385 mul r2 7!      System 1: the result;  ~ System 2: the digits first;  EXPRESSION? the outline
"""
# Shapes: B batch, L positions, V vocabulary

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from anabranch.lm import Decoder, SamplingConfig
from anabranch.lm.generate import stream
from anabranch.routers.contract.ask import Answered, Arm, Spent
from anabranch.studies.harness import Progress
from anabranch.studies.scale_world import Chain, Link, draw, written

LETTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz!~?=:;,()>+"
PAD = LETTERS.index("\n")
FAST, SLOW, PLAN = "!", "~", "?"
_BAR = re.compile("={5,}")
_BOX = re.compile(r"\\boxed\{(\d+)\}")
IGNORED = -100
# Tokens of an answer.
MOST = 160


def encoded(text: str) -> list[int]:
    """Ids of a text; of what the world does not have, of a space."""
    return [LETTERS.find(letter) if letter in LETTERS else 1 for letter in text]


def decoded(ids: Sequence[int]) -> str:
    """The text of ids."""
    return "".join(LETTERS[one] for one in ids)


def asked(before: Sequence[int], step: str, mode: str) -> str:
    """A step as the model is asked it, behind the results before."""
    return "".join(f"r{number}:{value} " for number, value in enumerate(before, start=1)) + step + mode


def answer_of(link: Link, value: int, result: int, mode: str) -> str:
    """What is right."""
    if mode == FAST:
        return str(result)
    return f"{written(link, value)} ={result}"


def example(rng: random.Random, kinds: Sequence[str], plans: float) -> tuple[str, str]:
    """What is asked, and what is right: of a step in one of the modes, or of an outline."""
    chain = draw(rng, kinds)
    if rng.random() < plans:
        return chain.text + PLAN, ";".join(chain.steps)
    at = rng.randrange(len(chain.links))
    mode = rng.choice((FAST, SLOW))
    values = (chain.start, *chain.results)
    right = answer_of(chain.links[at], values[at], values[at + 1], mode)
    return asked(chain.results[:at], chain.steps[at], mode), right


def batch(rng: random.Random, kinds: Sequence[str], plans: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[B, L]``, and what comes after each, where that is an answer's."""
    made = [example(rng, kinds, plans) for _ in range(rows)]
    both = [(encoded(one), encoded(two + "\n")) for one, two in made]
    longest = max(len(one) + len(two) for one, two in both) - 1
    token_BL = torch.full((rows, longest), PAD)
    target_BL = torch.full((rows, longest), IGNORED)
    for row, (one, two) in enumerate(both):
        whole = torch.tensor(one + two)
        token_BL[row, : len(whole) - 1] = whole[:-1]
        target_BL[row, len(one) - 1 : len(whole) - 1] = whole[len(one) :]
    return token_BL, target_BL


def train(
    model: Decoder, kinds: Sequence[str], *, steps: int, rows: int, rate: float, seed: int, progress: Progress
) -> None:
    """Teach both modes and outlines, by AdamW with a warm-up and a cosine."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm), rate / 20),
        ],
        [warm],
    )
    model.train()
    for step in range(steps):
        token_BL, target_BL = batch(rng, kinds, 0.15, rows)
        logits_BLV = model(token_BL).logits_BLV
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            progress(f"step {step} of {steps}, loss {loss.item():.3f}")
    model.eval()


@dataclass
class _Waiting:
    prompt: str
    max_tokens: int
    temperature: float
    coming: asyncio.Future[list[int]]


@dataclass
class ModelAsk:
    """An `Ask` over such a model. What is asked at one time is one batch.

    Attributes:
        model: trained.
        temperature: of all answers; 0 takes the likeliest.
        seed: of what is drawn.
        most: tokens of an answer.
        spent: as of any `Ask`.
    """

    model: Decoder
    temperature: float = 0.0
    seed: int = 0
    most: int = MOST
    left: float = float("inf")
    spent: Spent = field(default_factory=Spent)
    _waiting: list[_Waiting] = field(default_factory=list)
    _batches: int = 0

    async def __call__(self, arm: Arm | str, messages: Any, *, max_tokens: int | None = None, **how: Any) -> Answered:
        """The answer to one of SCALE's prompts; ``arm`` says which mode."""
        name = arm if isinstance(arm, str) else arm.model
        stage, before, text = read_prompt(messages[-1]["content"])
        prompt = text + PLAN if stage == "O" else asked(before, text, SLOW if name == "slow" else FAST)
        ids = await self.write(prompt, max_tokens)
        prompt_tokens, completion_tokens = len(prompt), len(ids) + 1
        self.spent = Spent(
            prompt_tokens=self.spent.prompt_tokens + prompt_tokens,
            completion_tokens=self.spent.completion_tokens + completion_tokens,
        )
        said = told(decoded(ids), stage)
        return Answered.saying(said, model=name, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    def stream(self, *arguments: Any, **how: Any) -> Any:
        """Nobody streams in a study."""
        raise NotImplementedError

    async def write(self, prompt: str, max_tokens: int | None = None) -> list[int]:
        """What the model writes behind a prompt, without its end."""
        loop = asyncio.get_running_loop()
        one = _Waiting(prompt, min(max_tokens or self.most, self.most), self.temperature, loop.create_future())
        self._waiting.append(one)
        if len(self._waiting) == 1:
            # Whoever else asks in this turn of the loop, or the next, is in the batch.
            loop.call_soon(loop.call_soon, self._flush)
        return await one.coming

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._batches += 1
        config = SamplingConfig(
            max_tokens=max(one.max_tokens for one in waiting),
            temperature=self.temperature,
            stop=(PAD,),
            seed=self.seed * 100_003 + self._batches,
        )
        try:
            found: list[list[int]] = [[] for _ in waiting]
            for step in stream(self.model, [encoded(one.prompt) for one in waiting], config):
                for row, token in zip(step.rows, step.tokens, strict=True):
                    found[row].append(token)
        except Exception as error:
            for one in waiting:
                one.coming.set_exception(error)
            return
        for one, ids in zip(waiting, found, strict=True):
            if not one.coming.done():
                one.coming.set_result(ids[: one.max_tokens])


def read_prompt(text: str) -> tuple[str, list[int], str]:
    """What is asked for (``O`` an outline), results so far, and the step or the problem."""
    parts = [part.strip() for part in _BAR.split(text)]
    if parts[0] == "O":
        return "O", [], parts[1]
    boxes = [_BOX.search(part) for part in parts[3:-2:2]]
    return parts[0], [int(box[1]) if box else 0 for box in boxes], parts[-2]


def told(text: str, stage: str) -> str:
    """What the model wrote, in the form that SCALE reads."""
    if stage == "O":
        return json.dumps({f"step{number}": step for number, step in enumerate(text.split(";"), start=1)})
    value = text.rpartition("=")[2].strip()
    # What is no number is a wrong answer, not none: nobody stands in for the system.
    return rf"\boxed{{{value}}}" if value.isdigit() else "?"


def right(chain: Chain, answer: str | None) -> bool:
    """Whether a final answer is the chain's."""
    return answer == str(chain.results[-1])

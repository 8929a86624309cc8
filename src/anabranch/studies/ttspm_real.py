"""Arms of `ttspm` on real models: sums in words (SmolLM2), functions of HumanEval and problems of GSM8K (Qwen2.5-Coder).

What is right is found by the verifiers that the package ships: a function runs its tests in a process of its own, a problem of GSM8K
must come to the very number. Data lie in the folder that ANABRANCH_DATA names.
"""
# Shapes: Q questions, M samples of each

import gzip
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from anabranch.errors import DataError
from anabranch.files import parse_json, sha256_of
from anabranch.places import data_file
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.small_model import CODER, SMOLLM2, Messages, SmallModel, Weights
from anabranch.test_time import BetaTTSPM, CodeVerifier, hit_curve, is_gsm8k_right

# File, where it is from, and its sha256.
HUMANEVAL = (
    "qa/humaneval.jsonl.gz",
    "openai/human-eval",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
GSM8K = (
    "qa/gsm8k_test.jsonl.gz",
    "openai/grade-school-math",
    "bb13a52c31b1fa4805ebab294dce067e337ccd4b61c3e6461c85c92965282c62",
)

COMPLETE = "Complete this function. Reply with the whole function in one block of code, and nothing else."
WORDS = (
    "Tom has {a} apples and buys {b} more.",
    "A box holds {a} pens, and {b} are put in.",
    "{a} birds sit there and {b} come.",
)
LEAVES = " Then {c} go away."


@dataclass(frozen=True)
class Question:
    """What is asked, and whether an answer is right.

    Attributes:
        text: of the user's message.
        is_right: of an answer.
    """

    text: str
    is_right: Callable[[str], bool]


def word_sums(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions of one and of two steps, in words, with their answers."""
    draw, found = random.Random(seed), []
    for number in range(count):
        a, b = draw.randint(2, 30), draw.randint(2, 30)
        c = draw.randint(1, a + b - 1) if number % 2 else 0
        text = draw.choice(WORDS).format(a=a, b=b) + (LEAVES.format(c=c) if c else "")
        found.append((f"{text} How many are there now? Reply with the number.", str(a + b - c)))
    return found


def last_number(text: str) -> str:
    """Of an answer; empty where there is none."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else ""


def sums(count: int, seed: int) -> list[Question]:
    """Sums in words."""
    return [
        Question(text, lambda said, answer=answer: last_number(said) == answer)  # type: ignore[misc]
        for text, answer in word_sums(count, seed)
    ]


def functions(count: int, seed: int) -> list[Question]:
    """Functions of HumanEval, drawn anew for each seed."""
    verifier = CodeVerifier()
    return [
        Question(
            f"{COMPLETE}\n\n```python\n{row['prompt']}```",
            lambda said, row=row: verifier.check_humaneval(row["prompt"], said, row["test"], row["entry_point"]).passed,  # type: ignore[misc]
        )
        for row in random.Random(seed).sample(_rows(*HUMANEVAL), count)
    ]


def problems(count: int, seed: int) -> list[Question]:
    """Problems of GSM8K, drawn anew for each seed."""
    return [
        Question(
            f"{row['question']} Think step by step, and end with a line '#### ' and the number.",
            lambda said, row=row: is_gsm8k_right(said, row["answer"]),  # type: ignore[misc]
        )
        for row in random.Random(seed).sample(_rows(*GSM8K), count)
    ]


@dataclass(frozen=True)
class Asked:
    """What an arm asks whom.

    Attributes:
        questions: of a count and a seed.
        weights: of the model.
        max_tokens: of an answer.
    """

    questions: Callable[[int, int], list[Question]]
    weights: Weights
    max_tokens: int


ASKED = {
    "smollm2": Asked(sums, SMOLLM2, 48),
    "humaneval": Asked(functions, CODER, 320),
    "gsm8k": Asked(problems, CODER, 320),
}


def run_real(
    kind: str,
    count: int,
    samples: int,
    temperature: float,
    seed: int,
    progress: Progress,
    say: Callable[[Sequence[Messages], int], Sequence[str]] | None = None,
) -> Metrics:
    """Samples of every question, verified; their curve, and the mixture fitted to all of it.

    Args:
        kind: of `ASKED`.
        count: of questions.
        samples: of each.
        temperature: of samples.
        seed: of questions and samples.
        progress: told of each round of samples.
        say: from prompts and the number of a sample to answers; None asks the model.
    """
    asked = ASKED[kind]
    questions = asked.questions(count, seed)
    prompts: list[Messages] = [[{"role": "user", "content": question.text}] for question in questions]

    def ask(prompts: Sequence[Messages], number: int) -> list[str]:
        model = SmallModel(
            max_tokens=asked.max_tokens, temperature=temperature, seed=seed * 1000 + number, weights=asked.weights
        )
        return [reply.text for reply in model.answer(prompts)]

    right_MQ = []
    for number in range(samples):
        progress(f"sample {number + 1} of {samples}")
        said = (say or ask)(prompts, number)
        right_MQ.append([question.is_right(text) for question, text in zip(questions, said, strict=True)])
    return told(np.array(right_MQ).T)


def told(right_QM: np.ndarray) -> Metrics:
    """Accuracy of one sample, the curve, the mixture fitted to all of it, how far it is off, and where it stops."""
    num = right_QM.shape[1]
    curve_N = hit_curve(right_QM.sum(1), num).mean(0)
    fitted = BetaTTSPM().fit(right_QM)
    return {
        "accuracy": float(right_QM.mean()),
        "curve": curve_N.tolist(),
        "fit": [float(fitted.f_max), float(fitted.a), float(fitted.b)],
        "fit_off": float(np.abs(fitted.value(np.arange(1, num + 1)) - curve_N).max()),
        "stop": int(fitted.saturation(0.01)),
    }


def pinned(kind: str) -> str | None:
    """Names the questions and the weights of an arm, both of which a run takes only as they are pinned; None for what reads neither."""
    found = {
        "smollm2": (SMOLLM2.sha256,),
        "humaneval": (HUMANEVAL[2], CODER.sha256),
        "gsm8k": (GSM8K[2], CODER.sha256),
    }.get(kind)
    return " ".join(one[:16] for one in found) if found else None


@cache
def _rows(name: str, source: str, sha256: str) -> list[dict[str, str]]:
    path: Path = data_file(name, source)
    found = sha256_of(path)
    if found != sha256:
        raise DataError(f"{path} has sha256 {found}; the study is of {sha256}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [parse_json(line) for line in file if line.strip()]

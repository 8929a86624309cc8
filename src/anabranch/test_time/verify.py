"""Verifiers: is this answer right? Final numbers of word problems by exact match, code by running its tests in a process of its own.

Code of a model is nobody's code. It runs in a process with limits of time, memory, files and processes, an empty folder, no environment
and, where the system lets a user have one of his own, no network; tests count as passed only if the process says so with a word that
the code was not told. That stops what goes wrong by mistake. It is no wall against code that means harm: whoever runs models that
strangers can steer runs the whole of it in a container or a virtual machine.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from anabranch.bounds import finite
from anabranch.sandbox import Refused, Sandbox, Work
from anabranch.sandbox_worker import Limits

__all__ = ["CodeVerifier", "Verdict", "code_of", "gsm8k_answer", "is_gsm8k_right"]

# Characters of an answer, and of its tests, that are looked at.
MOST_CODE = 200_000

_LAST = re.compile(r"####\s*+([^\n]*+)")
_NUMBER = re.compile(r"-?\$?-?\d[\d,]*(?:\.\d+)?")
_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)

_CLOSING = re.compile(r"(?:\"{3}|'{3}|`{3}\w*)[ \t]*$", re.MULTILINE)


def gsm8k_answer(text: str) -> str | None:
    """The final number of a solution as GSM8K writes it, without commas, a dollar sign or a trailing .0; None without one.

    It stands behind ``####``, as in the data (Cobbe et al. 2021, arXiv 2110.14168); of an answer without such a line it is the last one.
    """
    marked = _LAST.findall(text)
    found = _NUMBER.findall(marked[-1] if marked else text)
    if not found:
        return None
    number = (found[0] if marked else found[-1]).replace(",", "").replace("$", "")
    sign = "-" if number.startswith("-") else ""
    digits = number.lstrip("-")
    whole, _, part = digits.partition(".")
    part = part.rstrip("0")
    value = (whole.lstrip("0") or "0") + (f".{part}" if part else "")
    return "0" if value == "0" else sign + value


def is_gsm8k_right(answer: str, solution: str) -> bool:
    """Whether an answer comes to the number of GSM8K's solution, digit for digit."""
    wanted = gsm8k_answer(solution)
    return wanted is not None and gsm8k_answer(answer) == wanted


def code_of(answer: str) -> str:
    """The code of an answer: its fenced blocks of Python one after another, or all of it where it has no fence."""
    blocks = [body for language, body in _FENCED.findall(answer) if language.lower() in ("", "python", "py", "python3")]
    return "\n".join(blocks) if blocks else answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a run.

    Attributes:
        passed: all tests were run, and held.
        why: where they did not: the kind of error, never a text that the code could choose; "" if they did.
    """

    passed: bool
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class CodeVerifier:
    """Runs code and its tests.

    Attributes:
        seconds: that one run may take, of computing and of waiting alike; at most 15.
        source: whose code it is: where no process is free, sources take turns.
    """

    seconds: float = 5.0
    source: str = ""

    def __post_init__(self) -> None:
        finite("seconds", self.seconds, 0.01, 15.0)

    def run(self, code: str, tests: str) -> Verdict:
        """Run ``code`` and then ``tests`` (statements that raise where something is wrong). It blocks.

        Raises SandboxError where there is no process for it, which says nothing of the code.
        """
        if len(code) + len(tests) > MOST_CODE:
            return Verdict(False, "too long")
        request = {"code": code, "tests": tests, "seconds": self.seconds}
        try:
            said = Sandbox.of(_WORK).ask(self.source, request)
        except Refused:
            # Of the process that watches, which the code may have brought down.
            return Verdict(False, "refused")
        return Verdict(said == "passed", "" if said == "passed" else str(said)[1:80])

    def check_humaneval(self, prompt: str, answer: str, test: str, entry_point: str) -> Verdict:
        """A problem of HumanEval (Chen et al. 2021, arXiv 2107.03374): the answer may be the rest of the function or all of it.

        Args:
            prompt: with signature and docstring.
            answer: of the model; fenced code in it is taken alone.
            test: that defines ``check(candidate)``.
            entry_point: name of the function.
        """
        code = code_of(answer)
        is_whole = re.search(rf"^def\s+{re.escape(entry_point)}\b", code, re.MULTILINE) is not None
        # Imports and helpers of the prompt are there for a whole function too.
        return self.run(
            f"{prompt}\n    pass\n\n{code}" if is_whole else prompt + code, f"{test}\ncheck({entry_point})\n"
        )

    def check_examples(self, prompt: str, answer: str) -> Verdict | None:
        """The examples (``>>> f(2)`` and what it gives) that stand in a question; None where it has none."""
        if ">>>" not in prompt:
            return None
        # A closing mark of a docstring or a fence is no part of what the last example gives.
        text = _CLOSING.sub("", prompt[:MOST_CODE])
        return self.run(code_of(answer), _EXAMPLES.format(text=repr(text)))


# Run where the code has been: doctest's own parser, so that an example means there what it means in Python.
_EXAMPLES = """
import doctest
class Loud(doctest.DocTestRunner):
    def report_start(self, *told): pass
    def report_success(self, *told): pass
    def report_failure(self, *told): pass
    def report_unexpected_exception(self, *told): pass
found = doctest.DocTestParser().get_doctest({text}, dict(globals()), "question", None, None)
assert found.examples
assert Loud(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(found, out=lambda text: None).failed == 0
"""

_WORK = Work(
    program=Path(__file__).with_name("verify_worker.py"),
    does="runs code of models",
    do="run code of models",
    limits=Limits(seconds=20.0, memory=2 << 30),
    greeting={"code": "", "tests": "", "seconds": 5.0},
)

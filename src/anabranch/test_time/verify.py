"""Verifiers: is this answer right? Final numbers of word problems by exact match, code by running it.

Code of a model is nobody's code, and examples of a question are its sender's: both run inside bubblewrap alone (`anabranch.jail`), in
processes that see no file of the machine but a read-only Python, no environment, no network, no other process, may start none, and end
with their run. Without bubblewrap nothing is run, unless ``sandbox = "none"`` says that the code is one's own: then limits of time,
memory, files and processes stop what goes wrong by mistake, and nothing else.

What is expected is not where the code is. Examples are held against what they printed outside; the tests of a `check_humaneval` run in
another process, and only values that Python writes as literals go between the two. A candidate can still do what it could on paper: give
the answers that stand in the question. `CodeVerifier.run` has code and tests in one process, since any statement may be a test: there a
candidate that means to can have itself passed, and only what it does by mistake cannot.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anabranch.bounds import finite, shown
from anabranch.errors import InputError
from anabranch.jail import jail
from anabranch.sandbox import Refused, Sandbox, SandboxError, Work
from anabranch.sandbox_worker import Limits

__all__ = ["CodeVerifier", "Verdict", "code_of", "gsm8k_answer", "is_gsm8k_right"]

# Characters of an answer, and of its tests, that are looked at.
MOST_CODE = 200_000

# Of a question that holds examples.
MOST_QUESTION = 50_000

_LAST = re.compile(r"####\s*+([^\n]*+)")
# With a minus sign as keyboards have it or as books do; a point may come first, but no second one.
_NUMBER = re.compile(r"[-\u2212]?\$?[-\u2212]?(?:\d+(?:,\d+)*(?:\.\d+)?|(?<![.\d])\.\d+)")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})*|\d+")
_FENCED = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[^\n]*+\n(.*?)^[ \t]*+```", re.DOTALL | re.MULTILINE)


def gsm8k_answer(text: str) -> str | None:
    """The final number of a solution as GSM8K writes it, without commas, a dollar sign or a trailing .0; None without one.

    It stands behind ``####``, as in the data (Cobbe et al. 2021, arXiv 2110.14168); of an answer without such a line it is the last one.
    Commas that do not stand before three digits each (2,3) may mean anything, and are no number.
    """
    marked = _LAST.findall(text)
    found = _NUMBER.findall(marked[-1] if marked else text)
    if not found:
        return None
    number = (found[0] if marked else found[-1]).replace("$", "").replace("\u2212", "-")
    sign = "-" if number.startswith("-") else ""
    whole, _, part = number.lstrip("-").partition(".")
    if whole and not _GROUPED.fullmatch(whole):
        return None
    whole, part = whole.replace(",", ""), part.rstrip("0")
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
        sandbox: ``bwrap``, or ``none`` for code that you trust as your own: see the module.

    Raises SandboxError, with what to install, where this machine has no such sandbox.
    """

    seconds: float = 5.0
    source: str = ""
    sandbox: Literal["bwrap", "none"] = "bwrap"

    def __post_init__(self) -> None:
        finite("seconds", self.seconds, 0.01, 15.0)
        if self.sandbox not in ("bwrap", "none"):
            raise InputError(f"sandbox is {shown(self.sandbox)}; it must be bwrap, or none for code that you trust")
        if self.sandbox == "bwrap":
            jail()
        elif os.name != "posix":
            raise SandboxError("code is run on Linux and other systems of POSIX alone")

    def run(self, code: str, tests: str) -> Verdict:
        """Run ``code`` and then ``tests`` (statements that raise where something is wrong). It blocks.

        Raises SandboxError where there is no process for it, which says nothing of the code.
        """
        return self._verdict(self._request(mode="run", code=code, tests=tests))

    def check_humaneval(self, prompt: str, answer: str, test: str, entry_point: str) -> Verdict:
        """A problem of HumanEval (Chen et al. 2021, arXiv 2107.03374): the answer may be the rest of the function or all of it.

        What the function is given and what it returns must be literals (numbers, text, bytes, lists, tuples, sets, dicts, None).

        Args:
            prompt: with signature and docstring.
            answer: of the model; fenced code in it is taken alone.
            test: that defines ``check(candidate)``.
            entry_point: name of the function.

        Raises SandboxError as `run` does.
        """
        if len(answer) > MOST_CODE:
            return _TOO_LONG
        code = code_of(answer)
        is_whole = re.search(rf"^def\s+{re.escape(entry_point)}\b", code, re.MULTILINE) is not None
        stub = f"{prompt}\n    pass\n"
        # Imports and helpers of the prompt are there for a whole function too.
        code = f"{stub}\n{code}" if is_whole else prompt + code
        tests = f"{test}\ncheck({entry_point})\n"
        return self._verdict(self._request(mode="check", code=code, prompt=stub, tests=tests, name=entry_point))

    def check_examples(self, prompt: str, answer: str) -> Verdict | None:
        """The examples (``>>> f(2)`` and what it gives) that stand in a question, as `doctest` reads them.

        None where it has none: no ``>>>`` with a command behind it, none that is not to be skipped, too many (over 200), or such as take
        longer to read than one run may. Of a question over 50,000 characters the examples are read that end before.

        Raises SandboxError as `run` does.
        """
        request = self._examples(prompt, answer)
        return request if request is None or isinstance(request, Verdict) else _read(self._said(request))

    async def check_examples_in_turn(self, prompt: str, answer: str) -> Verdict | None:
        """As `check_examples`, for an event loop: sources take turns before they wait, however many answers each has."""
        request = self._examples(prompt, answer)
        if request is None or isinstance(request, Verdict):
            return request
        try:
            return _read(json.loads(await Sandbox.of(_WORK).ask_in_turn(self.source, request)))
        except Refused as error:
            raise _ended(error) from None

    def _examples(self, prompt: str, answer: str) -> dict[str, Any] | Verdict | None:
        """What is to be asked, or what is known without asking."""
        # An example whose end is not looked at is none.
        question = prompt if len(prompt) <= MOST_QUESTION else prompt[:MOST_QUESTION].rpartition(">>>")[0]
        if ">>>" not in question:
            return None
        if len(answer) > MOST_CODE:
            return _TOO_LONG
        return self._request(mode="examples", code=code_of(answer), question=question)

    def _request(self, **job: str) -> dict[str, Any]:
        return {**job, "jail": jail() if self.sandbox == "bwrap" else (), "seconds": self.seconds}

    def _verdict(self, request: dict[str, Any]) -> Verdict:
        if sum(len(one) for one in request.values() if isinstance(one, str)) > MOST_CODE:
            return _TOO_LONG
        verdict = _read(self._said(request))
        assert verdict is not None
        return verdict

    def _said(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(Sandbox.of(_WORK).ask(self.source, request))
        except Refused as error:
            raise _ended(error) from None
        return said


_TOO_LONG = Verdict(False, "too long")


def _ended(error: Refused) -> SandboxError:
    """Of the process that watches, in which none of the code runs."""
    return SandboxError(f"the process that {_WORK.does} ended: {error}")


def _read(said: dict[str, Any]) -> Verdict | None:
    if "no_examples" in said:
        return None
    if "unknown" in said:
        raise SandboxError(f"code cannot be run: {said['unknown']}")
    if said.get("passed") is True:
        return Verdict(True)
    why = said.get("error")
    return Verdict(False, why[:80] if isinstance(why, str) and why else "ended early")


_WORK = Work(
    program=Path(__file__).with_name("verify_worker.py"),
    does="runs code of models",
    do="run code of models",
    limits=Limits(seconds=20.0, memory=2 << 30),
    greeting={"mode": ""},
    # Walls and a Python of its own are part of each run.
    quick_s=0.6,
)

"""Verifiers: final numbers as GSM8K has them, and code in a process that it can neither hang, exhaust, fool by mistake, nor read."""

import gzip
import json
import os
import sys

import pytest

from anabranch.errors import InputError
from anabranch.sandbox import close_all
from anabranch.test_time import CodeVerifier, gsm8k_answer, is_gsm8k_right
from anabranch.test_time.verify import MOST_CODE, code_of
from real_data import needs_data, real_data

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="code is run in a child that is forked")

verifier = CodeVerifier(seconds=2.0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48 + 24 = 72 clips.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### $70,000.00", "70000"),
        ("#### -5", "-5"),
        ("#### 0.50", "0.5"),
        ("so it is 3, and in the end $12.", "12"),
        ("#### 7\nand 9", "7"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("no number", None),
        ("", None),
    ],
)
def test_final_numbers(text, number):
    assert gsm8k_answer(text) == number


def test_exact_match():
    assert is_gsm8k_right("She has 1,200 left.", "#### 1200")
    assert not is_gsm8k_right("She has 1,201 left.", "#### 1200")
    assert not is_gsm8k_right("nothing", "nothing")


def test_code_is_taken_out_of_its_fences():
    answer = "Here it is:\n```python\ndef f(x):\n    return x + 1\n```\nas you asked.\n```text\nno\n```\n"
    assert code_of(answer) == "def f(x):\n    return x + 1\n"
    assert code_of("def f(x): return x") == "def f(x): return x"


PROMPT = 'import math\n\ndef area(r):\n    """Of a circle.\n\n    >>> round(area(1), 3)\n    3.142\n    """\n'
TEST = "def check(candidate):\n    assert abs(candidate(2) - 12.566370614359172) < 1e-9\n"


@pytest.mark.parametrize(
    ("answer", "passed", "why"),
    [
        ("    return math.pi * r * r\n", True, ""),
        ("```python\ndef area(r):\n    return math.pi * r ** 2\n```", True, ""),
        ("    return r\n", False, "AssertionError"),
        ("    return pi\n", False, "NameError"),
        ("  this is no code", False, "IndentationError"),
    ],
)
def test_humaneval(answer, passed, why):
    verdict = verifier.check_humaneval(PROMPT, answer, TEST, "area")
    assert (verdict.passed, verdict.why) == (passed, why)


def test_examples_of_a_question():
    assert verifier.check_examples(PROMPT, "import math\ndef area(r): return math.pi * r * r").passed
    assert not verifier.check_examples(PROMPT, "def area(r): return r").passed
    assert verifier.check_examples("What is 2 + 2?", "4") is None
    # Marks without an example that can be read test nothing, so nothing is verified.
    assert not verifier.check_examples("a >>> b", "x = 1").passed


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", "TimeoutError"),
        ("import time; time.sleep(60)", "TimeoutError"),
        ("x = 'a' * (1 << 31)", "MemoryError"),
        ("import os; os._exit(0)", "ended early"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended early"),
        ("class passed(Exception): pass\nraise passed", "passed"),
        ("\x00", "SyntaxError"),
    ],
)
def test_code_that_ends_otherwise_passes_nothing(code, why):
    verdict = CodeVerifier(seconds=0.5).run(code, "assert True")
    assert not verdict.passed
    assert verdict.why == why or code == "\x00"


def test_what_runs_has_nothing_of_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    # Processes that were started before have an older environment.
    close_all()
    assert verifier.run("import os", "assert 'OPENAI_API_KEY' not in os.environ").passed
    assert verifier.run("import os", "assert os.listdir('.') == []\nopen('mine', 'w').write('x')").passed
    assert not os.path.exists("mine")
    # It may write a file of its own, but no large one.
    verdict = verifier.run("f = open('mine', 'wb')", "f.write(bytes(1 << 24)); f.flush()")
    assert not verdict.passed


def test_one_that_failed_leaves_the_next_alone():
    for _ in range(2):
        assert not CodeVerifier(seconds=0.2).run("while True: pass", "").passed
        assert verifier.run("x = 1", "assert x == 1").passed


def test_too_much_is_not_run():
    assert verifier.run("x" * (MOST_CODE + 1), "").why == "too long"
    with pytest.raises(InputError, match="seconds is 100"):
        CodeVerifier(seconds=100.0)


# Real data


@needs_data("qa/humaneval.jsonl.gz")
def test_every_solution_of_humaneval_passes_and_no_empty_one_does():
    rows = read("qa/humaneval.jsonl.gz")
    assert len(rows) == 164
    for answer, passed in (("canonical_solution", 164), ("empty", 0)):
        verdicts = [
            CodeVerifier().check_humaneval(
                row["prompt"], row.get(answer, "    pass\n"), row["test"], row["entry_point"]
            )
            for row in rows
        ]
        assert sum(verdict.passed for verdict in verdicts) == passed


@pytest.mark.slow
@needs_data("qa/humaneval.jsonl.gz")
def test_solutions_of_humaneval_pass_the_examples_of_their_questions_but_for_those_that_are_wrong():
    rows = [row for row in read("qa/humaneval.jsonl.gz") if ">>>" in row["prompt"]]
    answers = [f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in rows]
    failed = [
        row["task_id"].partition("/")[2]
        for row, answer in zip(rows, answers, strict=True)
        if not CodeVerifier().check_examples(row["prompt"], answer).passed
    ]
    # Their own examples do not give what they say, or say it in other words than Python.
    assert failed == ["47", "65", "108", "113", "116", "128", "145", "156", "162"]


@needs_data("qa/gsm8k_test.jsonl.gz")
def test_every_solution_of_gsm8k_has_its_number():
    rows = read("qa/gsm8k_test.jsonl.gz")
    assert len(rows) == 1319
    for row in rows:
        written = row["answer"].split("####")[1].strip()
        assert gsm8k_answer(row["answer"]) == written.replace(",", "")
        assert is_gsm8k_right(f"So she has {written} in the end.", row["answer"])


def read(name):
    with gzip.open(real_data(name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]

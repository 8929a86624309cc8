"""Verifiers: final numbers as GSM8K has them, and code that can neither hang, exhaust, read, outlive nor reach what runs it.

What a candidate tries here it tries behind real walls (bubblewrap), where this machine has them.
"""

import asyncio
import gzip
import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch import sandbox
from anabranch.errors import InputError
from anabranch.sandbox import SandboxError, close_all
from anabranch.test_time import CodeVerifier, gsm8k_answer, is_gsm8k_right, verify_worker
from anabranch.test_time import verify as module
from anabranch.test_time.verify import MOST_CODE, code_of
from jailed import LACK, needs_jail
from real_data import needs_data, real_data
from waiting import until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="code is run on POSIX alone")

# What is tested of limits, and not of walls, is tested where there are none too.
# What ends by itself has as long as a busy machine needs.
own = CodeVerifier(seconds=15.0, sandbox="none")
verifier = own if LACK else CodeVerifier(seconds=15.0)


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
        ("It is .5", "0.5"),
        ("It costs $.50.", "0.5"),
        ("well...5", "5"),
        ("it is \u22125", "-5"),
        ("-\u22125", "-5"),
        ("12,345,678.90", "12345678.9"),
        ("so 2,3", None),
        ("#### 2,3", None),
        ("1,2345", None),
        ("1234,567", None),
        ("1, 2, 3", "3"),
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
    for wrong in (".5", "\u22125", "2,3"):
        assert not is_gsm8k_right(f"It is {wrong}", "#### 5")
        assert not is_gsm8k_right(f"It is {wrong}", "#### 23")


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


@pytest.mark.parametrize(
    "question",
    [
        "What is 16 >>> 2 in Java?",
        ">>>> you wrote: hello",
        ">>>f(2)\n4\n",
        ">>>",
        ">>> f(2) # doctest: +SKIP\n5\n",
        ">>> 1\n1\n" * 201,
        "x" * 50_000 + "\n>>> f(2)\n4\n",
        # One whose end is not looked at.
        ">>> f(2)\n" + "4" * 50_000,
    ],
)
def test_marks_without_an_example_that_can_be_read_say_nothing_of_an_answer(question):
    """They do not say that it is wrong: a shift of Java's, a quoted mail."""
    for answer in ("def f(x): return 2 * x", "It shifts right, filling with zeros."):
        assert own.check_examples(question, answer) is None


def test_of_a_long_question_the_examples_count_that_are_read_to_their_end():
    question = ">>> f(2)\n4\n\n" + "x" * 49_970 + "\n\n>>> f(2)\n55555555555555555\n"
    assert own.check_examples(question, "def f(x): return 2 * x").passed
    assert not own.check_examples(question, "def f(x): return x").passed


@pytest.mark.parametrize(
    "question",
    [
        ">>> f()\nTraceback (most recent call last):\n" + "\x0c\n" * 24_000,
        ">>> f() # doctest:" + " " * 49_000 + "'\n1\n",
    ],
)
def test_examples_that_take_long_to_read_end_with_their_time(question):
    """Patterns of `doctest` take time quadratic in them: minutes, which the process that watches would not live through."""
    before = next(iter(sandbox.Sandbox.of(module._WORK).workers)).process
    assert CodeVerifier(seconds=0.3, sandbox="none").check_examples(question, "def f(): return 1") is None
    assert next(iter(sandbox.Sandbox.of(module._WORK).workers)).process is before


def test_long_runs_in_an_answer_are_read_in_linear_time():
    """In quadratic time these would not end: they are read on an event loop."""
    for run in (" ", "a", "\t", "``` ", "\n```"):
        answer = "```" + run * (MOST_CODE // len(run) - 4)
        code_of(answer)
    assert asyncio.run(own.check_examples_in_turn(">>> 1\n1\n", "```" + " " * (MOST_CODE - 3))).passed is False


def test_what_is_too_long_is_looked_at_by_no_pattern(monkeypatch):
    monkeypatch.setattr(module, "_FENCED", None)
    answer = "x" * (MOST_CODE + 1)
    assert asyncio.run(own.check_examples_in_turn(">>> 1\n1\n", answer)).why == "too long"
    assert own.check_examples(">>> 1\n1\n", answer).why == "too long"
    assert own.check_humaneval(PROMPT, answer, TEST, "area").why == "too long"


@pytest.mark.parametrize("walls", ["none", pytest.param("bwrap", marks=needs_jail)])
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", "TimeoutError"),
        ("import time; time.sleep(60)", "TimeoutError"),
        ("x = 'a' * (1100 << 20)", "MemoryError"),
        ("import os; os._exit(0)", "ended early"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended early"),
        ("class passed(Exception): pass\nraise passed", "passed"),
        ("\x00", "SyntaxError"),
    ],
)
def test_code_that_ends_otherwise_passes_nothing(code, why, walls):
    seconds = 0.5 if why == "TimeoutError" else 15.0
    verdict = CodeVerifier(seconds=seconds, sandbox=walls).run(code, "assert True")
    assert not verdict.passed
    assert verdict.why == why or code == "\x00"


def test_what_runs_has_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    # Processes that were started before have an older environment.
    close_all()
    for one in {own, verifier}:
        code = "import os\nseen = os.environ.get('OPENAI_API_KEY'), os.listdir('.')"
        assert one.run(code, "assert seen == (None, [])").passed
    # Where there are no walls it may write a file of its own, but no large one.
    assert own.run("open('mine', 'w').write('x')", "").passed
    assert not os.path.exists("mine")
    assert not own.run("f = open('mine', 'wb')", "f.write(bytes(1 << 24)); f.flush()").passed
    if verifier is not own:
        assert verifier.run("open('mine', 'w')", "").why == "OSError"


def test_one_that_failed_leaves_the_next_alone():
    for _ in range(2):
        assert not CodeVerifier(seconds=0.2, sandbox=verifier.sandbox).run("while True: pass", "").passed
        assert verifier.run("x = 1", "assert x == 1").passed


def test_too_much_is_not_run():
    assert verifier.run("x" * (MOST_CODE + 1), "").why == "too long"
    with pytest.raises(InputError, match="seconds is 100"):
        CodeVerifier(seconds=100.0)
    with pytest.raises(InputError, match="sandbox is 'docker'; it must be bwrap, or none for code that you trust"):
        CodeVerifier(sandbox="docker")


def test_what_cannot_be_run_is_neither_right_nor_wrong(monkeypatch):
    monkeypatch.setattr(module, "jail", lambda: ("/bin/false",))
    with pytest.raises(SandboxError, match=r"code cannot be run: the process that runs it did not start \(code 1\)"):
        CodeVerifier().run("x = 1", "")
    monkeypatch.setattr(module, "jail", lambda: ("/no/such/file",))
    with pytest.raises(SandboxError, match="a process for it cannot be started"):
        CodeVerifier().check_humaneval(PROMPT, "", TEST, "area")
    monkeypatch.setattr(sandbox, "WAIT_S", 0.3)
    with pytest.raises(SandboxError, match=r"had no answer after 0\.3 s"):
        CodeVerifier(sandbox="none").run("import time; time.sleep(4)", "")


# What examples say, and who may know it


@pytest.mark.parametrize(
    ("examples", "passed"),
    [
        (">>> f(2)\n4\n", True),
        (">>> f(2)\n5\n", False),
        (">>> x = f(2)\n>>> x, x\n(4, 4)\n", True),
        (">>> f(2)\n4\n>>> f(3)\n7\n", False),
        (">>> print(f(2))\n4\n", True),
        (">>> [f(2),  f(3)]\n[4,\n 6]\n", True),
        (">>> list(map(f, range(99))) # doctest: +ELLIPSIS\n[0, 2, ..., 196]\n", True),
        (">>> list(map(f, range(99)))\n[0, 2, ..., 196]\n", False),
        (">>> f(2)\n4\n>>> f(2) # doctest: +SKIP\n5\n", True),
        (">>> f(None)\nTraceback (most recent call last):\n    ...\nValueError: no number\n", True),
        (">>> f(None)\nTraceback (most recent call last):\n    ...\nValueError: other\n", False),
        (
            ">>> f(None) # doctest: +IGNORE_EXCEPTION_DETAIL\nTraceback (most recent call last):\nValueError: other\n",
            True,
        ),
        (">>> f(2)\nTraceback (most recent call last):\nValueError: no number\n", False),
        (">>> f(None)\nnothing\n", False),
        (">>> f(\n", False),
        (">>> print('a  b')\na b\n", True),
        (">>> print('a  b') # doctest: -NORMALIZE_WHITESPACE\na b\n", False),
    ],
)
def test_examples_mean_what_doctest_says(examples, passed):
    answer = "def f(x):\n    if x is None:\n        raise ValueError('no number')\n    return 2 * x"
    assert own.check_examples(f"Write f.\n\n{examples}", answer).passed is passed


SEARCH = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    return "want-" + str(7) in repr(seen + gc.get_objects())
"""


def test_what_is_expected_is_not_where_the_code_is():
    question = "Write f.\n>>> f(1)\nFalse\n>>> f(2)\n'want-7'\n"
    # The first example alone holds: what the second expects is found nowhere.
    assert verifier.check_examples(question, SEARCH).passed is False
    assert verifier.check_examples(question[: question.index(">>> f(2)")], SEARCH).passed is True


WRITE = "import os, sys\nf = sys._getframe(1)\nout = f.f_locals.get('out')\n"


@needs_jail
@pytest.mark.parametrize(
    "code",
    [
        # The attacks of a reader on what ran code before: the word in its caller's frame, and another compiler.
        WRITE + "os.write(out, f.f_locals.get('word', '').encode()); os._exit(0)",
        "import builtins\nfirst = compile\nbuiltins.compile = lambda *a: first('0', 't', 'exec')",
        "import builtins, json\nbuiltins.exec = builtins.compile = json.loads = lambda *a: None",
        WRITE + "os.write(out, b'{\"passed\": true}\\n'); os._exit(0)",
        WRITE + 'os.write(out, b\'{"ready": true}\\n{"passed": true}\\n\'); os._exit(0)',
        WRITE + "os.write(out, b'{\"ready\": true}\\n'); os.close(out); import time; time.sleep(9)",
        WRITE + "os.write(out, b'x' * 999 + b'\\n'); os._exit(0)",
        WRITE + "os.write(out, b'[' * 99999 + b'\\n'); os._exit(0)",
        WRITE + "while 1: os.write(out, bytes(1 << 16))",
        "import builtins\nbuiltins.abs = lambda x: 2",
        "__builtins__['abs'] = lambda x: 2",
    ],
)
def test_code_that_says_it_passed_has_not(code):
    assert not CodeVerifier(seconds=1.0).run(code, "assert abs(1) == 2").passed


@needs_jail
@pytest.mark.parametrize("said", ['{"unknown": "x"}', '{"no_examples": true}', '{"started": true}', '{"error": 7}'])
def test_code_does_not_say_that_nobody_can_tell(said):
    """Whether it could be run, and whether there were examples, is not for it to say."""
    code = WRITE + f"os.write(out, b'{said}\\n'); os._exit(0)"
    assert verifier.check_examples("Write f.\n>>> f(2)\n4\n", code).passed is False
    assert verifier.run(code, "").passed is False


@needs_jail
def test_what_is_said_without_an_end_is_not_kept():
    one = CodeVerifier(seconds=15.0)
    assert one.run(WRITE + "while 1: os.write(out, bytes(1 << 16))", "").why == "ended early"


@needs_jail
@pytest.mark.parametrize(
    "said",
    [
        "[]",
        '[["4\\\\n", null]]',
        '[["4\\\\n", null], ["", null]]',
        '"44"',
        '{"a": 1, "b": 2}',
        "[[4, 4], [7, 7]]",
        "[0, 0]",
    ],
)
def test_outputs_that_code_writes_itself_are_held_against_what_is_wanted(said):
    """All of them, whatever they are; the right ones it could as well have returned."""
    code = WRITE + f"os.write(out, b'{{\"outputs\": {said}}}\\n'); os._exit(0)"
    assert not verifier.check_examples("Write f.\n>>> f(2)\n4\n>>> f(3)\n7\n", code).passed


CHECK = """
def check(candidate):
    assert candidate(2) == 4
    assert candidate([1, {'a': (2.5, None)}]) == {1: {3}, 'x': float('inf')}
"""
SAYS = "    return 4 if x == 2 else {1: {3}, 'x': float('inf')}\n"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (SAYS, ""),
        ("    import collections\n    return 4 if x == 2 else collections.OrderedDict({1: {3}, 'x': 1e999})\n", ""),
        ("    return 5\n", "AssertionError"),
        # What is equal to everything is no literal.
        ("    class Equal:\n        def __eq__(self, other): return True\n    return Equal()\n", "TypeError"),
        ("    class Four(int):\n        def __eq__(self, other): return True\n    return Four(5)\n", "AssertionError"),
        ("    return float('nan')\n", "TypeError"),
        ("    return [[]] * 400_000\n", "EOFError"),
        ("    import os; os._exit(0)\n", "EOFError"),
        ("    raise SystemExit\n", "SystemExit"),
        ("    class passed(Exception): pass\n    raise passed\n", "passed"),
        ("    class É(Exception): pass\n    raise type('no name', (Exception,), {})\n", "Exception"),
        ("    while True: pass\n", "TimeoutError"),
        # What it prints is heard by nobody.
        ("    print('passed'); import sys; sys.stdout.flush(); return 5\n", "AssertionError"),
    ],
)
def test_a_candidate_is_apart_from_its_tests(answer, why):
    one = CodeVerifier(seconds=1.0 if "while" in answer else 15.0, sandbox=verifier.sandbox)
    verdict = one.check_humaneval("def f(x):\n", answer, CHECK, "f")
    assert (verdict.passed, verdict.why) == (not why, why)


def test_tests_may_want_an_error_and_helpers_of_the_prompt():
    prompt = "def half(x):\n    return x / 2\n\ndef f(x):\n"
    tests = """
def check(candidate):
    try:
        candidate(0)
    except ZeroDivisionError:
        return half(2)
    assert False
"""
    assert verifier.check_humaneval(prompt, "    return 1 // x\n", tests, "f").passed
    assert not verifier.check_humaneval(prompt, "    return 1\n", tests, "f").passed
    # Numbers that Python does not write in decimals.
    tests = (
        "def check(candidate):\n    assert candidate(10 ** 5000) == -(10 ** 5001)\n    assert candidate(x=1) == -10\n"
    )
    assert verifier.check_humaneval("def f(x):\n", "    return -10 * x\n", tests, "f").passed


def test_what_ends_a_candidate_ends_not_its_tests():
    """An error of Python's that is no `Exception` is one by name alone there."""
    tests = """
def check(candidate):
    try:
        candidate(0)
    except Exception as error:
        assert type(error).__name__ == "SystemExit"
    else:
        assert False
"""
    assert verifier.check_humaneval("def f(x):\n", "    raise SystemExit\n", tests, "f").passed


def test_where_the_process_with_the_code_cannot_start_nobody_can_tell(monkeypatch):
    """That with the tests can: what it then hears is no fault of the code."""
    asked = {
        "mode": "check",
        "code": PROMPT + "    return 0\n",
        "prompt": PROMPT + "    pass\n",
        "tests": "",
        "name": "area",
    }
    asked |= {"jail": [], "seconds": 5.0}
    assert answered(asked) == {"passed": True}

    class Lame(verify_worker._Running):
        def __init__(self, asked, peer):
            super().__init__({**asked, "jail": ("/bin/false",) if asked["mode"] == "serve" else ()}, peer)

    monkeypatch.setattr(verify_worker, "_Running", Lame)
    assert answered(asked) == {"unknown": "the process that runs it did not start (code 1)"}


def answered(asked):
    return json.loads(verify_worker.answer(json.dumps(asked).encode())["answer"])


# Walls


@needs_jail
@pytest.mark.parametrize(
    "code",
    [
        "import glob\nassert glob.glob('/proc/*') == [] and glob.glob('/etc/*') == [] and glob.glob('/srv/*') == []",
        "import glob, os\nassert glob.glob('/*/.ssh') == [] and not os.path.exists('/home')",
        "import os, sys\nsys.setrecursionlimit(9)\nassert 'PATH' not in os.environ",
        "for path in ('/x', '/dev/x', '/usr/lib/x'):\n    try: open(path, 'w')\n    except OSError: pass\n    else: 1 / 0",
        "import os, signal\nassert os.getppid() <= 1",
    ],
)
def test_nothing_of_the_machine_is_there(code):
    assert verifier.run(code, "").passed


@needs_jail
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert verifier.run(code, "").why == "PermissionError"
        with pytest.raises(BlockingIOError):
            server.accept()


@needs_jail
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.fork() or os.setsid() or os.fork()",
        "import subprocess\nsubprocess.Popen(['/bin/sh'])",
        "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
        "import threading\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=input).start()",
        "import ctypes\nassert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) >= 0",
    ],
)
def test_it_starts_no_process_and_no_thread(code):
    assert verifier.run(code, "").why in ("PermissionError", "AssertionError", "OSError", "RuntimeError")
    assert inside() == []


def inside():
    """Processes that run inside, started by this one's workers."""
    workers = [one.process.pid for one in sandbox.Sandbox.of(module._WORK).workers if one.process is not None]
    return [child for worker in workers for child in children(worker)]


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


@needs_jail
def test_nothing_outlives_its_run_or_the_process_that_watches():
    assert CodeVerifier(seconds=0.5).run("while True: pass", "").why == "TimeoutError"
    assert inside() == []
    # The watcher is killed in the middle of a run.
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(CodeVerifier(seconds=5.0).run, "import time; time.sleep(60)", "")
        killed_in_the_middle()
        # It is begun again.
        assert waiting.result(60).why == "TimeoutError"


def killed_in_the_middle():
    # The walls' own process, the first one behind them, and the Python that runs the code: it has taken its job, and sleeps.
    until(lambda: [last for last in pythons() if is_at_work(last)])
    [last] = pythons()
    [watcher] = [one for one in sandbox.Sandbox.of(module._WORK).workers if one.process and children(one.process.pid)]
    os.kill(watcher.process.pid, signal.SIGKILL)
    until(lambda: has_ended(last))


def pythons():
    return [last for outer in inside() for first in children(outer) for last in children(first)]


def is_at_work(pid):
    """Its standard input is nothing: so it is once the job was read."""
    try:
        return os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    except OSError:
        return False


def has_ended(pid):
    """Also where nobody has asked yet how."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return "State:\tZ" in file.read()
    except OSError:
        return True


# Real data


@needs_data("qa/humaneval.jsonl.gz")
def test_solutions_of_humaneval_pass_and_empty_ones_do_not():
    rows = read("qa/humaneval.jsonl.gz")[::40]
    for answer, passed in (("canonical_solution", len(rows)), ("empty", 0)):
        assert num_passed(rows, answer) == passed


@pytest.mark.slow
@needs_data("qa/humaneval.jsonl.gz")
def test_every_solution_of_humaneval_passes_and_no_empty_one_does():
    rows = read("qa/humaneval.jsonl.gz")
    assert len(rows) == 164
    for answer, passed in (("canonical_solution", 164), ("empty", 0)):
        assert num_passed(rows, answer) == passed


def num_passed(rows, answer):
    one = CodeVerifier(sandbox=verifier.sandbox)
    answers = [row.get(answer, "    pass\n") for row in rows]
    return sum(
        one.check_humaneval(row["prompt"], said, row["test"], row["entry_point"]).passed
        for row, said in zip(rows, answers, strict=True)
    )


@pytest.mark.slow
@needs_data("qa/humaneval.jsonl.gz")
def test_solutions_of_humaneval_pass_the_examples_of_their_questions_but_for_those_that_are_wrong():
    rows = [row for row in read("qa/humaneval.jsonl.gz") if ">>>" in row["prompt"]]
    answers = [f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in rows]
    failed = [
        row["task_id"].partition("/")[2]
        for row, answer in zip(rows, answers, strict=True)
        if not verifier.check_examples(row["prompt"], answer).passed
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

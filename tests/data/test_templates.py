"""Chat templates are programs of strangers: none may hang or exhaust the process that renders it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from anabranch import sandbox
from anabranch.data import templates
from anabranch.data.templates import render_template, template_variables
from anabranch.errors import TokenizerError
from anabranch.sandbox import Sandbox
from waiting import until

MESSAGES = [{"role": "user", "content": "x"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = r"asked for more than 1 GiB of memory"
TIME = r"took more than 1 s of computing"
EITHER = f"{MEMORY}|{TIME}"
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="the limits of POSIX")


def process():
    """Of the worker that answers next."""
    return Sandbox.of(templates.WORK)._free[-1].process


@pytest.fixture
def new_workers():
    """None has started, and none that starts here is kept."""
    sandbox.close_all()
    yield
    sandbox.close_all()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOPS, TIME),
        ("{{ '{:>2000000000}'.format(1) }}", MEMORY),
        ("{{ 'x' | center(2000000000) }}", MEMORY),
        ("{{ 'x'.ljust(5000000) }}", r"makes more than 1,\d{3},\d{3} characters"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("{{ 'x'.ljust(2000000000) }}", MEMORY),
                ("{{ 'x' * 10**12 }}", MEMORY),
                ("{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}", EITHER),
                (
                    "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
                    EITHER,
                ),
                (  # a small value that is long when it is written or compared
                    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
                    EITHER,
                ),
                ("{{ '%2000000000d' % 1 }}", MEMORY),
                ("{{ [1] | tojson(indent=2000000000) }}", MEMORY),
                ("{{ (1).to_bytes(2000000000, 'big') }}", MEMORY),
                ("{{ 'x' | slice(2000000000) | list }}", EITHER),
                ("{{ lipsum(n=100000) }}", EITHER),
                ("{{ ('x' * 1000000) | replace('x', 'x' * 1000000) }}", EITHER),
            ]
        ),
    ],
)
def test_a_template_without_end_is_stopped_and_the_next_is_rendered(template, why):
    with pytest.raises(TokenizerError, match=f"^the tokenizer's chat template refused the messages: .*({why})"):
        render_template(template, messages=MESSAGES)
    assert render_template("{{ messages[0].content }}", messages=MESSAGES) == "x"


@pytest.mark.slow
def test_what_is_worked_out_while_it_is_compiled_is_limited_too():
    with pytest.raises(TokenizerError, match=f"chat template cannot be read: it {TIME}"):
        template_variables("{{ (9 ** 99999) ** 99999 }}")
    assert template_variables("{{ messages }}{{ tools }}") == {"messages", "tools"}


def test_long_conversations_may_make_long_texts():
    text = "é\n\ud800" * 700_000
    assert render_template("<{{ text }}{{ text }}>", text=text) == f"<{text}{text}>"


def test_values_that_are_no_json_are_told():
    with pytest.raises(TokenizerError, match=r"refused the messages: they are no JSON: .*object"):
        render_template("", tools=object())
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TokenizerError, match=r"refused the messages: .*recursion"):
        render_template("", tools=deep)


def test_a_long_complaint_is_cut():
    with pytest.raises(TokenizerError, match=r"refused the messages: x{1000}$"):
        render_template("{{ raise_exception('x' * 1000000) }}")


def test_threads_get_their_own_answers():
    def render(number):
        return render_template("{{ number }}", number=number)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, range(200))) == [str(number) for number in range(200)]


def test_a_process_that_another_ended_is_begun_anew():
    render_template("")
    ended = process()
    ended.kill()
    ended.wait()
    assert render_template("{{ 1 }}") == "1"
    assert process().pid != ended.pid


def test_a_request_whose_process_another_ends_is_asked_once_more(monkeypatch):
    render_template("")
    ended = process()
    # Dead, but not yet known to be.
    ended.kill()
    monkeypatch.setattr(ended, "poll", lambda: None)
    assert render_template("{{ 1 }}") == "1"
    assert process() is not ended


def test_one_that_does_not_answer_is_not_waited_for(monkeypatch):
    render_template("")
    os.kill(process().pid, signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "WAIT_S", 0.1)
    with pytest.raises(TokenizerError, match=r"its process had no answer after 0.1 s"):
        render_template("{{ 1 }}")
    monkeypatch.undo()
    assert render_template("{{ 1 }}") == "1"


def test_what_is_printed_as_python_starts_is_no_answer(tmp_path, monkeypatch, new_workers):
    (tmp_path / "sitecustomize.py").write_text("""print('{"answer": "another"}', flush=True)""")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [render_template("{{ n }}", n=n) for n in range(5)] == list("01234")


@pytest.mark.parametrize(
    "line", [b'0 {"answer": "another"}\n', b"%s nothing\n", b"%s {}\n", b'%s {"answer": 1}\n', b"\n"]
)
def test_what_is_no_answer_to_the_request_is_never_returned(line, monkeypatch):
    render_template("")
    ended = process()
    worker = Sandbox.of(templates.WORK)._free[-1]

    class Answers:
        def readline(self):
            return line.replace(b"%s", b"%d" % number)

        def close(self):
            pass

    number = 10**9
    monkeypatch.setattr(sandbox, "NUMBERS", iter([number, *range(10)]))
    with worker._pipes[1]:
        worker._pipes = worker._pipes[0], Answers()
    with pytest.raises(TokenizerError, match=r"^the process that renders chat templates gave what is no answer"):
        render_template("{{ 1 }}")
    assert ended.poll() is not None
    assert render_template("{{ 2 }}") == "2"


@pytest.mark.parametrize("seconds", [0.01, 0.05])
def test_an_answer_that_nobody_waits_for_is_not_that_to_the_next_request(seconds):
    class Late(BaseException):
        pass

    def late(*_):
        raise Late

    render_template("")
    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(Late):
            render_template("{% for i in range(9999) %}{% for j in range(200) %}{% endfor %}{% endfor %}first")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render_template("second") == "second"


def test_a_template_without_end_holds_up_no_other():
    render_template("")
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(render_template, LOOPS)
        assert [render_template("{{ n }}", n=n) for n in range(3)] == list("012")
        assert not endless.done()
        with pytest.raises(TokenizerError, match=TIME):
            endless.result()


@pytest.mark.slow
def test_sixty_slow_templates_hold_up_no_quick_one(new_workers):
    assert render_template("{{ quick }}", quick=1) == "1"
    with ThreadPoolExecutor(60) as pool:
        slow = [pool.submit(render_template, LOOPS) for _ in range(60)]
        assert [render_template("{{ quick }}", quick=number) for number in range(12)] == [str(n) for n in range(12)]
        assert not all(future.done() for future in slow)
        for future in slow:
            future.cancel()
            if not future.cancelled():
                assert re.search(f"{TIME}|busy", str(future.exception()))


def test_who_gets_a_process_at_the_last_moment_has_the_whole_time_for_the_answer(monkeypatch, new_workers):
    assert render_template("{{ 1 }}") == "1"
    renderer, pid = Sandbox.of(templates.WORK), process().pid
    taken = [renderer._take("{{ 1 }}", 1, 0) for _ in renderer.workers]
    monkeypatch.setattr(sandbox, "WAIT_S", 60.0)
    gone = [0.0]
    monkeypatch.setattr(sandbox, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + gone[0]))
    loop = "{% for i in range(9999) %}{% for j in range(250) %}{% endfor %}{% endfor %}done"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(render_template, loop)
        until(lambda: renderer._waiting)
        # As if it had waited.
        gone[0] = 59.99
        renderer._give(taken.pop(0))
        assert answer.result() == "done"
    for worker in taken:
        renderer._give(worker)
    assert pid in [worker.process.pid for worker in renderer.workers if worker.process]


def test_a_thread_that_cannot_be_started_is_told_in_a_line(monkeypatch):
    assert render_template("{{ 1 }}") == "1"

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(
        TokenizerError, match=r"^the process that renders chat templates cannot be watched: can't start"
    ):
        render_template("{{ 2 }}")
    monkeypatch.undo()
    assert render_template("{{ 3 }}") == "3"


def test_limits_are_told_also_where_the_system_forgets_how_processes_end(new_workers):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert render_template("{{ 1 }}") == "1"
        with pytest.raises(
            TokenizerError, match=r"it took more than 1 s of computing or 1 GiB of memory \(which of them"
        ):
            render_template(LOOPS)
        assert render_template("{{ 2 }}") == "2"
        sandbox.close_all()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_limit_of_time_holds_where_its_signal_is_blocked(new_workers):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        with pytest.raises(TokenizerError, match=TIME):
            render_template(LOOPS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("python", [None, "", "/no/such/python", sys.executable + "\0", "/bin/false"])
def test_a_python_that_cannot_be_started_is_told_in_a_line(python, monkeypatch, new_workers):
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(
        TokenizerError, match=r"^the process that renders chat templates (cannot be started|ended as).*$"
    ):
        render_template("")
    monkeypatch.undo()
    assert render_template("{{ 1 }}") == "1"


def test_folders_of_modules_that_are_no_text_are_passed_over_as_python_does(monkeypatch, new_workers):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/"), None, b"/"])
    assert render_template("{{ 1 }}") == "1"


def test_a_fork_has_a_renderer_of_its_own_and_none_outlives_its_process():
    # The folder alone as its package: the whole of it takes seconds to import.
    program = f"""
import os, sys, types
sys.modules["anabranch.data"] = types.ModuleType("anabranch.data")
sys.modules["anabranch.data"].__path__ = [{str(Path(templates.__file__).parent)!r}]
from anabranch import sandbox
from anabranch.data import templates
ask = lambda number: templates.render_template("{{{{ number }}}}", number=number)
assert ask(0) == "0"
pid = os.fork()
for number in range(1, 100):
    assert ask(number) == str(number)
if pid == 0:
    sandbox.close_all()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(sandbox.Sandbox.of(templates.WORK)._free[-1].process.pid)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)

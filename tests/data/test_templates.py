"""Chat templates are programs of strangers: none may hang or exhaust the process that renders it."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anabranch.data import templates
from anabranch.data.templates import render_template, template_variables
from anabranch.errors import TokenizerError

MESSAGES = [{"role": "user", "content": "x"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = r"asked for more than 1 GiB of memory"
TIME = r"took more than 1 s of computing"
EITHER = f"{MEMORY}|{TIME}"
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="the limits of POSIX")


def renderer():
    return templates._RENDERERS[os.getpid()]


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
    process = renderer()._process
    process.kill()
    process.wait()
    assert render_template("{{ 1 }}") == "1"
    assert renderer()._process.pid != process.pid


def test_one_that_does_not_answer_is_not_waited_for(monkeypatch):
    render_template("")
    os.kill(renderer()._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(templates, "_WAIT_S", 0.1)
    with pytest.raises(TokenizerError, match=r"its process was ended \(code -9\), after 0.1 s"):
        render_template("{{ 1 }}")
    monkeypatch.undo()
    assert render_template("{{ 1 }}") == "1"


def test_a_fork_has_a_renderer_of_its_own_and_none_outlives_its_process():
    # The folder alone as its package: the whole of it takes seconds to import.
    program = f"""
import os, sys, types
sys.modules["anabranch.data"] = types.ModuleType("anabranch.data")
sys.modules["anabranch.data"].__path__ = [{str(Path(templates.__file__).parent)!r}]
from anabranch.data import templates
ask = lambda number: templates.render_template("{{{{ number }}}}", number=number)
assert ask(0) == "0"
pid = os.fork()
for number in range(1, 100):
    assert ask(number) == str(number)
if pid == 0:
    templates._close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(templates._RENDERERS[os.getpid()]._process.pid)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)

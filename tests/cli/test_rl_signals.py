"""Signals to commands that ask a pool: calls that are out are ended, and in the file with what they may have cost."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from anabranch.cli.main import main
from rl_own_models import QUESTIONS, line, pool_file, router, says, write_lines
from scripted_endpoint import endpoint
from waiting import until


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return router(tmp_path_factory.mktemp("policy"), {"small": "knows all", "large": "2 dollars a million tokens"})


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_commands_that_ask_a_pool_as_ctrl_c_does(capfd, files, policy, number):
    """It ended the process at once: calls that were out, and may be billed, were in no file."""
    interrupts = []

    def interrupted(path, body):
        if interrupts:
            signal.pthread_kill(threading.main_thread().ident, interrupts.pop())
        return says(path, body)

    # What such a command leaves as it is would end the tests.
    before = signal.signal(number, lambda *_: None)
    try:
        with endpoint(interrupted) as (url, seen):
            pool_file(files, url)
            assert main([*map(str, line(policy, "run", "--max-usd", 1))]) == 0
            capfd.readouterr()
            for words in (
                ("rl", "eval", "run"),
                ("rl", "replay", "run", "--out", "e.txt"),
                ("routers", "route", "who wrote book 2 ?", "--router", "run"),
            ):
                (files / "run/pool.jsonl").unlink()
                seen.clear()
                interrupts.append(number)
                assert main([*words]) == 130
                assert capfd.readouterr().err.endswith("interrupted\n")
                kept = [json.loads(one) for one in (files / "run/pool.jsonl").read_text().splitlines()]
                assert len(kept) == len(seen) > 0
                assert all(one["usd"] > 0 for one in kept)
    finally:
        signal.signal(number, before)


class Hanging:
    """A run whose pool answered while it learned, and now hangs for longer than any test waits."""

    def __init__(self, folder):
        self.folder, self.hangs, self.asked, self.is_over = folder, False, threading.Event(), threading.Event()

    def says(self, path, body):
        if not self.hangs:
            return says(path, body)
        self.asked.set()
        self.is_over.wait(600)
        return 503, {}, {}


@pytest.fixture(scope="module")
def hanging(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hanging")
    write_lines(folder / "q.jsonl", QUESTIONS)
    made = Hanging(folder)
    with endpoint(made.says) as (url, seen):
        pool = pool_file(folder, url)
        pool.write_text(f"call_s = 600\n{pool.read_text()}")
        command = [sys.executable, "-m", "anabranch", *map(str, line(policy, "run", "--max-usd", 1))]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
        made.hangs, made.seen = True, seen
        yield made
        made.is_over.set()


_EVAL = ("rl", "eval", "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "number"),
    [
        (_EVAL, signal.SIGTERM),
        (_EVAL, signal.SIGHUP),
        (_EVAL, signal.SIGINT),
        (("rl", "replay", "run", "--out", "e.txt"), signal.SIGTERM),
        (("routers", "route", "who wrote book 2 ?", "--router", "run"), signal.SIGTERM),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value[1],
)
def test_one_signal_ends_calls_that_hang_and_says_so(hanging, words, number):
    """It was held up by them without a word: who killed the process after ten seconds, as docker does, lost what they may have cost."""
    kept = hanging.folder / "run/pool.jsonl"
    kept.unlink()
    hanging.seen.clear()
    hanging.asked.clear()
    command = [sys.executable, "-m", "anabranch", *words]
    process = subprocess.Popen(
        command, cwd=hanging.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert hanging.asked.wait(120)
        process.send_signal(number)
        # The endpoint still hangs.
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err) == (130, "warning: interrupted: ending calls that are out\ninterrupted\n")
    # Nothing is owed where nobody had been asked yet.
    rows = [row for one in kept.read_text().splitlines() if (row := json.loads(one))["usd"] > 0]
    assert len(rows) == len(hanging.seen) > 0
    assert all(one["error"].endswith("had not answered when the pool was closed") for one in rows)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_as_often_as_it_takes_end_a_training_whose_calls_are_out(files, policy, number):
    """The third Ctrl-C stopped what calls were waiting for: the process hung, and what may have been billed was in no file.

    The second SIGTERM ended the process at once, and it was not either.
    """
    asked, is_over = threading.Event(), threading.Event()

    def hangs(path, body):
        asked.set()
        is_over.wait(600)
        return 503, {}, {}

    with endpoint(hangs) as (url, _):
        pool_file(files, url)
        command = [sys.executable, "-m", "anabranch", *map(str, line(policy, "run", "--max-usd", 1))]
        process = subprocess.Popen(command, cwd=files, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            assert asked.wait(120)

            def has_ended():
                process.send_signal(number)
                time.sleep(2)
                return process.poll() is not None

            until(has_ended)
            assert process.wait() in (130, -number), process.communicate(timeout=60)[1]
        finally:
            is_over.set()
            process.kill()
            process.communicate()
    lines = (files / "run/pool.jsonl").read_text().splitlines()
    kept = [row for one in lines if (row := json.loads(one))["usd"] > 0]
    assert kept
    assert all(one["error"].endswith("had not answered when the pool was closed") for one in kept)

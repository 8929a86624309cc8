"""A process that is forked while another thread compiles can compile, and finds no kernel half made."""

import os
import subprocess
import sys
import threading

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

FORKED = """
import os, threading, time
import anabranch.graph
from numba import njit
from numba.core.compiler_lock import global_compiler_lock
has, order = threading.Event(), []

def compile():
    with global_compiler_lock:
        has.set()
        time.sleep(0.3)
        order.append("compiled")

thread = threading.Thread(target=compile)
thread.start()
has.wait()
child = os.fork()
if not child:
    assert order == ["compiled"], order
    os._exit(njit(lambda number: number + 41)(1))
thread.join()
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with global_compiler_lock:
    pass
print(status, order)
"""


def test_a_process_forked_while_another_thread_compiles_compiles_too():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert run.stdout == "42 ['compiled']\n", run.stderr


def test_a_fork_by_one_that_compiles_leaves_it_its_lock():
    from numba.core.compiler_lock import global_compiler_lock

    from anabranch.graph import forking

    with global_compiler_lock:
        forking.before()
        forking.after_in_parent()
        assert global_compiler_lock.is_locked()
    assert not global_compiler_lock.is_locked()
    assert not forking._forking


def test_a_child_whose_fork_did_not_wait_gets_a_lock_of_its_own(monkeypatch):
    from numba.core import compiler_lock

    from anabranch.graph import forking

    lock, has, may = compiler_lock._CompilerLock(), threading.Event(), threading.Event()
    monkeypatch.setattr(compiler_lock, "global_compiler_lock", lock)

    def compile():
        lock.acquire()
        has.set()
        may.wait(60)

    thread = threading.Thread(target=compile)
    thread.start()
    assert has.wait(60)
    forking.after_in_child()
    assert lock._lock.acquire(blocking=False)
    may.set()
    thread.join()


def test_without_numba_a_fork_waits_for_nothing(monkeypatch):
    from anabranch.graph import forking

    monkeypatch.delitem(sys.modules, "numba.core.compiler_lock", raising=False)
    for step in (forking.before, forking.after_in_parent, forking.after_in_child):
        step()
    assert not forking._forking


def test_what_an_index_needs_is_loaded_with_it():
    """A thread that loads a module as it first adds something keeps it from a process that is forked meanwhile, for ever."""
    asked = """
import sys
import numpy
from anabranch.graph.hnsw import HNSW
had = set(sys.modules)
index = HNSW(4, quantization="int4")
from anabranch.graph.hnsw.checks import as_vectors
as_vectors(numpy.ones((3, 4), "f4"), 4, "l2", "vectors")
print(sorted(set(sys.modules) - had))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", asked], capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr

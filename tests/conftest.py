"""One thread, fixed seeds, and hypothesis profiles: ``HYPOTHESIS_PROFILE=deep pytest`` looks much longer."""

import gc
import itertools
import logging
import os
import re
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

import slow_tests
from anabranch import native
from anabranch.nn import kernels

settings.register_profile("dev", max_examples=30, deadline=None)
settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Numbers of folders.
_FOLDERS = itertools.count()

# Where to record how long each test takes.
_DURATIONS = []

# A script that starts tests with ``&`` has them ignore interrupts, and nohup hangups, as do processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)  # shapes are tiny: more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption(
        "--record-durations",
        metavar="FILE",
        help="add a line to FILE for each test: seconds and its name (tests/slow_tests.py)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report):
    """Each test once, by the process that hears of all."""
    yield
    if _DURATIONS and report.when == "call":
        with open(_DURATIONS[0], "a", encoding="utf-8") as file:
            file.write(f"{report.duration:.3f} {report.nodeid}\n")


def pytest_configure(config):
    if (path := config.getoption("--record-durations")) and not hasattr(config, "workerinput"):
        _DURATIONS.append(path)


def pytest_collection_finish():
    """A million objects of the tests themselves are left out of garbage collections: one took a second, and some tests collect often."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What has ``cuda`` among its parameters is marked so: ``-m cuda`` runs it. What the list of slow tests names is slow."""
    for item, is_slow in zip(
        items, slow_tests.slow_ones((item.nodeid for item in items), slow_tests.read()), strict=True
    ):
        if is_slow:
            item.add_marker(pytest.mark.slow)
        parameters = getattr(item, "callspec", None)
        if parameters is not None and any(isinstance(x, str) and x == "cuda" for x in parameters.params.values()):
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(autouse=True, scope="session")
def _kernels():
    """Loads the compiled kernels from the user's cache before any test has a cache of its own, where they would be compiled anew.

    A process looks for them once, so a test that switches them off by the environment does so for processes it starts.
    """
    kernels.load()


# The user's, before a test has one of its own.
_CACHE = os.environ.get("ANABRANCH_CACHE")

# A test may put another in its place, which is still there when the fixtures that were made before monkeypatch end.
_LOAD = kernels.load


@pytest.fixture(autouse=True)
def _kernels_stay():
    """Without kernels the bits are others: a test that takes them away gives them back."""
    yield
    is_without = _LOAD.cache_info().currsize > 0 and _LOAD() is None
    if is_without and native.load() is not None:
        _LOAD.cache_clear()
        raise AssertionError("this test leaves the process without kernels; use the fixture without_kernels")


@pytest.fixture
def without_kernels(monkeypatch):
    """Plain PyTorch, in this process and those it starts, until the test has ended."""
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    kernels.load.cache_clear()
    yield
    _load_again()


def _load_again():
    """The kernels of the user's cache: that of the test's own has none yet, and to compile them takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ANABRANCH_NO_KERNELS", raising=False)
        if _CACHE is None:
            patch.delenv("ANABRANCH_CACHE", raising=False)
        else:
            patch.setenv("ANABRANCH_CACHE", _CACHE)
        _LOAD.cache_clear()
        _LOAD()


@pytest.fixture(autouse=True)
def _seed():
    # `torch.manual_seed` writes down the stack for each kind of device that has not begun, which takes milliseconds.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def tmp_path(request, tmp_path_factory):
    """A folder of this test's own. That of pytest looks through the folders of all tests before: 8 ms after four thousand of them."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}{next(_FOLDERS)}"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    """Whoever computes on more threads sets them back: where processes share two cores, all later tests would take fifty times as long."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"this test leaves torch on {left} threads"


@pytest.fixture(autouse=True)
def _log_levels():
    """A server that a test runs in this process sets how much is logged: the next test hears what it would hear alone."""
    loggers = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith("anabranch")]
    levels = [(log, log.level) for log in loggers if isinstance(log, logging.Logger)]
    yield
    for log, level in levels:
        log.setLevel(level)


@pytest.fixture
def by_keyword(monkeypatch):
    """Makes every router be called with named arguments from then on, as a design may."""
    from anabranch.routing import Router

    def call(self, x_ND, context):
        return torch.nn.Module.__call__(self, context=context, x_ND=x_ND)

    return lambda: monkeypatch.setattr(Router, "__call__", call, raising=False)

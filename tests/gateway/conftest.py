"""Stores of both kinds, empty, and a Redis for a module."""

import pytest

from gateway_stores import KINDS, missing, server
from redis_process import redis_server


@pytest.fixture(scope="session")
def databases():
    """Makes an empty PostgreSQL database and gives its URL; skips where there is no PostgreSQL."""
    if reason := missing():
        pytest.skip(f"no PostgreSQL to test with: {reason}")
    with server() as database:
        yield database


@pytest.fixture(params=KINDS)
def url(request, tmp_path):
    """Of an empty store."""
    return str(tmp_path / "g.db") if request.param == "sqlite" else request.getfixturevalue("databases")()


@pytest.fixture(scope="module", name="server")
def _redis():
    with redis_server() as made:
        yield made


@pytest.fixture
def prefix(request):
    """Of keys in Redis that no other test has."""
    return f"t{abs(hash(request.node.nodeid))}"

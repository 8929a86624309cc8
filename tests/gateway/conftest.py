"""Stores of both kinds, empty."""

import pytest

from gateway_stores import KINDS, missing, server


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

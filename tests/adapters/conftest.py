"""Folders that several files of tests read, and none changes."""

import pytest

from adapter_kinds import make_places


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """See `adapter_kinds.make_places`."""
    return make_places(tmp_path_factory.mktemp)

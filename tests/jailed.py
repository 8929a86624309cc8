"""Where code can be run behind walls: bubblewrap is there, and may make namespaces."""

import pytest

from anabranch.jail import jail
from anabranch.sandbox import SandboxError


def _lack() -> str:
    try:
        jail()
    except SandboxError as error:
        return str(error)
    return ""


LACK = _lack()
needs_jail = pytest.mark.skipif(bool(LACK), reason=LACK)

"""Names that were perhaps meant."""

import difflib

from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.config import suggestions
from anabranch.gateway.config.suggestions import COMPARED, near

NAMES = st.text("abc-1", max_size=8)


@settings(max_examples=300, deadline=None)
@given(NAMES, st.lists(NAMES, max_size=COMPARED, unique=True), st.integers(1, 4))
def test_near_names_are_those_of_the_standard_library(name, known, n):
    assert near(name, known, n) == difflib.get_close_matches(name, known, n=n, cutoff=0.5)


MANY = [f"provider-{n}/some-model-{n * 7}b-instruct-2025" for n in range(400)]


def test_of_many_names_that_are_alike_few_are_compared_as_a_whole(monkeypatch):
    """37 ms of the event loop for a request that names a model there is not."""
    compared = []

    class Counted(difflib.SequenceMatcher):
        def ratio(self):
            compared.append(self.a)
            return super().ratio()

    monkeypatch.setattr(suggestions, "SequenceMatcher", Counted)
    for name in ("provider-x/some-model-yyb-instruct-2025", "Provider-17/some-model-911b-instruct-2025", "gpt-5"):
        compared.clear()
        found = near(name, MANY)
        assert len(compared) <= COMPARED
        assert found == difflib.get_close_matches(name.casefold(), MANY, n=3, cutoff=0.5)

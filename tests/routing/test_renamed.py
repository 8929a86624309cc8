"""Names of before: they read what is called otherwise now, and warn where they are used."""

import pytest

from anabranch.routing.renamed import Renamed


class Thing:
    old = Renamed("new")
    new = 3


def test_the_old_name_reads_the_new_one_and_warns_in_the_line_that_uses_it():
    with pytest.warns(DeprecationWarning, match=r"^old of Thing is called new; the old name goes in the next") as seen:
        assert Thing().old == 3
    assert [warning.filename for warning in seen] == [__file__]


def test_the_class_knows_what_it_has():
    assert isinstance(Thing.old, Renamed)

"""Pictures of studies: arms can be told from each other."""

from anabranch.report.style import SERIES
from anabranch.studies.picture import _look


def test_no_two_arms_look_alike_when_colours_begin_anew():
    looks = [_look(number) for number in range(3 * len(SERIES))]
    assert len(set(looks)) == len(looks)
    assert {colour for colour, _, _ in looks} == set(SERIES)

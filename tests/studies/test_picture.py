"""Pictures of studies: arms can be told from each other."""

import re

import pytest

from anabranch.report.style import SERIES, figure, to_svg
from anabranch.studies.harness import Results
from anabranch.studies.picture import _look, draw_arms


def test_no_two_arms_look_alike_when_colours_begin_anew():
    looks = [_look(number) for number in range(3 * len(SERIES))]
    assert len(set(looks)) == len(looks)
    assert {colour for colour, _, _ in looks} == set(SERIES)


@pytest.mark.parametrize("name", ["a$b$^{", r"$\frac{1}$ and $\no$", "%s {0} \\"])
def test_names_may_be_any_text(tmp_path, name):
    metrics = {"bits_per_byte": 2.0, "curve": [[0, 3.0, None], [1, 2.0, None]]}
    results = Results({name: {0: metrics, 1: metrics}, "other$": {0: metrics, 1: metrics}})
    draw_arms(results, tmp_path / "drawn", baseline=name, title=f"{name} against $5")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_powers_on_logarithmic_axes_are_plain_text():
    with figure(3, 2, ncols=2) as (made, (left, right)):
        left.loglog([1, 1000], [1e-3, 1e4])
        right.plot([1, 64], [1, 3])
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        to_svg(made)
        labels = [
            label.get_text() for axes in (left, right) for label in axes.get_xticklabels() + axes.get_yticklabels()
        ]
        labels += [label.get_text() for label in right.yaxis.get_minorticklabels()]
    assert {"10\u2070", "10\u00b3", "10\u207b\u00b3", "2\u00d710\u2070"} <= {*labels}
    assert not [label for label in labels if re.search(r"[$\\^{}]", label)]

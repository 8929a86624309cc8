"""The page of adapters: pictures show the numbers that there are, words agree with them, odd sizes and names break nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.report.adapter_use import (
    FILES,
    MOST_ADAPTERS,
    MOST_PANELS,
    by_matrix,
    by_task,
    check_use_place,
    explain_use,
    shown_adapters,
    shown_tasks,
    write_use,
)


def use_of(weight_TME, tasks=None, matrices=None, adapters=None):
    """As `anabranch.adapters.use.AdapterUse`, which is above."""
    weight_TME = np.asarray(weight_TME, float)
    num_tasks, num_matrices, num_adapters = weight_TME.shape
    sum_TE = np.nansum(np.abs(weight_TME), axis=1)
    names = [
        given or tuple(f"{word} {number}" for number in range(count))
        for given, word, count in (
            (tasks, "task", num_tasks),
            (matrices, "matrix", num_matrices),
            (adapters, "adapter", num_adapters),
        )
    ]
    return SimpleNamespace(
        tasks=names[0],
        matrices=names[1],
        adapters=names[2],
        weight_TME=weight_TME,
        tokens_T=(7,) * num_tasks,
        share_TE=sum_TE / np.maximum(sum_TE.sum(1, keepdims=True), 1e-30),
        to_dict=lambda: {"tasks": list(names[0]), "matrices": list(names[1]), "shares": sum_TE.tolist()},
    )


def drawn(*sizes, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(sizes[-1], 0.4), sizes[:-1])


def test_pictures_show_the_numbers():
    use = use_of(drawn(3, 4, 5))
    [picture] = [axes for axes in by_task(use).axes if axes.get_title(loc="left")]
    np.testing.assert_allclose(np.asarray(picture.images[0].get_array()), use.share_TE)
    assert [text.get_text() for text in picture.get_yticklabels()] == list(use.tasks)
    assert [text.get_text() for text in picture.get_xticklabels()] == list(use.adapters)
    written = {text.get_text() for text in picture.texts}
    assert f"{use.share_TE.max():.0%}" in written
    panels = [axes for axes in by_matrix(use).axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list(use.tasks)
    for axes, weight_ME in zip(panels, use.weight_TME, strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), weight_ME)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 210, 2), (60, 3, 2), (2, 2, 90), (9, 40, 12)], ids=str)
def test_any_sizes(sizes, tmp_path):
    use = use_of(drawn(*sizes))
    assert len(shown_adapters(use)) == min(sizes[2], MOST_ADAPTERS)
    assert len(shown_tasks(use, MOST_PANELS)) == min(sizes[0], MOST_PANELS)
    page = write_use(use, tmp_path / "out", title="many", extra={"model": "m"})
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    for name in ("tasks.png", "matrices.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert page.read_text(encoding="utf-8").count("data:image/svg+xml;base64,") == 2


def test_nobody_is_used_and_holes():
    nothing = use_of(np.zeros((2, 3, 2)))
    by_task(nothing)
    by_matrix(nothing)
    assert explain_use(nothing)[0] == "task 0 is served by nobody: nothing is added to its rows."
    holes = use_of([[[0.5, np.nan], [np.nan, np.nan]]])
    by_task(holes)
    by_matrix(holes)
    assert explain_use(holes)[0] == "task 0 is served by adapter 0 (100%)."
    by_matrix(use_of(np.full((1, 1, 1), np.nan)))


def test_words_agree_with_the_numbers():
    use = use_of([[[0.75, 0.25, 0]], [[0, 1.0, 0]]], tasks=("sql", "law"), adapters=("a", "b", "c"))
    assert explain_use(use) == [
        "sql is served by a (75%), b (25%).",
        "law is served by b (100%).",
        "Tasks differ: 38% of a task's weight is on other adapters than in the average of all tasks.",
        "No task uses c.",
    ]


def test_names_are_what_they_are(tmp_path):
    names = ("<b>$x$</b>", "\x1b[31mred", "a" * 300)
    use = use_of(drawn(3, 3, 3), tasks=names, matrices=names, adapters=names)
    page = write_use(use, tmp_path, title="<i>", extra={"<k>": "<v>"}).read_text(encoding="utf-8")
    assert "<b>$x$" not in page
    assert "<i>" not in page
    assert json.loads((tmp_path / "adapters.json").read_text())["tasks"][0] == names[0]


def test_what_is_not_ours_is_not_replaced(tmp_path):
    write_use(use_of(drawn(1, 1, 2)), tmp_path / "own", title="x", extra={})
    check_use_place(tmp_path / "own")
    check_use_place(tmp_path / "new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tasks.png").write_text("mine")
    with pytest.raises(DataError, match="is there and of no such page"):
        check_use_place(tmp_path / "other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file, and the page is a folder"):
        check_use_place(tmp_path / "file")
    (tmp_path / "own" / "adapters.json").write_text("{}")
    with pytest.raises(DataError, match="is not replaced"):
        check_use_place(tmp_path / "own")

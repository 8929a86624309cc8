"""Each guide, read by someone who installs what it names and types what it says: all that these extras do not bring is hidden."""

import pytest

from guide_worlds import GUIDES, WORLDS
from guides import DOCS, Guide, Reader, hidden


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*-guide.md")))
def test_every_guide_says_what_to_install(page):
    assert Guide(page).extras


def test_commands_of_a_page_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("guides.DOCS", tmp_path)
    (tmp_path / "a.md").write_text(
        "Install `pip install 'anabranch[graph]'`.\n```bash\nanabranch graph info x  # why\npip install y\nKEY=1 anabranch z\n```\n"
        "## Pictures\n`pip install 'anabranch[plots]'`\n```bash\nanabranch graph info x \\\n  --picture y.png\n```\n"
        "## More\n```bash\ntorchrun -m anabranch\n```\n```bash no-run\nanabranch never\n```\n"
    )
    guide = Guide("a.md", smaller={"anabranch graph info x --picture": "--top 1"}, left_out={"torchrun": "slow"})
    assert [(" ".join(words), sorted(named)) for words, named in guide.commands()] == [
        ("anabranch graph info x", ["graph"]),
        ("anabranch graph info x --picture y.png", ["graph", "plots"]),
        ("torchrun -m anabranch", ["graph"]),
    ]
    assert guide.unused() == []
    assert guide.made_small(["torchrun", "-m", "anabranch"]) is None
    assert guide.made_small("anabranch graph info x --picture y.png".split())[-2:] == ["--top", "1"]
    assert Guide("a.md", left_out={"anabranch old": "gone"}).unused() == ["anabranch old"]


def test_what_is_hidden_is_what_no_named_extra_brings():
    of_graph = hidden(["graph"])
    assert {"torch", "matplotlib", "aiohttp"} <= set(of_graph)
    assert not {"numba", "scipy", "pyarrow", "numpy", "networkx"} & set(of_graph)
    # What torch itself needs comes with it.
    assert "networkx" not in hidden(["lm"])
    assert "matplotlib" not in hidden(["graph", "plots"])


def test_a_command_is_refused_what_is_not_installed(tmp_path):
    reader = Reader(tmp_path)
    with pytest.raises(AssertionError, match=r"needs .*torch; pip install 'anabranch\[lm\]'"):
        reader.types(["anabranch", "info", "moe"], ["graph"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", GUIDES)
def test_a_reader_follows_the_guide(page, tmp_path):
    reader = Reader(tmp_path)
    WORLDS.get(page, lambda reader: None)(reader)
    assert reader.follows(GUIDES[page]) >= 1


def test_all_guides_are_followed():
    assert {path.name for path in DOCS.glob("*-guide.md")} <= GUIDES.keys()

"""Each guide, read by someone who installs what it names and types what it says: all that these extras do not bring is hidden."""

import pytest

from anabranch.extras import extras
from base_install import NEEDS
from guide_worlds import GUIDES, WORLDS
from guides import DOCS, Guide, Reader, cli_options, hidden


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


def test_examples_leave_what_the_commands_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("guides.DOCS", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.csv").write_text("1\n")
    reader, text = (
        Reader(tmp_path / "there"),
        "`pip install 'anabranch[graph]'`\n```python\nopen('{}', 'w').write('22')\n```\n",
    )
    (tmp_path / "a.md").write_text(text.format("other.csv"))
    assert reader.follows(Guide("a.md")) == 1
    (tmp_path / "a.md").write_text(text.format("rows.csv"))
    with pytest.raises(AssertionError, match=r"the examples of a\.md write over what its commands read: rows\.csv"):
        reader.follows(Guide("a.md"))


def flags(words):
    """The options among them, without their values."""
    return {word.split("=")[0] for word in words if word.startswith("-")}


@pytest.mark.parametrize("page", GUIDES)
def test_what_makes_a_command_small_is_an_option_of_it(page):
    """Seen at once, and not after the minutes that all commands before it take."""
    commands = cli_options()
    for words, _ in GUIDES[page].commands():
        small = GUIDES[page].made_small(words)
        if small is not None and "anabranch" in small:
            ours = small[small.index("anabranch") + 1 :]
            assert flags(ours) <= commands[name_of(ours, commands)] | {"--help"}, small


def name_of(words, commands):
    """The longest beginning that is a command of ours."""
    return next(name for length in (3, 2, 1) if (name := " ".join(words[:length])) in commands)


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_names_the_extras_of_its_commands(page):
    """Seen at once where `NEEDS` tells what a command or an option of it needs; what it does not tell, the slow test of the page finds."""
    commands = cli_options()
    needs = [(name_of(line.split(), commands), flags(line.split()), extra) for line, extra in NEEDS.items()]
    for words, named in GUIDES[page].commands():
        if words[0] != "anabranch" or GUIDES[page].made_small(words) is None:
            continue
        ours = words[1:]
        name = name_of(ours, commands)
        wanted = {one for of, given, extra in needs if of == name and given <= flags(ours) for one in extra.split(",")}
        missing = {module for one in wanted for module in extras()[one].modules} & set(hidden(sorted(named)))
        assert not missing, f"{' '.join(words)} needs {', '.join(sorted(wanted))}"


@pytest.mark.slow
@pytest.mark.timeout(10000)
@pytest.mark.parametrize("page", GUIDES)
def test_a_reader_follows_the_guide(page, tmp_path):
    reader = Reader(tmp_path)
    WORLDS.get(page, lambda reader: None)(reader)
    assert reader.follows(GUIDES[page]) >= 1


def test_all_guides_are_followed():
    assert {path.name for path in DOCS.glob("*-guide.md")} <= GUIDES.keys()

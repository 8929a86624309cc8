"""Extras: what is read from the metadata, which pip command a missing package gets, and what a base install can do."""

import importlib
import re
import sys
import tomllib
from importlib import metadata

import pytest

from anabranch import extras as module
from anabranch.errors import AnabranchError, BackendError, MissingExtraError
from anabranch.extras import Extra, explain, extras, is_installed, lazy, module_of, require
from base_install import BASE, NEEDS, ROOT, WITH_FILES, WORKS, check_base, check_ends, helps, tried

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def hidden(monkeypatch):
    """Hides packages that are installed."""

    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def missing(*names):
    return ModuleNotFoundError(f"No module named {names[0]!r}", name=names[0])


# What extras bring


def test_the_base_is_what_every_command_needs():
    assert {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]} == BASE


def test_extras_bring_what_users_expect():
    found = extras()
    assert set(found) == set(PROJECT["optional-dependencies"])
    assert found["lm"] == Extra("lm", ("pyarrow", "safetensors", "tokenizers", "torch"))
    assert found["plots"].modules == ("matplotlib",)
    assert set(found["lm"].modules) < set(found["serve"].modules)
    for name in ("graph", "gateway", "routers"):  # nobody who wants a graph engine or a gateway installs torch
        assert not {"torch", "matplotlib"} & set(found[name].modules)
    # A gateway maps none of these, and an image of one should not hold them.
    heavy = {"numba", "scipy", "networkx", "tokenizers", "pyarrow", "starlette", "uvicorn"}
    assert not heavy & set(found["gateway"].modules)
    # Spark needs Java; adapters are for who has their framework, peft for who wants its long tail of methods.
    users = set(found) - {"all", "bench", "dev", "docs", "spark", "langchain", "llama-index", "peft", "sumo"}
    assert set(found["all"].modules) == {name for extra in users for name in found[extra].modules}


def test_a_server_has_one_http_stack():
    stacks = {"aiohttp", "starlette", "uvicorn", "fastapi", "httpx", "requests", "flask", "hypercorn"}
    assert stacks & set(extras()["serve"].modules) == {"aiohttp"}


def test_metadata_of_a_wheel_says_the_same_as_the_source(monkeypatch):
    built = _built()
    module._requirements.cache_clear()
    source = extras()
    monkeypatch.setattr(module, "__file__", "/nowhere/site-packages/anabranch/extras.py")
    monkeypatch.setattr(module.metadata, "metadata", lambda name: built)
    module._requirements.cache_clear()
    try:
        assert extras() == source
    finally:
        module._requirements.cache_clear()


def _built():
    """The metadata that a wheel of the source carries, as the build back end writes it."""
    import email

    lines = []
    for name, wanted in PROJECT["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {name}")
        for line in wanted:
            requirement, _, marker = (part.strip() for part in line.partition(";"))
            marker = f"({marker}) and extra == '{name}'" if " or " in marker else f"{marker} and extra == '{name}'"
            lines.append(f"Requires-Dist: {requirement}; {marker.removeprefix(' and ')}")
    return email.message_from_string("\n".join([*(f"Requires-Dist: {x}" for x in PROJECT["dependencies"]), *lines]))


def test_packages_that_are_installed_are_found_under_their_names():
    """Otherwise the table of names that differ has a gap."""
    for lines in PROJECT["optional-dependencies"].values():
        for line in lines:
            name = re.match(r"[\w-]+", line)[0]
            if name != "anabranch" and _is_distributed(name):
                assert is_installed(module_of(name)), name


def _is_distributed(name):
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_missing_is_looked_up_anew(hidden):
    assert extras()["graph"].missing == ()
    hidden("numba")
    assert extras()["graph"].missing == ("numba",)
    assert extras()["routers"].missing == ("numba",)


def test_what_is_for_some_platforms_only_does_not_count_as_missing(monkeypatch):
    lines = ("numba", "uvloop; sys_platform != 'win32'", "winloop ; sys_platform == 'win32'", "aiohttp>=3;")
    monkeypatch.setattr(module, "_requirements", lambda: {"fast": lines, "more": ("anabranch[fast]", "scipy")})
    assert extras()["fast"].modules == ("aiohttp", "numba")
    assert extras()["more"].modules == ("aiohttp", "numba", "scipy")


# Messages


def test_require_names_everything_in_one_command(hidden):
    require("lm", "graph", by="this")
    hidden("torch", "matplotlib")
    require("graph", by="this")
    with pytest.raises(MissingExtraError) as caught:
        require("lm", "plots", "graph", by="drawing a model")
    assert str(caught.value) == "drawing a model needs matplotlib and torch; pip install 'anabranch[lm,plots]'"
    assert caught.value.modules == ("matplotlib", "torch")
    assert caught.value.command == "pip install 'anabranch[lm,plots]'"
    assert isinstance(caught.value, BackendError)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("package", "of", "command"),
    [
        ("torch", "", "pip install 'anabranch[lm]'"),
        ("scipy", "", "pip install 'anabranch[laws]'"),
        ("scipy", "routers", "pip install 'anabranch[routers]'"),
        ("scipy", "plots", "pip install 'anabranch[laws]'"),
        ("pyyaml", "", "pip install 'anabranch[gateway]'"),
        ("networkx", "", "pip install 'anabranch[graph]'"),
        ("scikit-learn", "", "pip install 'anabranch[graph]'"),
        ("nobody-knows-it", "", "pip install nobody-knows-it"),
    ],
)
def test_a_single_package_gets_the_smallest_extra(hidden, package, of, command):
    hidden(module_of(package))
    with pytest.raises(MissingExtraError, match=f"{re.escape(command)}$"):
        require(package, by="this", of=of)


def test_without_a_word_the_folder_that_wanted_it_is_named(hidden):
    """A study that embeds a graph said that it needs the extra of clusters, which is smaller and brings numba too."""
    hidden("numba")
    for folder, extra in (("graph", "graph"), ("cluster", "cluster"), ("studies", "cluster")):
        with pytest.raises(ModuleNotFoundError) as caught:
            exec("raise error", {"__name__": f"anabranch.{folder}.module", "error": missing("numba")})
        assert (
            explain(caught.value, by="anabranch study", near=["study", "x"]).command
            == f"pip install 'anabranch[{extra}]'"
        )


@pytest.mark.parametrize(
    ("name", "near", "command"),
    [
        ("torch", (), "pip install 'anabranch[lm]'"),
        ("torch.nn", ("serve",), "pip install 'anabranch[serve]'"),
        ("aiohttp", ("gateway", "serve"), "pip install 'anabranch[gateway]'"),
        ("aiohttp", ("serve", "gateway"), "pip install 'anabranch[serve]'"),
        ("yaml", ("graph", "import"), "pip install 'anabranch[gateway]'"),
        ("sklearn", ("dev",), "pip install 'anabranch[graph]'"),
        ("matplotlib", ("all",), "pip install 'anabranch[plots]'"),
    ],
)
def test_a_failed_import_is_explained_by_the_words_near_it(hidden, name, near, command):
    hidden(name.partition(".")[0])
    told = explain(missing(name), by="anabranch x", near=near)
    assert told is not None
    assert told.command == command
    assert str(told) == f"anabranch x needs {name.partition('.')[0]}; {command}"


@pytest.mark.parametrize("name", ["anabranch.nothing", "nobody_knows_it", None, "torch.nothing"])
def test_what_pip_does_not_cure_is_not_explained(name):
    assert explain(ModuleNotFoundError("x", name=name), by="this") is None


def test_an_error_that_was_explained_stays_as_it_is(hidden):
    hidden("torch")
    with pytest.raises(MissingExtraError) as caught:
        require("torch", by="inner")
    assert explain(caught.value, by="outer") is caught.value


# Packages whose names are loaded late


def test_lazy_names_keep_what_they_found_and_tell_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "__init__.py").write_text(
        "from anabranch.extras import lazy\n__getattr__, __dir__ = lazy(__name__, {'one': '.a', 'b': None, 'c': '.c', 'd': '.d'})\n"
    )
    (tmp_path / "late" / "a.py").write_text("one = object()\n")
    (tmp_path / "late" / "b.py").write_text("two = 2\n")
    (tmp_path / "late" / "c.py").write_text("import yaml\nc = 3\n")
    (tmp_path / "late" / "d.py").write_text("import late.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    late = importlib.import_module("late")
    assert {"one", "b", "c", "d", "__name__"} <= set(dir(late))
    assert late.one is late.one is vars(late)["one"]
    assert late.b.two == 2
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"late.c needs yaml; pip install 'anabranch\[gateway\]'"):
        _ = late.c
    with pytest.raises(ModuleNotFoundError, match=r"late\.nothing"):  # ours: told as it is
        _ = late.d
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = late.other
    for name in [name for name in sys.modules if name.partition(".")[0] == "late"]:
        monkeypatch.delitem(sys.modules, name)


def test_lazy_gives_functions_of_a_package():
    get, listed = lazy("anabranch.graph", {"Graph": ".store"})
    assert get("Graph").__name__ == "Graph"
    assert "Graph" in listed()


# A base install: everything that an extra brings is hidden in a process of its own. `test_wheel` does the same with a real one.


def test_a_base_install_helps_and_names_every_missing_extra():
    check_base(*tried(sys.executable, hide=True))


@pytest.mark.parametrize("extra", WITH_FILES)
def test_commands_that_read_files_need_no_more_than_their_extra(extra):
    told, _ = tried(sys.executable, hide=True, extra=extra)
    check_ends(told)


def test_every_command_is_among_those_that_were_tried():
    rest = {command.removesuffix(" --help") for command in helps()} - {"--help", "graph", "routers", "gateway"}
    groups = {"gateway keys", "gateway budget", "gateway ledger", "gateway coe", "routers coe"}
    named = {name for name in rest if any(f"{line} ".startswith(f"{name} ") for line in (*NEEDS, *WORKS))}
    read_files = {" ".join(line.split()[:3]) for lines in WITH_FILES.values() for line in lines}
    need_files = {name for name in rest if any(f"{line} ".startswith(f"{name} ") for line in read_files)} - named
    # They run until they are stopped.
    endless = {"cluster coordinate", "cluster master"}
    assert rest - groups - named - need_files == endless


def test_what_is_missing_is_an_error_of_ours():
    assert issubclass(MissingExtraError, AnabranchError)

"""Where the cache lies: one rule for everything that keeps something, and no home directory stops nobody."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from anabranch import places
from anabranch.errors import DataError
from anabranch.places import cache_folder, cache_places, expanded

SOURCE = Path(places.__file__).parent
NO_SUCH_USER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """A user with an empty home and an empty folder of temporary files."""
    for name in ("ANABRANCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.fixture
def homeless(unset, monkeypatch):
    """The same without a home."""

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    return unset / "temporary" / f"anabranch-{os.geteuid()}"


def test_the_rule(unset, monkeypatch):
    assert cache_folder() == unset / "home" / ".cache" / "anabranch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(unset / "shared"))
    assert cache_folder() == unset / "shared" / "anabranch"
    monkeypatch.setenv("ANABRANCH_CACHE", "~/mine")
    assert cache_folder() == unset / "home" / "mine"


def test_a_relative_folder_of_caches_is_void(unset, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "shared")
    assert cache_folder() == unset / "home" / ".cache" / "anabranch"


def test_a_folder_that_the_user_names_is_never_exchanged_for_another(unset, monkeypatch):
    (unset / "file").write_text("no folder")
    monkeypatch.setenv("ANABRANCH_CACHE", str(unset / "file" / "cache"))
    assert cache_folder() == unset / "file" / "cache"


def test_without_a_home_there_is_a_private_folder(homeless, caplog):
    assert cache_places() == ()
    with caplog.at_level(logging.WARNING):
        assert [cache_folder(), cache_folder()] == [homeless, homeless]
    assert homeless.stat().st_mode & 0o777 == 0o700
    (line,) = caplog.messages
    assert line.startswith(f"no home directory that can be written; what is cached goes to {homeless}")


@pytest.mark.parametrize("home", ["", "relative", "FILE"])
def test_a_home_that_is_none(unset, monkeypatch, home):
    (unset / "home" / "file").write_text("no folder")
    monkeypatch.setenv("HOME", home.replace("FILE", str(unset / "home" / "file")))
    monkeypatch.setattr(places.os, "access", lambda path, mode: Path(path) != Path("/"))
    assert cache_folder() == unset / "temporary" / f"anabranch-{os.geteuid()}"


def test_a_folder_that_others_can_write_is_not_trusted(homeless):
    homeless.mkdir()
    homeless.chmod(0o777)
    found = cache_folder()
    assert found != homeless
    assert found.parent == homeless.parent
    assert found.stat().st_mode & 0o777 == 0o700


def test_a_link_in_its_place_is_not_followed(homeless, tmp_path):
    homeless.symlink_to(tmp_path, target_is_directory=True)
    assert cache_folder() != homeless


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda place: place.symlink_to("nowhere")])
def test_what_another_user_put_in_its_place_takes_no_cache_away(homeless, make):
    make(homeless)
    found = cache_folder()
    assert found != homeless
    assert found.parent == homeless.parent
    assert found.stat().st_mode & 0o777 == 0o700


def test_where_nothing_at_all_can_be_written(homeless, monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(DataError, match=r"no folder can be written for the cache: No usable .*; set ANABRANCH_CACHE"):
        cache_folder()


def test_a_home_that_nobody_knows():
    with pytest.raises(DataError, match="~nobody-at-all/x begins with a home directory that is not known here"):
        expanded("~nobody-at-all/x")


def test_nobody_has_a_rule_of_his_own():
    rules = ("XDG_CACHE_HOME", "Path.home(")
    texts = {str(path.relative_to(SOURCE)): path.read_text() for path in SOURCE.rglob("*.py")}
    assert [name for name, text in texts.items() if any(rule in text for rule in rules)] == ["places.py"]


@pytest.fixture
def place():
    """A folder of temporary files that every user reaches; those of tests are for this user only."""
    with tempfile.TemporaryDirectory(prefix="cache-folder-", dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@as_root
@pytest.mark.parametrize("home", [None, "/", "/nonexistent"])
def test_a_user_whom_the_system_does_not_know(home, place):
    """As in a container that runs under any uid: the kernels of graphs and models find a place, or do without."""
    script = (
        "import os, pwd, tempfile; from anabranch import places, graph\n"
        f"os.setgroups([]); os.setgid({NO_SUCH_USER}); os.setuid({NO_SUCH_USER})\n"
        "os.environ.pop('NUMBA_CACHE_DIR', None); graph._keep_compiled()\n"
        "print(places.cache_folder(), os.environ['NUMBA_CACHE_DIR'])"
    )
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(place), "PYTHONPATH": str(SOURCE.parent)}
    environment |= {} if home is None else {"HOME": home}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = place / f"anabranch-{NO_SUCH_USER}"
    assert done.stdout.split() == [str(folder), str(folder / "numba")]

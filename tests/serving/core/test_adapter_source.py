"""What is read of the folders of adapters, and who is told what is wrong with one."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from anabranch.errors import CapacityError, CheckpointError
from anabranch.serving.core.adapter_entry import Entry
from anabranch.serving.core.adapter_source import AdapterSource, bare
from anabranch.serving.core.client import BusyError


@dataclass
class Numbers:
    nbytes: int
    version: str
    told: ClassVar[dict[str, str]] = {}


def source(*, size=7, version="1", error=None):
    """One whose adapters have so many bytes, or fail after these are told; with size None they do not tell."""

    def read(folder, root, check):
        if size is not None:
            check(size)
        if error is not None:
            raise error
        return Numbers(size or 9, f"{folder} {root} {version}")

    return AdapterSource(read)


def entry(version="", *, is_pinned=False):
    return Entry("a", "folder", "/root", is_pinned, version=version)


def test_what_there_is():
    told = []
    for read in (source().first, source().again):
        assert read(entry(), told.append) == Numbers(7, "folder /root 1")
    assert source().again(entry("folder /root 1"), told.append).nbytes == 7
    assert told == [7, 7, 7]


@pytest.mark.parametrize("error", [CheckpointError("no adapter at /root/folder"), OSError(5, "Input/output error")])
def test_an_operator_is_told_what_is_wrong_and_others_that_it_cannot_be_read(error, caplog):
    with pytest.raises(type(error)) as raised:
        source(error=error).first(entry(), lambda nbytes: None)
    assert raised.value is error
    assert caplog.text == ""
    with pytest.raises(BusyError, match="'a' is known and cannot be read now") as raised:
        source(error=error).again(entry(), lambda nbytes: None)
    assert "root" not in str(raised.value)
    assert str(error) in caplog.text
    # What is no error of ours comes with its trace.
    assert ("Traceback" in caplog.text) == isinstance(error, OSError)


@pytest.mark.parametrize(
    ("is_pinned", "mend"), [(False, "load it once more"), (True, "start the server again, or put its files back")]
)
def test_other_numbers_are_an_operators_to_load(is_pinned, mend, caplog):
    before = entry("folder /root 0", is_pinned=is_pinned)
    assert source().first(before, lambda nbytes: None).version == "folder /root 1"
    with pytest.raises(BusyError, match="cannot be read now"):
        source().again(before, lambda nbytes: None)
    assert f"folder holds other numbers than when the adapter was loaded; {mend}" in caplog.text


@pytest.mark.parametrize("error", [BusyError("others use it"), CapacityError("it never has room")])
def test_what_is_said_of_room_is_told_to_all(error, caplog):
    def check(nbytes):
        raise error

    for read in (source().first, source().again):
        with pytest.raises(type(error)) as raised:
            read(entry(), check)
        assert raised.value is error
    assert caplog.text == ""


def test_the_size_of_what_is_not_read():
    assert source(error=OSError()).size_of(entry()) == 7
    assert source(size=None).size_of(entry()) == 0
    with pytest.raises(BusyError, match="cannot be read now"):
        source(size=None, error=CheckpointError("gone")).size_of(entry())


def test_an_error_comes_without_the_frames_of_the_work():
    error = CheckpointError("damaged")

    def work():
        try:
            raise OSError
        except OSError:
            raise error  # noqa: B904 - the context is what is tested

    with pytest.raises(CheckpointError) as raised:
        bare(work)
    assert raised.value is error
    assert (error.__cause__, error.__context__) == (None, None)
    assert "work" not in {one.name for one in raised.traceback}
    assert bare(lambda: 3) == 3

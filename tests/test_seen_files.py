"""Files that are the same are told so, and others under their names are not."""

import itertools
import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import seen_files
from anabranch.seen_files import SeenFile, SeenFiles


def stamped(path, stamp=10**18):
    """As archives and images of containers leave files that were made at other times."""
    os.utime(path, ns=(stamp, stamp))
    return path


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 40)
    return stamped(path)


def changed(file, work):
    seen = SeenFiles.of([file])
    work()
    return seen.difference(SeenFiles.of([file]))


def test_a_file_that_nobody_touched_is_the_same(file, tmp_path):
    assert changed(file, lambda: None) == ""
    assert changed(file, file.read_bytes) == ""
    # Such as a network's file system that gives it another inode.
    assert changed(file, lambda: os.replace(shutil.copy2(file, tmp_path / "again"), file)) == ""


WAYS = {
    "written into": lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]),
    "written into, and stamped as before": lambda file: stamped(
        file, file.write_bytes(b"\1" + file.read_bytes()[1:]) and 10**18
    ),
    "longer": lambda file: stamped(file, file.write_bytes(file.read_bytes() + b"a") and 10**18),
    "another time": lambda file: stamped(file, 10**18 + 1),
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_file_under_the_name_is_told(file, way):
    assert changed(file, lambda: WAYS[way](file)) == str(file)


def test_a_file_that_came_is_told(file, tmp_path):
    other = tmp_path / "tokenizer.json"
    seen = SeenFiles.of([file])
    other.write_text("{}")
    assert seen.difference(SeenFiles.of([file, other])) == str(other)
    assert SeenFiles.of([file, other]).difference(seen) == str(other)


@settings(max_examples=30)
@given(size=st.integers(0, 3 * seen_files.HEAD // 256), at=st.integers(0, 2**30))
def test_samples_lie_within_the_file_and_reach_both_ends(size, at):
    whole = seen_files.WHOLE
    for length in (size, whole, whole + 1 + size, whole + at):
        samples = seen_files._samples(length)
        assert all(begin >= 0 and begin + count <= length for begin, count in samples)
        assert samples[0][0] == 0
        assert max(begin + count for begin, count in samples) == length
        # Of a large file no part of a fifteenth is passed over.
        gaps = [begin - (before + count) for (before, count), (begin, _) in itertools.pairwise(samples)]
        assert max(gaps, default=0) <= length / (seen_files.NUM_BLOCKS - 1)


@pytest.mark.parametrize("at", [0, 100_000, -1])
def test_large_files_are_told_apart_by_samples(tmp_path, at, monkeypatch):
    """Weights of another training differ everywhere; a header in its beginning."""
    monkeypatch.setattr(seen_files, "WHOLE", 1 << 16)
    monkeypatch.setattr(seen_files, "HEAD", 1 << 15)
    path, numbers = tmp_path / "big", bytearray(1 << 20)
    stamped(path, path.write_bytes(numbers) and 10**18)
    before = SeenFile.of(path)
    numbers[at] = 1
    if at == 100_000:
        numbers[at:] = b"\2" * (len(numbers) - at)
    stamped(path, path.write_bytes(numbers) and 10**18)
    after = SeenFile.of(path)
    assert before != after
    assert replace(before, sample="") == replace(after, sample="")


@pytest.mark.parametrize("place", range(1, 14))
def test_a_large_file_that_differs_in_its_middle_alone_is_told(tmp_path, place, monkeypatch):
    """Such as one layer that was trained further: its header, its beginning and its end are as before."""
    monkeypatch.setattr(seen_files, "WHOLE", 1 << 16)
    monkeypatch.setattr(seen_files, "HEAD", 1 << 15)
    path, numbers = tmp_path / "big", bytearray(1 << 20)
    stamped(path, path.write_bytes(numbers) and 10**18)
    before, fifteenth = SeenFile.of(path), -(-len(numbers) // 15)
    begin = place * fifteenth
    numbers[begin : begin + fifteenth] = b"\2" * fifteenth
    assert numbers[: seen_files.HEAD] == bytes(seen_files.HEAD)
    assert numbers[-seen_files.BLOCK :] == bytes(seen_files.BLOCK)
    stamped(path, path.write_bytes(numbers) and 10**18)
    after = SeenFile.of(path)
    assert before != after
    assert replace(before, sample="") == replace(after, sample="")


def test_contents_are_the_same_wherever_they_are(file, tmp_path):
    other = tmp_path / "elsewhere" / file.name
    other.parent.mkdir()
    shutil.copy(file, other)
    first, second = SeenFiles.of([file]), SeenFiles.of([other])
    assert first.content == second.content
    other.write_bytes(b"\1" + file.read_bytes()[1:])
    assert first.content != SeenFiles.of([other]).content
    assert SeenFiles().content == ""

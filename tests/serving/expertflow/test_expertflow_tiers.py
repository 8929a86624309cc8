"""Tiers: what a load writes, and that what was read is forgotten where that was asked for."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CheckpointError, DataError
from anabranch.nn import kernels
from anabranch.serving.expertflow import Expert
from anabranch.serving.expertflow.direct import BLOCK, CHUNK, DirectFile
from anabranch.serving.expertflow.tiers import DequantTier, FileTier, MemoryTier, dequantize, quantize, write_experts

Pool = tuple[torch.Tensor, torch.Tensor]


def made(experts: int = 6, hidden: int = 64, dim: int = 32) -> Pool:
    torch.manual_seed(0)
    return torch.randn(experts, 2 * hidden, dim), torch.randn(experts, dim, hidden)


def slot_of(pool: Pool) -> Pool:
    return torch.zeros_like(pool[0][0]), torch.zeros_like(pool[1][0])


def test_memory_and_files_write_the_same_experts(tmp_path: Path) -> None:
    pools = [made(), made(3, 32, 16)]
    for tier in (MemoryTier(pools), write_experts(tmp_path / "experts.bin", pools)):
        for number, pool in enumerate(pools):
            slot = slot_of(pool)
            for expert in range(len(pool[0])):
                pieces = list(tier.load(Expert(number, expert), slot))
                assert len(pieces) == 2
                assert torch.equal(slot[0], pool[0][expert])
                assert torch.equal(slot[1], pool[1][expert])
        tier.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_come_out_as_they_were_rounded(bits: int) -> None:
    pool = made()
    slot = slot_of(pool)
    list(DequantTier([pool], bits).load(Expert(0, 2), slot))
    assert torch.equal(slot[0], dequantize(*quantize(pool[0][2], bits), bits))
    assert (slot[0] - pool[0][2]).abs().max() < 4 / (127 if bits == 8 else 7)


def read_bytes() -> int:
    """That this process has got from devices."""
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")]
    return int(line.split()[1])


@pytest.mark.parametrize("drop_cache", [False, True])
def test_what_was_read_is_read_again_from_the_disk_only_if_it_was_dropped(tmp_path: Path, drop_cache: bool) -> None:
    pool = made(16, 512, 256)  # 1.5 MiB each; in the cache they lie in pieces that are no multiple of it
    tier, slot = write_experts(tmp_path / "experts.bin", [pool]), slot_of(pool)
    tier.drop_cache = drop_cache
    try:
        before = read_bytes()
    except OSError:
        pytest.skip("the system does not count what a process reads")
    for _ in range(2):  # the first time they are in the cache because they were written
        for expert in range(16):
            list(tier.load(Expert(0, expert), slot))
            assert torch.equal(slot[0], pool[0][expert])
    share = (read_bytes() - before) / (pool[0].nbytes + pool[1].nbytes)
    tier.close()
    if drop_cache and share == 0:
        pytest.skip("the folder for tests is in memory")
    assert share > 0.9 if drop_cache else share < 0.1


@pytest.fixture(scope="module", params=["compiled", "plain"])
def reader(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whether reads past the cache are the compiled ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(kernels, "load", lambda: None)
        elif kernels.load() is None:
            pytest.skip("no compiled kernels here")
        yield request.param


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_piece_is_read_past_the_cache_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, reader: str, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 3 * BLOCK))
    path = tmp_path_factory.getbasetemp() / "piece.bin"
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    offset, length = data.draw(st.integers(0, size + BLOCK)), data.draw(st.integers(0, 2 * BLOCK))
    file, into = DirectFile(path), bytearray(length)
    for past_cache in (True, False):
        count = file.read(offset, memoryview(into), past_cache=past_cache)
        assert into[:count] == content[offset : offset + length]
        assert count == len(content[offset : offset + length])
    file.close()


def test_a_piece_larger_than_the_buffer(tmp_path: Path, reader: str) -> None:
    content = random.Random(0).randbytes(2 * CHUNK + 100)
    (tmp_path / "large.bin").write_bytes(content)
    file, into = DirectFile(tmp_path / "large.bin"), bytearray(2 * CHUNK + 50)
    assert file.read(7, memoryview(into), past_cache=True) == len(into)
    assert into == content[7 : 7 + len(into)]
    file.close()


@pytest.mark.parametrize("refuses", ["open", "read"])
def test_a_file_system_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    (tmp_path / "some.bin").write_bytes(b"abcdef")
    monkeypatch.setattr(kernels, "load", lambda: None)
    refused, real_open, real_read = OSError(errno.EINVAL, "not here"), os.open, os.preadv

    def opened(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and refuses == "open":
            raise refused
        return real_open(path, flags)

    def read(handle: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers[0]) == BLOCK and refuses == "read":
            raise refused
        return real_read(handle, buffers, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    file, into = DirectFile(tmp_path / "some.bin"), bytearray(4)
    assert file.read(1, memoryview(into), past_cache=True) == 4
    assert into == b"bcde"
    assert not file.is_direct
    file.close()


def test_what_the_compiled_reader_is_refused_is_told(tmp_path: Path) -> None:
    library, buffer = kernels.load(), bytearray(BLOCK)
    if library is None:
        pytest.skip("no compiled kernels here")
    (tmp_path / "some.bin").write_bytes(b"abcdef")
    file = DirectFile(tmp_path / "some.bin")
    if not file.is_direct:
        pytest.skip("the folder for tests has no direct reads")
    assert file._direct is not None
    os.close(file._direct)
    file._direct = os.open(tmp_path, os.O_RDONLY)  # a folder cannot be read
    with pytest.raises(IsADirectoryError):
        file.read(0, memoryview(buffer), past_cache=True)
    file.close()


def test_a_device_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)
    (tmp_path / "some.bin").write_bytes(b"abcdef")
    file = DirectFile(tmp_path / "some.bin")

    def broken(handle: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="broken"):
        file.read(0, memoryview(bytearray(4)), past_cache=True)
    file.close()


def test_files_that_end_early_or_are_not_there(tmp_path: Path) -> None:
    pool = made()
    tier = write_experts(tmp_path / "experts.bin", [pool])
    with (tmp_path / "experts.bin").open("r+b") as file:
        file.truncate(100)
    for tier.drop_cache in (False, True):
        with pytest.raises(CheckpointError, match="was written to while it was in use"):
            list(tier.load(Expert(0, 5), slot_of(pool)))
    table = tier.table
    tier.close()
    tier = FileTier(table)
    with pytest.raises(DataError, match="it is truncated"):
        list(tier.load(Expert(0, 5), slot_of(pool)))
    tier.close()
    (tmp_path / "experts.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot read experts"):
        FileTier(table)

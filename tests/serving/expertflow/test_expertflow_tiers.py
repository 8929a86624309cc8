"""Tiers: what a load writes, and that what was read is forgotten where that was asked for."""

from pathlib import Path

import pytest
import torch

from anabranch.errors import CheckpointError, DataError
from anabranch.serving.expertflow import Expert
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


def test_files_that_end_early_or_are_not_there(tmp_path: Path) -> None:
    pool = made()
    tier = write_experts(tmp_path / "experts.bin", [pool])
    with (tmp_path / "experts.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="it is truncated"):
        list(tier.load(Expert(0, 5), slot_of(pool)))
    table = tier.table
    tier.close()
    (tmp_path / "experts.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot read experts"):
        FileTier(table)

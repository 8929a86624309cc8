"""What collectives reach between the devices that are here: all-reduce over NCCL, or over gloo between processes on a CPU.

An all-reduce of S bytes between N devices sends 2 (N - 1) / N S from each, so what one device sends a second follows from its time.
A tiny one tells what a collective takes however little it moves.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from anabranch.errors import BackendError


def measure_network(
    num_devices: int, device: str = "cpu", *, seconds: float = 0.2, size: int = 16 << 20
) -> tuple[float, float]:
    """Bytes/s that one of ``num_devices`` sends in an all-reduce of ``size`` bytes, and seconds of a tiny one; the best of several.

    Raises BackendError if there are not as many devices.
    """
    if device == "cuda" and torch.cuda.device_count() < num_devices:
        raise BackendError(
            f"{num_devices} devices were asked for, but torch finds {torch.cuda.device_count()}; use fewer or a named profile"
        )
    with tempfile.TemporaryDirectory(prefix="anabranch-network-") as folder:
        answer = Path(folder) / "seconds"
        try:
            mp.spawn(_rank, (num_devices, device, folder, seconds, max(size, 4)), nprocs=num_devices)
        except mp.ProcessRaisedException as error:
            raise BackendError(
                f"collectives between {num_devices} devices failed: {error.msg.strip().splitlines()[-1]}"
            ) from None
        large, small = (float(number) for number in answer.read_text().split())
    return 2 * (num_devices - 1) / num_devices * size / large, small


def _rank(rank: int, count: int, device: str, folder: str, seconds: float, size: int) -> None:
    """One device's side of it."""
    torch.set_num_threads(1)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    try:
        found = [_best(torch.ones(length, device=place), seconds) for length in (size // 4, 1)]
        if rank == 0:
            Path(folder, "seconds").write_text(f"{found[0]} {found[1]}")
    finally:
        dist.destroy_process_group()


def _best(values: torch.Tensor, seconds: float) -> float:
    """Of as many all-reduces as fit into ``seconds``, at least three; all ranks do as many."""
    dist.all_reduce(values)
    taken = torch.tensor([_once(values) for _ in range(3)])
    dist.all_reduce(each := taken.to(values.device), dist.ReduceOp.MAX)
    rounds = min(max(int(seconds / max(float(each.min()), 1e-6)), 1), 1000)
    return min([float(taken.min()), *(_once(values) for _ in range(rounds))])


def _once(values: torch.Tensor) -> float:
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    begin = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - begin

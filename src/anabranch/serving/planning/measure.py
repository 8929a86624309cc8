"""A profile of the device that is here, by micro-benchmarks: products of several sizes, attention over more than the caches hold, copies.

`measure` gives the `Hardware` for the cost model, `measure_shares` the R -> P table of two operations side by side. Run them on a quiet
machine: a figure is the best of several rounds, but a busy core halves it all the same.
"""
# Shapes: M rows, K and N widths, B sequences, H heads, S positions, D head width

import os
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from anabranch.errors import BackendError
from anabranch.serving.planning.hardware import Efficiency, Hardware
from anabranch.serving.planning.interference import PAPER_POINTS, ShareTable, monotone

ROWS = (128, 512, 2048)
WIDTH = 1024

# More than the last cache of the machines we know.
STREAM_BYTES = 256 << 20


def measure(
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.2,
    stream_bytes: int = STREAM_BYTES,
    num_devices: int = 1,
) -> Hardware:
    """The profile of ``device``; about ten times ``seconds``.

    With several devices their collectives are measured too, see `anabranch.serving.planning.network`; several on a CPU are processes
    of it, which share its cores and its memory.

    Raises BackendError if there is no such device, or not as many.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendError("hardware cuda was asked for, but torch finds no CUDA device; use cpu or a named profile")
    place = torch.device(device)
    with torch.inference_mode():
        rates = {rows: _product_rate(rows, place, dtype, seconds) for rows in ROWS}
        copied = _copy_rate(place, dtype, seconds, stream_bytes)
        read = _attention_rate(place, dtype, seconds, stream_bytes)
        launch = _seconds_of(_small(place, dtype), place, seconds / 4)
    bandwidth = max(copied, read)
    # Processes of one processor share it.
    shared = 1 if place.type == "cuda" else num_devices
    network = collective = 0.0
    if num_devices > 1:
        from anabranch.serving.planning.network import measure_network

        network, collective = measure_network(num_devices, place.type, seconds=seconds, size=stream_bytes // 16)
    return Hardware(
        name=device if place.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        num_devices=num_devices,
        network_bandwidth=network,
        machine=_machine(place, dtype),
        memory_bytes=_memory_bytes(place) / shared,
        memory_bandwidth=bandwidth / shared,
        compute=max(rates.values()) / shared,
        efficiency=Efficiency(attention=min(read / bandwidth, 1.0), launch_s=launch, collective_s=collective),
    )


def measure_shares(
    *, dtype: torch.dtype = torch.float32, seconds: float = 0.5, stream_bytes: int = STREAM_BYTES
) -> ShareTable:
    """R -> P of attention beside products on this machine's CPU.

    R is what a product on the cores that are left loses against one on all cores, P what attention reaches of its speed on all. The
    points of the network are the paper's: there is no network here to profile.
    """
    cores = torch.get_num_threads()
    place = torch.device("cpu")
    product, stream = _product(512, place, dtype), _attention(place, dtype, stream_bytes)[0]
    alone = [_rate(work, cores, seconds) for work in (product, stream)]
    points = []
    for given in range(1, cores):
        beside = _together((product, cores - given), (stream, given), seconds)
        points.append((1 - beside[0] / alone[0], beside[1] / alone[1]))
    table = {**PAPER_POINTS, "memory": tuple(monotone(points))}
    return ShareTable(table, source=f"measured on {cores} threads", machine=_machine(place, dtype))


def _machine(place: torch.device, dtype: torch.dtype) -> str:
    """The processor, its threads and the type of numbers: what figures are of."""
    if place.type == "cuda":
        return f"{torch.cuda.get_device_name(place)}, {dtype}"
    try:
        named = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {dtype}"


def _memory_bytes(place: torch.device) -> float:
    if place.type == "cuda":
        return float(torch.cuda.get_device_properties(place).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _product(rows: int, place: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x_MK = torch.ones(rows, WIDTH, dtype=dtype, device=place)
    w_NK = torch.ones(4 * WIDTH, WIDTH, dtype=dtype, device=place)
    return lambda: F.linear(x_MK, w_NK)


def _product_rate(rows: int, place: torch.device, dtype: torch.dtype, seconds: float) -> float:
    return 2 * rows * WIDTH * 4 * WIDTH / _seconds_of(_product(rows, place, dtype), place, seconds)


def _copy_rate(place: torch.device, dtype: torch.dtype, seconds: float, size: int) -> float:
    source = torch.ones(size // dtype.itemsize // 2, dtype=dtype, device=place)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds_of(lambda: target.copy_(source), place, seconds)


def _attention(place: torch.device, dtype: torch.dtype, size: int) -> tuple[Callable[[], object], int]:
    """Decoding: one query of each of 8 sequences over keys and values of ``size`` bytes; and these bytes."""
    heads, width, batch = 4, 64, 8
    length = max(size // (2 * batch * heads * width * dtype.itemsize), 16)
    query_BHLD = torch.ones(batch, heads, 1, width, dtype=dtype, device=place)
    key_BHSD, value_BHSD = (torch.ones(batch, heads, length, width, dtype=dtype, device=place) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(query_BHLD, key_BHSD, value_BHSD), key_BHSD.nbytes * 2


def _attention_rate(place: torch.device, dtype: torch.dtype, seconds: float, size: int) -> float:
    work, read = _attention(place, dtype, size)
    return read / _seconds_of(work, place, seconds)


def _small(place: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x_MK = torch.ones(1, 8, dtype=dtype, device=place)
    return lambda: F.linear(x_MK, x_MK)


def _seconds_of(work: Callable[[], object], place: torch.device, seconds: float) -> float:
    """The shortest of the runs that fit into ``seconds``, at least three."""
    best, count, until = float("inf"), 0, time.perf_counter() + seconds
    work()
    while count < 3 or time.perf_counter() < until:
        _wait(place)
        begin = time.perf_counter()
        work()
        _wait(place)
        best, count = min(best, time.perf_counter() - begin), count + 1
    return best


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _rate(work: Callable[[], object], cores: int, seconds: float) -> float:
    """Runs per second on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        with torch.inference_mode():
            work()
            count, begin = 0, time.perf_counter()
            while time.perf_counter() < begin + seconds:
                work()
                count += 1
            return count / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)


def _together(
    first: tuple[Callable[[], object], int], second: tuple[Callable[[], object], int], seconds: float
) -> list[float]:
    """Runs per second of both side by side, each on its threads."""
    rates = [0.0, 0.0]

    def run(number: int, work: Callable[[], object], cores: int) -> None:
        rates[number] = _rate(work, cores, seconds)

    threads = [threading.Thread(target=run, args=(number, *pair)) for number, pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rates

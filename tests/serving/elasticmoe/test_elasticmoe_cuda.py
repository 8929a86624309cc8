"""The CUDA backend over a stand-in for the driver: errors, leaks, file descriptors, and what only several GPUs have."""

import os
import resource
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch

from anabranch.errors import BackendError, CapacityError, ConfigError
from anabranch.lm.checkpoint import load_model
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.cuda import CudaBackend
from anabranch.serving.elasticmoe.cuda_driver import LIBRARY, Driver
from anabranch.serving.elasticmoe.devices import Host
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.memory import MemoryManager
from anabranch.serving.elasticmoe.plan import place, plan_scale
from anabranch.serving.elasticmoe.policy import Policy
from elastic_backends import seen, write

PAGE = 2 << 20


@pytest.fixture
def cuda(standin):
    backend = CudaBackend()
    yield backend
    backend.close()


@pytest.fixture
def pages(cuda):
    pages = cuda.pages(0, "test", 4 * PAGE, range(0, 4 * PAGE, PAGE))
    for number in range(4):
        write(pages, number * PAGE, bytes([number + 1]) * 10)
    yield pages
    pages.close()


def test_without_a_driver(tmp_path, monkeypatch):
    with pytest.raises(BackendError, match=r"there is no CUDA driver here .*nothing.*; choose device='cpu'"):
        Driver(str(tmp_path / "nothing.so"))
    (tmp_path / "wrong.so").write_text("not a library")
    monkeypatch.setenv(LIBRARY, str(tmp_path / "wrong.so"))
    with pytest.raises(BackendError, match="there is no CUDA driver here"):
        CudaBackend()


def test_a_library_without_the_calls(tmp_path):
    with pytest.raises(BackendError, match="cuInit"):
        Driver("libc.so.6")


def test_a_driver_without_devices_or_virtual_memory(standin, monkeypatch):
    monkeypatch.setenv("STANDIN_GPUS", "0")
    with pytest.raises(BackendError, match="CUDA shows no GPU here"):
        Driver()
    monkeypatch.setenv("STANDIN_GPUS", "1")
    monkeypatch.setenv("STANDIN_IS_OLD", "1")
    with pytest.raises(BackendError, match="GPU 0 or its driver cannot map memory"):
        Driver()


def test_the_driver_s_own_words(cuda):
    with pytest.raises(BackendError, match=r"CUDA: cuMemRelease: invalid argument \(error 1\)"):
        cuda.driver.release(12345)
    with pytest.raises(BackendError, match="cuStreamCreate: invalid device context"):
        cuda.driver.stream()
    with pytest.raises(BackendError, match="cuMemMap"):
        cuda.driver.map(PAGE, PAGE, 0)


def test_a_fork_may_not_use_it(standin, tmp_path):
    """CUDA's rule, and why the fork server opens no driver: the stand-in keeps it, or the group's tests would not find out."""
    (tmp_path / "fork.py").write_text("""
import os
from anabranch.errors import BackendError
from anabranch.serving.elasticmoe.cuda_driver import Driver

driver = Driver()
if not os.fork():
    try:
        driver.reserve(2 << 20)
    except BackendError as error:
        os._exit("initialization error" not in str(error))
    os._exit(2)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
""")
    subprocess.run([sys.executable, str(tmp_path / "fork.py")], check=True)


def test_out_of_memory_says_how_much_is_free(standin, monkeypatch):
    monkeypatch.setenv("STANDIN_BYTES", str(3 * PAGE))
    backend = CudaBackend()
    pages = backend.pages(0, "test", 8 * PAGE, range(0, 8 * PAGE, 4 * PAGE))
    with pytest.raises(CapacityError, match="no memory for 8,388,608 bytes on GPU 0: 6,291,456 are free"):
        write(pages, 0, b"x")
    assert pages.resident == 0
    pages.close()
    with pytest.raises(CapacityError):
        backend.pages(0, "test", 4 * PAGE)  # all at once
    backend.close()


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuMemHostAlloc"])
def test_a_block_that_cannot_be_made_leaves_nothing(standin, call):
    backend = CudaBackend()
    pages = backend.pages(0, "test", 2 * PAGE, [0, PAGE])
    standin.fail(call)
    with pytest.raises(CapacityError):
        write(pages, 0, b"x")
    assert pages.resident == 0
    assert {"handles", "mappings", "pinned", "bytes"} & standin.held().keys() <= {"pinned"}
    write(pages, 0, b"x")  # and it can be made after
    assert pages.resident == PAGE
    pages.close()
    backend.close()


def test_what_cannot_be_read_leaves_the_lane_usable(cuda, pages, standin):
    for call in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2"):
        standin.fail(call)
        with pytest.raises(CapacityError, match=call):
            write(pages, 0, b"y") if "HtoD" in call else pages.copy(0, pages, PAGE, 10)
    write(pages, 0, b"y")
    assert pages.copy(PAGE, pages, 0, 10) == 10


def test_more_than_a_pinned_buffer_holds(cuda, tmp_path):
    data = os.urandom((21 << 20) + 3)  # five halves of it and a rest, none like another
    pages = cuda.pages(0, "test", 24 << 20)
    write(pages, 100, data)
    part = cuda.range(0, 1, 24 << 20)
    part.remap(pages, [0])
    assert seen(part, 100 + len(data)) == bytes(100) + data
    part.close()
    pages.close()


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("after", [1, 2])
def test_a_remap_that_fails_is_made_good_by_the_next(cuda, pages, standin, call, after):
    part = cuda.range(0, 3, PAGE)
    part.remap(pages, [0, PAGE, 2 * PAGE])
    standin.fail(call, after)
    with pytest.raises(CapacityError):
        part.remap(pages, [3 * PAGE, PAGE, 0])
    assert part.where[1] == pages.block(PAGE).key  # the survivor is untouched
    part.remap(pages, [3 * PAGE, PAGE, 0])
    assert seen(part, 3 * PAGE)[::PAGE] == bytes([4, 2, 1])
    part.close()
    standin.fail("", 0)


def test_memory_lives_as_long_as_it_is_mapped(cuda, pages, standin):
    part = cuda.range(0, 1, PAGE)
    part.remap(pages, [0])
    pages.release(0, PAGE)
    assert standin.held()["bytes"] == 4 * PAGE
    assert seen(part, 10) == b"\1" * 10
    with pytest.raises(RuntimeError, match="test has no block at 0"):
        part.remap(pages, [0])
    write(pages, 0, b"new")
    assert part.remap(pages, [0]) == (1, 0)  # other memory at the same place
    assert seen(part, 4) == b"new\0"
    assert standin.held()["bytes"] == 4 * PAGE
    part.close()


def test_blocks_and_ranges_of_different_sizes(cuda, pages):
    part = cuda.range(0, 1, 2 * PAGE)
    with pytest.raises(ValueError, match="blocks of other sizes than the range's 4194304 bytes"):
        part.remap(pages, [0])
    part.close()
    with pytest.raises(ValueError, match="are not in one block of test"):
        pages.copy(PAGE - 1, pages, 0, 2)


@contextmanager
def few_files(most):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_blocks_are_opened_in_batches(cuda, standin):
    """The stand-in holds a file for each handle, as no driver does; so what is counted here is what was asked for at once."""
    starts = range(0, 300 * PAGE, PAGE)
    pages = cuda.pages(0, "test", 300 * PAGE, starts)
    for start in starts:
        write(pages, start, bytes([start // PAGE % 251]))
    asked = []

    def ask(offsets):
        asked.append(len(offsets))
        return pages.export(offsets)

    before = len(os.listdir("/proc/self/fd"))
    with few_files(before + 300 + 64 + 10):  # a file for each handle, those of one batch, and a few
        opened = cuda.opened(0, starts, ask)
    assert asked == [64, 64, 64, 64, 44]
    assert len(os.listdir("/proc/self/fd")) == before + 300
    part = cuda.range(0, 300, PAGE)
    assert part.remap(opened, starts[::-1]) == (300, 0)
    assert seen(part, 300 * PAGE)[::PAGE] == bytes(number % 251 for number in range(299, -1, -1))
    opened.close()
    part.close()
    pages.close()


def test_opening_that_fails_leaves_nothing(cuda, pages, standin):
    before, files = standin.held(), len(os.listdir("/proc/self/fd"))
    for call, after in (("cuMemExportToShareableHandle", 3), ("cuMemImportFromShareableHandle", 2)):
        standin.fail(call, after)
        with pytest.raises(CapacityError, match=call):
            cuda.opened(0, [0, PAGE, 2 * PAGE], pages.export)
        assert standin.held() == before
        assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("gpus", ["1", "2"])
@pytest.mark.parametrize("devices", [(0, 1, 2), (1,), (0, 2)])
def test_a_failure_anywhere_in_prepare_rolls_back(standin, folder, monkeypatch, gpus, devices):
    monkeypatch.setenv("STANDIN_GPUS", gpus)
    backend = CudaBackend()
    layout = layout_of(folder, backend.page)
    host = Host(layout, 2 * PAGE, backend=backend)
    host.load(place(6, 2, (0, 1)))
    before, held = (host.resident, sorted(host.devices), host.placement), standin.held()
    plan = plan_scale(host.placement, devices, expert_bytes=layout.expert_bytes, shard_bytes=layout.dense_bytes)
    failures = 0
    for call in ("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyDtoDAsync_v2"):
        for after in (1, 2, 3, 5):
            standin.fail(call, after)
            try:
                host.prepare(plan)
            except CapacityError:
                failures += 1
                assert host.plan is None
            else:
                host.drop()  # there were fewer calls than that
                standin.fail("", 0)
            assert (host.resident, sorted(host.devices), host.placement) == before
            now = standin.held()
            assert {kind: now[kind] for kind in ("handles", "mappings", "reservations", "bytes")} == {
                kind: held[kind] for kind in ("handles", "mappings", "reservations", "bytes")
            }
    assert failures >= 10
    host.prepare(plan)
    host.commit()
    assert host.placement == plan.new
    host.close()
    backend.close()


def test_a_layout_of_other_pages_is_refused(cuda, folder):
    with pytest.raises(ConfigError, match="pages of 4096 bytes; the devices need multiples of 2097152"):
        Host(layout_of(folder), 2 * PAGE, backend=cuda)


def test_a_manager_without_a_driver(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(LIBRARY, str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match="there is no CUDA driver here"):
        MemoryManager.start(layout_of(folder, PAGE), 2 * PAGE, kind="cuda")


def test_a_manager_that_runs_out_of_memory(standin, folder, monkeypatch):
    monkeypatch.setenv("STANDIN_BYTES", str(20 * PAGE))  # 24 are experts
    memory = MemoryManager.start(layout_of(folder, PAGE), 2 * PAGE, kind="cuda")
    with pytest.raises(CapacityError, match="no memory for 2,097,152 bytes on GPU 0: 0 are free"):
        memory.load(place(6, 2, (0,)))
    memory.close()


def test_what_a_group_on_cuda_devices_refuses(standin, folder, monkeypatch):
    with pytest.raises(ConfigError, match="mapped is false; that is for device='cpu', not for 'cuda'"):
        ElasticConfig(model=str(folder), device="cuda", mapped=False, weights="own")
    with pytest.raises(ConfigError, match="mapped, not copied"):
        CudaBackend().range(0, 1, PAGE, copies=True)
    monkeypatch.setenv("STANDIN_GPUS", "2")
    with pytest.raises(ConfigError, match="weights is 'shared', but the devices are on 2 GPUs"):
        Group(ElasticConfig(model=str(folder), device="cuda"))
    Group(ElasticConfig(model=str(folder), device="cuda", policy=Policy(max_devices=1)))  # one GPU is enough


def test_a_group_on_two_gpus(standin, folder, monkeypatch):
    """Ranks that map memory of another GPU, copies between GPUs, and streams as one process gives them."""
    monkeypatch.setenv("STANDIN_GPUS", "2")
    config = ElasticConfig(model=str(folder), device="cuda", weights="own", num_blocks=48, pace_s=0.004, ahead=False)
    model, _ = load_model(folder)
    group = Group(config)
    tokens: dict[str, list[int]] = defaultdict(list)
    over = threading.Condition()
    ended = []

    def take(output):
        with over:
            tokens[output.id] += output.tokens
            ended.extend([output.finish] if output.finish is not None else [])
            over.notify_all()

    try:
        group.start()
        for number in range(4):
            request = Request(id=str(number), prompt=(number, 5, 9), sampling=Sampling(temperature=0.0, max_tokens=40))
            group.ledger.submit(request, take)
        for devices in (2, 3, 1):
            group.scale(devices)
        with over:
            assert over.wait_for(lambda: len(ended) == 4, 60)
    finally:
        group.close()
    assert ended == [Finish.LENGTH] * 4
    for number in range(4):
        expected = [number, 5, 9]
        with torch.inference_mode():
            for _ in range(40):
                expected.append(int(model(torch.tensor([expected]), last_only=True).logits_BLV[0, -1].argmax()))
        assert tokens[str(number)] == expected[3:]

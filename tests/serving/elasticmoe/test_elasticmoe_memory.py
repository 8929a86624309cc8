"""The memory manager, and tensors over its pages: bytes, addresses, physical pages, and what is resident; over every backend."""

import os
import struct
from dataclasses import replace

import pytest
import torch

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder
from anabranch.lm.checkpoint import load_model, save_model
from anabranch.lm.tensors import build_empty
from anabranch.serving.elasticmoe.arena import DenseArena, ExpertArena, KvArena
from anabranch.serving.elasticmoe.backend import CPU
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.devices import Disk, Host
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.mapped import HOST, PAGE, Pages, Range, move_bytes
from anabranch.serving.elasticmoe.memory import MemoryManager, attach
from anabranch.serving.elasticmoe.plan import place, plan_scale
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError, pair
from elastic_backends import bytes_of, seen, write
from elastic_models import moe_config


@pytest.fixture
def layout(folder, backend):
    return layout_of(folder, backend.page)


@pytest.fixture
def kv_bytes(backend):
    return 2 * backend.page


@pytest.fixture
def kv_at_once(backend, kv_bytes):
    """Bytes of a cache that nobody has written yet."""
    return 0 if backend.kind == "cpu" else kv_bytes


@pytest.fixture
def host(layout, kv_bytes, backend):
    host = Host(layout, kv_bytes, backend=backend)
    yield host
    host.close()


@pytest.fixture
def shared(layout, kv_bytes, backend):
    host = Host(layout, kv_bytes, shares=True, backend=backend)
    yield host
    host.close()


@pytest.fixture
def memory(layout, kv_bytes, backend):
    manager = MemoryManager.start(layout, kv_bytes, kind=backend.kind)
    yield manager
    manager.close()


@pytest.fixture
def pages(backend):
    """Room for eight blocks of a page, none of which is there."""
    pages = backend.pages(0, "test", 8 * backend.page, [number * backend.page for number in range(8)])
    yield pages
    pages.close()


def physical_pages(part, slots: int) -> list[int]:
    """Frame number of the first page of each slot; zeros without the privilege to see them."""
    found = []
    with open("/proc/self/pagemap", "rb") as file:
        for slot in range(slots):
            file.seek((part.address + slot * part.block) // PAGE * 8)
            found.append(struct.unpack("<Q", file.read(8))[0] & ((1 << 55) - 1))
    return found


def fill(backend, pages, count: int = 8) -> None:
    for number in range(count):
        write(pages, number * backend.page, bytes([number + 1]) * backend.page)


def test_a_range_maps_blocks_side_by_side(backend, pages):
    page, part = backend.page, backend.range(0, 4, backend.page)
    fill(backend, pages)
    assert part.remap(pages, [5 * page, 0, page]) == (3, 0)
    assert seen(part, 3 * page)[::page] == bytes([6, 1, 2])
    assert part.remap(pages, [5 * page, 7 * page, page, 2 * page]) == (2, 2)
    assert seen(part, 4 * page)[::page] == bytes([6, 8, 2, 3])
    write(pages, 7 * page, b"\x63")
    assert seen(part, 2 * page)[page] == 0x63  # mapped, not copied
    assert part.remap(pages, [5 * page]) == (0, 1)
    assert part.remap(pages, [5 * page, page]) == (1, 1)
    assert seen(part, 2 * page)[::page] == bytes([6, 2])
    part.close()


def test_survivors_keep_their_physical_pages(backend, pages):
    page, part = backend.page, backend.range(0, 3, backend.page)
    fill(backend, pages)
    part.remap(pages, [0, 3 * page, 6 * page])
    kept = part.where[0], part.where[2]
    seen(part, 3 * page)  # touch them
    is_host = part.place == (CPU, 0)
    before = physical_pages(part, 3) if is_host else []
    assert part.remap(pages, [0, 4 * page, 6 * page]) == (1, 2)
    assert (part.where[0], part.where[2]) == kept
    assert seen(part, 3 * page)[::page] == bytes([1, 5, 7])
    if is_host:
        after = physical_pages(part, 3)
        assert (before[0], before[2]) == (after[0], after[2])
        if any(before):  # page numbers are shown to the privileged alone
            assert before[1] != after[1]
    part.close()


def test_blocks_exist_only_once_written_and_go_when_released(backend):
    page = backend.page
    pages = backend.pages(0, "test", 1000 * page, range(0, 1000 * page, page))
    assert pages.resident == 0
    fill(backend, pages, 3)
    assert pages.resident == 3 * page
    pages.release(page, page)
    pages.release(page, page)  # what is not there is let go of already
    assert pages.resident == 2 * page
    write(pages, page, b"x")
    assert pages.resident <= 3 * page
    assert bytes_of(backend, pages, page, page, 100) == b"x" + bytes(99)  # nothing of before
    pages.close()


def test_blocks_are_copied_between_devices(backend):
    page, count = backend.page, 3 * backend.page // 2
    one, other = (backend.pages(device, "test", 4 * page, [0, 2 * page]) for device in (0, 1))
    data = bytes(range(251)) * (count // 251)
    write(one, 2 * page, data)
    assert other.copy(0, one, 2 * page, len(data)) == len(data)
    one.close()  # a copy, not the same
    assert bytes_of(backend, other, 0, 2 * page, len(data)) == data
    other.close()


def test_a_file_that_is_too_short(backend, pages, tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    with open(tmp_path / "short", "rb") as file:
        assert pages.read(10, file.fileno(), 1, 2) == 2
        assert bytes_of(backend, pages, 0, backend.page, 12)[10:] == b"bc"
        with pytest.raises(EOFError, match="1 bytes are missing at 3"):
            pages.read(0, file.fileno(), 0, 4)


def test_copying_where_nothing_can_be_mapped():
    pages = Pages("test", 4 * PAGE)
    fill(HOST, pages, 4)
    part = Range(2, PAGE, copies=True)
    assert part.remap(pages, [2 * PAGE, 0]) == (2, 0)
    assert part.remap(pages, [2 * PAGE, PAGE]) == (1, 1)
    assert seen(part, 2 * PAGE)[::PAGE] == bytes([3, 2])
    part.close()
    pages.close()


def test_moving_bytes_that_are_not_there(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    pages = Pages("test", PAGE)
    with open(tmp_path / "short", "rb") as file:
        assert move_bytes(pages.fd, 10, file.fileno(), 1, 2) == 2
        assert os.pread(pages.fd, 2, 10) == b"bc"
        with pytest.raises(EOFError, match="1 bytes are missing at 3"):
            move_bytes(pages.fd, 0, file.fileno(), 0, 4)
    pages.close()


def test_files_travel_with_messages():
    here, there = pair()
    pages = Pages("test", PAGE)
    os.pwrite(pages.fd, b"hello", 0)
    here.send({"number": 1}, [pages.fd])
    message, (fd,) = there.recv()
    assert message == {"number": 1}
    assert os.pread(fd, 5, 0) == b"hello"
    assert not there.poll()
    os.close(fd)
    here.close()
    assert there.poll()
    with pytest.raises(ChannelClosedError):
        there.recv()
    with pytest.raises(ChannelClosedError):
        there.send(1)
    there.close()
    pages.close()


def test_layout_says_what_padding_costs(folder):
    layout = layout_of(folder)
    assert layout.num_experts == (6, 6)
    assert layout.expert_bytes == (5 * PAGE, 5 * PAGE)  # 3 pages of w13, and 1.5 of w2 that take 2
    assert layout.padding == 12 * PAGE // 2
    assert layout.expert_total == 12 * 5 * PAGE


def test_layout_refuses_what_cannot_be_spread(tmp_path):
    save_model(tmp_path / "dense", Decoder.Config(num_layers=1, dim=32).build())
    with pytest.raises(ConfigError, match="has no experts"):
        layout_of(tmp_path / "dense")
    with pytest.raises(CheckpointError):
        layout_of(tmp_path / "nothing")


def test_nothing_is_read_twice(host, layout):
    host.load(place(6, 2, (0, 1, 2)))
    read = host.usage()["read"]
    sizes = {entry.name: entry.bytes for entry in layout.dense}
    sizes |= {matrix.name: matrix.bytes * matrix.experts for layer in layout.layers for matrix in layer}
    assert read == sizes
    assert host.moved["p2p"] == 2 * layout.dense_bytes


def expert_bytes_of(model, layer: int, expert: int) -> list[bytes]:
    pool = model.blocks[layer].feed_forward.experts
    return [pool.w13[expert].detach().numpy().tobytes(), pool.w2[expert].detach().numpy().tobytes()]


def check_experts(host, model) -> None:
    for device in host.devices.values():
        for layer, matrices in enumerate(host.layout.layers):
            arena = ExpertArena(matrices, backend=host.backend, device=device.number)
            arena.remap(device.experts, host.placement.of(layer, device.number))
            tensors = arena.tensors()
            for slot, expert in enumerate(arena.experts):
                assert [t[slot].cpu().numpy().tobytes() for t in tensors] == expert_bytes_of(model, layer, expert)
            for part in arena.ranges:  # one contiguous run, whatever the blocks are
                assert part.block % host.backend.page == part.address % host.backend.page == 0
            del tensors
            arena.close()


@pytest.mark.parametrize("changes", [[(0, 1, 2), (2,), (2, 5, 6, 7), (0, 5)], [(0, 1), (0, 1, 2, 3, 4), (0,)]])
def test_experts_after_any_change_are_those_of_the_model(host, layout, folder, kv_at_once, changes):
    model, _ = load_model(folder)
    host.load(place(6, 2, changes[0]))
    check_experts(host, model)
    for devices in changes[1:]:
        plan = plan_scale(host.placement, devices, expert_bytes=layout.expert_bytes, shard_bytes=layout.dense_bytes)
        before, new = host.resident, set(devices) - set(host.placement.devices)
        moved = host.prepare(plan)
        assert moved["disk"] == 0
        assert host.resident <= before + plan.bytes["p2p"] + len(new) * kv_at_once  # what was, and what came in
        host.commit()
        assert host.resident == len(devices) * (layout.dense_bytes + kv_at_once) + layout.expert_total
        check_experts(host, model)


def test_dropping_a_plan_restores_everything(host, layout, folder):
    model, _ = load_model(folder)
    host.load(place(6, 2, (0, 1)))
    before = host.resident
    for devices in ((0, 1, 2), (1,), (3,)):
        host.prepare(plan_scale(host.placement, devices, expert_bytes=layout.expert_bytes))
        host.drop()
        assert host.resident == before
        assert sorted(host.devices) == [0, 1]
        check_experts(host, model)


def test_lost_devices_come_back_from_disk(host, layout, folder):
    model, _ = load_model(folder)
    host.load(place(6, 2, (0, 1)))
    plan = plan_scale(
        host.placement, (0, 2), expert_bytes=layout.expert_bytes, lost=(1,), shard_bytes=layout.dense_bytes
    )
    moved = host.prepare(plan)
    assert moved["disk"] == sum(m.bytes * 3 for layer in layout.layers for m in layer)
    host.commit()
    check_experts(host, model)


@pytest.mark.parametrize("changes", [[(0, 1, 2), (2,), (2, 5, 6, 7), (0, 5)], [(0, 1), (0, 1, 2, 3, 4), (0,)]])
def test_shared_weights_are_there_once_whatever_changes(shared, layout, folder, kv_at_once, changes):
    model, _ = load_model(folder)
    shared.load(place(6, 2, changes[0]))
    once = layout.dense_bytes + layout.expert_total
    assert weights(shared, kv_at_once) == once
    for devices in changes[1:]:
        plan = plan_scale(shared.placement, devices, expert_bytes=layout.expert_bytes, shard_bytes=layout.dense_bytes)
        moved = shared.prepare(plan)
        assert (moved["p2p"], moved["disk"]) == (0, 0)
        assert moved["zero_copy"] == layout.expert_total + len(plan.attention) * layout.dense_bytes
        assert weights(shared, kv_at_once) == once
        shared.drop()
        check_experts(shared, model)
        shared.prepare(plan)
        shared.commit()
        assert weights(shared, kv_at_once) == once
        usage = shared.usage()
        assert sum(usage["shared"].values()) == once
        assert usage["resident"] == once + len(devices) * kv_at_once
        check_experts(shared, model)


def weights(host, kv_at_once) -> int:
    return host.resident - len(host.devices) * kv_at_once


def test_caches_are_not_shared(shared, layout, backend, kv_bytes, kv_at_once):
    shared.load(place(6, 2, (0, 1)))
    before, page = shared.resident, backend.page
    write(shared.devices[0].kv, 0, b"x" * page)
    assert shared.resident - before == (0 if kv_at_once else page)
    assert bytes_of(backend, shared.devices[1].kv, 0, kv_bytes, 1) == b"\0"
    before = shared.resident
    plan = plan_scale(shared.placement, (1,), expert_bytes=layout.expert_bytes)
    shared.prepare(plan)
    assert shared.commit() == (kv_at_once or page)  # the cache of the device that left
    assert shared.resident == before - (kv_at_once or page)


def test_a_lost_device_takes_no_shared_weights_with_it(shared, layout, folder):
    model, _ = load_model(folder)
    shared.load(place(6, 2, (0, 1)))
    plan = plan_scale(shared.placement, (0, 2), expert_bytes=layout.expert_bytes, lost=(1,))
    assert shared.prepare(plan)["disk"] == 0
    shared.commit()
    check_experts(shared, model)


def test_shared_weights_are_not_read_over(shared, layout):
    shared.load(place(6, 2, (0, 1)))
    plan = plan_scale(shared.placement, (0,), expert_bytes=layout.expert_bytes)
    with pytest.raises(RuntimeError, match="in use"):
        shared.prepare(plan, from_disk=True)
    assert shared.plan is None
    with pytest.raises(ConfigError, match="p2p is false; that needs weights='own'"):
        ElasticConfig(model="x", p2p=False)


def test_a_failed_copy_leaves_the_old_placement(host, layout, tmp_path):
    host.load(place(6, 2, (0, 1)))
    before = host.resident
    host.disk = Disk(replace(layout, folder=str(tmp_path)))
    plan = plan_scale(host.placement, (0, 1, 2), expert_bytes=layout.expert_bytes)
    with pytest.raises(CheckpointError, match="cannot read"):
        host.prepare(plan, from_disk=True)
    assert host.resident == before
    assert host.plan is None


def test_a_process_that_attaches_sees_the_model(memory, layout, backend):
    memory.load(place(6, 2, (0, 1)))
    model, _ = load_model(layout.folder)
    channel = Channel.of_fd(memory.connect())
    attached = attach(channel, 1, backend=backend)
    dense = DenseArena(attached)
    empty = build_empty(moe_config())
    dense.give_to(empty)
    assert empty.blocks[0].feed_forward.experts.w13.is_meta
    for name, value in model.state_dict().items():
        if "experts" not in name:
            assert torch.equal(empty.state_dict()[name].cpu(), value), name
    arena = ExpertArena(layout.layers[1], backend=backend, device=1)
    arena.remap(attached.experts, attached.placement.of(1, 1))
    w13, w2 = arena.tensors()
    assert w13.is_contiguous() == (backend.page == PAGE)
    assert not w2.is_contiguous()  # half a page between experts
    assert torch.equal(w13.cpu(), model.blocks[1].feed_forward.experts.w13[3:])
    assert torch.equal(w2.cpu(), model.blocks[1].feed_forward.experts.w2[3:])
    beside = attach(channel, 1, only=("kv",), backend=backend, device_here=0)
    kv = [KvArena(attached), KvArena(beside)]
    one, other = (part.buffers((2, 8), torch.float32) for part in kv)
    one[1][1, 7] = 5.0
    assert other[1][1, 7] == 5.0
    with pytest.raises(RuntimeError, match="device 7 has no memory"):
        attach(channel, 7, backend=backend)
    attached.close()  # what is mapped stays mapped
    beside.close()
    assert torch.equal(w2.cpu(), model.blocks[1].feed_forward.experts.w2[3:])
    assert other[1][1, 7] == 5.0
    channel.close()
    del empty, w13, w2, one, other
    for part in (dense, arena, *kv):
        part.close()


def test_attaching_leaves_no_files_behind(memory, backend):
    memory.load(place(6, 2, (0, 1)))
    channel = Channel.of_fd(memory.connect())

    def files() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (memory.process.pid, os.getpid())]

    counts = []
    for _ in range(3):
        attach(channel, 0, backend=backend).close()
        channel.ask(("usage", {}))  # answered by the thread that sent the files, when it has closed them
        counts.append(files())
    assert counts[0] == counts[1] == counts[2]
    channel.close()


def test_the_manager_ends_with_its_owner(memory):
    memory.load(place(6, 2, (0,)))
    assert memory.usage()["devices"][0]["dense"] > 0
    memory.close()
    assert not memory.process.is_alive
    with pytest.raises(ChannelClosedError):
        memory.usage()

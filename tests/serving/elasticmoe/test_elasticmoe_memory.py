"""The memory manager, and tensors over its pages: bytes, addresses, physical pages, and what is resident."""

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
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.devices import Disk, Host
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.mapped import PAGE, Pages, Range, move_bytes
from anabranch.serving.elasticmoe.memory import MemoryManager, attach
from anabranch.serving.elasticmoe.plan import place, plan_scale
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError, pair
from elastic_models import moe_config

KV = 4 * PAGE


@pytest.fixture(scope="module")
def layout(folder):
    return layout_of(folder)


@pytest.fixture
def host(layout):
    host = Host(layout, KV)
    yield host
    host.close()


@pytest.fixture
def shared(layout):
    host = Host(layout, KV, shares=True)
    yield host
    host.close()


@pytest.fixture
def memory(layout):
    manager = MemoryManager.start(layout, KV)
    yield manager
    manager.close()


def physical_pages(address: int, size: int) -> list[int]:
    """Page frame numbers of mapped memory; zeros without the privilege to see them."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        entries = struct.unpack(f"<{size // PAGE}Q", file.read(size // PAGE * 8))
    return [entry & ((1 << 55) - 1) for entry in entries]


def filled(pages: Pages, count: int) -> None:
    for number in range(count):
        os.pwrite(pages.fd, bytes([number + 1]) * PAGE, number * PAGE)


def test_a_range_maps_blocks_side_by_side():
    pages, part = Pages("test", 8 * PAGE), Range(4, PAGE)
    filled(pages, 8)
    assert part.remap(pages.fd, [5 * PAGE, 0, PAGE]) == (3, 0)
    assert bytes(part.buffer(3 * PAGE))[::PAGE] == bytes([6, 1, 2])
    assert part.remap(pages.fd, [5 * PAGE, 7 * PAGE, PAGE, 2 * PAGE]) == (2, 2)
    assert bytes(part.buffer(4 * PAGE))[::PAGE] == bytes([6, 8, 2, 3])
    os.pwrite(pages.fd, b"\x63", 7 * PAGE)
    assert bytes(part.buffer(2 * PAGE))[PAGE] == 0x63  # mapped, not copied
    assert part.remap(pages.fd, [5 * PAGE]) == (0, 1)
    part.close()
    pages.close()


def test_survivors_keep_their_physical_pages():
    pages, part = Pages("test", 8 * PAGE), Range(3, PAGE)
    filled(pages, 8)
    part.remap(pages.fd, [0, 3 * PAGE, 6 * PAGE])
    bytes(part.buffer(3 * PAGE))  # touch them
    before = physical_pages(part.address, 3 * PAGE)
    part.remap(pages.fd, [0, 4 * PAGE, 6 * PAGE])
    bytes(part.buffer(3 * PAGE))
    after = physical_pages(part.address, 3 * PAGE)
    assert (before[0], before[2]) == (after[0], after[2])
    if any(before):  # page numbers are shown to the privileged alone
        assert before[1] != after[1]
    assert part.where[2][1] == 6 * PAGE
    part.close()
    pages.close()


def test_pages_exist_only_once_written_and_go_when_released():
    pages = Pages("test", 1000 * PAGE)
    assert pages.resident == 0
    filled(pages, 3)
    assert pages.resident == 3 * PAGE
    pages.release(PAGE, PAGE)
    assert pages.resident == 2 * PAGE
    assert os.pread(pages.fd, 1, PAGE) == b"\0"
    pages.close()


def test_copying_where_nothing_can_be_mapped():
    pages = Pages("test", 4 * PAGE)
    filled(pages, 4)
    part = Range(2, PAGE, copies=True)
    assert part.remap(pages.fd, [2 * PAGE, 0]) == (2, 0)
    assert part.remap(pages.fd, [2 * PAGE, PAGE]) == (1, 1)
    assert bytes(part.buffer(2 * PAGE))[::PAGE] == bytes([3, 2])
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


def test_layout_says_what_padding_costs(layout):
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
        attached = type("Attached", (), {"experts": device.experts.fd})
        for layer, matrices in enumerate(host.layout.layers):
            arena = ExpertArena(matrices)
            arena.remap(attached.experts, host.placement.of(layer, device.number))
            tensors = arena.tensors()
            for slot, expert in enumerate(arena.experts):
                assert [t[slot].numpy().tobytes() for t in tensors] == expert_bytes_of(model, layer, expert)
            del tensors
            arena.close()


@pytest.mark.parametrize("changes", [[(0, 1, 2), (2,), (2, 5, 6, 7), (0, 5)], [(0, 1), (0, 1, 2, 3, 4), (0,)]])
def test_experts_after_any_change_are_those_of_the_model(host, layout, folder, changes):
    model, _ = load_model(folder)
    host.load(place(6, 2, changes[0]))
    check_experts(host, model)
    for devices in changes[1:]:
        plan = plan_scale(host.placement, devices, expert_bytes=layout.expert_bytes, shard_bytes=layout.dense_bytes)
        before = host.resident
        moved = host.prepare(plan)
        assert moved["disk"] == 0
        assert host.resident <= before + plan.bytes["p2p"]  # what was, and what came in; the cache is not touched
        host.commit()
        assert host.resident == len(devices) * layout.dense_bytes + layout.expert_total
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
def test_shared_weights_are_there_once_whatever_changes(shared, layout, folder, changes):
    model, _ = load_model(folder)
    shared.load(place(6, 2, changes[0]))
    once = layout.dense_bytes + layout.expert_total
    assert shared.resident == once
    for devices in changes[1:]:
        plan = plan_scale(shared.placement, devices, expert_bytes=layout.expert_bytes, shard_bytes=layout.dense_bytes)
        moved = shared.prepare(plan)
        assert (moved["p2p"], moved["disk"]) == (0, 0)
        assert moved["zero_copy"] == layout.expert_total + len(plan.attention) * layout.dense_bytes
        assert shared.resident == once
        shared.drop()
        check_experts(shared, model)
        shared.prepare(plan)
        shared.commit()
        assert shared.resident == once
        assert shared.usage()["resident"] == sum(shared.usage()["shared"].values()) == once
        check_experts(shared, model)


def test_caches_are_not_shared(shared, layout):
    shared.load(place(6, 2, (0, 1)))
    before = shared.resident
    os.pwrite(shared.devices[0].kv.fd, b"x" * PAGE, 0)
    assert os.pread(shared.devices[1].kv.fd, 1, 0) == b"\0"
    assert shared.resident == before + PAGE
    plan = plan_scale(shared.placement, (1,), expert_bytes=layout.expert_bytes)
    shared.prepare(plan)
    assert shared.commit() == PAGE  # the cache of the device that left
    assert shared.resident == before


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


def test_a_process_that_attaches_sees_the_model(memory, layout):
    memory.load(place(6, 2, (0, 1)))
    model, _ = load_model(layout.folder)
    channel = Channel.of_fd(memory.connect())
    attached = attach(channel, 1)
    dense = DenseArena(attached)
    empty = build_empty(moe_config())
    dense.give_to(empty)
    assert empty.blocks[0].feed_forward.experts.w13.is_meta
    for name, value in model.state_dict().items():
        if "experts" not in name:
            assert torch.equal(empty.state_dict()[name], value), name
    arena = ExpertArena(layout.layers[1])
    arena.remap(attached.experts, attached.placement.of(1, 1))
    w13, w2 = arena.tensors()
    assert w13.is_contiguous()
    assert not w2.is_contiguous()  # half a page between experts
    assert torch.equal(w2, model.blocks[1].feed_forward.experts.w2[3:])
    kv = [KvArena(attached), KvArena(attached)]
    one, other = (part.buffers((2, 8), torch.float32) for part in kv)
    one[1][1, 7] = 5.0
    assert other[1][1, 7] == 5.0
    with pytest.raises(RuntimeError, match="device 7 has no memory"):
        attach(channel, 7)
    channel.close()
    attached.close()


def test_the_manager_ends_with_its_owner(memory):
    memory.load(place(6, 2, (0,)))
    assert memory.usage()["devices"][0]["dense"] > 0
    memory.close()
    assert not memory.process.is_alive
    with pytest.raises(ChannelClosedError):
        memory.usage()

"""Plans of a change of devices: a case by hand, and what must hold for any."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import CapacityError, InputError
from anabranch.serving.elasticmoe.plan import check_memory, place, plan_scale

MIB = 1 << 20


def test_twelve_experts_from_four_devices_to_six():
    """Each of 4 devices has 3, the quota becomes 2, so each gives one: 4 moves a layer."""
    old = place(12, 1, (0, 1, 2, 3))
    assert old.experts == (((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)),)
    plan = plan_scale(old, range(6), expert_bytes=(MIB,), shard_bytes=10)
    assert plan.new.experts == (((0, 1), (3, 4), (6, 7), (9, 10), (2, 5), (8, 11)),)
    assert plan.moves == 4
    assert [(copy.source, copy.target, copy.expert) for copy in plan.copy] == [
        (0, 4, 2),
        (1, 4, 5),
        (2, 5, 8),
        (3, 5, 11),
    ]
    assert plan.drop == ((0, 0, 2), (1, 0, 5), (2, 0, 8), (3, 0, 11))
    assert plan.bytes == {"p2p": 4 * MIB + 20, "disk": 0}
    assert plan.kv_keep == (0, 1, 2, 3)
    assert plan.kv_new == (4, 5)
    assert plan.map[(4, 0)] == (2, 5)
    assert "8 of 12 stay, 4 move" in str(plan)
    assert "layer 0 expert 2: device 0 -> device 4" in str(plan)


def test_the_coldest_experts_move():
    old = place(4, 1, (0,))
    plan = plan_scale(old, (0, 1), expert_bytes=(1,), heat={(0, 0): 1.0, (0, 1): 9.0, (0, 2): 0.5, (0, 3): 7.0})
    assert plan.new.experts == (((1, 3), (0, 2)),)


def test_a_lost_device_is_read_from_disk_again():
    old = place(6, 2, (0, 1, 2))
    plan = plan_scale(old, (0, 2), expert_bytes=(5, 7), shard_bytes=3, lost=(1,))
    assert {copy.source for copy in plan.copy} == {None}
    assert {(copy.layer, copy.expert) for copy in plan.copy} == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert plan.bytes == {"p2p": 0, "disk": 24}
    assert "lost device 1" in str(plan)


def test_a_plan_over_shared_weights_copies_nothing():
    old = place(6, 2, (0, 1, 2))
    plan = replace(plan_scale(old, (0, 2), expert_bytes=(5, 7), shard_bytes=3, lost=(1,)), shared=True)
    assert plan.moves == 4
    assert plan.bytes == {"p2p": 0, "disk": 0}
    assert "0 between devices, 0 from disk, for devices share their weights" in str(plan)
    assert "layer 0 expert 2: lost -> device 0" in str(plan)


def test_larger_quotas_take_turns():
    """5 experts over 4 devices in 8 layers: 40 in all, 10 on each device."""
    placement = place(5, 8, (0, 1, 2, 3))
    totals = [sum(len(row[rank]) for row in placement.experts) for rank in range(4)]
    assert totals == [10, 10, 10, 10]


def test_tensor_parallel_ranks_are_kept():
    old = place(8, 1, (0, 1, 2, 3), tp=2)
    plan = plan_scale(old, range(6), expert_bytes=(1,), shard_bytes=100)
    assert [(copy.target, copy.source) for copy in plan.attention] == [(4, 0), (5, 1)]
    assert plan.new.shard(5) == 1
    with pytest.raises(InputError, match="not a multiple of the tensor parallel degree 2"):
        plan_scale(old, range(5), expert_bytes=(1,))
    with pytest.raises(InputError, match="device 1 holds part 1 of the attention; it cannot become part 0"):
        plan_scale(old, (1, 0), expert_bytes=(1,))


def test_refusals():
    old = place(4, 1, (0, 1))
    for devices, message in (((), "devices is empty"), ((0, 0), "each may be there once")):
        with pytest.raises(InputError, match=message):
            plan_scale(old, devices, expert_bytes=(1,))
    with pytest.raises(InputError, match="which is lost"):
        plan_scale(old, (0, 1), expert_bytes=(1,), lost=(1,))
    for lost, named in (((7,), "7"), ((0, 2), "2"), ((10**400,), "an integer of about 40. digits"), ((-1,), "-1")):
        with pytest.raises(InputError, match=rf"^lost has device {named}; the group has devices 0, 1$"):
            plan_scale(old, (1,), expert_bytes=(1,), lost=lost)
    with pytest.raises(InputError, match="expert_bytes has 2 layers"):
        plan_scale(old, (0, 1), expert_bytes=(1, 1))


def test_too_little_memory_is_refused_with_the_sum():
    old = place(4, 1, (0, 1))
    plan = plan_scale(old, (0,), expert_bytes=(100,), shard_bytes=10)
    sizes = {"expert_bytes": (100,), "shard_bytes": 10, "kv_bytes": 5}
    assert check_memory(plan, capacity_bytes=415, **sizes) == {0: 415}
    with pytest.raises(CapacityError, match="device 0 would need 415 bytes"):
        check_memory(plan, capacity_bytes=414, **sizes)


def test_a_device_that_is_lost_twice_is_lost_once():
    old = place(4, 1, (0, 1, 2))
    once, thrice = (plan_scale(old, (1,), expert_bytes=(1,), lost=lost) for lost in ((0, 2), (0, 2, 0, 0)))
    assert once == thrice
    assert once.lost == (0, 2)


@st.composite
def changes(draw):
    old = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
    new = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
    lost = [device for device in old if device not in new and draw(st.booleans())]
    history = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True), max_size=3))
    return draw(st.integers(1, 20)), draw(st.integers(1, 3)), old, history, new, lost


@given(changes())
def test_invariants(change):
    num_experts, layers, old_devices, history, new_devices, lost = change
    sizes = tuple(range(1, layers + 1))
    old = place(num_experts, layers, old_devices)
    for devices in (*history, old_devices):  # slots in disorder, as after several changes
        old = plan_scale(old, devices, expert_bytes=sizes).new
    plan = plan_scale(old, new_devices, expert_bytes=sizes, shard_bytes=50, lost=lost)
    for layer in range(layers):
        loads = [len(held) for held in plan.new.experts[layer]]
        assert sorted(expert for held in plan.new.experts[layer] for expert in held) == list(range(num_experts))
        assert max(loads) - min(loads) <= 1
        low, larger = divmod(num_experts, len(new_devices))
        have = sorted((len(old.of(layer, device)) for device in new_devices), reverse=True)
        quota = [low + (number < larger) for number in range(len(new_devices))]
        here = sum(have)  # what no survivor holds must come in any case, what is over a quota must move
        bound = num_experts - here + sum(max(0, h - q) for h, q in zip(have, quota, strict=True))
        assert sum(copy.layer == layer for copy in plan.copy) == bound
        assert set(plan.new.owners(layer)) == set(range(num_experts))
    arriving = {(copy.target, copy.layer, copy.expert) for copy in plan.copy}
    assert not arriving & set(plan.keep)
    assert len(arriving) + len(plan.keep) == num_experts * layers
    for copy in plan.copy:
        assert copy.source is None or copy.expert in old.of(copy.layer, copy.source)
        assert (copy.source is None) == (copy.expert in {e for d in lost for e in old.of(copy.layer, d)})
    added = set(new_devices) - set(old_devices)
    assert {copy.target for copy in plan.attention} == added
    assert sum(copy.bytes for copy in plan.attention) == 50 * len(added)
    back = plan.inverse()
    assert back.new == old
    assert back.old == plan.new

"""Plans: layers with costs on ranks."""

import pytest

from anabranch.cluster import LayerCost, plan
from anabranch.errors import InputError

LAYERS = [LayerCost(name=f"layer {n}", flops=1e9, parameters=100, output_bytes=1e6, saved_bytes=8e6) for n in range(8)]


def test_by_hand():
    made = plan(LAYERS, ranks=4, micro_batches=8, flops_s=1e12, checkpoint="never")
    # Two layers of 1 ms forward and 2 ms backward each; (8 + 3) of them.
    assert made.timeline.step_s == pytest.approx(11 * 2 * 3e-3)
    assert made.one_rank_s == pytest.approx(8 * 8 * 3e-3)
    assert made.speedup == pytest.approx(8 * 4 / 11)
    assert made.partition.balance == (2, 2, 2, 2)
    # All eight micro-batches are held.
    assert made.activation_bytes_K == (128e6,) * 4
    assert made.to_dict()["ranks"][1]["layers"] == [[2, 3]]


def test_recomputation_and_1f1b_hold_less():
    always = plan(LAYERS, ranks=4, micro_batches=8, flops_s=1e12, checkpoint="always")
    # The first rank's input is data; the second holds 8 inputs, and one micro-batch's layers in place of one of them.
    assert always.activation_bytes_K[:2] == (16e6, 7e6 + 16e6)
    flushed = plan(LAYERS, ranks=4, micro_batches=8, flops_s=1e12, checkpoint="never", schedule_name="1f1b")
    assert flushed.activation_bytes_K == (64e6, 48e6, 32e6, 16e6)
    assert flushed.timeline.step_s == pytest.approx(11 * 2 * 3e-3)


def test_groups_links_and_memory_count():
    assert plan(LAYERS, ranks=2, flops_s=1e12, uncut=[range(7)]).partition.balance == (7, 1)
    assert plan(LAYERS, ranks=2, flops_s=1e12).schedule.num_micro_batches == 8
    even = {"ranks": 2, "micro_batches": 4, "flops_s": 1e12, "balance": [4, 4], "checkpoint": "never"}
    free = plan(LAYERS, **even)
    paid = plan(LAYERS, **even, bytes_s=1e9, latency_s=1e-3)
    assert paid.timeline.step_s == pytest.approx(free.timeline.step_s + 2 * 2e-3)
    with pytest.raises(InputError, match="do not hold them"):
        plan(LAYERS, ranks=2, flops_s=1e12, cap_bytes=3 * 1600)
    twice = plan(LAYERS, ranks=2, micro_batches=4, flops_s=1e12, schedule_name="interleaved")
    assert twice.chunks_of(1) == [range(2, 4), range(6, 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 9}, "8 layers cannot be 9 chunks"),
        ({"ranks": 8, "schedule_name": "interleaved"}, "16 chunks"),
        ({"ranks": 2, "flops_s": 0.0}, "flops_s is 0.0"),
        ({"ranks": 2, "bytes_s": -1.0}, "bytes_s is -1.0"),
        ({"ranks": 2, "checkpoint": "x"}, "checkpoint is 'x'"),
        ({"ranks": 2, "balance": [3, 3]}, "sums to 6"),
        ({"ranks": 3, "balance": [4, 4]}, "balance has 2 entries"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        plan(LAYERS, **{"flops_s": 1e12, **options})

"""Gradients over ranks: means, what has no part in a step, and sums in pairs, whose order is that of the ranks' tree."""

import pipes

import pytest
import torch

from anabranch.cluster.gradients import is_power_of_two
from anabranch.testing import RankError, run_ranks


@pytest.mark.parametrize("most", [None, 20], ids=["one message", "several messages"])
@pytest.mark.parametrize("in_pairs", [False, True])
def test_gradients_are_means_and_what_has_none_keeps_none(in_pairs, most):
    found = run_ranks(pipes.averaged, 4, in_pairs, most)
    before = found[0][0]
    for _, after in found:
        assert after["none"] is None
        assert after["fixed"] is None
        for name in ("all", "one", "half", "turned", "sparse", "sparse on some"):
            given = [torch.zeros_like(after[name]) if rank[name] is None else rank[name] for rank in before]
            pairs = ((given[0] + given[1]) + (given[2] + given[3])) / 4
            if in_pairs:
                assert torch.equal(after[name], pairs), name
            else:
                torch.testing.assert_close(after[name], pairs, rtol=2e-2 if name == "half" else 1e-6, atol=1e-6)
            # All ranks have the same bits.
            assert torch.equal(after[name], found[0][1][name])


def test_sums_in_pairs_want_a_power_of_two():
    with pytest.raises(RankError, match="there are 3 ranks, and sums in pairs are of 1, 2, 4, 8"):
        run_ranks(pipes.averaged, 3, True)
    assert [number for number in range(-1, 18) if is_power_of_two(number)] == [1, 2, 4, 8, 16]

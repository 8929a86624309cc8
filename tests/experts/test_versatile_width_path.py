"""The width path: virtual experts are slices of one feed-forward, cut out or masked."""

import pytest
import torch

from anabranch.experts.versatile import VersatileFFN
from anabranch.nn import BuildContext
from anabranch.routing import Routing


def path_of(**changes):
    config = VersatileFFN.Config(**{"hidden_dim": 8, "num_experts": 4, "max_loops": 2, **changes})
    layer = config.build(BuildContext(4, init_std=0.5, generator=torch.Generator().manual_seed(0)))
    return layer.paths, layer.branch(torch.nn.Identity())


def choices(index, weight):
    return Routing(torch.tensor(index), torch.tensor(weight), torch.zeros(len(index), 4))


def test_a_hidden_unit_has_the_gates_of_its_owners():
    """Experts of two units each; overlapping ones of four begin at 0, 1, 2, 4 and share units."""
    path, _ = path_of()
    gate = path.gate_NF(choices([[0, 2], [3, -1]], [[0.25, 0.75], [0.5, 0.0]]), torch.float32)
    assert gate.tolist() == [[0.25, 0.25, 0, 0, 0.75, 0.75, 0, 0], [0, 0, 0, 0, 0, 0, 0.5, 0.5]]
    path, _ = path_of(expert_dim=4, overlap=True)
    assert path.starts == (0, 1, 2, 4)
    gate = path.gate_NF(choices([[0, 1]], [[0.25, 0.5]]), torch.float32)
    assert gate.tolist() == [[0.25, 0.75, 0.75, 0.75, 0.5, 0, 0, 0]]


def test_gates_are_not_rounded_by_autocast():
    """1 + 2^-9 is 1 in bfloat16: a product in half precision would lose it before the sum."""
    path, _ = path_of(expert_dim=4, overlap=True)
    width = choices([[0, 1]], [[1 + 2.0**-9, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert path.gate_NF(width, torch.float32)[0, 1] == 2 + 2.0**-9
        assert path.gate_NF(width, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes", [{}, {"expert_dim": 3, "overlap": True}, {"slices": "contiguous"}, {"activation": "gelu"}]
)
def test_stacked_experts_are_slices_of_the_matrices(changes):
    path, branch = path_of(**changes)
    w13_ESD, w2_EDS = path.stacked(branch)
    *inputs, down_DF = branch.weights()
    for expert, start in enumerate(path.starts):
        units = slice(start, start + path.width)
        assert torch.equal(w13_ESD[expert], torch.cat([weight[units] for weight in inputs]))
        assert torch.equal(w2_EDS[expert], down_DF[:, units])


@pytest.mark.parametrize("changes", [{}, {"expert_dim": 3, "overlap": True}, {"activation": "gelu"}])
def test_cut_out_and_masked_give_the_same(changes):
    width = choices([[0, 2], [3, -1], [1, 0]], [[0.25, 0.75], [0.5, 0.0], [0.5, 0.5]])
    x_ND = torch.randn(3, 4)
    found = []
    for compute in ("masked", "grouped"):
        path, branch = path_of(width_compute=compute, **changes)
        assert path.is_grouped(branch) is (compute == "grouped")
        found.append(path.width_change(x_ND, branch, width))
    torch.testing.assert_close(*found)


def test_flops_of_the_chosen_experts_alone():
    path, branch = path_of()
    assert path.grouped_flops(branch) == 2 * 4 * 2 * 2 * 3  # D, d_e, K and three matrices

"""Slices with the optimizer's state, and snapshots of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from anabranch.cluster.elastic.state import Slice, State, check_layers, flat_of, gradient_of, install, snapshot_of
from anabranch.errors import ConfigError, InputError


def flats(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def slices_of(seed=0):
    (value, moment) = flats(2, 20, seed)
    step = {"step": torch.tensor(3.0)}
    return {2: Slice(5, 25, {"param": value, "exp_avg": moment}, step), 4: Slice(0, 0, {"param": torch.empty(0)})}


def test_a_snapshot_is_a_copy_and_comes_back():
    slices = slices_of()
    snapshot = snapshot_of(slices, 7)
    want = slices[2].tensors["param"].clone()
    # The tensors that live go on.
    slices[2].tensors["param"].add_(1)
    found = snapshot.slices()
    assert torch.equal(found[2].tensors["param"], want)
    assert found[2].scalars["step"].item() == 3
    assert (found[2].first, found[2].end, found[4].end) == (5, 25, 0)
    assert State({}, found).digest() != State({}, slices).digest()


def test_a_damaged_snapshot_is_seen_wherever_it_is_damaged():
    snapshot = snapshot_of(slices_of(), 7)
    for place in range(0, len(snapshot.body), 7):
        wrong = bytearray(snapshot.body)
        wrong[place] ^= 1
        with pytest.raises(InputError, match="another checksum"):
            replace(snapshot, body=bytes(wrong)).slices()
    for wrong in (
        replace(snapshot, version=8),
        replace(snapshot, body=snapshot.body[:-1]),
        replace(snapshot, body=snapshot.body + b"x"),
        replace(snapshot, layers=snapshot.layers[:1]),
        replace(snapshot, layers=((2, [5, 25, ["param"], []], [["float99", [20]]]),)),
        replace(snapshot, layers=((3, *snapshot.layers[0][1:]), snapshot.layers[1])),
    ):
        with pytest.raises((InputError, AttributeError)):
            wrong.slices()


def test_pieces_that_do_not_fit_are_refused():
    one = slices_of()[2]
    for pieces, said in [
        ([one.piece(5, 10), one.piece(11, 25)], "do not fit together at 10"),
        ([one.piece(5, 10)], "those from 10 on are missing"),
        ([one.piece(5, 10), Slice(10, 25, one.piece(10, 25).tensors, {"step": torch.tensor(4.0)})], "different steps"),
        ([one.piece(5, 10), Slice(10, 25, {"param": torch.zeros(15)}, one.scalars)], "do not fit"),
    ]:
        with pytest.raises(InputError, match=said):
            Slice.joined(5, 25, pieces)
    with pytest.raises(InputError, match="4 to 6 are asked for"):
        one.piece(4, 6)


def test_a_layer_is_a_view_of_its_flat():
    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    layer[0].bias.requires_grad_(False)
    flat = flat_of(layer)
    assert len(flat) == 6 + 2
    install(layer, torch.arange(8.0))
    assert layer[0].weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert layer[1].weight.tolist() == [[6, 7]]
    assert len(flat_of(nn.Tanh())) == 0


def test_gradients_of_a_layer_are_flat_whatever_their_layout():
    layer = nn.ModuleList([nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1), nn.Embedding(2, 1, sparse=True)])
    layer[1](layer[0](torch.tensor([2, 0, 2]))).sum().backward()
    assert layer[0].weight.grad.is_sparse
    flat, without = gradient_of(layer)
    (weight,) = layer[1].weight.detach()
    expected = torch.stack([weight, torch.zeros(2), 2 * weight])
    assert torch.allclose(flat[:6].view(3, 2), expected)
    # The last table had no part.
    assert (len(flat), without) == (6 + 3 + 2, {3})
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_layers_that_cannot_move_by_themselves_are_refused():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    for layers, said in [
        ([one, two], "layers 0 and 1 share the parameter 'weight'"),
        ([mixed], "one type a layer"),
        ([nn.Sequential(nn.BatchNorm1d(2))], "running statistics"),
        (
            [nn.Sequential(nn.Embedding(3, 2, max_norm=1.0))],
            "writes into its weights in the forward pass .0 has max_norm",
        ),
        ([], "layers is empty"),
        (["x"], "layer 0 is a str"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_layers(layers)

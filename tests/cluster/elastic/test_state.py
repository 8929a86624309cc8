"""Slices with the optimizer's state, and snapshots of them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from anabranch.cluster.elastic.cuts import bounds
from anabranch.cluster.elastic.state import PARAM, Slice, State, Updater, check_layers, flat_of, install, snapshot_of
from anabranch.errors import ConfigError, InputError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def flats(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("owners", [1, 3])
def test_slices_are_stepped_as_torch_steps_the_whole(name, owners):
    value, *gradients = flats(5, 101)
    parameter = nn.Parameter(value.clone())
    optimizer = OPTIMIZERS[name]([parameter])
    updater = Updater(OPTIMIZERS[name])
    cut = bounds(101, owners)
    slices = [{0: Slice(a, b, {"param": value[a:b]})} for a, b in pairwise(cut)]
    for version, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        optimizer.step()
        before = [dict(one[0].tensors) for one in slices]
        kept = [{key: tensor.clone() for key, tensor in one.items()} for one in before]
        new = [updater.next_slices(one, {0: gradient[one[0].first : one[0].end]}, version) for one in slices]
        # What was there is as it was: a step that is taken back is forgotten.
        assert all(torch.equal(old[key], kept[n][key]) for n, old in enumerate(before) for key in old)
        slices = new
        # Cut in another way in the midst: state goes with its numbers.
        whole = Slice.joined(0, 101, [one[0] for one in slices])
        cut = bounds(101, owners, turn=version)
        slices = [{0: whole.piece(a, b)} for a, b in pairwise(cut)]
    assert torch.equal(Slice.joined(0, 101, [one[0] for one in slices]).tensors["param"], parameter.detach())


@pytest.mark.parametrize("owners", [1, 2, 3])
def test_runs_of_numbers_learn_as_groups_of_torch_do(owners):
    """Numbers 0 to 4 decay, 4 to 10 do not, and 10 to 12 learn at half the rate, wherever the slices are cut."""
    value, *gradients = flats(4, 12)
    runs = [(0, 4, {"weight_decay": 0.5}), (4, 10, {"weight_decay": 0.0}), (10, 12, {"weight_decay": 0.5, "lr": 0.05})]

    def factory(parameters):
        return torch.optim.AdamW(parameters, lr=0.1)

    parts = [nn.Parameter(value[a:b].clone()) for a, b, _ in runs]
    optimizer = factory([{"params": [part], **options} for part, (_, _, options) in zip(parts, runs, strict=True)])
    updater = Updater(factory, groups={7: runs})
    slices = [{7: Slice(a, b, {"param": value[a:b]})} for a, b in pairwise(bounds(12, owners))]
    for version, gradient in enumerate(gradients):
        for part, (a, b, _) in zip(parts, runs, strict=True):
            part.grad = gradient[a:b].clone()
        optimizer.step()
        slices = [updater.next_slices(one, {7: gradient[one[7].first : one[7].end]}, version) for one in slices]
    joined = Slice.joined(0, 12, [one[7] for one in slices])
    assert torch.equal(joined.tensors["param"], torch.cat([part.detach() for part in parts]))
    assert joined.scalars["step"] == 3


def test_the_learning_rate_is_a_function_of_the_step():
    updater = Updater(lambda p: torch.optim.SGD(p, lr=1.0), lambda version: 0.5**version)
    slices = {0: Slice(0, 2, {"param": torch.zeros(2)})}
    for version in range(3):
        slices = updater.next_slices(slices, {0: torch.ones(2)}, version)
    assert slices[0].tensors["param"].tolist() == [-1.75, -1.75]
    assert updater.next_slices({}, {}, 0) == {}


class _Mean(torch.optim.SGD):
    """An optimizer that looks at all numbers together."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= parameter.grad.mean()


class _Square(torch.optim.SGD):
    """An optimizer with a matrix."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["matrix"] = torch.zeros(len(parameter), 2)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda p: _Mean(p, lr=1.0), "does not treat each number by itself"),
        (lambda p: _Square(p, lr=1.0), "keeps 'matrix' of shape"),
        (lambda p: torch.optim.AdamW(p, lr=-1.0), "Invalid learning rate"),
    ],
)
def test_an_optimizer_of_the_whole_is_refused(factory, said):
    with pytest.raises(ConfigError, match=said):
        Updater(factory)


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


def test_a_rate_that_is_a_tensor_stays_what_it_is():
    """It was multiplied in place at each use: by itself, and by how often a step was made again."""
    rate = torch.tensor(0.1)
    made = Updater(lambda parameters: torch.optim.SGD(parameters, lr=rate), lambda version: 0.5)
    plain = Updater(lambda parameters: torch.optim.SGD(parameters, lr=0.1), lambda version: 0.5)
    slices, gradient = {0: Slice(0, 3, {PARAM: torch.ones(3)})}, {0: torch.ones(3)}
    found, expected = (one.next_slices(slices, gradient, 3)[0].tensors[PARAM] for one in (made, plain))
    assert torch.allclose(found, expected)
    assert float(rate) == pytest.approx(0.1)

"""Steps of an optimizer on slices: as torch makes them of the whole, and of parameters by themselves."""

import random
from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn

from anabranch.cluster.elastic.cuts import bounds
from anabranch.cluster.elastic.state import HAS_STATE, PARAM, Slice, apart, snapshot_of, together
from anabranch.cluster.elastic.updating import Updater
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


def test_a_rate_that_is_a_tensor_stays_what_it_is():
    """It was multiplied in place at each use: by itself, and by how often a step was made again."""
    rate = torch.tensor(0.1)
    made = Updater(lambda parameters: torch.optim.SGD(parameters, lr=rate), lambda version: 0.5)
    plain = Updater(lambda parameters: torch.optim.SGD(parameters, lr=0.1), lambda version: 0.5)
    slices, gradient = {0: Slice(0, 3, {PARAM: torch.ones(3)})}, {0: torch.ones(3)}
    found, expected = (one.next_slices(slices, gradient, 3)[0].tensors[PARAM] for one in (made, plain))
    assert torch.allclose(found, expected)
    assert float(rate) == pytest.approx(0.1)


NUMBERS = (5, 1, 0, 8, 3)
# None goes to all that learn; the fourth decays otherwise, the last has a rate of its own.
RUNS = [(0, 6, {}), (6, 14, {"weight_decay": 0.5}), (14, 17, {"lr": 0.02})]
MORE = {
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "decays": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
}


def told_and_heard(own):
    """As it comes back from a snapshot."""
    return snapshot_of({0: own}, 3).slices()[0]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *MORE])
@pytest.mark.parametrize("runs", [None, RUNS], ids=["alike", "groups"])
@pytest.mark.parametrize("seed", range(4))
def test_a_parameter_without_a_part_in_a_step_is_left_as_torch_leaves_it(name, runs, seed):
    """Whoever owns which numbers, and however that changes: moments, counts of steps and weights are those of one process."""
    factory = {**OPTIMIZERS, **MORE}[name]
    size, places = sum(NUMBERS), [0, *accumulate(NUMBERS)]
    chance = random.Random(seed)
    value, *gradients = flats(9, size, seed)
    parameters = [nn.Parameter(value[a:b].clone()) for a, b in pairwise(places)]
    options = [next((o for first, end, o in runs or () if first <= a < end), {}) for a in places[:-1]]
    optimizer = factory([{"params": [p], **o} for p, o in zip(parameters, options, strict=True)])
    updater = Updater(factory, groups=None if runs is None else {7: runs}, sizes={7: NUMBERS})
    whole = Slice(0, size, {PARAM: value})
    for version, gradient in enumerate(gradients):
        without = frozenset(n for n in range(len(NUMBERS)) if chance.random() < 0.4)
        for number, (parameter, (a, b)) in enumerate(zip(parameters, pairwise(places), strict=True)):
            parameter.grad = None if number in without else gradient[a:b].clone()
        optimizer.step()
        # What has no part is 0 in the sum, and not looked at.
        summed = torch.cat(
            [torch.zeros(b - a) if n in without else gradient[a:b] for n, (a, b) in enumerate(pairwise(places))]
        )
        cut = bounds(size, chance.randint(1, 6))
        pieces = [
            updater.next_slices({0: whole.piece(a, b)}, {0: summed[a:b]}, version, layers={0: 7}, without={7: without})[
                0
            ]
            for a, b in pairwise(cut)
        ]
        whole = Slice.joined(0, size, [told_and_heard(piece) for piece in pieces])
        assert torch.equal(whole.tensors[PARAM], torch.cat([p.detach() for p in parameters]))
    for part, parameter in zip(apart(whole, NUMBERS), parameters, strict=True):
        state = {
            key: kept for key, kept in optimizer.state.get(parameter, {}).items() if isinstance(kept, torch.Tensor)
        }
        found = {key: kept for key, kept in {**part.tensors, **part.scalars}.items() if key != PARAM}
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], kept) for key, kept in state.items())
    again = together(0, size, apart(whole, NUMBERS))
    assert again.told()[0] == whole.told()[0]
    assert all(torch.equal(a, b) for a, b in zip(again.told()[1], whole.told()[1], strict=True))


def test_scalars_are_one_number_while_all_have_made_the_same_steps():
    updater = Updater(torch.optim.AdamW, sizes={0: (2, 3)})
    own = {0: Slice(0, 5, {PARAM: torch.ones(5)})}
    seen = []
    for without in ((), (1,), (0,), ()):
        own = updater.next_slices(own, {0: torch.ones(5)}, 0, without={0: frozenset(without)})
        seen.append((own[0].scalars["step"].tolist(), HAS_STATE in own[0].scalars))
    assert seen == [(1, False), ([2, 1], False), (2, False), (3, False)]
    first = updater.next_slices({0: Slice(0, 5, {PARAM: torch.ones(5)})}, {0: torch.ones(5)}, 0, without={0: {0}})[0]
    assert first.scalars[HAS_STATE].tolist() == [False, True]


def test_parameters_that_are_not_known_are_told_of():
    updater = Updater(torch.optim.AdamW)
    own = {4: Slice(0, 5, {PARAM: torch.ones(5)})}
    with pytest.raises(
        InputError, match="of layer 4 some parameters have no part in a step, and it is not known which it has"
    ):
        updater.next_slices(own, {4: torch.ones(5)}, 0, without={4: {0}})
    kept = Slice(0, 5, {PARAM: torch.ones(5)}, {"step": torch.ones(3)})
    for slice_, sizes in ((kept, (2, 3)), (own[4], (2, 2))):
        with pytest.raises(InputError, match="is none of a layer with 2 of"):
            apart(slice_, sizes)

"""What ranks must agree on: whatever makes a step another one has another word, and the same has the same."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.cluster import KeyedDropout
from anabranch.cluster.elastic.fingerprint import told


def words(layer=None, *, factory=torch.optim.AdamW, groups=None, rate=None, loss=F.cross_entropy):
    return told([nn.Linear(4, 4) if layer is None else layer], factory, groups, rate, loss)


def frozen(layer, seed=0):
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter.requires_grad_(False))
    return layer


class Own(nn.Module):
    """A layer with settings of its own, some of which say nothing."""

    def __init__(self, slope=0.1, activation=torch.tanh):
        super().__init__()
        self.slope, self.activation, self._calls, self.other = slope, activation, id(self), object()
        self.weight = nn.Parameter(torch.zeros(3))


class Buffered(nn.Module):
    """A layer with numbers that it does not learn."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("scale", torch.full((3,), value))


def with_(name, value):
    made = nn.Linear(2, 2)
    setattr(made, name, value)
    return made


class Stepped(Buffered):
    """What it has is a function of the step."""

    def on_step(self, step, fraction):
        self.scale.fill_(fraction)


def doubled(module, inputs, output):
    return 2 * output


def hooked(before=False):
    made = nn.Sequential(nn.Tanh())
    (made[0].register_forward_pre_hook if before else made[0].register_forward_hook)(doubled)
    return made


@dataclass(frozen=True)
class Options:
    slope: float


# Each is another step than the one beside it, though sizes and classes of layers are the same.
UNLIKE = {
    "activation": (nn.Sequential(nn.Tanh()), nn.Sequential(nn.ReLU())),
    "slope": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "dropout": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "keyed dropout": (KeyedDropout(0.1, layer=1), KeyedDropout(0.1, layer=2)),
    "seed of dropout": (KeyedDropout(0.1, layer=1), KeyedDropout(0.1, layer=1, seed=3)),
    "heads": (nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 2)),
    "activation function": (
        nn.TransformerEncoderLayer(4, 1, 4, activation=F.relu),
        nn.TransformerEncoderLayer(4, 1, 4, activation=F.gelu),
    ),
    "norm first": (nn.TransformerEncoderLayer(4, 1, 4), nn.TransformerEncoderLayer(4, 1, 4, norm_first=True)),
    "shapes": (nn.Linear(2, 6, bias=False), nn.Linear(6, 2, bias=False)),
    "types": (nn.Linear(2, 2), nn.Linear(2, 2).double()),
    "names": (
        nn.ParameterDict({"a": nn.Parameter(torch.zeros(1))}),
        nn.ParameterDict({"b": nn.Parameter(torch.zeros(1))}),
    ),
    "which learn": (nn.Linear(2, 2), frozen(nn.Linear(2, 2))),
    "numbers that do not learn": (frozen(nn.Linear(2, 2)), frozen(nn.Linear(2, 2), seed=1)),
    "own settings": (Own(), Own(0.2)),
    "buffers": (Buffered(1.0), Buffered(2.0)),
    "modes": (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.1)).eval()),
    "tensors": (with_("scale", torch.ones(2)), with_("scale", torch.zeros(2))),
    "tables": (with_("config", {"k": 1.0}), with_("config", {"k": 2.0})),
    "tables in tables": (
        with_("config", {"k": {"scale": torch.ones(2)}}),
        with_("config", {"k": {"scale": torch.zeros(2)}}),
    ),
    "options": (with_("config", Options(0.1)), with_("config", Options(0.2))),
    "sets": (with_("kept", {"a", "b"}), with_("kept", {"a"})),
    "hooks": (nn.Sequential(nn.Tanh()), hooked()),
    "hooks before": (hooked(), hooked(before=True)),
    "own function": (Own(), Own(activation=torch.relu)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_other_layers_have_other_words(name):
    one, other = UNLIKE[name]
    assert words(one)["layers"] != words(other)["layers"]
    assert words(one)["layers"] == words(one)["layers"]


def test_the_same_made_anew_has_the_same_words():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1), Own(), nn.TransformerEncoderLayer(4, 2, 8), KeyedDropout(0.1)
        )

    one, other = make(), make()
    # What they learned, and what they count meanwhile, is theirs.
    nn.init.ones_(other[0].weight)
    other[-1].step, other[-1].first_row, other[3]._calls = 7, 3, 9
    assert words(one) == words(other)
    # One that comes later has what is set after another step.
    assert words(Stepped(1.0)) == words(Stepped(2.0))
    assert words(Stepped(1.0)) != words(Buffered(1.0))


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.Adam,
        partial(torch.optim.AdamW, lr=0.2),
        partial(torch.optim.AdamW, betas=(0.8, 0.9)),
        lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.5),
    ],
)
def test_another_optimizer_has_another_word(factory):
    assert words(factory=factory)["optimizer"] != words()["optimizer"]
    assert words()["optimizer"].startswith("AdamW(amsgrad=False, betas=(0.9, 0.999), ")
    assert words()["optimizer"] == words(factory=lambda parameters: torch.optim.AdamW(parameters))["optimizer"]


def test_other_groups_and_another_rate_have_other_words():
    runs = {0: [(0, 4, {"lr": 0.1}), (4, 20, {"lr": 0.2})]}
    other = {0: [(0, 5, {"lr": 0.1}), (5, 20, {"lr": 0.2})]}
    assert len({words(groups=groups)["groups"] for groups in (None, runs, other)}) == 3
    assert words(groups=runs) == words(groups={0: [(0, 4, {"lr": 0.1}), (4, 20, {"lr": 0.2})]})

    def rate(step):
        return 0.5**step

    assert words(rate=rate)["learning_rate"] == words(rate=lambda step: 0.5**step)["learning_rate"]
    assert words(rate=rate)["learning_rate"] != words(rate=lambda step: 0.6**step)["learning_rate"]
    # One that is made for few steps is one too.
    assert words(rate=[1.0, 0.5].__getitem__)["learning_rate"][:3] == ["1", "0.5", "IndexError"]


def test_another_loss_has_another_word():
    losses = [
        F.cross_entropy,
        F.nll_loss,
        partial(F.cross_entropy, label_smoothing=0.1),
        partial(F.cross_entropy, label_smoothing=0.2),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.HuberLoss(delta=2.0),
        nn.HuberLoss(),
    ]
    found = [words(loss=loss)["loss"] for loss in losses]
    assert len(set(found)) == len(found)
    assert words(loss=nn.HuberLoss())["loss"] == found[-1]

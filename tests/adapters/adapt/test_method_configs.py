"""What a method's config says of the layers that it makes is said once, and handed on: no default stands twice, and no setting is lost."""

import dataclasses
import typing

import pytest

from anabranch.adapters.adapt.mixtures import Dynmole, LoraMixer
from anabranch.adapters.dynmole import DynMoLE, Experts
from anabranch.adapters.lora_mixer import SoftThenTopK, SpecialisationLoss
from anabranch.adapters.lora_mixer.loss import Specialisation
from anabranch.adapters.lora_mixer.stages import Order, Stages
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.mhr.layer import Skills
from anabranch.adapters.mhr.method import Mhr, Poly
from anabranch.adapters.mhr.penalties import Penalties
from anabranch.adapters.mhr.weights import Weights


def loss_of(config):
    [loss] = config.build().layer(()).router.balance
    return loss


# Of a method: the fields that it has of another class, and what these become.
HANDED_ON = {
    "dynmole": (Dynmole.Config, Experts, Dynmole.Config.settings),
    "poly": (Poly.Config, Skills, lambda config: config.build().layer(("all",))),
    "mhr": (Mhr.Config, Skills, lambda config: config.build().layer(("all",))),
    "lora_mixer's loss": (LoraMixer.Config, Specialisation, loss_of),
    "lora_mixer's stages": (LoraMixer.Config, Order, lambda config: config.in_stages),
}
# What cannot be made of the usual value by `other`.
OTHERS = {
    "experts_per_layer": (3, 3),
    "entropy_index": 1.5,
    "alignment": 0.5,
    "weights": Weights(form="l2"),
    "penalties": Penalties(sparsity=0.5),
}
# What is for one head alone.
BESIDE = {"mixes": {"heads": 1}}


def other(name, usual, hint):
    """A value that a field may have, and has not as it comes."""
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(usual, bool):
        return not usual
    if isinstance(usual, str):
        return next(word for word in typing.get_args(hint) if word != usual)
    return usual * 2 if isinstance(usual, int) else usual / 2 or 0.5


CASES = [(case, field.name) for case, (_, kind, _) in HANDED_ON.items() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_every_setting_is_handed_on(case, name):
    made, kind, become = HANDED_ON[case]
    value = other(name, getattr(made(), name), typing.get_type_hints(kind)[name])
    assert getattr(become(made(**{name: value}, **BESIDE.get(name, {}))), name) == value


def test_what_is_called_otherwise_has_the_same_usual_value():
    assert Dynmole.Config().settings() == DynMoLE()
    assert HANDED_ON["poly"][2](Poly.Config()) == MultiHeadRouted.Config(heads=1)
    assert HANDED_ON["mhr"][2](Mhr.Config()) == MultiHeadRouted.Config()
    assert loss_of(LoraMixer.Config()) == SpecialisationLoss.Config()
    assert LoraMixer.Config().build().layer(()).router.select == SoftThenTopK.Config()
    # New experts learn from the beginning.
    assert LoraMixer.Config().in_stages == Stages(experts="free")
    assert LoraMixer.Config(stages="hard").in_stages == Stages(stages="hard")

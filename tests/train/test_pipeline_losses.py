"""Losses of a decoder in two stages are those of the whole: losses over all layers, and targets that are not to be predicted."""

import re
from ast import literal_eval
from dataclasses import dataclass

import pytest
import torch

from anabranch import presets
from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.routing import SwitchLoss
from anabranch.train.pipeline_layers import _key_of, _owner_of
from ranks import run_ranks

# A batch in one process, and in two stages as one micro-batch and as two: losses, what they are sums of, and the gradients.
COMPARE = """
from anabranch.config import from_dict, override, to_dict
from anabranch.depth.duo_llm.parts import BudgetLoss
from anabranch.presets import find
from anabranch.routing.rate import RateBalance
from anabranch.train.pipeline import PipelinedDecoder

stages = dist.group.WORLD
alone = [dist.new_group([number]) for number in range(world)][rank]

def config(name):
    preset, _, kind = name.partition(" ")
    model = override(find(preset)("tiny"), {{"model.dim": 32, "model.vocab_size": 257}}).model
    balance = {{"rate": (RateBalance.Config(beta0=1.0),), "budget": (BudgetLoss.Config(alpha=3.0),), "": None}}[kind]
    if balance is not None:
        layer = model.feed_forward
        model = model.replace(feed_forward=layer.replace(router=layer.router.replace(balance=balance)))
    return from_dict(type(model), still(to_dict(model)))

def still(value):
    # Nothing is drawn: stages draw other numbers.
    if isinstance(value, dict):
        return {{name: 0.0 if name == "dropout" else still(one) for name, one in value.items()}}
    return [still(one) for one in value] if isinstance(value, list | tuple) else value

def learned(model, call, batches):
    outputs = []
    for token_BL, target_BL in batches:
        torch.manual_seed(3)
        outputs.append(call(token_BL, target_BL))
        (outputs[-1].loss / len(batches)).backward()
    names = outputs[0].auxiliary
    terms = {{name: sum(float(output.auxiliary[name]) for output in outputs) / len(batches) for name in names}}
    return sum(float(output.loss.detach()) for output in outputs) / len(batches), terms

def compare(name, *, pieces, recomputes=False, hides=False):
    made = config(name)
    token_BL = torch.randint(250, (4, 16), generator=torch.Generator().manual_seed(0))
    target_BL = token_BL.roll(-1, 1).clone()
    if hides:
        target_BL[0] = -100
        target_BL[1, 3:] = -100
    batch = token_BL, target_BL
    one, two = made.build(seed=0).train(), made.build(seed=0).train()
    # A loss of a micro-batch is of each; with targets left out the mean is over those of the whole batch.
    parts = [batch] if hides else list(zip(token_BL.chunk(pieces), target_BL.chunk(pieces)))
    ours = learned(one, one, parts)
    staged = PipelinedDecoder(two, stages, alone, micro_batches=pieces, recomputes=recomputes)
    theirs = learned(two, staged, [batch])
    wrong = 0.0
    for (key, mine), other in zip(two.named_parameters(), one.parameters()):
        if mine.grad is not None:
            wrong = max(wrong, float((mine.grad - other.grad).norm() / other.grad.norm().clamp_min(1e-12)))
    return ours, theirs, wrong

print(repr([compare(*args, **options) for args, options in {cases}]))
"""

OVER_LAYERS = ("dynmole", "moe rate", "moe budget")
CASES = [
    *(((name,), {"pieces": pieces, "recomputes": pieces == 2}) for name in OVER_LAYERS for pieces in (1, 2)),
    *((("dense",), {"pieces": pieces, "hides": True, "recomputes": pieces == 2}) for pieces in (1, 2, 4)),
]


@pytest.fixture(scope="module")
def compared():
    """Of each case what both stages found, by its name and how many micro-batches it has."""
    ranks = [literal_eval(line) for line in run_ranks(COMPARE.format(cases=CASES))]
    return {
        (args[0], options["pieces"]): [found[number] for found in ranks] for number, (args, options) in enumerate(CASES)
    }


def assert_equal(found):
    for ours, theirs, wrong in found:
        assert theirs[0] == pytest.approx(ours[0], rel=1e-6)
        assert theirs[1] == pytest.approx(ours[1], rel=1e-5)
        assert wrong < 1e-4


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("name", OVER_LAYERS)
def test_a_loss_over_all_layers_is_closed_once(compared, name, pieces):
    found = compared[name, pieces]
    assert any(value > 0 for value in found[0][0][1].values())
    assert_equal(found)


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_targets_that_are_left_out_count_for_nothing(compared, pieces):
    assert_equal(compared["dense", pieces])


@pytest.mark.slow
def test_every_preset_has_its_losses_in_stages(tmp_path):
    # What runs parallel streams is not cut; what draws draws other numbers in stages.
    names = [name for name in presets.names() if name not in ("parscale", "duo", "versatile")]
    cases = [((name,), {"pieces": 1}) for name in names]
    for found in zip(*(literal_eval(line) for line in run_ranks(COMPARE.format(cases=cases))), strict=True):
        assert_equal(found)


@dataclass(frozen=True)
class ByValue:
    scale: float

    def close(self, parts):
        return "mine", self.scale * torch.stack([part for (part,) in parts]).sum()


class ByIdentity:
    def close(self, parts):
        return "mine", parts[0][0]


def test_who_closes_a_loss_is_found_in_another_process():
    config = presets.find("moe")("tiny").model.replace(dim=8, num_layers=2)
    first, second = config.build(seed=0), config.build(seed=1)
    name, module = next((name, module) for name, module in first.named_modules() if isinstance(module, SwitchLoss))
    assert _owner_of(_key_of(module, first), second) is second.get_submodule(name)
    assert _owner_of(_key_of(ByValue(2.0), first), second) == ByValue(2.0)
    assert _key_of(ByValue(2.0), first) != _key_of(ByValue(3.0), first)


@pytest.mark.parametrize("owner", [ByIdentity(), SwitchLoss.Config().build(4)], ids=["identity", "of another model"])
def test_who_cannot_be_found_in_another_process_is_told(owner):
    model = Decoder.Config(dim=8, num_layers=1).build(seed=0)
    with pytest.raises(ConfigError, match=re.escape(f"closed by a {type(owner).__name__}, which stages cannot tell")):
        _key_of(owner, model)

"""Losses of a decoder in two stages are those of the whole: losses over all layers, and targets that are not to be predicted."""

import re
from ast import literal_eval
from dataclasses import dataclass

import pytest
import torch

from anabranch import presets
from anabranch.cluster.ranks import RankError
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


# Gradients of two pipelines of two stages, each with half of a batch in two micro-batches; what each process has of them, and how far
# the whole is from one process that takes the four one after another.
SHARED = """
from anabranch.config import override
from anabranch.presets import find
from anabranch.train.config import Parallel, TrainConfig
from anabranch.train.language_model import decoder_parts
from anabranch.train.optimizer import full_tensor
from anabranch.train.parallel import Workers

exchanged = []

def counting(exchange):
    def run(*args, **options):
        exchanged.append(1)
        return exchange(*args, **options)
    return run

# What FSDP calls by one name or the other, as torch's version is.
for named in ("reduce_scatter_single", "reduce_scatter_tensor"):
    if hasattr(dist, named):
        setattr(dist, named, counting(getattr(dist, named)))

def compare(name, tied, recomputes, parallel, experts):
    model = override(find(name)("tiny"), {{"model.dim": 32, "model.vocab_size": 257}}).model.replace(tie_embeddings=tied)
    token_BL = torch.randint(250, (8, 16), generator=torch.Generator().manual_seed(0))
    target_BL = token_BL.roll(-1, 1)
    one, two = model.build(seed=0).train(), model.build(seed=0).train()
    loss = 0.0
    for token, target in zip(token_BL.chunk(4), target_BL.chunk(4)):
        output = one(token, target)
        (output.loss / 4).backward()
        loss += float(output.loss.detach()) / 4
    layout = Parallel(pipeline=2, micro_batches=2, experts=experts)
    workers = Workers(TrainConfig(parallel=parallel, device="cpu", recompute=recomputes), layout)
    wrapped = workers.wrap(two, decoder_parts(two))
    mine = slice(4 * workers.batch_number, 4 * workers.batch_number + 4)
    exchanged.clear()
    staged = wrapped(token_BL[mine], target_BL[mine])
    staged.loss.backward()
    wrong, here, whole = 0.0, 0, 0
    for parameter, other in zip(two.parameters(), one.parameters()):
        if parameter.grad is not None:
            here += getattr(parameter.grad, "to_local", lambda: parameter.grad)().numel()
            whole += parameter.numel()
            found = full_tensor(parameter.grad)
            wrong = max(wrong, float((found - other.grad).norm() / other.grad.norm().clamp_min(1e-12)))
    told = float(workers.mean(staged.loss.detach().clone()))
    return loss, told, wrong, here / whole, len(exchanged)

def said():
    try:
        Workers(TrainConfig(device="cpu"), Parallel(pipeline=2, experts=4))
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

print(repr(([compare(*case) for case in {cases}], said())))
"""

WAYS = [
    (name, tied, recomputes, parallel, experts)
    for name, tied, recomputes in (("moe", False, True), ("rexmoe-open", True, False), ("dense", False, False))
    for parallel, experts in (("none", 1), ("fsdp", 1), ("none", 2), ("fsdp", 2))
    if (name, experts) != ("dense", 2)
]


@pytest.mark.slow
def test_pipelines_that_share_weights_and_experts_have_the_gradients_of_one_process():
    ranks = [literal_eval(line) for line in run_ranks(SHARED.format(cases=WAYS), 4)]
    for number, (_, tied, _, parallel, experts) in enumerate(WAYS):
        for loss, told, wrong, share, exchanged in (found[number] for found, _ in ranks):
            assert told == pytest.approx(loss, rel=1e-6)
            assert wrong < 1e-4, WAYS[number]
            if (parallel, tied) == ("fsdp", False):
                assert share == pytest.approx(0.5, abs=0.01)
                # Once a step, however many micro-batches: two of the four blocks, and embedding or head.
                assert exchanged == 3
            else:
                assert (share < 1) == (parallel == "fsdp" or experts > 1)
    said = "ConfigError: parallel.experts is 4, and pipelines share experts, of which there are 2; use a number that divides them"
    assert [told for _, told in ranks] == [said] * 4


FAILS = """
from anabranch.presets import find
from anabranch.config import override
from anabranch.train.config import Parallel, TrainConfig
from anabranch.train.language_model import decoder_parts
from anabranch.train.parallel import Workers

def fail(block, args):
    raise RuntimeError("out of luck")

model = override(find("moe")("tiny"), {"model.dim": 32, "model.vocab_size": 257}).model.build(seed=0).train()
workers = Workers(TrainConfig(parallel="fsdp", device="cpu"), Parallel(pipeline=2, micro_batches=4, experts=2))
wrapped = workers.wrap(model, decoder_parts(model))
token_BL = torch.randint(250, (4, 16))
if rank == 1:
    model.blocks[3].register_forward_pre_hook(fail)
wrapped(token_BL, token_BL.roll(-1, 1)).loss.backward()
"""


@pytest.mark.slow
def test_a_stage_that_fails_while_another_pipeline_waits_for_it_ends_all():
    with pytest.raises(RankError, match="out of luck"):
        run_ranks(FAILS, 4)


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

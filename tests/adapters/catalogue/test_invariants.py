"""Every method that is run, ours and through peft, held to the same: it starts as the base, what its formula counts learns and no more,
it is the same after it was saved, and merged it computes the same."""

import copy
import warnings

import pytest
import torch

from adapter_models import CONFIGS, drawn, make_base
from anabranch.adapters import catalogue
from anabranch.adapters.graft import layers_of
from anabranch.adapters.tasks import task_rows
from anabranch.errors import ConfigError
from anabranch.lm import load_config, load_model, save_model
from anabranch.nn import SelfAttention
from with_peft import needs_peft

TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])
# By id: options that fit a model of width 32, and the family where it must be another one.
OWN = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4, "targets": ("all",)},
    "lora-plus": {"rank": 3, "targets": ("mlp",)},
    "lora-fa": {"rank": 4},
    "eva": {"rank": 4},
    "dylora": {"rank": 4},
    "llm-adapters": {"rank": 4},
    "adapter-drop": {"rank": 4, "drop": 1},
    "adapter-parallel": {"width": 3, "activation": "gelu"},
    "shira": {"rank": 2},
    "fish-mask": {"rank": 2},
    "lt-sft": {"rank": 2},
    "intrinsic": {"size": 24},
    "poly": {"rank": 4, "number": 3, "tasks": 2},
    "mhr": {"rank": 4, "number": 3, "tasks": 2, "heads": 4},
    "molora": {"rank": 4, "number": 3},
    "mixlora": {"rank": 4, "number": 3},
    "dora": {"rank": 4},
    "ia3": {},
    "ssf": {"targets": ("attention",)},
    "adapter-houlsby": {"width": 3},
    "adapter-pfeiffer": {"width": 3},
    "sparse-adapter": {"width": 16, "sparsity": 0.8},
    "prompt-tuning": {"tokens": 5},
    "prefix-tuning": {"tokens": 5},
    "mam": {"tokens": 5, "width": 3},
    "unipelt": {"tokens": 5, "rank": 4, "width": 3},
    "adapter-fusion": {"width": 3, "number": 3},
    "adamix": {"width": 3, "number": 3},
    "s4": {"tokens": 5, "rank": 4, "width": 3},
    "lst": {"reduction": 4, "expansion": 2},
    "bitfit": {},
    "ln-tuning": {},
    "attention-tuning": {},
    "full": {},
}
# Of these two the biases learn, or take in what was learned.
FAMILY = {"bitfit": "qwen2", "ssf": "biased"}
THROUGH_PEFT = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4},
    "pissa": {"rank": 4},
    "olora": {"rank": 4},
    "dora": {"rank": 4},
    "adalora": {"rank": 4},
    "vera": {"rank": 16},
    "randlora": {"rank": 8},
    "lily": {"rank": 4, "number": 3},
    "unilora": {"rank": 4, "size": 24},
    "tinylora": {"rank": 2, "size": 8},
    "loha": {"rank": 4},
    "lokr": {"rank": 2},
    "hira": {"rank": 4},
    "miss": {"rank": 8},
    "gralora": {"rank": 4},
    "delora": {"rank": 4},
    "fourierft": {"entries": 50},
    "waveft": {"entries": 50},
    "c3a": {"block": 8},
    "vblora": {"rank": 2, "vectors": 8, "length": 8},
    "oft": {"block": 8},
    "boft": {"block": 4},
    "hra": {"rank": 4},
    "road": {"group": 8},
    "psoft": {"rank": 8},
    "ia3": {},
    "beft": {},
    "ln-tuning": {},
    "shira": {"rank": 4},
    "prompt-tuning": {"tokens": 5},
    "p-tuning": {"tokens": 5, "hidden": 12},
    "prefix-tuning": {"tokens": 5},
    "multitask-prompt-tuning": {"tokens": 5, "tasks": 3, "rank": 2},
    "cpt": {"ids": ("3", "17", "5")},
    "cartridge": {"tokens": 5},
    "llama-adapter": {"tokens": 5, "layers": 2},
    "adamss": {"rank": 8, "subspaces": 2},
    "deft": {"rank": 4},
    "frod": {"share": 0.05},
    "glora": {"rank": 4},
    "osf": {"kept": 0.4},
    "peanut": {"rank": 4, "depth": 2},
    "pvera": {"rank": 16},
    "shadow": {"rank": 4},
    "supertuning": {"sparsity": 0.9},
    "trainable-tokens": {"ids": ("3", "17", "5")},
}
# What learns by its name, and gets no gradient.
IDLE = {"shadow": "layers.1.shadow_update_"}


def told(model):
    """What a pass is told: the task of each row, where a model routes by it."""
    by_task = any(getattr(module, "routes_by_task", False) for module in model.modules())
    return {"state": task_rows(model, ["0", "1"], TOKENS.shape[1])} if by_task else {}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS, **told(model)).logits_BLV


BIASED = SelfAttention.Config(num_heads=4, num_kv_heads=2, qkv_bias=True, out_bias=True)


def built(family, **fields):
    model = CONFIGS[family]().replace(**fields).build()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(drawn(name, tensor.shape))
    return model


@pytest.fixture(scope="module")
def bases():
    made = {family: built(family) for family in ("llama", "qwen2", "olmoe")}
    return made | {"biased": built("qwen2", attention=BIASED)}


def moved(applied):
    """What learns is somewhere else now, as after training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in applied.model.named_parameters():
            if name in applied.trainable:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return applied


def same(first, second):
    """Whether two states have the same numbers."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("id", OWN)
def test_our_methods(id, bases, tmp_path):
    base, options = bases[FAMILY.get(id, "llama")], OWN[id]
    card, model = catalogue.find(id), copy.deepcopy(base)
    wanted = logits(model)
    estimate = catalogue.estimate(card, catalogue.Shape.of(model.config), options)
    applied = catalogue.apply(model, id, seed=3, **options)
    # It starts as the base, bit for bit, or its card says that it does not.
    assert torch.equal(logits(model), wanted) == card.starts_as_base
    begun = {name: value.clone() for name, value in applied.state().items()}
    # What its formula counts learns.
    assert applied.num_trainable == estimate.trainable
    assert set(applied.matched) | set(applied.skipped) == {
        matrix.part for matrix in catalogue.Shape.of(base.config).matrices
    }
    # And nothing else.
    moved(applied)
    found = logits(model)
    assert not torch.equal(found, wanted)
    model.train()(TOKENS, target_BL=TOKENS, **told(model)).loss.backward()
    assert {name for name, one in model.named_parameters() if one.grad is not None} == set(applied.trainable)
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in applied.trainable)
    # It is the same again, alone and with the whole model.
    applied.save(tmp_path / "alone")
    again = catalogue.load_applied(tmp_path / "alone", copy.deepcopy(base))
    assert same(applied.state(), again.state())
    assert torch.equal(logits(again.model), found)
    save_model(tmp_path / "whole", model)
    assert torch.equal(logits(load_model(tmp_path / "whole")[0]), found)
    # The same seed draws the same.
    fresh = catalogue.apply(copy.deepcopy(base), id, seed=3, **options)
    assert same(begun, fresh.state())
    # Taken off it is the base; merged it computes the same, as a plain model.
    if id not in ("attention-tuning", "full"):
        assert torch.equal(logits(again.remove()), wanted)
        assert again.model.config == base.config
        assert {name for name, one in again.model.named_parameters() if one.requires_grad} == set(
            dict(base.named_parameters())
        )
    if card.merges in ("no", "per task"):
        with pytest.raises(ConfigError, match=r"cannot be merged|another adapter for each task"):
            applied.merge()
    else:
        torch.testing.assert_close(logits(applied.merge()), found, rtol=1e-5, atol=2e-5)
        assert model.config == base.config
        assert set(model.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("id", ["lora", "adapter-parallel", "shira", "dora"])
def test_experts_are_adapted_too(id, bases, tmp_path):
    model = copy.deepcopy(bases["olmoe"])
    wanted = logits(model)
    applied = catalogue.apply(model, id, targets=("up", "down", "q"))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    moved(applied)
    assert len(applied.matched) == 2 * (2 * 4 + 1)
    found = logits(model)
    assert not torch.equal(found, wanted)
    applied.save(tmp_path / "alone")
    again = catalogue.load_applied(tmp_path / "alone", copy.deepcopy(bases["olmoe"]))
    assert torch.equal(logits(again.model), found)
    if id != "adapter-parallel":
        torch.testing.assert_close(logits(applied.merge()), found, rtol=1e-5, atol=2e-5)
    assert torch.equal(logits(again.remove()), wanted)


def test_masks_go_where_scores_are_greatest(bases):
    model = copy.deepcopy(bases["llama"])
    applied = catalogue.apply(model, "fish-mask", rank=1, targets=("q",))
    layer = layers_of(model)["blocks.0.attention.q"]
    score = torch.zeros(32, 32)
    score[3, :] = 1 + torch.arange(32)
    score[5, :] = 40 + torch.arange(32)
    layer.place(score)
    assert layer.index.tolist() == [3 * 32 + n for n in range(32)] + [5 * 32 + n for n in range(32)]
    with pytest.raises(ConfigError, match="there are scores of"):
        layer.place(torch.ones(3))
    assert applied.num_trainable == 2 * 64


def test_dylora_works_at_every_rank(bases):
    model = copy.deepcopy(bases["llama"])
    moved(catalogue.apply(model, "dylora", rank=4, targets=("q",)))
    layers = layers_of(model)
    torch.manual_seed(5)
    for layer in layers.values():
        layer.before_step(0, 0.0)
    used = {layer.used for layer in layers.values()}
    assert len(used) == 1
    assert 1 <= used.pop() <= 4
    layer, x = layers["blocks.1.attention.q"], torch.randn(3, 32)
    layer.train().used = 2
    cut = layer.at(2)
    torch.testing.assert_close(layer(x), x @ cut.delta().T)
    torch.testing.assert_close(layer.eval()(x), x @ layer.delta().T)
    with pytest.raises(ConfigError, match="this adapter has 1 to 4"):
        layer.at(5)


# Through peft


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("peft")
    make_base(root / "base", "llama")
    return root


def opened(place):
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).eval()


def of_peft(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits[:, -TOKENS.shape[1] :]


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("id", THROUGH_PEFT)
def test_methods_of_peft(id, place, tmp_path):
    import peft

    card, options = catalogue.find(id), THROUGH_PEFT[id]
    wanted = of_peft(opened(place))
    estimate = catalogue.estimate(card, catalogue.Shape.of(load_config(place / "base")), options)
    torch.manual_seed(1)
    model = catalogue.apply_peft(opened(place), id, **options)
    if card.starts_as_base:
        torch.testing.assert_close(of_peft(model), wanted, rtol=1e-5, atol=1e-5)
    learns = {name for name, one in model.named_parameters() if one.requires_grad}
    assert sum(one.numel() for name, one in model.named_parameters() if name in learns) == estimate.trainable
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name in learns:
                one.add_(torch.randn(one.shape, generator=generator) * 0.05)
    more = {"task_ids": torch.tensor([0, 1])} if id == "multitask-prompt-tuning" else {}
    model.train()(TOKENS, labels=TOKENS, **more).loss.backward()
    idle = {name for name in learns if id in IDLE and IDLE[id] in name}
    assert {name for name, one in model.named_parameters() if one.grad is not None} == learns - idle
    if more:
        return
    found = of_peft(model)
    assert not torch.allclose(found, wanted, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    if id not in ("pissa", "olora"):
        again = peft.PeftModel.from_pretrained(opened(place), tmp_path / "saved")
        assert torch.equal(of_peft(again), found)
    if card.merges in ("yes", "is the base"):
        torch.testing.assert_close(of_peft(model.merge_and_unload()), found, rtol=1e-4, atol=2e-5)


@needs_peft
def test_all_that_peft_has_has_a_card():
    """A new version brings types that nobody has looked at yet."""
    from peft import PeftType

    assert {kind.name for kind in PeftType} <= {card.peft_type for card in catalogue.CARDS.values()}


def test_there_are_as_many_as_were_asked_for():
    assert len(OWN) >= 14
    own = {id for id, card in catalogue.CARDS.items() if card.backend == "own"}
    through = {id for id, card in catalogue.CARDS.items() if card.backend == "peft"}
    assert own == set(OWN)
    assert through <= set(THROUGH_PEFT)

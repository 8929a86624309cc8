"""`check_fits`, asked directly: an adapter made here against the names of a model, without a folder or weights."""

from pathlib import Path

import pytest
import torch

from adapter_models import CONFIGS
from anabranch.adapters import Adapter, Pair
from anabranch.adapters.fits import check_fits
from anabranch.adapters.names import names_of
from anabranch.adapters.scaling import Scale
from anabranch.errors import CheckpointError

PLACE = Path("some-adapter")
CONFIG = CONFIGS["llama"]()
Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]


def pair(inputs=32, outputs=32):
    return Pair(torch.ones(2, inputs), torch.ones(outputs, 2), 8.0)


def check(layers, saved=None, config=CONFIG, **table):
    adapter = Adapter({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **table}, layers, saved or {})
    check_fits(adapter, names_of(config, [], None), config, PLACE)


GOOD = dict.fromkeys(Q, pair())


def test_one_that_fits():
    check(GOOD)
    check(GOOD, {"model.norm.weight": torch.ones(32)}, modules_to_save=["norm"])
    check({Q[1]: pair()}, layers_to_transform=[1])


NORMS = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]


def test_all_of_what_modules_to_save_names_is_there():
    both = {name: torch.ones(32) for name in NORMS}
    check(GOOD, both, modules_to_save=["input_layernorm"])
    with pytest.raises(CheckpointError, match=rf"lacks {NORMS[1]}, which modules_to_save names"):
        check(GOOD, {NORMS[0]: both[NORMS[0]]}, modules_to_save=["input_layernorm"])
    with pytest.raises(CheckpointError, match=r"lacks .*mlp\.gate_proj\.weight.*, which modules_to_save names"):
        check(GOOD, {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}, modules_to_save=["mlp"])
    # A word that no module has, as of a classifier, asks for nothing.
    check(GOOD, modules_to_save=["score"])


@pytest.mark.parametrize("brought", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_that_is_tied_is_there_once_the_embedding_is(brought):
    tied, words = CONFIG.replace(tie_embeddings=True), ["embed_tokens", "lm_head"]
    for config in (tied, CONFIG.replace(tie_embeddings=False)):
        named = {name: one.shape for name, one in names_of(config, [], None).tensors.items()}
        if brought not in named:
            continue
        given = {brought: torch.ones(named[brought])}
        if config is tied:
            check(GOOD, given, config=config, modules_to_save=words)
        else:
            with pytest.raises(CheckpointError, match="which modules_to_save names"):
                check(GOOD, given, config=config, modules_to_save=words)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (
            {**GOOD, "model.layers.2.self_attn.q_proj": pair()},
            {},
            r"adapts model\.layers\.2\.self_attn\.q_proj, for which the model",
        ),
        (
            {**GOOD, Q[0]: pair(31)},
            {},
            r"with 31 inputs and 32 outputs, and the model's has 32 and 32; is it",
        ),
        ({**GOOD, Q[0]: pair(32, 33)}, {}, r"with 32 inputs and 33 outputs"),
        ({Q[0]: pair()}, {}, rf"lacks lora_A and lora_B of {Q[1]}, which target_modules in"),
        (
            {**GOOD, "model.layers.0.mlp.gate": pair(32, 4)},
            {"config": CONFIGS["olmoe"]()},
            r"adapts model\.layers\.0\.mlp\.gate, which chooses experts, and LoRA beside a router .*target_parameters="
            r"\['mlp\.experts\.gate_up_proj', 'mlp\.experts\.down_proj'\]: exclude_modules leaves no router out",
        ),
        (
            GOOD,
            {"saved": {"model.norm.bias": torch.ones(32)}},
            r"brings model\.norm\.bias, for which the model",
        ),
        (
            GOOD,
            {"saved": {"model.norm.weight": torch.ones(31)}},
            r"brings model\.norm\.weight of shape \[31\], and the model's is \[32\]",
        ),
    ],
)
def test_one_that_does_not(layers, options, message):
    with pytest.raises(CheckpointError, match=message) as error:
        check(layers, **options)
    assert str(error.value).startswith("some-adapter ")
    assert "\n" not in str(error.value)


def test_sizes_that_an_adapter_does_not_say_are_not_compared():
    """IA3 knows what goes in, or what comes out."""
    table = {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    good = {**dict.fromkeys(Q, Scale(torch.ones(32), False)), **dict.fromkeys(DOWN, Scale(torch.ones(48), True))}
    check(good, **table)
    with pytest.raises(CheckpointError, match=r"down_proj with 32 inputs, and the model's has 48 and 32"):
        check({**good, DOWN[0]: Scale(torch.ones(32), True)}, **table)
    with pytest.raises(CheckpointError, match=r"q_proj with 48 outputs, and the model's has 32 and 32"):
        check({**good, Q[1]: Scale(torch.ones(48), False)}, **table)
    with pytest.raises(CheckpointError, match=rf"lacks ia3_l of {DOWN[1]}, which"):
        check({name: one for name, one in good.items() if name != DOWN[1]}, **table)


def test_experts_that_all_layers_lack_may_lack_and_those_of_one_may_not():
    config = CONFIGS["olmoe"]()
    words = {"target_modules": ["q_proj", "up_proj"], "config": config}
    ups = {f"model.layers.{layer}.mlp.experts.{one}.up_proj": pair(32, 16) for layer in (0, 1) for one in range(4)}
    check(GOOD, **words)
    check({**GOOD, **ups}, **words)
    gone = f"model.layers.1.mlp.experts.{3}.up_proj"
    with pytest.raises(CheckpointError, match=rf"lacks lora_A and lora_B of {gone}, which"):
        check({**GOOD, **{name: one for name, one in ups.items() if name != gone}}, **words)

"""Windows of attention are those that transformers gives the same folder, whatever its config.json says or leaves out."""

import json

import pytest
import torch
import transformers

from anabranch.lm import load_config, load_model
from foreign_models import BODY, VOCAB, build_theirs

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**EXPERTS, "head_dim": 16},
    "Mistral": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}
SWITCHED = ("Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe")
# Changes, where None drops a field, and the families that they are for.
ON = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
SAID = {
    "a window and no switch": ({**ON, "use_sliding_window": None}, SWITCHED),
    "a switch that is on": (ON, SWITCHED),
    "a stray switch": ({"use_sliding_window": False, "sliding_window": 8}, ("Mistral", "Mixtral", "GptOss")),
    "as wide as the context": ({**ON, "sliding_window": 64}, tuple(KINDS)),
    "no context": ({**ON, "max_position_embeddings": None}, tuple(KINDS)),
}
CASES = [(family, said) for said, (_, families) in SAID.items() for family in families]


def folder_with(place, family, changes):
    """A model of transformers whose config.json is edited."""
    build_theirs(family, **{"intermediate_size": 48, **KINDS[family]}).save_pretrained(place)
    table = {**json.loads((place / "config.json").read_text()), **changes}
    table = {name: value for name, value in table.items() if value is not None or name not in changes}
    (place / "config.json").write_text(json.dumps(table))
    return place


@pytest.mark.parametrize(("family", "said"), CASES)
@torch.no_grad()
def test_windows_are_those_of_transformers(family, said, tmp_path):
    folder = folder_with(tmp_path, family, SAID[said][0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, _ = load_model(folder)
    # Longer than the context, so that the widest window shows.
    token_BL = torch.randint(0, VOCAB, (1, 100), generator=torch.Generator().manual_seed(0))
    wanted = theirs(token_BL).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours.eval()(token_BL).logits_BLV, wanted, rtol=0, atol=5e-4)


@pytest.mark.parametrize("family", [*KINDS, "Olmoe", "Glm4Moe"])
def test_contexts_that_are_not_said_are_those_of_transformers(family, tmp_path):
    config = getattr(transformers, f"{family}Config")
    made = config(**{name: value for name, value in BODY.items() if name != "max_position_embeddings"})
    made.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    del table["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert load_config(tmp_path).max_positions == config().max_position_embeddings


@pytest.mark.parametrize("family", SWITCHED)
def test_a_window_that_is_on_and_has_no_width_is_of_4096(family, tmp_path):
    folder = folder_with(tmp_path, family, {**ON, "sliding_window": None})
    config = load_config(folder)
    assert {config.attention_of(layer).window for layer in range(config.num_layers)} - {None} == {4096}

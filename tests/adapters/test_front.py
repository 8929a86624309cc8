"""`Front`: virtual tokens in front of sequences; what they compute is in test_kinds and test_peft_parity."""

import pytest
import torch

from adapter_kinds import IN_FRONT, opened, put_on
from adapter_models import CONFIGS, TOKENS, VIRTUAL, logits, make_kind
from anabranch.adapters import adapter_of, load_peft
from anabranch.adapters.front import Front
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.routing import record_routing


@pytest.mark.parametrize("kind", IN_FRONT)
def test_virtual_tokens_are_held_once_and_not_recorded(places, kind):
    model = put_on(places, kind, "olmoe")
    assert isinstance(model.streams, Front)
    assert f"tokens={VIRTUAL}" in repr(model.streams)
    cache = model.new_cache(6)
    with record_routing(model) as recorder, torch.no_grad():
        model(TOKENS)  # layers see the virtual tokens in this pass
    assert cache.num_prefix == VIRTUAL
    assert cache.prefix.layers[0][0].shape == (1, 4, VIRTUAL, 8)
    trace = recorder.trace()
    assert trace.table.num_rows == len(trace.layers) * TOKENS.numel() * 2
    with pytest.raises(ConfigError, match="num_streams is 2"):
        model(TOKENS, num_streams=2)


@pytest.mark.parametrize("kind", IN_FRONT)
def test_an_engine_serves_virtual_tokens(places, kind):
    """Its blocks hold no more than tokens; what is in front stands beside them, once."""
    from anabranch.serving import LLM, Sampling

    model = put_on(places, kind)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :3].tolist()]
    wanted = generate(model, prompts, SamplingConfig(max_tokens=5, temperature=0.0))
    found = LLM(model).generate(prompts, Sampling(max_tokens=5, temperature=0.0))
    assert [list(one.tokens) for one in found] == wanted


def test_models_that_can_have_nothing_in_front(places, tmp_path):
    root = places["llama"][0]
    scaled = Decoder.Config(**{**fields_of(CONFIGS["llama"]()), "embedding_scale": 2.0})
    with pytest.raises(
        (ConfigError, CheckpointError), match=r"multiplies embeddings by 2|is none: no Hugging Face family"
    ):
        load_peft(root / "prompt", scaled.build())
    latent = CONFIGS["deepseek_v2"]().build()
    before = logits(latent)
    with pytest.raises(
        ConfigError, match="has virtual tokens, which this model cannot have in front: streams have keys"
    ):
        load_peft(root / "prompt", latent)
    assert torch.equal(logits(latent), before)
    model = put_on(places, "prefix")
    with pytest.raises(ConfigError, match="the model has an adapter already"):
        load_peft(root / "ia3", model)
    built = CONFIGS["llama"]().replace(streams=Front.Config()).build()
    with pytest.raises(ConfigError, match=r"the model has streams \(front\) already"):
        load_peft(root / "ia3", built)


def fields_of(config):
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}


def test_a_projected_prefix_is_read_and_does_not_learn(places, tmp_path):
    """A network that the file has not made it; what it made is there."""
    make_kind(tmp_path / "a", "prefix", places["llama"][1], prefix_projection=True)
    assert torch.equal(logits(load_peft(tmp_path / "a", opened(places))), logits(put_on(places, "prefix")))
    with pytest.raises(
        ConfigError, match="has virtual tokens of a network that peft learns in their place, which is not in the file"
    ):
        load_peft(tmp_path / "a", opened(places), trainable=True)


def test_tokens_of_p_tuning_are_those_of_prompt_tuning(places, tmp_path):
    """What its network made is in the file; the network is not, so it does not learn."""
    make_kind(tmp_path / "a", "prompt", places["llama"][1], peft_type="P_TUNING", encoder_hidden_size=7)
    model = load_peft(tmp_path / "a", opened(places))
    assert adapter_of(model).what == "P-tuning"
    assert torch.equal(logits(model), logits(put_on(places, "prompt")))
    with pytest.raises(ConfigError, match="has virtual tokens of a network that peft learns in their place"):
        load_peft(tmp_path / "a", opened(places), trainable=True)

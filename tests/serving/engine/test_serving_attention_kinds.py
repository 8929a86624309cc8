"""The engine continues models whose attention is not plain as they are continued alone: windows, sinks, scales, temperatures, latents."""

import pytest
import torch

from anabranch.lm import SamplingConfig, generate
from anabranch.nn import Rotary, SelfAttention
from anabranch.nn.latent_attention import LatentAttention
from anabranch.serving import LLM, Sampling

HEADS = {"num_heads": 4, "num_kv_heads": 2}
WINDOWED = SelfAttention.Config(**HEADS, window=6, sinks=True, rotary=Rotary.Config(theta=100.0))
KINDS = {
    "windows in all layers": {"attention": SelfAttention.Config(**HEADS, window=6)},
    "windows and sinks in some": {
        "attention": SelfAttention.Config(**HEADS, sinks=True),
        "local_attention": WINDOWED,
        "local_layers": (0,),
    },
    "a scale": {"attention": SelfAttention.Config(**HEADS, scale=0.4)},
    "a temperature": {"attention": SelfAttention.Config(**HEADS, temperature_scale=0.7, temperature_length=5)},
    "latents": {"attention": LatentAttention.Config(num_heads=4, kv_rank=12, head_dim=8, rotary_dim=4, value_dim=8)},
}
PROMPTS = [[1, 2, 3], list(range(4, 23)), [9, 7, 9, 7, 5, 30, 31, 32], list(range(4, 20))]
# Behind every window, and several times the length of a temperature.
LENGTH = 20


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_model_alone(kind, tiny_model):
    model = tiny_model(vocab_size=64, init_std=0.4, **KINDS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sink" in name:
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
    llm = LLM(model, num_blocks=40, block_tokens=4, max_batched_tokens=11)
    answers = llm.generate(PROMPTS, Sampling(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logprobs=1))
    llm.close()
    alone = generate(model, PROMPTS, SamplingConfig(max_tokens=LENGTH, temperature=0))
    assert [list(answer.tokens) for answer in answers] == [list(tokens) for tokens in alone]
    assert len({tuple(answer.tokens) for answer in answers}) > 1

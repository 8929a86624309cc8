"""Decoders whose sequences are cut over ranks, with one rank: the same as without; and what cannot be cut."""

import pytest
import torch

from anabranch.cluster.ring import ContextParallel, Layout, RingOptions, ShardedCache, average_gradients
from anabranch.cluster.ring.layout import Placement
from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import SelfAttention, SwiGLU


def decoder(**attention) -> Decoder:
    return Decoder.Config(
        vocab_size=19,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, **attention),
        feed_forward=SwiGLU.Config(hidden_dim=24),
    ).build(seed=3)


def tokens(length: int = 11) -> torch.Tensor:
    return torch.randint(0, 19, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "attention",
    [{}, {"window": 3}, {"sinks": True}, {"scale": 0.4}, {"temperature_scale": 0.3, "temperature_length": 4}],
)
def test_loss_and_gradients_are_the_decoders(attention):
    """Also with windows, sinks and what else a scoring has."""
    plain, token = decoder(**attention), tokens()
    target = token.roll(-1, 1).masked_fill(torch.arange(11) == 4, -100)
    if attention.get("sinks"):
        with torch.no_grad():
            for block in plain.blocks:
                block.attention.sink_H.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    expected = plain(token, target)
    expected.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
    plain.zero_grad()
    cut = ContextParallel(plain)
    found = cut(token, target)
    found.loss.backward()
    average_gradients(cut)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.cross_entropy, expected.cross_entropy)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cut(token).logits_BLV, plain(token).logits_BLV.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [{}, {"window": 3}])
@pytest.mark.parametrize("chunk", [None, 4])
def test_generation_over_a_cut_cache_is_the_decoders(attention, chunk):
    plain, token = decoder(**attention), tokens()
    cache, made = plain.new_cache(32), []
    with torch.no_grad():
        logits = plain(token, cache=cache).logits_BLV[:, -1]
        for _ in range(6):
            made.append(logits.argmax(-1))
            logits = plain(made[-1][:, None], cache=cache).logits_BLV[:, -1]
    assert torch.equal(ContextParallel(plain).generate(token, 6, chunk=chunk), torch.stack(made, 1))


def test_sampling_with_stops_is_the_decoders():
    """Sequences that stop leave the cache."""
    plain, prompts = decoder(), tokens(5).tolist()
    alone = generate(plain, prompts, SamplingConfig(max_tokens=12, temperature=1.0, seed=1))
    stop = (alone[0][4],)
    config = SamplingConfig(max_tokens=12, temperature=1.0, seed=1, stop=stop)
    expected = generate(plain, prompts, config)
    assert len({len(made) for made in expected}) == 2
    assert generate(ContextParallel(plain), prompts, config) == expected


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_prompt_in_pieces_is_the_prompt(chunk):
    """Of a model that is sampled from as any other."""
    plain, prompts = decoder(), tokens(5).tolist()
    config = SamplingConfig(max_tokens=6, temperature=1.0, seed=1)
    cut, seen = ContextParallel(plain, chunk=chunk), []
    plain.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    made = generate(cut, prompts, config)
    assert max(seen) == chunk
    assert sum(seen) == 5 + 5
    assert made == generate(plain, prompts, config)


def test_pieces_of_nothing_are_refused():
    with pytest.raises(InputError, match="chunk is 0; use at least 1"):
        ContextParallel(decoder(), chunk=0)


def test_nats_of_tokens_are_those_of_the_logits():
    plain, token = decoder(), tokens()
    target = token.roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(
        plain(token).logits_BLV.flatten(0, 1), target.flatten(), reduction="none"
    )
    found = ContextParallel(plain).token_nats(token, target)
    torch.testing.assert_close(found, expected.detach().view(2, 11), atol=1e-5, rtol=1e-5)


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    cut, token = ContextParallel(decoder()), tokens()
    cache = cut.new_cache()
    cut.extend(token[:, :5], cache)
    block = cut.model.blocks[1]
    block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")), prepend=True)
    with pytest.raises(RuntimeError, match="no"):
        cut.extend(token[:, 5:7], cache)
    block._forward_pre_hooks.clear()
    found = cut.extend(token[:, 5:], cache)
    whole = ContextParallel(cut.model)
    torch.testing.assert_close(found, whole.extend(token, whole.new_cache()), atol=1e-5, rtol=1e-5)
    assert cache.length == 11


def test_a_full_cache_says_so_before_anything_runs():
    cache = ShardedCache(max_length=4)
    with pytest.raises(CapacityError, match="the cache holds 4 positions, but 5 are needed"):
        cache.begin(Layout("contiguous", 1, 5), is_cut=False)
    with pytest.raises(InputError, match="the new positions begin at 3, and the cache has 0"):
        cache.begin(Layout("contiguous", 1, 1, first=3), is_cut=False)
    with pytest.raises(ConfigError, match="call begin before a pass"):
        cache.attend(0, *(torch.zeros(1, 1, 1, 4),) * 3)


def test_decoded_positions_are_spread_over_the_ranks():
    """Each goes to the rank that has fewest, the first of these, so that no rank's memory fills before the others'."""
    cache = ShardedCache()
    cache.world, cache.placement = 3, Placement((2, 0, 1), ((), (), ()))
    held = []
    for position in range(6):
        cache.begin(Layout("contiguous", 1, 1, first=position), is_cut=False)
        cache.commit()
        held.append(cache.placement.rows)
    assert held == [(2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 2, 2), (3, 3, 2), (3, 3, 3)]
    assert [sum(len(run.positions) for run in runs) for runs in cache.placement.runs] == [1, 3, 2]


def test_recomputed_activations_give_the_same_gradients():
    plain, token = decoder(), tokens()
    grads = []
    for recompute in (False, True):
        plain.zero_grad()
        plain.recompute = recompute
        ContextParallel(plain)(token, token.roll(-1, 1)).loss.backward()
        grads.append([parameter.grad.clone() for parameter in plain.parameters()])
    torch.testing.assert_close(*grads)


def test_what_cannot_be_cut_is_said():
    with pytest.raises(ConfigError, match="Linear is neither a decoder of ours nor a model of transformers"):
        ContextParallel(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="layout is 'spiral'"):
        ContextParallel(decoder(), layout="spiral")
    cut = ContextParallel(decoder())
    with pytest.raises(InputError, match=r"tokens are \[11\]; they must be \[B, S\]"):
        cut(tokens()[0])
    with pytest.raises(InputError, match=r"tokens are \[2, 11\] and targets \[2, 10\]"):
        cut(tokens(), tokens(10))
    with pytest.raises(CapacityError, match="the cache holds 4 positions, but 11 are needed"):
        cut.extend(tokens(), cut.new_cache(4))
    with pytest.raises(ConfigError, match="prompts of different lengths are padded"):
        generate(cut, [[1, 2], [3]], SamplingConfig(max_tokens=2))
    with pytest.raises(ConfigError, match="set last_only"):
        cut(tokens(), cache=cut.new_cache())
    with pytest.raises(InputError, match="there are no tokens"):
        cut.extend(torch.zeros(1, 0, dtype=torch.int64), cut.new_cache())
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        cut.generate(tokens(), 0)
    assert RingOptions().scheme == "auto"


def llama(kind: str = "llama", **values):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        **values,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("kind", "values"), [("llama", {}), ("mistral", {"sliding_window": 3})])
def test_models_of_transformers_give_what_they_gave(kind, values):
    model, token = llama(kind, **values), tokens()
    expected = model(token, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), token[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    cut = ContextParallel(model)
    torch.testing.assert_close(cut(token).logits_BLV, expected.detach(), atol=1e-5, rtol=1e-5)
    target = torch.nn.functional.pad(token[:, 1:], (0, 1), value=-100)
    found = torch.autograd.grad(cut(token, target).loss, list(model.parameters()))
    torch.testing.assert_close(found, grads, atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="state is for decoders of ours"):
        cut(token, state={"a": 1})
    with pytest.raises(ConfigError, match="a cache that is cut over ranks is of decoders of ours"):
        cut.extend(token, cut.new_cache())


def test_what_transformers_does_to_scores_is_not_left_out_in_silence():
    model, token = llama(), tokens()
    model.config._attn_implementation = "eager"
    cut = ContextParallel(model)
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.5
    cut.train()
    with pytest.raises(ConfigError, match="LlamaAttention asks for dropout"):
        cut(token)
    other = llama()
    other.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="LlamaForCausalLM has layers of kind 'linear_attention'"):
        ContextParallel(other)
    mixed = llama()
    mixed.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigError, match="1 of 2 layers of LlamaForCausalLM asked for attention"):
        ContextParallel(mixed)(token)
    alone = llama()
    alone.set_attn_implementation("anabranch_ring")
    with pytest.raises(ConfigError, match="works inside of ContextParallel only"):
        alone(token)

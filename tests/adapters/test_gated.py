"""Gates of adapters and of virtual tokens (UniPELT): formulas by hand; the same in one pass, with a cache, padded, and served."""

import copy

import pytest
import torch
import torch.nn.functional as F

from anabranch.adapters import Front, save_peft
from anabranch.adapters.around import put_around, take_around
from anabranch.adapters.catalogue import apply
from anabranch.adapters.gated import GatedBottleneck, GatedLowRank
from anabranch.adapters.graft import layers_of
from anabranch.adapters.taking_in import can_take_in, take_in
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import LatentAttention, SelfAttention, SwiGLU
from anabranch.nn.linear import Added, Projection
from anabranch.serving import LLM, Sampling

CONFIG = Decoder.Config(
    vocab_size=61,
    dim=32,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
    init_std=0.3,
)
GREEDY = SamplingConfig(max_tokens=9, temperature=0)


def text(length, seed=0):
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def moved(model, names):
    """What learns is somewhere else now, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def unified(config=CONFIG):
    model = config.build(seed=1)
    applied = apply(model, "unipelt", tokens=5, rank=4, width=3)
    return moved(model, applied.trainable)


# Formulas


def built(config, width=8):
    model = Decoder.Config(
        vocab_size=5,
        dim=width,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=6),
        linears={"*.attention.q": config} if isinstance(config, GatedLowRank.Config) else {"*.down": config},
    ).build(seed=0)
    layer = next(iter(layers_of(model).values()))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, layer


@pytest.mark.parametrize("biased", [False, True])
def test_lora_behind_a_gate_by_hand(biased):
    model, layer = built(GatedLowRank.Config(rank=2, alpha=6.0, biased=biased))
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
    bias = layer.gate_bias if biased else 0.0
    gate = 1 / (1 + torch.exp(-(x @ layer.gate + bias)))
    torch.testing.assert_close(layer(x), gate[..., None] * 3 * (x @ layer.a.T @ layer.b.T))
    assert sum(one.numel() for one in layer.parameters()) == 2 * (8 + 8) + 8 + biased
    assert model.config.count().parameters == sum(one.numel() for one in model.parameters())


def test_a_bottleneck_behind_a_gate_by_hand():
    model, layer = built(GatedBottleneck.Config(width=3))
    assert model.config.count().parameters == sum(one.numel() for one in model.parameters())
    down = next(module for module in model.modules() if isinstance(module, Added))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(5))
    y = x @ down.matrix.weight.T
    made = F.relu(y @ layer.down.T + layer.down_bias) @ layer.up.T + layer.up_bias
    gate = 1 / (1 + torch.exp(-(y @ layer.gate + layer.gate_bias)))
    torch.testing.assert_close(down(x), y + gate[..., None] * made)


def test_gates_start_as_one_half():
    model = CONFIG.build(seed=1)
    applied = apply(model, "unipelt", tokens=5, rank=4, width=3)
    seen = []
    model.streams._gate = lambda layer, x, gate=model.streams._gate: seen.append(gate(layer, x)) or seen[-1]
    model(torch.tensor([text(4)]))
    assert len(seen) == 2
    assert all(bool((gate_BL == 0.5).all()) for gate_BL in seen)
    assert {kind.owner for kind in model.config.linears.values()} == {GatedLowRank, GatedBottleneck}
    assert {"streams.weight", "streams.gate_ND", "streams.gate_bias_N"} <= set(applied.trainable)


# Virtual tokens behind gates, in a model


@torch.no_grad()
def test_a_pass_a_cache_and_padding_compute_the_same():
    """Many queries at once, as heads twice as wide; few of them apart; and sequences of other lengths together."""
    model, ids = unified(), text(24)
    whole = model(torch.tensor([ids])).logits_BLV
    cache = model.new_cache(24)
    parts = [model(torch.tensor([piece]), cache=cache).logits_BLV for piece in (ids[:20], ids[20:21], ids[21:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    cache = model.new_cache(24)
    single = [model(torch.tensor([[token]]), cache=cache).logits_BLV for token in ids]
    torch.testing.assert_close(torch.cat(single, 1), whole, rtol=1e-4, atol=1e-4)
    for length in (3, 19):
        short = model(torch.tensor([ids[:length]])).logits_BLV
        padded = torch.tensor([ids, [0] * (24 - length) + ids[:length]])
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[1, : 24 - length] = False
        found = model(padded, token_mask_BL=mask).logits_BLV
        torch.testing.assert_close(found[1:, -length:], short, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:1], whole, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences_and_of_recomputation():
    model = unified().double()
    token_BL = torch.tensor([text(18)])
    model.train()

    def loss():
        return F.cross_entropy(model(token_BL).logits_BLV[0, :-1], token_BL[0, 1:])

    learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
    gradients = torch.autograd.grad(loss(), list(learning.values()))
    model.recompute = True
    again = torch.autograd.grad(loss(), list(learning.values()))
    model.recompute = False
    for name, one, other in zip(learning, gradients, again, strict=True):
        torch.testing.assert_close(one, other)
        place = int(one.abs().argmax())
        with torch.no_grad():
            flat = learning[name].view(-1)
            flat[place] += 1e-6
            above = loss()
            flat[place] -= 2e-6
            below = loss()
            flat[place] += 1e-6
        assert float((above - below) / 2e-6) == pytest.approx(float(one.view(-1)[place]), rel=1e-4), name


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_server_computes_what_the_model_does(deterministic):
    model, prompts = unified(), [text(30), text(3, 1), text(17, 2)]
    wanted = generate(model, prompts, GREEDY)
    assert wanted != generate(take_around(copy.deepcopy(model)), prompts, GREEDY)
    llm = LLM(model, num_blocks=60, block_tokens=4, deterministic=deterministic)
    sampling = Sampling(temperature=0.0, max_tokens=9, ignore_eos=True)
    assert [list(answer.tokens) for answer in llm.generate(prompts, sampling)] == wanted
    llm.close()


def test_gates_are_of_keys_and_of_plain_attention():
    with pytest.raises(ConfigError, match="gated is for keys and values, and of is 'embeddings'"):
        Front.Config(gated=True)
    latent = CONFIG.replace(
        attention=LatentAttention.Config(num_heads=2, kv_rank=8, q_rank=12, head_dim=8, rotary_dim=4)
    )
    model = latent.build(seed=0)
    with pytest.raises(ConfigError, match="attention of kind 'latent' knows no gates of virtual tokens"):
        put_around(model, front=Front.Config(of="keys", gated=True))
    assert model.streams is None
    model(torch.tensor([text(4)]))


def test_lora_behind_a_gate_is_taken_for_no_other(tmp_path):
    """No matrix takes it in, and no folder of peft's holds it without its gate."""
    model, layer = built(GatedLowRank.Config(rank=2))
    assert not can_take_in(layer)
    with pytest.raises(ConfigError, match="no matrix computes what a layer of kind 'gated_low_rank' does"):
        take_in(model)
    with pytest.raises(ConfigError, match="LoRA behind a gate is in no matrix, and in no adapter of peft's"):
        save_peft(tmp_path / "none", model)
    assert not (tmp_path / "none").exists()


def test_peft_has_no_such_adapter(tmp_path):
    model = put_around(CONFIG.build(seed=0), front=Front.Config(num_tokens=3, of="keys", gated=True))
    with pytest.raises(ConfigError, match="no adapter of peft's has gates of virtual tokens"):
        save_peft(tmp_path / "none", model)
    assert not (tmp_path / "none").exists()


def test_a_projection_is_all_that_a_gate_needs():
    """Built alone, as the linear seam builds it."""
    context = next(CONFIG.contexts(seed=0))
    layer = GatedBottleneck.Config(width=2).build(Projection("a.down", 6, 8, parts={"down": 8}), context)
    assert layer.gate.shape == (8,)
    assert not layer.up.any()

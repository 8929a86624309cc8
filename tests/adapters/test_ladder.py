"""The ladder: the formula by hand, no gradient through the model, and the same with a cache, recompute and a pool of experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from anabranch.adapters import catalogue
from anabranch.adapters.around import bare_config, bare_name, put_around, take_around
from anabranch.adapters.front import Front
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.block import PreNorm
from anabranch.train import DecoderTask, TaskContext, TrainConfig

CONFIG = Decoder.Config(
    vocab_size=61,
    dim=32,
    num_layers=3,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
)
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])


def laddered(config=CONFIG):
    """A model whose ladder has learned something."""
    model = put_around(config.build(seed=1), ladder=Ladder.Config(reduction=4, expansion=2), seed=2).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".rung." in name or name.endswith(".alpha"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model, token_BL):
    """The equations of the module, over the hidden states of the base."""
    base = take_around(copy.deepcopy(model))
    x_BLD, states = base.embed(token_BL), []
    context = base.context(token_BL)
    first = x_BLD
    for block in base.blocks:
        x_BLD = block(x_BLD, context)
        states.append(x_BLD)
    side = first @ model.blocks[0].rung["start"].weight.T
    for block, x in zip(model.blocks, states, strict=True):
        mu = 1 / (1 + torch.exp(-block.alpha / 0.1))
        mixed = mu * (x @ block.rung["down"].weight.T) + (1 - mu) * side
        gate, value = (block.rung["norm"](mixed) @ block.rung["wide"].weight.T).split(16, -1)
        side = mixed + (F.silu(gate) * value) @ block.rung["narrow"].weight.T
    last = model.blocks[-1].rung
    return base.logits(base.norm(states[-1] + last["end_norm"](side) @ last["up"].weight.T))


@torch.no_grad()
def test_the_formula_by_hand():
    model = laddered()
    torch.testing.assert_close(model(TOKENS).logits_BLV, by_hand(model, TOKENS), rtol=1e-5, atol=1e-5)


def test_no_gradient_goes_through_the_model():
    model = laddered()
    model.blocks[1].laddered.feed_forward.requires_grad_(True)
    model(TOKENS, target_BL=TOKENS).loss.backward()
    assert all(one.grad is None for one in model.blocks[1].laddered.parameters())
    assert all(one.grad.abs().sum() > 0 for name, one in model.named_parameters() if ".rung." in name)


@pytest.mark.slow
def test_activations_are_those_of_the_side_alone():
    """At most half of LoRA's, by what autograd keeps."""
    wide = CONFIG.replace(dim=256, num_layers=4, feed_forward=SwiGLU.Config(hidden_dim=768), vocab_size=257)
    token_BL = torch.arange(128).view(2, 64)

    def kept(id, **options):
        model = wide.build(seed=0).double()
        catalogue.apply(model, id, **options)
        model.double()
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            state = model.train()
            hidden = state.hidden(token_BL, state.context(token_BL))
        weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        assert hidden.requires_grad
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept("lst", reduction=8) <= 0.5 * kept("lora", rank=8, targets=("all",))


@torch.no_grad()
def test_a_cache_changes_nothing():
    model = laddered()
    cache = model.new_cache(16)
    parts = [model(TOKENS[:, :5], cache=cache).logits_BLV, model(TOKENS[:, 5:], cache=cache).logits_BLV]
    torch.testing.assert_close(torch.cat(parts, 1), model(TOKENS).logits_BLV, rtol=1e-5, atol=1e-5)
    alone = [generate(model, [row], SamplingConfig(max_tokens=4, temperature=0.0))[0] for row in ([3, 17, 60], [5, 22])]
    assert generate(model, [[3, 17, 60], [5, 22]], SamplingConfig(max_tokens=4, temperature=0.0)) == alone


def test_recompute_changes_nothing():
    plain, again = laddered(), laddered()
    again.recompute = True
    for model in (plain, again):
        model.train()(TOKENS, target_BL=TOKENS).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


@torch.no_grad()
def test_beside_experts_and_off_again():
    config = CONFIG.replace(feed_forward=MoE.Config(num_experts=4, hidden_dim=16))
    base = config.build(seed=1).eval()
    wanted = base(TOKENS).logits_BLV
    model = put_around(copy.deepcopy(base), ladder=Ladder.Config(reduction=4)).eval()
    # Zeros at first.
    assert torch.equal(model(TOKENS).logits_BLV, wanted)
    assert bare_config(model.config) == config
    assert {bare_name(name) for name in model.state_dict()} >= set(base.state_dict())
    assert torch.equal(take_around(model)(TOKENS).logits_BLV, wanted)
    assert model.config == config
    assert model.state_dict().keys() == base.state_dict().keys()


def test_numbers_that_are_counted_are_there():
    config = CONFIG.replace(block=Ladder.Config(inner=PreNorm.Config(), reduction=4, expansion=3))
    assert config.count().parameters == sum(one.numel() for one in config.build().parameters())


def test_two_of_them_are_refused():
    model = laddered()
    with pytest.raises(ConfigError, match="has a ladder already"):
        put_around(model, ladder=Ladder.Config())
    put_around(model, front=Front.Config(num_tokens=2))
    with pytest.raises(ConfigError, match="has streams already"):
        put_around(model, front=Front.Config(num_tokens=2))


def test_a_new_base_that_cannot_learn_is_told(caplog):
    """No gradient goes through a ladder, so that a run from nothing would leave what it wraps as it was drawn."""
    context = TaskContext(TrainConfig(steps=1, batch_size=1), batch_size=1)
    new = laddered().config
    DecoderTask(DecoderTask.Config(model=new)).build_model(context)
    assert "block is 'ladder', through which no gradient goes" in caplog.text
    assert "start from a trained model (--from)" in caplog.text
    caplog.clear()
    DecoderTask(DecoderTask.Config(model=new), model=laddered()).build_model(context)
    DecoderTask(DecoderTask.Config(model=bare_config(new))).build_model(context)
    assert not caplog.text


def test_what_was_written_without_an_axis_is_read(tmp_path):
    """Shards need one, and the number of a rung had none before."""
    model = laddered()
    write_own(tmp_path / "adapter", model)
    file = tmp_path / "adapter" / "adapter.safetensors"
    numbers = load_file(file)
    alphas = [name for name in numbers if name.endswith(".alpha")]
    assert len(alphas) == len(model.blocks)
    save_file(numbers | {name: torch.tensor(0.25 + place) for place, name in enumerate(alphas)}, file)
    again = read_own(tmp_path / "adapter", CONFIG.build(seed=1))
    assert [block.alpha.tolist() for block in again.blocks] == [[0.25], [1.25], [2.25]]

"""AdapterFusion: the formula by hand, what starts as the base, adapters that were trained apart, and what cannot be fused."""

import copy

import pytest
import torch
import torch.nn.functional as F

from anabranch.adapters import SerialBottleneck
from anabranch.adapters.adapt.fusing import FusionMethod
from anabranch.adapters.around import put_around
from anabranch.adapters.catalogue import apply
from anabranch.adapters.front import Front
from anabranch.adapters.fusion import AdapterFusion
from anabranch.adapters.graft import layers_of
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import put_on, take_off
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.linear import Added
from anabranch.serving import LLM, Sampling

CONFIG = Decoder.Config(
    vocab_size=61,
    dim=16,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4),
    feed_forward=SwiGLU.Config(hidden_dim=24),
    max_positions=64,
    init_std=0.3,
)
TOKENS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(4))


def learned(model, seed=3):
    """Layers beside matrices are somewhere else now, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits_BLV


def adapter(folder, width, seed, base=None, **changes):
    """One of the base that was trained alone."""
    model = copy.deepcopy(CONFIG.build(seed=0) if base is None else base)
    config = SerialBottleneck.Config(width=width, activation=changes.pop("activation", "relu"))
    put_on(model, dict.fromkeys(changes.pop("targets", ["*.down"]), config), seed=seed)
    write_own(folder, learned(model, seed))
    return logits(model)


@torch.no_grad()
def test_the_formula_by_hand():
    model = CONFIG.build(seed=0)
    put_on(model, {"*.down": AdapterFusion.Config(widths=(2, 5, 1), activation="gelu")})
    learned(model)
    down = next(module for module in model.blocks[1].modules() if isinstance(module, Added))
    layer = down.beside["down"]
    x = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(5))
    y = x @ down.matrix.weight.T
    parts, first = [], 0
    for number, width in enumerate((2, 5, 1)):
        own = slice(first, first + width)
        low = F.gelu(y @ layer.down[own].T + layer.down_bias[own])
        parts.append(low @ layer.up[:, own].T + layer.up_bias[number])
        first += width
    scores = torch.stack([((y @ layer.query.T) * (z @ layer.key.T)).sum(-1) for z in parts], -1)
    weights = scores.softmax(-1)
    mixed = sum(weights[..., [number]] * z for number, z in enumerate(parts))
    torch.testing.assert_close(down(x), y + mixed @ layer.value.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weights(y, layer.adapted(y)), weights)
    assert model.config.count().parameters == sum(one.numel() for one in model.parameters())


def test_it_starts_as_the_base_and_its_values_near_the_identity():
    base = CONFIG.build(seed=0).eval()
    model = copy.deepcopy(base)
    apply(model, "adapter-fusion", number=3, width=4)
    assert torch.equal(logits(model), logits(base))
    layer = layers_of(model)["blocks.0.feed_forward.down"]
    torch.testing.assert_close(layer.value.detach(), torch.eye(16), atol=1e-5, rtol=0)
    assert float(layer.query.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_values_are_kept_near_the_identity_in_training():
    """The mean over matrices of a hundredth of their squared distance."""
    model = CONFIG.build(seed=0)
    put_on(model, {"*.down": AdapterFusion.Config(widths=(2, 2), value_penalty=0.5)})
    learned(model).train()
    output = model(TOKENS, target_BL=TOKENS)
    apart = [float((layer.value.detach() - torch.eye(16)).square().sum()) for layer in layers_of(model).values()]
    assert float(output.auxiliary["fusion_value"]) == pytest.approx(0.5 * sum(apart) / 2, rel=1e-5)
    total = output.cross_entropy + output.auxiliary["fusion_value"]
    assert float(output.loss.detach()) == pytest.approx(float(total), rel=1e-6)
    # Of no tokens nothing is learned.
    assert model(TOKENS[:0], target_BL=TOKENS[:0]).loss == 0
    assert "fusion_value" not in model.eval()(TOKENS, target_BL=TOKENS).terms


def test_one_adapter_whose_values_are_the_identity_is_that_adapter(tmp_path):
    wanted = adapter(tmp_path / "a", 3, 1)
    model = FusionMethod.Config(adapters=(str(tmp_path / "a"),)).build().begin(CONFIG.build(seed=0), [], seed=0).eval()
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.value.copy_(torch.eye(16))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_adapters_that_were_trained_apart_stay_and_the_attention_alone_learns(tmp_path):
    adapter(tmp_path / "a", 3, 1)
    adapter(tmp_path / "b", 5, 2)
    base = CONFIG.build(seed=0).eval()
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    method = FusionMethod.Config(adapters=folders).build()
    model = method.begin(copy.deepcopy(base), ["one"], seed=7)
    learning = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name.rpartition(".")[2] for name in learning} == {"query", "key", "value"}
    assert len(learning) == 3 * 2
    layer = layers_of(model)["blocks.1.feed_forward.down"]
    for number, (folder, width) in enumerate(zip(folders, (3, 5), strict=True)):
        alone = read_own(folder, copy.deepcopy(base))
        other, first = layers_of(alone)["blocks.1.feed_forward.down"], 3 * number
        assert torch.equal(layer.down[first : first + width], other.down)
        assert torch.equal(layer.down_bias[first : first + width], other.down_bias)
        assert torch.equal(layer.up[:, first : first + width], other.up)
        assert torch.equal(layer.up_bias[number], other.up_bias)
    frozen = {name: one.detach().clone() for name, one in model.named_parameters() if not one.requires_grad}
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    before = float(model.train()(TOKENS, target_BL=TOKENS).loss.detach())
    for _ in range(5):
        optimizer.zero_grad()
        model(TOKENS, target_BL=TOKENS).loss.backward()
        assert all(model.get_parameter(name).grad.abs().max() > 0 for name in learning)
        optimizer.step()
    assert float(model(TOKENS, target_BL=TOKENS).loss.detach()) < before
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    # It is a folder of its own, which needs those of its adapters no more.
    model.eval()
    method.write(tmp_path / "fused", model, "base")
    for folder in folders:
        (tmp_path / folder / "adapter.safetensors").unlink()
    again = read_own(tmp_path / "fused", copy.deepcopy(base))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(take_off(again)), logits(base))


def test_it_generates_and_is_served_as_it_computes():
    model = learned(put_on(CONFIG.build(seed=0), {"*.down": AdapterFusion.Config(widths=(2, 3))}))
    prompts = [[1, 2, 3], list(range(20)), [7]]
    wanted = generate(model, prompts, SamplingConfig(max_tokens=8, temperature=0))
    for deterministic in (False, True):
        llm = LLM(model, num_blocks=60, block_tokens=4, deterministic=deterministic)
        sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
        assert [list(answer.tokens) for answer in llm.generate(prompts, sampling)] == wanted
        llm.close()


def test_experts_have_one_each():
    config = CONFIG.replace(feed_forward=MoE.Config(num_experts=4, hidden_dim=8))
    base = config.build(seed=0).eval()
    model = copy.deepcopy(base)
    applied = apply(model, "adapter-fusion", number=2, width=3)
    assert len(applied.matched) == 2 * 4
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(learned(model)), logits(base), atol=1e-3)


def fused(*folders, model=None):
    return (
        FusionMethod.Config(adapters=tuple(map(str, folders)))
        .build()
        .begin(CONFIG.build(seed=0) if model is None else model, [], seed=0)
    )


def test_what_cannot_be_fused_leaves_the_model_as_it_was(tmp_path):
    adapter(tmp_path / "a", 3, 1)
    adapter(tmp_path / "more", 3, 1, targets=["*.down", "*.o"])
    adapter(tmp_path / "bent", 3, 1, activation="tanh")
    adapter(tmp_path / "elsewhere", 3, 1, base=CONFIG.build(seed=9))
    other = CONFIG.build(seed=0)
    apply(other, "adapter-parallel", width=2)
    write_own(tmp_path / "parallel", other)
    front = put_around(CONFIG.build(seed=0), front=Front.Config(num_tokens=2, of="keys"))
    write_own(tmp_path / "front", front)
    with pytest.raises(ConfigError, match="adapters is empty; name at least one folder"):
        FusionMethod.Config(adapters=())
    model = CONFIG.build(seed=0)
    before, learning = logits(model), [one.requires_grad for one in model.parameters()]
    for folders, error, message in (
        (
            ["a", "more"],
            ConfigError,
            r"more and \S+a are not behind the same matrices: one of them has blocks\.0\.attention\.o",
        ),
        (["a", "bent"], ConfigError, "bent has activation 'tanh' and .* 'relu'"),
        (["a", "parallel"], ConfigError, "parallel is bottleneck, and what is fused are bottlenecks in series"),
        (["front"], ConfigError, "front is front, and what is fused"),
        (["a", "elsewhere"], CheckpointError, "elsewhere was trained on another base"),
        (["a", "nowhere"], CheckpointError, "no adapter of anabranch's in"),
    ):
        with pytest.raises(error, match=message):
            fused(*(tmp_path / folder for folder in folders), model=model)
        assert torch.equal(logits(model), before)
        assert [one.requires_grad for one in model.parameters()] == learning
        assert not model.config.linears

"""SparseAdapter: what is kept by hand, scores against gradients, and runs that prune by their first batch."""

import json

import pytest
import torch
import torch.nn.functional as F

from anabranch.adapters import catalogue
from anabranch.adapters.adapt import AdaptTask, method_named
from anabranch.adapters.graft import layers_of
from anabranch.adapters.sparse_bottleneck import SparseBottleneck, kept_weights, snip
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=32,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
    init_std=0.2,
)
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])


def model_of(**options):
    model = CONFIG.build(seed=1)
    return model, catalogue.apply(
        model, "sparse-adapter", seed=3, **{"width": 16, "sparsity": 0.75, "targets": ("down",), **options}
    )


def dense_of(layer):
    """(D, U) with zeros where weights were pruned."""
    flat = torch.zeros(2 * 16 * 32)
    flat[layer.index] = layer.value.detach()
    return flat[: 16 * 32].view(16, 32), flat[16 * 32 :].view(32, 16)


def test_it_is_a_bottleneck_with_zeros():
    model, applied = model_of()
    layer = layers_of(model)["blocks.0.feed_forward.down"]
    assert isinstance(layer, SparseBottleneck)
    assert len(layer.value) == kept_weights(16, 32, 0.75) == 256
    with torch.no_grad():
        layer.up_bias.normal_(generator=torch.Generator().manual_seed(1))
    y, (down, up) = torch.randn(3, 32), dense_of(layer)
    torch.testing.assert_close(layer.made(y), F.relu(y @ down.T + layer.down_bias) @ up.T + layer.up_bias)
    assert applied.num_trainable == 2 * (256 + 16 + 32)
    # Nothing is scored yet: the largest of what was drawn.
    assert layer.value.detach().abs().min() >= 0.02


def test_scores_are_weights_times_their_gradients():
    model, _ = model_of()
    layers = list(layers_of(model).values())
    drawn = [layer._drawn_W.clone() for layer in layers]

    def losses():
        yield model(TOKENS[:1], target_BL=TOKENS[:1]).loss
        yield model(TOKENS[1:], target_BL=TOKENS[1:]).loss

    snip(model, losses())
    for layer, weights in zip(layers, drawn, strict=True):
        assert torch.equal(layer.value.detach(), weights[layer.index])
        with pytest.raises(ConfigError, match="has been pruned"):
            layer.score()
    other, _ = model_of()
    found = list(layers_of(other).values())
    scored = [layer.score() for layer in found]
    total = sum(
        model_loss
        for model_loss in (other(TOKENS[:1], target_BL=TOKENS[:1]).loss, other(TOKENS[1:], target_BL=TOKENS[1:]).loss)
    )
    for layer, weights, gradient in zip(layers, drawn, torch.autograd.grad(total, scored), strict=True):
        score = (weights * gradient).abs()
        kept = torch.zeros_like(score, dtype=torch.bool)
        kept[layer.index] = True
        assert score[kept].min() >= score[~kept].max() * (1 - 1e-4)
        assert not torch.equal(layer.index, weights.abs().topk(256).indices.sort().values)


def test_what_cannot_be():
    for options, says in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": "x"}, "sparsity"),
        ({"width": 0}, "width"),
    ):
        with pytest.raises(ConfigError, match=says):
            model_of(**options)
    model, _ = model_of()
    layer = layers_of(model)["blocks.0.feed_forward.down"]
    with pytest.raises(ConfigError, match=r"there are scores of \[3\]"):
        layer.prune(torch.ones(3))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    save_model(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    rows = [{"task": "back", "input": word, "output": word[::-1]} for word in "ab cde fghi jk lmnop q rst uv".split()]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run_of(place, **changes):
    method = method_named("sparse-adapter").replace(width=16, sparsity=0.9)
    task = AdaptTask.Config(model=str(place / "base"), data=str(place / "rows.jsonl"), method=method, held_out=0.0)
    train = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "schedule": Constant.Config(),
        "device": "cpu",
        "checkpoint_every": None,
    }
    return TaskRunConfig(task=task, train=TrainConfig(**{**train, **changes}))


def test_a_run_prunes_by_its_first_batch_and_goes_on_to_the_bit(place, tmp_path):
    whole = Trainer(run_of(place), tmp_path / "whole")
    base = whole.task.base
    begun = {name: value.clone() for name, value in base.state_dict().items() if name.endswith("index")}
    by_size = CONFIG.build(seed=1)
    catalogue.apply(by_size, "sparse-adapter", seed=0, width=16, sparsity=0.9)
    assert any(not torch.equal(value, by_size.state_dict()[name]) for name, value in begun.items())
    whole.fit()
    state = base.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in begun.items())
    Trainer(run_of(place, steps=2), tmp_path / "part").fit()
    again = Trainer(run_of(place), tmp_path / "part", resume=True)
    again.fit()
    for name in whole.task.method.kept(base):
        assert torch.equal(state[name], again.task.base.state_dict()[name]), name
    # And from its folder.
    from anabranch.adapters.own_folder import read_own

    whole.task.method.write(tmp_path / "adapter", base, "base")
    model, _ = load_model(place / "base")
    read_own(tmp_path / "adapter", model)
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits_BLV, base.eval()(TOKENS).logits_BLV)

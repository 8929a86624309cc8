"""S4: its groups by hand; prefixes of some layers alone against a model of one layer; cached, padded, stored and served."""

import json

import pytest
import torch

from anabranch.adapters import Front, LowRank, SerialBottleneck
from anabranch.adapters.adapt import AdaptTask, method_named
from anabranch.adapters.after import Shift
from anabranch.adapters.around import put_around
from anabranch.adapters.catalogue import Shape, apply, estimate, find
from anabranch.adapters.design_space import GROUPS, group_of, layer_at, prefixed
from anabranch.adapters.graft import layers_of
from anabranch.adapters.own_folder import read_own
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, SamplingConfig, generate, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.serving import LLM, Sampling
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=32,
    num_layers=6,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
    init_std=0.2,
)
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41, 7, 1], [9, 5, 22, 1, 59, 30, 2, 2]])
SIZES = {"tokens": 5, "rank": 2, "width": 3}


def moved(model):
    """What learns is somewhere else now, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def designed(config=CONFIG):
    model = config.build(seed=1)
    apply(model, "s4", seed=2, **SIZES)
    return moved(model)


def test_groups_are_a_spindle():
    assert [group_of(layer, 12) for layer in range(12)] == [0] * 2 + [1] * 4 + [2] * 4 + [3] * 2
    assert [group_of(layer, 6) for layer in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [group_of(layer, 2) for layer in range(2)] == [1, 2]
    assert prefixed(6) == (1, 2, 3, 4, 5)
    assert [sorted(group) for group in GROUPS] == [["A", "L"], ["A", "P"], ["A", "B", "P"], ["B", "L", "P"]]


def test_what_stands_where():
    layers = layers_of(designed())
    kinds = {}
    for part, layer in layers.items():
        kinds.setdefault(int(part.split(".")[1]), {})[part.rpartition(".")[2]] = type(layer)
    assert kinds[0] == {"q": LowRank, "v": LowRank, "o": SerialBottleneck, "down": SerialBottleneck}
    assert kinds[1] == kinds[2] == {"o": SerialBottleneck, "down": SerialBottleneck}
    rest = dict.fromkeys(("q", "k", "v", "gate", "up"), Shift)
    assert kinds[3] == kinds[4] == {**rest, "o": SerialBottleneck, "down": SerialBottleneck}
    assert kinds[5] == {"q": LowRank, "v": LowRank, **dict.fromkeys(("k", "o", "gate", "up", "down"), Shift)}
    assert layer_at("k", 0, 6, {}) is None


def test_what_learns_by_hand():
    serial, prefix = 2 * 32 * 3 + 32 + 3, 2 * 5 * 16
    lora = 2 * (32 + 32) + 2 * (32 + 16)
    shifts = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}
    inner = shifts["q"] + shifts["k"] + shifts["v"] + shifts["gate"] + shifts["up"]
    last = shifts["k"] + shifts["o"] + shifts["gate"] + shifts["up"] + shifts["down"]
    wanted = 2 * lora + 5 * 2 * serial + 5 * prefix + 2 * inner + last
    found = estimate(find("s4"), Shape.of(CONFIG), SIZES)
    assert found.trainable == wanted
    assert len(found.matched) == len(layers_of(designed())) == 4 + 2 * 2 + 2 * 7 + 7


def test_a_shift_is_added():
    model = designed()
    layer = layers_of(model)["blocks.3.feed_forward.up"]
    y = torch.randn(2, 48)
    torch.testing.assert_close(layer.around(type("Rows", (), {"y": y})()), y + layer.shift)


# Prefixes of some layers


def with_front(layers, config=CONFIG, tokens=5):
    front = Front.Config(num_tokens=tokens, of="keys", layers=layers)
    return moved(put_around(config.build(seed=1), front=front, seed=4))


def logits(model, token_BL=TOKENS, **options):
    with torch.no_grad():
        return model.eval()(token_BL, **options).logits_BLV


def test_a_layer_without_a_prefix_meets_none():
    """Two layers of which the second has one, against the first alone, and then the second as a whole model on what the first made."""
    config = CONFIG.replace(num_layers=2)
    model = with_front((1,), config)
    plain = config.replace(num_layers=1).build(seed=1)
    plain.embedding, plain.blocks[0] = model.embedding, model.blocks[0]
    context = plain.context(TOKENS)
    with torch.no_grad():
        x_BLD = plain.blocks[0](plain.embed(TOKENS), context)
    second = config.replace(num_layers=1, vocab_size=TOKENS.numel(), tie_embeddings=False).build(seed=1)
    second = put_around(second, front=Front.Config(num_tokens=5, of="keys"), seed=4).eval()
    second.blocks[0], second.norm = model.blocks[1], model.norm
    second.blocks[0].attention.layer = 0
    with torch.no_grad():
        second.streams.weight.copy_(model.streams.weight)
        second.embedding.weight.copy_(x_BLD.flatten(0, 1))
        place_BL = torch.arange(TOKENS.numel()).view_as(TOKENS)
        found = second.hidden(place_BL, second.context(place_BL))
        second.blocks[0].attention.layer = 1
        wanted = model.hidden(TOKENS, model.context(TOKENS))
    torch.testing.assert_close(wanted, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1, 4), (5,)])
def test_all_ways_to_compute_agree(layers, tmp_path):
    model = with_front(layers)
    whole = logits(model)
    assert not torch.allclose(whole, logits(with_front((2, 3))), atol=1e-3)
    # With a cache, in a prompt of many and then single tokens.
    cache = model.new_cache(16)
    parts = [logits(model, TOKENS[:, :5], cache=cache)]
    parts += [logits(model, TOKENS[:, place : place + 1], cache=cache) for place in range(5, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    # Behind padding.
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), TOKENS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)], 1)
    torch.testing.assert_close(logits(model, padded, token_mask_BL=mask)[:, 3:], whole, rtol=1e-4, atol=1e-4)
    # Stored.
    save_model(tmp_path / "m", model)
    assert torch.equal(logits(load_model(tmp_path / "m")[0]), whole)


def test_it_is_served_as_it_is_generated(tmp_path):
    model = designed()
    save_model(tmp_path / "m", model, ByteTokenizer.Config().build())
    prompts = [TOKENS[0].tolist(), TOKENS[1, :3].tolist()]
    wanted = generate(model, prompts, SamplingConfig(max_tokens=9, temperature=0))
    llm = LLM(tmp_path / "m", dtype="float32", num_blocks=30)
    found = llm.generate([tuple(one) for one in prompts], Sampling(max_tokens=9, temperature=0, ignore_eos=True))
    llm.close()
    assert [list(one.tokens) for one in found] == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": (1,), "of": "embeddings"}, "layers is for keys and values without gates"),
        ({"layers": (1,), "of": "keys", "gated": True}, "layers is for keys and values without gates"),
        ({"layers": (2, 1), "of": "keys"}, r"layers is \[2, 1\]; they must be ascending numbers from 0"),
        ({"layers": (1, 1), "of": "keys"}, "ascending"),
        ({"layers": (-1,), "of": "keys"}, "ascending"),
        ({"layers": (), "of": "keys"}, "layers"),
    ],
)
def test_layers_that_cannot_be(options, says):
    with pytest.raises(ConfigError, match=says):
        Front.Config(num_tokens=3, **options)


def test_a_layer_that_the_model_has_not_is_told():
    model = CONFIG.build(seed=1)
    with pytest.raises(ConfigError, match="layers has 6, and the model has 0 to 5"):
        put_around(model, front=Front.Config(num_tokens=3, of="keys", layers=(1, 6)))
    with pytest.raises(ConfigError, match="no adapter of peft's has virtual tokens of some layers alone"):
        with_front((1,)).streams.described(CONFIG)


# From rows to a folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("s4")
    save_model(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    rows = [{"task": "back", "input": word, "output": word[::-1]} for word in "ab cde fghi jk lmnop q rst uv".split()]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_it_is_trained_and_read_back(place, tmp_path):
    method = method_named("s4").replace(tokens=4, rank=2, width=3)
    task = AdaptTask.Config(model=str(place / "base"), data=str(place / "rows.jsonl"), method=method, held_out=0.0)

    def run_of(steps):
        train = TrainConfig(
            steps=steps,
            batch_size=4,
            learning_rate=1e-2,
            schedule=Constant.Config(),
            device="cpu",
            checkpoint_every=None,
        )
        return TaskRunConfig(task=task, train=train)

    whole = Trainer(run_of(4), tmp_path / "whole")
    whole.fit()
    Trainer(run_of(2), tmp_path / "part").fit()
    again = Trainer(run_of(4), tmp_path / "part", resume=True)
    again.fit()
    base = whole.task.base
    for name in whole.task.method.kept(base):
        assert torch.equal(base.state_dict()[name], again.task.base.state_dict()[name]), name
    model, _ = load_model(place / "base")
    read_own(whole.task.write(tmp_path / "adapter").folder, model)
    assert torch.equal(logits(model), logits(base))

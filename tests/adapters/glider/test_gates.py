"""PHATGOOSE's gates: the layer by hand, training by the command's own machinery, what is written."""

import pytest
import torch
import torch.nn.functional as F

from adapter_models import ATTENTION, TOKENS, linear_layers, make_adapter, make_base
from anabranch.adapters import load_peft, read_peft
from anabranch.adapters.attached import attached_on
from anabranch.adapters.glider import GatedLowRank, GateMethod, GliderPool, describe_expert
from anabranch.adapters.glider.folder import read_described
from anabranch.adapters.graft import layers_of
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import load_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("gates")
    base = make_base(place / "base", "llama")
    make_adapter(place / "one", linear_layers(base, ATTENTION), seed="a", rank=3)
    make_adapter(place / "rs", linear_layers(base, ATTENTION), seed="a", rank=3, use_rslora=True)
    describe_expert(place / "one", instruction=["Say it.", "Tell it."])
    return place


def begun(root, folder="one"):
    method = GateMethod.Config(adapter=str(root / folder)).build()
    return method, method.begin(load_model(root / "base")[0], ["t"], seed=0).eval()


def run(model):
    return model(TOKENS).logits_BLV


@pytest.mark.parametrize("folder", ["one", "rs"])
def test_only_gates_learn_and_begin_at_a_half(root, folder):
    _, model = begun(root, folder)
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.endswith(".gate") for name in learned)
    assert len(learned) == len(layers_of(model)) == 8
    layer = layers_of(model)["blocks.0.attention.q"]
    assert isinstance(layer, GatedLowRank)
    pair = read_peft(root / folder).pairs["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 5, 32)
    assert torch.allclose(layer(x), 0.5 * F.linear(x, layer.delta()), atol=1e-5)
    assert layer.scale == pytest.approx(pair.scale)
    layer.gate.data = torch.randn(32)
    expected = (x @ layer.gate).sigmoid().unsqueeze(-1) * pair.scale * (x @ pair.a_RC.T @ pair.b_OR.T)
    # Llama's queries stand in the order of files.
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("folder", ["one", "rs"])
def test_gates_wide_open_are_the_adapter(root, folder):
    _, model = begun(root, folder)
    plain = load_peft(root / folder, load_model(root / "base")[0].eval())
    hooks = [layer.register_forward_hook(lambda _, args, y: 2 * y) for layer in layers_of(model).values()]
    with torch.no_grad():
        assert torch.allclose(run(model), run(plain), atol=1e-5)
    assert len(hooks) == 8


def test_gates_get_gradients_and_nothing_else(root):
    _, model = begun(root)
    F.cross_entropy(run(model).flatten(0, 1), TOKENS.flatten()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == 8
    assert all(grad.any() for grad in found.values())


def test_what_is_written_is_the_adapter_with_gates(root, tmp_path):
    method, model = begun(root)
    for number, layer in enumerate(layers_of(model).values()):
        layer.gate.data += torch.randn(32, generator=torch.Generator().manual_seed(number))
    for _ in range(2):
        written = method.write(tmp_path / "out", model, "base")
    assert written.form == "peft"
    before, after = read_peft(root / "one"), read_peft(tmp_path / "out")
    assert before.table == after.table
    assert all(torch.equal(before.tensors()[name], tensor) for name, tensor in after.tensors().items())
    described = read_described(tmp_path / "out")
    assert described.instructions == ("Say it.", "Tell it.")
    places = attached_on(model).names.places
    assert set(described.gates) == set(before.pairs)
    for module, gate_C in described.gates.items():
        assert torch.equal(gate_C, layers_of(model)[places[module].part].gate)
    pool = GliderPool.load(tmp_path)
    pool.onto(load_model(root / "base")[0])
    assert not pool.layers()["blocks.0.attention.q"].router.score.unsigned_E.any()


def test_what_has_no_gate_is_told(root, tmp_path):
    base = load_model(root / "base")[0]
    with pytest.raises(ConfigError, match="needs an adapter to train gates of"):
        GateMethod.Config().build().begin(base, [], seed=0)
    with pytest.raises(CheckpointError, match="no adapter at"):
        GateMethod.Config(adapter=str(tmp_path / "x")).build().begin(base, [], seed=0)
    _, gated = begun(root)
    with pytest.raises(ConfigError, match="the model has an adapter already; unload it first"):
        GateMethod.Config(adapter=str(root / "one")).build().begin(gated, [], seed=0)
    head = {"lm_head.weight": torch.zeros(61, 32)}
    layers = {"model.layers.0.self_attn.q_proj": (32, 32)}
    make_adapter(tmp_path / "whole", layers, extra=head, modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="which has no gate"):
        GateMethod.Config(adapter=str(tmp_path / "whole")).build().begin(base, [], seed=0)
    with pytest.raises(CheckpointError, match=r"it holds no adapter_config\.json, and is a pool"):
        describe_expert(tmp_path, instruction="x")


def test_experts_that_nothing_can_stand_beside_are_told_before_anything_changes(tmp_path):
    base = make_base(tmp_path / "base", "olmoe")
    make_adapter(tmp_path / "a", linear_layers(base, ["q_proj", "down_proj"]))
    model = load_model(tmp_path / "base")[0]
    for block in model.blocks:
        block.feed_forward.experts.exchange = lambda *_: None
    with pytest.raises(ConfigError, match="are a ExpertPool, which nothing can stand beside"):
        GateMethod.Config(adapter=str(tmp_path / "a")).build().begin(model, [], seed=0)
    assert not model.config.linears
    assert all(parameter.requires_grad for parameter in model.parameters())

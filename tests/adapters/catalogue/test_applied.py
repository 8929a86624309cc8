"""What was put on is saved and read with care: of this base, whole, and finite; a merge that cannot be changes nothing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import CONFIGS, TOKENS, drawn, logits
from anabranch.adapters import catalogue
from anabranch.adapters.catalogue.applied import TABLE, WEIGHTS
from anabranch.adapters.catalogue.table import CARDS
from anabranch.adapters.graft import layers_of
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.nn.nf4 import quantize_nf4
from anabranch.nn.quantize import quantize
from anabranch.routing import BiasBalancer, RateBalance, Router, RoutingContext, TopK
from anabranch.train.hooks import StepHooks
from with_peft import needs_peft

TRAIN_THE_BASE = [id for id, card in CARDS.items() if card.trains_base and card.backend == "own"]


def routed():
    """Whose routers have biases and rates that move."""
    balanced = Router.Config(
        select=TopK.Config(top_k=1), balance=(BiasBalancer.Config(), RateBalance.Config(target=0.9))
    )
    return Decoder.Config(
        vocab_size=CONFIGS["llama"]().vocab_size,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, qkv_bias=True),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=balanced),
        max_positions=64,
    ).build(seed=1)


@pytest.fixture(scope="module")
def base():
    model = CONFIGS["llama"]().build()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(drawn(name, tensor.shape))
    return model


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def test_mixlora_gives_its_best_their_share_and_is_punished_for_uneven_loads(model):
    """Weights of the two best are those of their softmax over the two (arXiv 2404.15159); molora's are of all, without a loss."""
    losses = {}
    for method, options in (("mixlora", {"number": 4, "active": 2}), ("molora", {"number": 4})):
        put = copy.deepcopy(model)
        catalogue.apply(put, method, rank=2, **options)
        routers = [layer.router for layer in layers_of(put).values()]
        x, context = drawn("x", (7, routers[0].score.weight.shape[1])), RoutingContext(training=True)
        routing = routers[0].train()(x, context)
        used = 2 if method == "mixlora" else 4
        logit = x @ routers[0].score.weight.T
        wanted = logit.topk(used).values.softmax(-1)
        torch.testing.assert_close(routing.weight_NK.sort(descending=True).values, wanted.sort(descending=True).values)
        losses[method] = {name: float(loss.detach()) for name, loss in context.mean_losses().items()}
        if method == "mixlora":
            share, load = logit.detach().softmax(-1).mean(0), routing.load_E() / routing.load_E().sum()
            assert sum(losses[method].values()) == pytest.approx(0.01 * 4 * float((share * load).sum()), rel=1e-4)
    assert losses["molora"] == {}


@pytest.fixture
def folder(model, tmp_path):
    """With SHiRA of the base."""
    applied = catalogue.apply(model, "shira", rank=2)
    with torch.no_grad():
        for name in applied.trainable:
            model.get_parameter(name).normal_()
    applied.save(tmp_path / "saved")
    applied.remove()
    return tmp_path / "saved"


def table(**fields):
    def change(folder):
        path = folder / TABLE
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def tensors(ending, change):
    def apply(folder):
        held = load_file(folder / WEIGHTS)
        for name in [name for name in held if name.endswith(ending)]:
            held[name] = change(held[name])
        save_file(held, folder / WEIGHTS)

    return apply


def swapped(index):
    index = index.clone()
    index[:2] = index[:2].flip(0)
    return index


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / TABLE).unlink(), "it holds no catalogue_adapter.json"),
        (table(method="no"), "names method 'no', of which there is no card"),
        (table(method=["lora"]), "of which there is no card"),
        (table(options=[1]), "or has no options"),
        (table(options={"rank": 0}), "rank of shira is 0"),
        (table(options={"rank": 10**6}), r"does not hold the \d+ numbers that its options say"),
        (table(options={"rank": 1}), "does not hold what its options say"),
        (table(base="0123"), "is of another base"),
        (tensors("value", lambda value: value * torch.nan), "holds NaN or infinity in"),
        (tensors("index", lambda index: index + 10**6), "names places of .* that the matrix has not"),
        (tensors("index", lambda index: index - 10**6), "names places of .* that the matrix has not"),
        (tensors("index", swapped), "or not in order"),
        (tensors("index", lambda index: index.int()), "names places of"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS),
        (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    ],
)
def test_a_folder_that_is_wrong_changes_nothing(folder, model, spoil, message):
    spoil(folder)
    before, learned = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((CheckpointError, ConfigError), match=message):
        catalogue.load_applied(folder, model)
    assert torch.equal(logits(model), before)
    assert not model.config.linears
    assert [parameter.requires_grad for parameter in model.parameters()] == learned


def test_an_adapter_of_another_base(folder):
    other = CONFIGS["llama"]().replace(num_layers=3).build()
    with pytest.raises(CheckpointError, match="is of another base: a model of other sizes or parts"):
        catalogue.load_applied(folder, other)


def test_a_folder_of_other_things_stays(model, tmp_path):
    (tmp_path / "novel.txt").write_text("years of work")
    with pytest.raises(DataError):
        catalogue.apply(model, "lora").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["novel.txt"]


def test_a_merge_that_a_type_cannot_hold_changes_nothing(model):
    model.half()
    applied = catalogue.apply(model, "lora", targets=("q",))
    last = layers_of(model)["blocks.1.attention.q"]
    with torch.no_grad():
        last.b.fill_(1e6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"blocks\.1\.attention\.q with what was learned has numbers that float16 cannot hold"
    ):
        applied.merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_shift_without_a_bias_is_not_lost(model):
    applied = catalogue.apply(model, "ssf", targets=("q",))
    with torch.no_grad():
        layers_of(model)["blocks.0.attention.q"].factor.fill_(2.0)
        layers_of(model)["blocks.1.attention.q"].shift.fill_(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="the matrix has no bias to take it in"):
        applied.merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        layers_of(model)["blocks.1.attention.q"].shift.zero_()
    found = logits(model)
    torch.testing.assert_close(logits(applied.merge()), found, rtol=1e-5, atol=1e-5)


def test_the_base_that_was_trained_is_not_given_back(model):
    applied = catalogue.apply(model, "attention-tuning")
    with pytest.raises(ConfigError, match="trains the model's own matrices; load the model again"):
        applied.remove()


@pytest.mark.parametrize("id", TRAIN_THE_BASE)
def test_what_moves_in_the_base_is_the_method_s_too(id, tmp_path):
    """Biases and rates of routers: they go where it goes, and are as they were where it is taken off."""
    model = routed().train()
    before, begun = {name: value.clone() for name, value in model.state_dict().items()}, routed()
    applied = catalogue.apply(model, id)
    StepHooks(model, 3).run_after(0)
    for step in range(1, 4):
        model(TOKENS, TOKENS)
        StepHooks(model, 3).run_after(step)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # Nothing has learned, so that this is all.
    assert moved
    assert moved.isdisjoint(dict(model.named_parameters()))
    assert moved <= applied.state().keys()
    applied.save(tmp_path / "saved")
    catalogue.load_applied(tmp_path / "saved", begun)
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in model.state_dict().items())
    if id in ("attention-tuning", "full"):
        return
    applied.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_matrices_in_few_bits_are_not_what_moves():
    model = CONFIGS["qwen2"]().build()
    quantize_nf4(model)
    applied = catalogue.apply(model, "ln-tuning")
    assert applied.state().keys() == set(applied.trainable)


def test_matrices_of_one_size_have_places_of_their_own(model):
    catalogue.apply(model, "intrinsic", size=16, targets=("q", "o"))
    layers = layers_of(model)
    shared = {id(layer.shared) for layer in layers.values()}
    assert len(shared) == 1
    with torch.no_grad():
        next(iter(layers.values())).shared.z.copy_(torch.arange(1.0, 17))
        deltas = [layer.delta() for layer in layers.values()]
    assert all(not torch.equal(deltas[0], other) for other in deltas[1:])
    # Every number of z is used about as often, with either sign.
    used = deltas[0].abs().unique(return_counts=True)[1]
    assert len(used) == 16
    assert used.max() < 3 * used.min()
    assert 0.4 < float((deltas[0] > 0).float().mean()) < 0.6


def test_a_pass_learns_by_what_it_was_told(model):
    """The state of a model with a method on it goes through the trainer's door as any other: a step lowers the loss."""
    applied = catalogue.apply(model, "lora", rank=4, targets=("all",))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model.train()(TOKENS, target_BL=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert applied.num_trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)


@needs_peft
@pytest.mark.filterwarnings("ignore")
def test_peft_is_told_what_a_card_says():
    assert catalogue.peft_config("rslora", {"rank": 5}).use_rslora
    assert catalogue.peft_config("rslora", {"rank": 5}).r == 5
    assert catalogue.peft_config("dora").use_dora
    assert catalogue.peft_config("lora", {"targets": ("q", "down"), "alpha": 3.0}).target_modules == {
        "q_proj",
        "down_proj",
    }
    assert catalogue.peft_config("lora", {"targets": ("all",)}).target_modules == "all-linear"
    assert catalogue.peft_config("ia3").feedforward_modules == {"down_proj"}
    assert catalogue.peft_config("oft", {"block": 16}).oft_block_size == 16
    assert catalogue.peft_config("p-tuning", {"hidden": 7}).encoder_hidden_size == 7
    for id, message in (
        ("mezo", "is not run through peft"),
        ("bitfit", "apply puts it onto a model of ours"),
        ("eva", "needs batches of data"),
    ):
        with pytest.raises(ConfigError, match=message):
            catalogue.peft_config(id)


@pytest.mark.parametrize("bits", ["int8", "int4", "nf4"])
@pytest.mark.parametrize(
    ("id", "what"),
    [
        ("bitfit", "would train nothing"),
        ("attention-tuning", "would train nothing"),
        ("full", r"would train [\d,]+ of its 17,600 numbers"),
    ],
)
def test_what_trains_the_base_is_not_put_onto_few_bits(id, what, bits):
    """They trained what was left, or nothing; a run ended with a message that named classes of ours."""
    model = CONFIGS["qwen2"]().build()
    quantize_nf4(model) if bits == "nf4" else quantize(model, bits)
    wanted = {name: one.requires_grad for name, one in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=f"{id} {what}: matrices of this model are in few bits, in which .* or a method whose layers"
    ):
        catalogue.apply(model, id)
    assert {name: one.requires_grad for name, one in model.named_parameters()} == wanted
    # Norms are no matrices.
    assert catalogue.apply(model, "ln-tuning").num_trainable == 160

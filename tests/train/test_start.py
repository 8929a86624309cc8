"""Runs that start from the weights of another model: every recipe by the design it leads to."""

import json

import pytest
import torch

from anabranch import presets
from anabranch.config import override
from anabranch.data import ByteTokenizer, Files, train_bpe
from anabranch.errors import ConfigError, TokenizerError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.lm.recipes import kept_fields
from anabranch.nn import SwiGLU
from anabranch.train import RunConfig, Trainer, read_run_config
from anabranch.train.start import keep_tokenizer, resumed_parts, start_run

ROUTER = {
    "score": {"kind": "tempered"},
    "select": {"kind": "mixture"},
    "balance": [{"kind": "budget", "destination": 1, "budget": 0.5}],
}
SMALL = {
    "train.steps": 2,
    "train.batch_size": 2,
    "train.eval_tokens": 64,
    "data.sequence_length": 32,
    "data.validation_fraction": 0.2,
}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"The words of text number {number} are these words. " * 8)
    return Files.Config(paths=(str(folder),))


def small(preset, text, **settings):
    config = override(presets.find(preset)("tiny"), SMALL | settings)
    return config.replace(data=config.data.replace(corpus=text))


def saved(preset, folder, **settings):
    """A model of the preset, narrow, in a folder; and the model."""
    model = override(presets.find(preset)("tiny").model, {"dim": 32, "num_layers": 2, **settings}).build(seed=3)
    save_model(folder, model, ByteTokenizer())
    return model.eval()


# source, target, settings of the target, recipe, whether the first logits are the source's
WAYS = [
    ("dense", "moe", {}, ("upcycle",), True),
    ("dense", "versatile", {}, ("from_dense",), False),
    ("dense", "parscale", {}, ("add_streams",), False),
    ("moe", "parscale", {}, ("add_streams",), False),
    ("moe", "rexmoe", {}, ("from_vanilla",), True),
    ("moe", "rexmoe-psr", {}, ("from_vanilla",), False),
    ("moe", "chain", {}, ("from_moe",), True),
    ("rexmoe-open", "chain", {}, ("from_moe",), True),
    ("moe", "rmoe", {}, ("to_recurrent",), False),
    ("duo", "duo", {"model.feed_forward.router": ROUTER}, ("with_router",), True),
    ("moe", "moe", {}, (), True),
]


@pytest.mark.parametrize(("source", "target", "settings", "recipe", "same"), WAYS)
def test_a_design_starts_from_the_model_it_is_made_of(tmp_path, text, source, target, settings, recipe, same):
    model = saved(source, tmp_path / "model")
    config, given = start_run(small(target, text, **settings), tmp_path / "model", tmp_path / "run", settings)
    assert config.start.model == str(tmp_path / "model")
    assert config.start.recipe == recipe
    assert (config.model.dim, config.model.num_layers) == (32, 2)
    assert type(given["model"]) is Decoder
    assert torch.equal(given["model"].embedding.weight, model.embedding.weight)
    if same:
        token_BL = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
        state = {"duo_route": "big"} if source == "duo" else {}
        ours = given["model"].eval()(token_BL, state=state).logits_BLV
        torch.testing.assert_close(ours, model(token_BL, state=state).logits_BLV, rtol=1e-4, atol=1e-5)
    result = Trainer(config, tmp_path / "run", **given).fit()
    assert result.status == "finished"
    assert read_run_config(tmp_path / "run") == config
    assert load_model(tmp_path / "run")[0].config == config.model


def test_only_routers_learn_in_the_stage_of_routers_also_when_resumed(tmp_path, text):
    model = saved("duo", tmp_path / "model")
    wanted = small("duo", text, **{"model.feed_forward.router": ROUTER})
    config, given = start_run(wanted, tmp_path / "model", tmp_path / "run")
    Trainer(config, tmp_path / "run", **given).fit()
    held = read_run_config(tmp_path / "run")
    longer = held.replace(train=held.train.replace(steps=4))
    trainer = Trainer(longer, tmp_path / "run", resume=True, **resumed_parts(longer, tmp_path / "run"))
    trainer.fit()
    learned = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert learned
    assert all(".router." in name for name in learned)
    before = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items() if name in before)


def test_the_small_modules_learn_alone_after_the_big_ones(tmp_path, text):
    """The second half of ``freeze_big`` by ``--from``: the model of the first half has p_big 1, what is wanted p_big 0."""
    model = saved("duo", tmp_path / "model", **{"feed_forward.p_big": 1.0})
    config, given = start_run(
        small("duo", text, **{"model.feed_forward.p_big": 0.0}), tmp_path / "model", tmp_path / "run"
    )
    assert config.start.recipe == ("train_small",)
    assert config.model.feed_forward.p_big == 0.0
    trainer = Trainer(config, tmp_path / "run", **given)
    trainer.fit()
    before, after = model.state_dict(), trainer.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".small." in name}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("moe", "versatile", "'moe' layers cannot start one of 'versatile' layers: from_dense starts from a dense"),
        ("dense", "rexmoe", "'swiglu' layers cannot start one of 'rexmoe' layers: from_vanilla starts from"),
        (
            "dense",
            "rmoe",
            "'swiglu' layers cannot start one of 'moe' layers: to_recurrent starts from a model with linear",
        ),
        ("rmoe", "moe", "routers are 'recurrent' cannot start one of 'linear'"),
        ("moe", "dense", "'moe' layers cannot start one of 'swiglu' layers: no recipe leads there"),
        ("parscale", "dense", "the model has streams"),
        ("rexmoe-psr", "rexmoe", "psr is .* in the model and None"),
        ("moe", "duo", "'moe' layers cannot start one of 'duo' layers: no recipe leads there"),
    ],
)
def test_where_no_recipe_leads_it_says_what_would(tmp_path, text, source, target, message):
    saved(source, tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        start_run(small(target, text), tmp_path / "model", tmp_path / "run")


def test_settings_that_the_model_decides_otherwise_are_refused(tmp_path, text):
    saved("dense", tmp_path / "model")
    settings = {"model.dim": 64}
    with pytest.raises(ConfigError, match=r"model\.dim is set to 64, but .* has another"):
        start_run(small("versatile", text, **settings), tmp_path / "model", tmp_path / "run", settings)
    settings = {"model.dim": 32, "model.feed_forward.max_loops": 3}
    config, _ = start_run(small("versatile", text, **settings), tmp_path / "model", tmp_path / "run", settings)
    assert config.model.feed_forward.max_loops == 3


def test_a_wide_dense_model_becomes_whole_copies_where_slices_do_not_fit(tmp_path, text):
    saved("dense", tmp_path / "model", **{"feed_forward.hidden_dim": 384})
    config, _ = start_run(small("moe", text), tmp_path / "model", tmp_path / "run")
    assert config.model.feed_forward.hidden_dim == 384


def test_tokenizer_and_vocabulary_are_the_models_and_stay_when_it_is_gone(tmp_path, text):
    tokenizer = train_bpe((f"The words of text number {number}" for number in range(50)), 300)
    shape = Decoder.Config(vocab_size=320, dim=32, num_layers=2, feed_forward=SwiGLU.Config(hidden_dim=32))
    save_model(tmp_path / "model", shape.build(seed=0), tokenizer)
    config, given = start_run(small("versatile", text), tmp_path / "model", tmp_path / "run")
    assert config.model.vocab_size == 320
    trainer = Trainer(config, tmp_path / "run", **given)
    keep_tokenizer(config, given["tokenizer"], tmp_path / "run")
    trainer.fit()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    held = read_run_config(tmp_path / "run")
    assert held.data.build().tokenizer.fingerprint == tokenizer.fingerprint
    (tmp_path / "run").rename(tmp_path / "moved")
    longer = held.replace(train=held.train.replace(steps=3))
    again = Trainer(longer, tmp_path / "moved", resume=True, **resumed_parts(longer, tmp_path / "moved"))
    assert again.fit().step == 3


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_from_the_model_again(tmp_path, text):
    model = saved("dense", tmp_path / "model")
    config, _ = start_run(small("versatile", text), tmp_path / "model", tmp_path / "run")
    given = resumed_parts(config, tmp_path / "run")
    assert torch.equal(given["model"].embedding.weight, model.embedding.weight)
    saved("dense", tmp_path / "other", num_layers=3)
    with pytest.raises(ConfigError, match="another model than when"):
        resumed_parts(config.replace(start=config.start.replace(model=str(tmp_path / "other"))), tmp_path / "run")
    assert resumed_parts(RunConfig(), tmp_path / "run") == {}


def test_a_model_without_a_tokenizer_is_refused(tmp_path, text):
    save_model(tmp_path / "model", Decoder.Config(dim=32, num_layers=1).build(), None)
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        start_run(small("versatile", text), tmp_path / "model", tmp_path / "run")


def test_configs_of_before_have_no_start(tmp_path, text):
    config = small("dense", text)
    Trainer(config, tmp_path / "run").fit()
    file = tmp_path / "run" / "config.json"
    table = json.loads(file.read_text())
    del table["start"]
    file.write_text(json.dumps(table))
    longer = config.replace(train=config.train.replace(steps=3))
    assert read_run_config(tmp_path / "run") == config
    assert Trainer(longer, tmp_path / "run", resume=True).fit().step == 3


# Fields of the feed-forward of a small mixture that change what its weights mean, or cannot be had without other weights.
MEANT = [
    ("router.score.activation", "sigmoid", "softmax"),
    ("router.select.top_k", 1, 2),
    ("router.select.normalize", "none", "sum"),
    ("router.select.scale", 2.0, 1.0),
    ("shared_experts", 1, 0),
    ("weight_on", "input", "output"),
]


@pytest.mark.parametrize("target", ["moe", "rexmoe-open", "rmoe"])
@pytest.mark.parametrize(("name", "value", "held"), MEANT)
def test_a_router_that_means_something_else_is_refused(tmp_path, text, target, name, value, held):
    saved("moe", tmp_path / "model")
    path = f"model.feed_forward.{name}"
    wanted = small(target, text, **{path: value})
    said = (
        f"{path} is {held!r} in the model and {value!r} in the design that is wanted; --set {path}={held}, start from"
    )
    with pytest.raises(ConfigError) as raised:
        start_run(wanted, tmp_path / "model", tmp_path / "run")
    assert str(raised.value).startswith(said)
    start_run(override(wanted, {path: held}), tmp_path / "model", tmp_path / "run")


def test_a_chain_begins_as_a_mixture_chooses_and_a_chain_as_a_chain(tmp_path, text):
    saved("moe", tmp_path / "moe")
    config, _ = start_run(small("chain", text), tmp_path / "moe", tmp_path / "run")
    assert config.model.feed_forward.router.select.top_k == 2
    saved("chain", tmp_path / "chain")
    with pytest.raises(ConfigError, match=r"select\.top_k is 1 in the model and 2 in the design"):
        start_run(small("chain", text, **{"model.feed_forward.router.select.top_k": 2}), tmp_path / "chain", tmp_path)


def test_all_that_stands_in_the_way_is_said_at_once(tmp_path, text):
    saved("moe", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"activation is .*'softmax'") as raised:
        start_run(
            small("moe-lossfree", text, **{"model.feed_forward.router.select.top_k": 3}), tmp_path / "model", tmp_path
        )
    sets = (
        "--set model.feed_forward.router.score.activation=softmax --set model.feed_forward.router.select.top_k=2, start"
    )
    assert sets in str(raised.value)


def test_balancers_and_capacity_are_those_of_the_design(tmp_path, text):
    model = saved("moe", tmp_path / "model")
    layer = "model.feed_forward."
    settings = {
        f"{layer}router.score.activation": "softmax",
        f"{layer}capacity_factor": 1.5,
        f"{layer}capacity_order": "score",
        f"{layer}recompute": True,
    }
    wanted = small("moe-lossfree", text, **settings)
    config, given = start_run(wanted, tmp_path / "model", tmp_path / "run", settings)
    ours, theirs = config.model.feed_forward, wanted.model.feed_forward
    assert [part.owner.kind for part in ours.router.balance] == ["bias"]
    assert ours == theirs
    token_BL = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(given["model"].eval()(token_BL).logits_BLV, model(token_BL).logits_BLV)
    assert Trainer(config, tmp_path / "run", **given).fit().status == "finished"
    assert "expert_bias" in " ".join(given["model"].state_dict())
    # The run's own weights have a bias now, without which they would choose other experts.
    settings = {f"{layer}router.balance": [{"kind": "switch"}]}
    with pytest.raises(ConfigError, match=r"router\.balance is \['bias'\] in the model and \['switch'\] in the design"):
        start_run(small("moe", text, **settings), tmp_path / "run", tmp_path / "next")
    # Another rate leaves the bias itself alone.
    rate = {f"{layer}router.score.activation": "softmax", f"{layer}router.balance": [{"kind": "bias", "rate": 0.5}]}
    config, again = start_run(small("moe-lossfree", text, **rate), tmp_path / "run", tmp_path / "next")
    assert config.model.feed_forward.router.balance[0].rate == 0.5
    name = "blocks.0.feed_forward.router.balance.0.expert_bias"
    assert given["model"].state_dict()[name].any()
    assert torch.equal(again["model"].state_dict()[name], given["model"].state_dict()[name])


@pytest.mark.parametrize(
    ("source", "path", "value"),
    [
        ("versatile", "model.feed_forward.num_experts", 4),
        ("versatile", "model.feed_forward.router.select.top_k", 3),
        ("parscale", "model.streams.num_streams", 2),
    ],
)
def test_a_design_of_other_settings_is_never_dropped_in_silence(tmp_path, text, source, path, value):
    saved(source, tmp_path / "model")
    with pytest.raises(ConfigError, match=path.replace(".", r"\.") + f" is .* in the model and {value} in the design"):
        start_run(small(source, text, **{path: value}), tmp_path / "model", tmp_path / "run")


def test_a_duo_with_routers_takes_another_budget_but_no_other_router(tmp_path, text):
    saved("duo", tmp_path / "model", **{"feed_forward.router": ROUTER})
    path = "model.feed_forward.router"
    other = ROUTER | {"balance": [{"kind": "budget", "destination": 1, "budget": 0.25}]}
    config, _ = start_run(small("duo", text, **{path: other}), tmp_path / "model", tmp_path / "run")
    assert config.model.feed_forward.router.balance[0].budget == 0.25
    other = ROUTER | {"select": {"kind": "top_k", "top_k": 1}}
    with pytest.raises(ConfigError, match=r"router\.select is 'mixture' in the model and 'top_k' in the design"):
        start_run(small("duo", text, **{path: other}), tmp_path / "model", tmp_path / "run")
    with pytest.raises(ConfigError, match="routers are 'tempered' cannot start one of None routers"):
        start_run(small("duo", text), tmp_path / "model", tmp_path / "run")


def test_what_is_the_models_is_said(tmp_path, text):
    saved("moe", tmp_path / "model", **{"feed_forward.hidden_dim": 48, "attention.num_heads": 2})
    wanted = small("rexmoe", text)
    config, _ = start_run(wanted, tmp_path / "model", tmp_path / "run")
    kept = {found.path: (found.wanted, found.held) for found in kept_fields(wanted.model, config.model)}
    assert kept == {
        "model.dim": (128, 32),
        "model.num_layers": (4, 2),
        "model.attention.num_heads": (4, 2),
        "model.feed_forward.hidden_dim": (128, 48),
    }
    assert kept_fields(config.model, config.model) == ()


def test_a_run_without_a_checkpoint_does_not_start_from_weights_of_later(tmp_path, text):
    model = saved("dense", tmp_path / "model")
    config, _ = start_run(small("versatile", text), tmp_path / "model", tmp_path / "run")
    with torch.no_grad():
        model.blocks[1].feed_forward.w2.weight[0, 0] += 1e-3
    save_model(tmp_path / "model", model, ByteTokenizer())
    with pytest.raises(ConfigError, match=r"another model than when the run in .* began; start a new run"):
        resumed_parts(config, tmp_path / "run")
    # Runs of before know no digest: they go on as they did.
    before = config.replace(start=config.start.replace(digest=None))
    assert resumed_parts(before, tmp_path / "run")["model"].config == config.model

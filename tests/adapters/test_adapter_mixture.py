"""AdaMix: what is drawn and averaged by hand, the two passes of a step and their divergence, and runs from rows to one adapter."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters import catalogue
from anabranch.adapters.adapt import AdaptTask, method_named
from anabranch.adapters.adapt.answers import Answers, batch_of
from anabranch.adapters.adapter_mixture import AdapterMixture, twice_told
from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.graft import layers_of
from anabranch.adapters.own_folder import OwnAdapter, read_own
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.experts.parscale.streams import ParScale
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.items import on_items
from anabranch.routing import RoutingContext
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
K, M, OUT = 3, 5, 32


def moved(model):
    """Every adapter somewhere else, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def model_of(**options):
    model = CONFIG.build(seed=1)
    catalogue.apply(model, "adamix", seed=3, **{"width": M, "number": K, "targets": ("down",), **options})
    return moved(model)


def rows_of(y):
    """What a layer behind a matrix is given: what came out."""
    return type("Given", (), {"y": y})()


def one_of(layer, y, i, j):
    """U_j act(D_i y + e_i) + f_j."""
    low = F.relu(y @ layer.down[i].T + layer.down_bias[i])
    return low @ layer.up[j].T + layer.up_bias[j]


def test_a_step_is_one_pair_of_halves_and_afterwards_it_is_the_average():
    layer = next(iter(layers_of(model_of()).values()))
    assert isinstance(layer, AdapterMixture)
    y = torch.randn(2, 4, OUT)
    with torch.no_grad():
        mean = F.linear(
            F.relu(F.linear(y, layer.down.mean(0), layer.down_bias.mean(0))), layer.up.mean(0), layer.up_bias.mean(0)
        )
        torch.testing.assert_close(layer.eval().made(y), mean)
        layer.train()
        seen = set()
        for seed in range(60):
            torch.manual_seed(seed)
            (i,), (j,) = torch.randint(K, (2, 1)).tolist()
            torch.manual_seed(seed)
            torch.testing.assert_close(layer.made(y), one_of(layer, y, i, j))
            seen.add((i, j))
    # D and U are drawn apart.
    assert len(seen) == K * K


@pytest.mark.parametrize("num_streams", [1, 3])
def test_halves_of_a_pass_that_is_told_have_a_choice_each(num_streams):
    """In all streams the same; these stand one after another."""
    layer = next(iter(layers_of(model_of()).values())).train()
    y = torch.randn(num_streams, 2, 4, OUT)
    twice = torch.cat([y, y], 1).flatten(0, 1)
    context = RoutingContext(state=twice_told(4, 4, num_streams=num_streams), num_streams=num_streams)
    with torch.no_grad():
        for seed in range(20):
            torch.manual_seed(seed)
            (i, again_i), (j, again_j) = torch.randint(K, (2, 2)).tolist()
            torch.manual_seed(seed)
            found = layer.around(rows_of(twice), context).unflatten(0, (num_streams, 4))
            torch.testing.assert_close(found[:, :2], y + one_of(layer, y, i, j))
            torch.testing.assert_close(found[:, 2:], y + one_of(layer, y, again_i, again_j))


@functools.cache
def one_layer():
    return next(iter(layers_of(model_of()).values())).train()


@given(data=st.data())
def test_some_items_of_a_pass_have_the_choice_of_their_half_in_any_order(data):
    """As those of one expert, of a pass in two streams."""
    layer = one_layer()
    rows, length, num_streams = 2 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 2
    whole = num_streams * rows * length
    item_R = torch.tensor(data.draw(st.lists(st.integers(0, whole - 1), min_size=1, unique=True)))
    y_RO = torch.randn(len(item_R), OUT, generator=torch.Generator().manual_seed(1))
    context = RoutingContext(
        state=twice_told(rows, length, num_streams=num_streams), num_streams=num_streams, sequence_length=length
    )
    torch.manual_seed(3)
    found_RO = on_items(lambda x, part: layer.around(rows_of(x), part), y_RO, context, item_R, whole)
    torch.manual_seed(3)
    downs, ups = torch.randint(K, (2, 2)).tolist()
    for row, item in enumerate(item_R.tolist()):
        half = item // length % rows >= rows // 2
        torch.testing.assert_close(found_RO[row], y_RO[row] + one_of(layer, y_RO[row], downs[half], ups[half]))


def test_what_is_merged_before_a_layer_is_told_and_not_taken_for_one_half():
    layer = next(iter(layers_of(model_of()).values())).train()
    context = RoutingContext(state=twice_told(4, 4))
    with pytest.raises(ConfigError, match=r"sees 8 items where .* are of 16: .*set method.consistency to 0"):
        layer.around(rows_of(torch.randn(2, 4, OUT)), context)
    # Nothing is drawn outside of training, and halves are alike.
    assert layer.eval().around(rows_of(torch.randn(2, 4, OUT)), context).shape == (2, 4, OUT)


STREAMS = CONFIG.replace(streams=ParScale.Config(num_streams=2, prefix_len=2, mlp_dim=8, embedding_dim=4))
EXPERTS = CONFIG.replace(feed_forward=MoE.Config(num_experts=3, hidden_dim=16))


@pytest.mark.parametrize("config", [STREAMS, EXPERTS, STREAMS.replace(feed_forward=EXPERTS.feed_forward)])
def test_two_choices_differ_beside_streams_and_beside_experts(config):
    """Not a few tokens alone: of every row, and not outside of training."""
    model = config.build(seed=1)
    catalogue.apply(model, "adamix", seed=3, width=M, number=K, targets=("down",))
    moved(model).train()
    target_BL = TOKENS.roll(-1, 1).repeat(2, 1)
    torch.manual_seed(2)
    token_BL = TOKENS.repeat(2, 1)
    state = twice_told(*token_BL.shape, num_streams=model.streams_of(None)[0])
    *_, apart_M = Answers(model)(token_BL, target_BL, state=state, twice=True)
    assert (apart_M > 1e-4).all()
    *_, none_M = Answers(model.eval())(token_BL, target_BL, state=state, twice=True)
    assert none_M.abs().max() < 1e-9


def given_rows():
    token_BL = torch.cat([TOKENS, TOKENS])
    start_B, length_B = torch.tensor([3, 2, 3, 2]), torch.tensor([8, 6, 8, 6])
    return batch_of(token_BL, start_B, length_B, torch.zeros(4, dtype=torch.int64))


def test_the_divergence_of_two_passes_by_hand():
    model = model_of().train()
    answers, given = Answers(model), given_rows()
    del given["task_B"]
    torch.manual_seed(2)
    nats_M, spread_M, _, _, apart_M = answers(**given, state=twice_told(4, 7), twice=True)
    torch.manual_seed(2)
    context = model.context(given["token_BL"], token_mask_BL=given["mask_BL"], state=twice_told(4, 7))
    log_p = model.logits(model.hidden(given["token_BL"], context)).log_softmax(-1)
    first, second = log_p.chunk(2)
    asked = given["target_BL"][:2] != -100
    a, b = first[asked], second[asked]
    assert not torch.equal(a, b)
    wanted = (
        F.kl_div(b, a, log_target=True, reduction="none") + F.kl_div(a, b, log_target=True, reduction="none")
    ).sum(-1) / 2
    torch.testing.assert_close(apart_M, wanted)
    torch.testing.assert_close(nats_M, -a.gather(1, given["target_BL"][:2][asked][:, None])[:, 0])
    torch.testing.assert_close(spread_M, -a.mean(-1))
    # Outside of training both are the average.
    *_, none_M = Answers(model.eval())(**given, state=twice_told(4, 7), twice=True)
    assert not none_M.detach().any()


def test_what_cannot_be():
    for options, says in (({"number": 0}, "number"), ({"width": 0}, "width"), ({"rank": 2}, "no option 'rank'")):
        with pytest.raises(ConfigError, match=says):
            model_of(**options)
    with pytest.raises(ConfigError, match="consistency"):
        method_named("adamix").replace(consistency=-1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("adamix")
    save_model(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    rows = [{"task": "back", "input": word, "output": word[::-1]} for word in "ab cde fghi jk lmnop q rst uv".split()]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "text.txt").write_text("some words to measure on, and some more\n" * 20)
    return root


def run_of(place, consistency=None, **changes):
    method = method_named("adamix").replace(width=4, number=3, consistency=consistency)
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


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits_BLV


def test_a_run_goes_on_to_the_bit_and_what_it_writes_is_one_adapter(place, tmp_path):
    whole = Trainer(run_of(place), tmp_path / "whole")
    whole.fit()
    base = whole.task.base
    Trainer(run_of(place, steps=2), tmp_path / "part").fit()
    again = Trainer(run_of(place), tmp_path / "part", resume=True)
    again.fit()
    for name in whole.task.method.kept(base):
        assert torch.equal(base.state_dict()[name], again.task.base.state_dict()[name]), name
    folder = whole.task.write(tmp_path / "adapter").folder
    model, _ = load_model(place / "base")
    read_own(folder, model)
    assert {type(layer) for layer in layers_of(model).values()} == {SerialBottleneck}
    assert torch.equal(logits(model), logits(base))
    learned = sum(value.numel() for name, value in base.state_dict().items() if name in whole.task.method.kept(base))
    assert learned == 3 * sum(value.numel() for value in OwnAdapter.read(folder).numbers.values())


def gradient_of(run, place, out):
    trainer = Trainer(run, out)
    moved(trainer.task.base)
    found = trainer._stepper.gradient(trainer.stream, trainer._context)
    trainer.close()
    return found


def test_a_step_holds_two_choices_to_each_other(place, tmp_path):
    found = {weight: gradient_of(run_of(place, weight), place, tmp_path / str(weight)) for weight in (0.0, 1.0, 2.0)}
    assert found[0.0].terms.keys() == {"answer"}
    assert found[1.0].terms.keys() == {"answer", "consistency"}
    assert float(found[1.0].terms["consistency"]) > 0
    # The same draws, and so the same divergence, twice as heavy.
    torch.testing.assert_close(found[2.0].terms["consistency"], 2 * found[1.0].terms["consistency"])
    torch.testing.assert_close(found[1.0].total, found[1.0].terms["answer"] + found[1.0].terms["consistency"])


def test_from_the_command_to_nats(place, tmp_path, capsys):
    line = [
        "adapt",
        place / "base",
        place / "rows.jsonl",
        "--method",
        "adamix",
        "--set",
        "method.width=4",
        "--steps",
        "2",
    ]
    assert (
        main([str(word) for word in [*line, "--set", "train.batch_size=4", "--out", tmp_path / "run", "--json"]]) == 0
    )
    capsys.readouterr()
    told = ["eval", place / "base", "--adapter", tmp_path / "run" / "adapter", "--data", place / "text.txt", "--json"]
    assert main([str(word) for word in told]) == 0, capsys.readouterr().err

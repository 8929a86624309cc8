"""Stages 1 and 3 of Duo-LLM, its analyses and controls; the layer and the oracle are in test_duo_llm.py."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.data import ByteTokenizer
from anabranch.depth.duo_llm import (
    BIG,
    SMALL,
    BudgetLoss,
    DuoFFN,
    LabelledRoutes,
    Mixture,
    RouteLabels,
    TemperedScore,
    analyze,
    big_by_position,
    calibrate_budget,
    class_weights,
    difficulty,
    duo_layers,
    focal_loss,
    gap_closed,
    hopeless_share,
    learned_router,
    option_shares,
    oracle,
    ramp_loss,
    rank_correlation,
    route_loss,
    take,
    top_tokens,
    train_duo,
    train_router,
    transfer,
    with_router,
)
from anabranch.errors import ConfigError, DataError
from anabranch.lm import SamplingConfig, generate, load_model, save_model
from anabranch.nn import MoE
from anabranch.routing import RoutingContext, record_routing
from anabranch.routing.balance import Observation
from anabranch.testing import check_feed_forward, check_task
from anabranch.train import Constant, Examples, TaskRunConfig, Trainer, evaluate, read_metrics
from duo import all_one, decoder, losses, tokens

# The parts of the router


def observe(balancer, probability_NE, context):
    routing = Mixture.Config().build(2)(probability_NE)
    balancer(Observation(probability_NE.log(), routing), context)


def test_budget_loss_by_hand_on_two_layers():
    loss_of = BudgetLoss.Config(budget=0.5, alpha=2.0).build(2)
    context = RoutingContext(training=True, sequence_length=2)
    # Two sequences of two tokens; share of big in layer 0: (0.8 + 0.6) / 2 = 0.7 and 0.2, in layer 1: 0.9 and 0.4.
    first_N = torch.tensor([0.8, 0.6, 0.1, 0.3], requires_grad=True)
    second_N = torch.tensor([0.9, 0.9, 0.4, 0.4], requires_grad=True)
    for share_N in (first_N, second_N):
        observe(loss_of, torch.stack([1 - share_N, share_N], dim=1), context)
    # Means over layers 0.8 and 0.3: 2 * ((0.3)^2 + (-0.2)^2) / 2 = 0.13.
    loss = context.mean_losses()["budget"]
    assert loss.item() == pytest.approx(0.13)
    loss.backward()
    # d/dp = alpha / S * 2 (mean - b) / layers / tokens = 2 / 2 * 2 * 0.3 / 2 / 2 = 0.15 and -0.1
    torch.testing.assert_close(first_N.grad, torch.tensor([0.15, 0.15, -0.1, -0.1]))
    torch.testing.assert_close(second_N.grad, first_N.grad)


def test_budget_is_over_layers_not_per_layer():
    loss_of = BudgetLoss.Config(budget=0.5).build(2)
    context = RoutingContext(training=True, sequence_length=3)
    for share in (1.0, 0.0):  # one layer always, one never: the budget is kept
        observe(loss_of, torch.tensor([[1 - share, share]] * 3), context)
    assert context.mean_losses()["budget"].item() == 0


def test_padding_does_not_count_in_the_budget():
    loss_of = BudgetLoss.Config(budget=0.0).build(2)
    mask_N = torch.tensor([True, False, False, False])
    context = RoutingContext(training=True, sequence_length=2, item_mask_N=mask_N)
    share_N = torch.tensor([0.5, 1.0, 1.0, 1.0])
    observe(loss_of, torch.stack([1 - share_N, share_N], dim=1), context)
    assert context.mean_losses()["budget"].item() == pytest.approx(0.25)  # the second sequence is empty


def test_focal_loss_by_hand():
    probability_E = torch.tensor([0.2, 0.5, 0.3])
    logit_NE = probability_E.log().expand(2, 3)
    label_N = torch.tensor([1, 2])
    # -0.5^2 ln 0.5 = 0.17329; -0.7^2 ln 0.3 = 0.58995; with weights 2 and 1 and the mean of both: 0.46826
    loss = focal_loss(logit_NE, label_N, gamma=2.0, weight_E=torch.tensor([1.0, 2.0, 1.0]))
    assert loss.item() == pytest.approx((2 * 0.1732868 + 0.5899464) / 2, abs=1e-6)
    weight_E = torch.tensor([0.3, 1.2, 1.5])
    plain = (F.cross_entropy(logit_NE, label_N, reduction="none") * weight_E[label_N]).mean()
    torch.testing.assert_close(focal_loss(logit_NE, label_N, gamma=0.0, weight_E=weight_E), plain)
    padded = focal_loss(torch.cat([logit_NE, torch.zeros(3, 3)]), torch.tensor([1, 2, -1, -1, -1]))
    torch.testing.assert_close(padded, focal_loss(logit_NE, label_N))


def test_class_weights_are_those_of_dr_llm():
    label_N = torch.repeat_interleave(torch.arange(3), torch.tensor([4399, 120956, 1457]))
    torch.testing.assert_close(class_weights(label_N, 3), torch.tensor([0.916, 0.905, 1.179]), atol=1e-3, rtol=0)


def test_temperature_sharpens_the_mixture_and_shift_moves_it():
    model = with_router(decoder())
    score = duo_layers(model)[0].router.score
    x_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    plain_NE = score.project(x_ND, RoutingContext())
    score.temperature.on_step(10, 1.0)
    torch.testing.assert_close(score.project(x_ND, RoutingContext()), plain_NE / 0.1)
    score.shift_E[BIG] = 2.0
    torch.testing.assert_close(score.project(x_ND, RoutingContext())[:, BIG], plain_NE[:, BIG] / 0.1 + 2)


def test_straight_through_takes_the_best_with_the_gradient_of_the_mixture():
    score_NE = torch.tensor([[0.3, 0.7], [0.6, 0.4]], requires_grad=True)
    value_NE = torch.tensor([[1.0, 5.0], [2.0, 7.0]])  # what each option is worth
    gradients = []
    for hard in (False, True):
        routing = Mixture.Config(straight_through=hard).build(2)(score_NE)
        weight_NE = torch.zeros(2, 2).scatter(1, routing.index_NK, routing.weight_NK)
        gradients.append(torch.autograd.grad((weight_NE * value_NE).sum(), score_NE)[0])
    assert weight_NE.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert torch.equal(gradients[0], gradients[1])


# The layer with a learned router


def test_a_learned_router_mixes_in_training_and_chooses_in_evaluation():
    model = with_router(decoder(1, seed=1), freeze=False)
    layer = duo_layers(model)[0]
    captured = []
    layer.register_forward_hook(lambda module, args, y: captured.append((args[0], y)))
    token_BL = tokens()
    model.train()(token_BL)
    x_BLD, y_BLD = captured.pop()
    probability_BLE = (x_BLD @ layer.router.score.weight.T).softmax(-1)
    expected = probability_BLE[..., :1] * layer.small(x_BLD) + probability_BLE[..., 1:] * layer.big(x_BLD)
    torch.testing.assert_close(y_BLD, expected, rtol=1e-5, atol=1e-6)
    model.eval()(token_BL)
    x_BLD, y_BLD = captured.pop()
    is_big_BL1 = (x_BLD @ layer.router.score.weight.T).argmax(-1, keepdim=True) == BIG
    assert is_big_BL1.any()
    assert not is_big_BL1.all()
    torch.testing.assert_close(y_BLD, torch.where(is_big_BL1, layer.big(x_BLD), layer.small(x_BLD)))


@pytest.mark.slow
@pytest.mark.parametrize("allow_skip", [False, True])
def test_a_learned_router_keeps_the_contract(allow_skip):
    router = learned_router(0.5, skip=0.2 if allow_skip else None)
    config = DuoFFN.Config(big=24, small=8, allow_skip=allow_skip, router=router)
    check_feed_forward(config, num_layers=2, compile_backend="eager")


@pytest.mark.slow
def test_skipping_keeps_the_contract():
    check_feed_forward(
        DuoFFN.Config(big=24, small=8, allow_skip=True, p_skip=0.2), num_layers=2, compile_backend="eager"
    )


def test_a_router_is_put_on_a_trained_model_whose_base_stays():
    model = decoder()
    routed = with_router(model)
    assert {name for name, p in routed.named_parameters() if p.requires_grad} == {
        f"blocks.{layer}.feed_forward.router.score.weight" for layer in range(3)
    }
    ids_BL = tokens(3, 8)
    torch.testing.assert_close(losses(routed, ids_BL, "big"), losses(model, ids_BL, "big"))
    output = routed.train()(ids_BL[:, :-1], ids_BL[:, 1:])
    assert set(output.auxiliary) == {"budget"}
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in routed.parameters())
    plain = model.config.replace(feed_forward=MoE.Config(num_experts=2, hidden_dim=8))
    with pytest.raises(ConfigError, match="no 'duo' feed-forward"):
        with_router(plain.build())
    assert from_dict(type(routed.config), json.loads(json.dumps(to_dict(routed.config)))) == routed.config
    with pytest.raises(ConfigError, match=r"budget \+ skip is 1.2"):
        learned_router(0.7, skip=0.5)


@pytest.mark.parametrize("route", ["random", "big", None])
def test_decisions_are_traced_whoever_makes_them(route):
    model = with_router(decoder()).eval()
    token_BL = tokens()
    with record_routing(model) as recorder, torch.no_grad():
        model(token_BL, state=take(route) if route else None)
    load_YE = recorder.trace().load_LE()
    assert load_YE.shape == (3, 2)
    assert (load_YE.sum(1) == token_BL.numel()).all()
    if route == "big":
        assert (load_YE[:, SMALL] == 0).all()


def test_calibration_meets_the_budget(caplog):
    model = with_router(decoder())
    token_BL = tokens(20, 20)
    for budget in (0.25, 0.6):
        share = calibrate_budget(model, token_BL, budget)
        assert share == pytest.approx(budget, abs=0.005)
        assert float(option_shares(model, token_BL)[:, BIG].mean()) == share
    with pytest.raises(ConfigError, match="budget is 3"):
        calibrate_budget(model, token_BL, 3)
    with pytest.raises(ConfigError, match="needs a learned router"):
        calibrate_budget(decoder(), token_BL, 0.5)
    for layer in duo_layers(model):
        torch.nn.init.zeros_(layer.router.score.weight)
    assert not caplog.messages
    assert calibrate_budget(model, token_BL, 0.2) == 0  # all tokens change over at one shift: the nearest
    assert "the nearest is 0.0000" in caplog.text


# Training


def chosen(model, token_BL):
    """The routes that a learned router takes, ``[B, L, Y]``."""
    with record_routing(model.eval()) as recorder, torch.no_grad():
        model(token_BL)
    trace = recorder.trace()
    layers = [torch.from_numpy(trace.decisions(layer.layer).index_NK).view(token_BL.shape) for layer in trace.layers]
    return torch.stack(layers, dim=-1).long()


def test_random_routing_trains_and_resumes_to_the_bit(duo_run, tmp_path):
    whole = train_duo(duo_run(), tmp_path / "whole")

    def stop(event):
        if event.kind == "checkpoint" and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_duo(duo_run(), tmp_path / "parts", on_event=stop)
    resumed = train_duo(duo_run(), tmp_path / "parts", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_router_trains_resumes_and_leaves_the_base_alone(duo_run, tmp_path):
    model = train_duo(duo_run(steps=2), tmp_path / "duo")
    run = duo_run()
    whole = train_router(model, run, tmp_path / "whole")

    def stop(event):
        if event.kind == "checkpoint" and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_router(model, run, tmp_path / "parts", on_event=stop)
    resumed = train_router(model, run, tmp_path / "parts", resume=True)
    start = with_router(model, seed=run.train.seed).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, start[name]) == (".router." not in name or "prior" in name or "shift" in name), name
    assert duo_layers(whole)[0].router.score.temperature.value.item() == pytest.approx(0.1)


def test_freezing_big_trains_small_on_what_big_left(duo_run, tmp_path):
    run = duo_run(steps=4)
    model = train_duo(run, tmp_path / "run", recipe="freeze_big")
    big = Trainer(
        run.replace(
            model=run.model.replace(feed_forward=run.model.feed_forward.replace(p_big=1.0)),
            train=run.train.replace(steps=2),
        ),
        tmp_path / "big",
    )
    big.fit()
    before = big.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".small." not in name), name
    assert model.config == run.model
    with pytest.raises(ConfigError, match="recipe is 'magic'"):
        train_duo(run, tmp_path / "x", recipe="magic")


def test_a_router_learns_the_labels_of_an_oracle(duo_run, tmp_path):
    model, ids_BL = decoder(2), tokens(6, 9)
    # Labels that a router can reproduce: what another router chose.
    route_BLY = chosen(with_router(model, seed=5), ids_BL[:, :-1])
    assert 0.2 < route_BLY.double().mean() < 0.8
    labels = RouteLabels(ids_BL, route_BLY, None, "exact")
    run = duo_run(steps=60, batch_size=6, learning_rate=0.1)
    before = chosen(with_router(model, seed=run.train.seed), ids_BL[:, :-1])
    assert (before == route_BLY).double().mean() < 0.8
    routed = train_router(model, run, tmp_path / "run", supervision="oracle", labels=labels)
    assert (chosen(routed, ids_BL[:, :-1]) == route_BLY).double().mean() > 0.97
    for name, value in model.state_dict().items():
        assert torch.equal(value, routed.state_dict()[name]), name
    last = read_metrics(tmp_path / "run")[-1]
    assert last["agreement"] == (chosen(routed, ids_BL[:, :-1]) == route_BLY).double().mean()
    with pytest.raises(ConfigError, match="needs labels"):
        train_router(model, run, tmp_path / "unused", supervision="oracle")


def labelled(model, seed=0):
    """Random labels for a few sequences."""
    draw = torch.Generator().manual_seed(seed)
    return RouteLabels(tokens(6, 9), torch.randint(2, (6, 8, len(duo_layers(model))), generator=draw), None, "exact")


def test_learning_labels_is_a_task_that_keeps_the_contract(duo_run):
    model = with_router(decoder(2))
    run = TaskRunConfig(task=LabelledRoutes.Config(model=model.config), train=duo_run().train)
    check_task(run, ranks=False, model=model, labels=labelled(model))


@pytest.mark.slow  # starts two processes
def test_two_processes_learn_labels_as_one_does(duo_run):
    model = with_router(decoder(2))
    run = TaskRunConfig(task=LabelledRoutes.Config(model=model.config), train=duo_run(clip=None).train)
    check_task(run, model=model, labels=labelled(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids_BL": torch.full((6, 9), 257)}, "labels has token 257, and the model has 0 to"),
        ({"ids_BL": torch.full((6, 9), -1)}, "labels has token -1"),
        ({"route_BLY": torch.full((6, 8, 2), 2)}, "labels has option 2, and the model has 0 to 1"),
        ({"route_BLY": torch.zeros(6, 8, 3, dtype=torch.int64)}, "routes over 3 duo layers, and the model has 2"),
    ],
)
def test_labels_of_another_model_are_refused(change, said):
    model = with_router(decoder(2))
    task = LabelledRoutes.Config(model=model.config)
    with pytest.raises(DataError, match=said):
        task.build(model=model, labels=dataclasses.replace(labelled(model), **change))
    with pytest.raises(ConfigError, match="LabelledRoutes has no labels"):
        task.build(model=model)


def states_of_routers(model, token_BL, route_BLY):
    """(router, what it sees) of every duo layer where this route is taken."""
    seen = []
    handles = [
        layer.router.register_forward_hook(lambda module, args, y: seen.append((module, args[0])))
        for layer in duo_layers(model)
    ]
    model(token_BL, state=take(route_BLY))
    for handle in handles:
        handle.remove()
    return seen


def test_learning_labels_is_a_loop_written_out(duo_run, tmp_path):
    """Focal loss with the labels' class weights over shuffled sequences, and nothing else moves a router."""
    model, labels = decoder(2), labelled(decoder(2))
    run = duo_run(steps=3, batch_size=4, weight_decay=0.0, clip=None, schedule=Constant.Config(warmup=0))
    trained = train_router(model, run, tmp_path / "run", supervision="oracle", labels=labels)
    twin = with_router(model, seed=run.train.seed).train()
    learning = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    stream = Examples(labels.ids_BL, labels.route_BLY, seed=run.train.seed)
    weight_E = class_weights(labels.route_BLY, 2)
    for step in range(3):
        for module in twin.modules():
            if isinstance(module, TemperedScore):
                module.temperature.on_step(step, step / 3)
        ids_BL, route_BLY = stream.next_batch(4)
        captured = states_of_routers(twin, ids_BL[:, :-1], route_BLY)
        loss = 0.0
        for place, (router, x_ND) in enumerate(captured):
            logit_NE = x_ND.detach() @ router.score.weight.T / router.score.temperature.value
            loss = loss + focal_loss(logit_NE, route_BLY[..., place].reshape(-1), weight_E=weight_E) / len(captured)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in twin.state_dict().items():
        if "temperature" not in name:
            torch.testing.assert_close(trained.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


def test_labels_of_another_oracle_are_not_gone_on_with(duo_run, tmp_path):
    model, run = decoder(2), duo_run(steps=2)
    options = {"supervision": "oracle", "resume": True}
    train_router(model, run, tmp_path / "run", labels=labelled(model), **options)
    with pytest.raises(DataError, match="cannot resume the examples: they, or what a tokenizer makes"):
        train_router(model, duo_run(steps=3), tmp_path / "run", labels=labelled(model, seed=1), **options)


def test_checkpoints_and_generation(tmp_path):
    model = with_router(decoder()).eval()
    duo_layers(model)[0].router.score.shift_E[BIG] = 0.7
    save_model(tmp_path / "model", model)
    again, _ = load_model(tmp_path / "model")
    token_BL = tokens()
    with torch.no_grad():
        assert torch.equal(again.eval()(token_BL).logits_BLV, model(token_BL).logits_BLV)
    new = generate(model, [[1, 2, 3], [4]], SamplingConfig(max_tokens=5, temperature=0))
    text = [1, 2, 3]
    for token in new[0]:
        with torch.no_grad():
            assert int(model(torch.tensor([text])).logits_BLV[0, -1].argmax()) == token
        text.append(token)


# Labels and analyses


def test_labels_survive_a_file(tmp_path):
    model, ids_BL = decoder(3, allow_skip=True), tokens(2, 5)
    result = oracle(model, ids_BL, 1, options=("small", "big", "skip"))
    labels = RouteLabels.of(ids_BL, result, 1)
    labels.write(tmp_path / "labels.jsonl")
    again = RouteLabels.read(tmp_path / "labels.jsonl")
    assert torch.equal(again.route_BLY, labels.route_BLY)
    assert torch.equal(again.ids_BL, ids_BL)
    assert (again.budget, again.bound) == (1, "optimistic")
    row = json.loads((tmp_path / "labels.jsonl").read_text().splitlines()[1])
    work = {0: "skip", 1: "small", 2: "big"}
    names = [[("small", "big", "skip")[option] for option in route] for route in labels.route_BLY[1].tolist()]
    assert [[work[label] for label in route] for route in row["label"]] == names
    (tmp_path / "bad.jsonl").write_text('{"ids": [1, 2], "label": [[3]]}\n')
    with pytest.raises(DataError, match="does not hold route labels"):
        RouteLabels.read(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", r"the file is empty"),
        ('{"ids": [1, 2], "label": [[3]]}', r"label has 3; it is 0 \(skip\), 1 \(small\) or 2 \(big\)"),
        ('{"ids": [1, 2], "label": [[-1]]}', r"label has -1; it is 0"),
        ('{"ids": [1, 2], "label": [[true]]}', r"label has true; it is whole numbers"),
        ('{"ids": [1, false], "label": [[1]]}', r"ids has false; it is whole numbers"),
        ('{"ids": [1, 2], "label": [[1.5]]}', r"label has 1.5; it is whole numbers"),
        (
            '{"ids": [1, 2], "label": []}',
            r"label has a row of layers for each of ids but the last; it has shape \[1, 0\]",
        ),
        ('{"ids": [1, 2], "label": [[]]}', r"label is empty"),
        ('{"ids": [1], "label": []}', r"label has a row of layers"),
        ('{"ids": [1, -2], "label": [[1]], "budget": 1, "bound": "exact"}', r"ids has -2; token ids are 0 or more"),
        (
            '{"ids": [1, 2], "label": [[1]], "budget": "a", "bound": "exact"}',
            r'budget is "a"; it is 0 to 1 layers, or null',
        ),
        ('{"ids": [1, 2], "label": [[1]], "budget": true, "bound": "exact"}', r"budget is true"),
        ('{"ids": [1, 2], "label": [[1]], "budget": 2, "bound": "exact"}', r"budget is 2; it is 0 to 1"),
        ('{"ids": [1, 2], "label": [[1]], "budget": null, "bound": 7}', r"bound is 7; it is a word"),
        ('{"ids": [1, 2], "label": [[1]], "bound": "exact"}', r"no field 'budget'"),
        (
            '{"ids": [1, 2], "label": [[1]], "budget": 1, "bound": "exact"}\n'
            '{"ids": [1, 2], "label": [[1]], "budget": 0, "bound": "exact"}',
            r"line 2 is of another oracle than line 1",
        ),
    ],
)
def test_damaged_labels_are_told_in_one_line(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text(line and f"{line}\n")
    with pytest.raises(DataError, match=f"does not hold route labels \\({said}") as caught:
        RouteLabels.read(tmp_path / "bad.jsonl")
    assert "\n" not in str(caught.value)


def test_transfer_scores_the_chosen_routes_on_another_model():
    first, second, ids_BL = decoder(3, seed=0), decoder(3, seed=1), tokens(5, 6)
    result = oracle(first, ids_BL, (1, 2), chunk=2)
    torch.testing.assert_close(transfer(result, first, ids_BL, chunk=3), result.loss_GBL, rtol=1e-5, atol=1e-5)
    moved_GBL = transfer(result, second, ids_BL, chunk=3)
    route_BLY = result.route_BLY(2)
    for row, position in itertools.product(range(5), range(5)):
        expected_BL = losses(second, ids_BL, all_one(route_BLY[row, position].tolist(), ids_BL))
        assert float(moved_GBL[1, row, position]) == pytest.approx(float(expected_BL[row, position]), abs=1e-5)
    assert (moved_GBL >= oracle(second, ids_BL, (1, 2)).loss_GBL - 1e-5).all()
    with pytest.raises(ConfigError, match="the model has 2"):
        transfer(result, decoder(2), ids_BL)


def test_difficulty_is_not_negative_where_all_small_is_a_candidate():
    model, ids_BL = decoder(3), tokens(4, 8)
    small_BL = route_loss(model, ids_BL, "small", chunk=3)
    assert (difficulty(oracle(model, ids_BL), small_BL) >= -1e-6).all()
    assert torch.allclose(difficulty(oracle(model, ids_BL, 0), small_BL, 0), torch.zeros(4, 7), atol=1e-6)


def test_shares_by_position_by_hand():
    route_BLY = torch.tensor([[[1, 0], [1, 0], [0, 1], [0, 0]]])  # one sequence, four positions, two layers
    assert big_by_position(route_BLY, 2).tolist() == [[1.0, 0.0], [0.0, 0.5]]


def test_ramps_pick_each_positions_budget():
    result = oracle(decoder(3), tokens(2, 7), (0, 1, 2, 3))
    # six positions from 3 to 1: budgets 3, 2.6, 2.2, 1.8, 1.4, 1
    expected = torch.stack([result.loss_GBL[budget, :, place] for place, budget in enumerate([3, 3, 2, 2, 1, 1])])
    assert ramp_loss(result, 3, 1) == pytest.approx(float(expected.double().mean()))
    assert ramp_loss(result, 2, 2) == pytest.approx(float(result.oracle_G[2]))


def test_hopeless_share_by_hand():
    loss_BL = torch.arange(20.0).view(2, 10)  # the top tenth: 18 and 19
    difficulty_BL = torch.ones(2, 10)
    difficulty_BL[1, 8] = 0.0
    assert hopeless_share(loss_BL, difficulty_BL) == 0.5


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=12))
@settings(max_examples=30, deadline=None)
def test_rank_correlation_agrees_with_scipy(values):
    stats = pytest.importorskip("scipy.stats")
    other = [value * value - value for value in values]
    if len(set(values)) > 1 and len(set(other)) > 1:
        expected = stats.spearmanr(values, other).statistic
        assert rank_correlation(values, other) == pytest.approx(expected)
    else:
        assert math.isnan(rank_correlation(values, other))


def test_gap_closed():
    assert gap_closed(2.0, 1.75, 1.0) == 0.25
    assert math.isnan(gap_closed(1.0, 1.0, 1.0))


def test_analysis_is_json_with_text(tmp_path):
    model = decoder(3, dim=16)
    config = model.config.replace(vocab_size=257)
    model, tokenizer = config.build(seed=0), ByteTokenizer.Config().build()
    ids_BL = torch.tensor([tokenizer.encode("def f(x): return x + 1  # plus"), tokenizer.encode("a" * 30)])
    result = oracle(model, ids_BL, (0, 1, 2, 3), shuffle_seed=0)
    table = analyze(
        result,
        route_loss(model, ids_BL, "small"),
        ids_BL=ids_BL,
        tokenizer=tokenizer,
        ramps=[(3, 1), (1, 3)],
        path=tmp_path / "analysis.json",
    )
    assert json.loads((tmp_path / "analysis.json").read_text()) == table
    assert [row["budget"] for row in table["rows"]] == [0, 1, 2, 3]
    assert len(table["heat"]["1"]) == 3
    assert sum(map(sum, table["heat"]["1"])) / 10 == pytest.approx(1.0, abs=0.02)  # one big layer per token
    assert len(table["difficult"]) == 20
    values = [entry["value"] for entry in table["difficult"]]
    assert values == sorted(values, reverse=True)
    found = top_tokens(ids_BL, torch.eye(2, 29) * 5, tokenizer, count=1, before=4)
    assert found == [{"value": 5.0, "before": "d", "token": "e"}]


def test_evaluation_of_a_route_is_that_of_the_trainer(duo_run, tmp_path):
    from anabranch.depth.duo_llm import Routed

    run = duo_run(steps=1)
    trainer = Trainer(run, tmp_path / "run")
    nats = trainer.fit().nats_per_token
    windows = trainer.data.validation(batch_size=4, num_windows=8)
    assert evaluate(Routed(trainer.model, "big"), windows).nats_per_token == pytest.approx(nats)
    assert evaluate(Routed(trainer.model, "small"), windows).nats_per_token != pytest.approx(nats)

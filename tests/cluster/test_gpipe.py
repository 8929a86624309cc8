"""GPipe on one machine: gradients are those of the model that was not split, whatever is chosen; and what is refused."""

import pipes

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.cluster import GPipe, KeyedDropout, MessageLog, Pop, SavedBytes, Stash
from anabranch.cluster.gpipe import StageError
from anabranch.cluster.gpipe.costs import layer_costs
from anabranch.errors import InputError


def check_gradients(kind, items=10, tolerance=1e-10, **options):
    model, (x, target), loss_fn = pipes.MODELS[kind](), pipes.data_of(kind, items), pipes.loss_of(kind)
    expected, wanted = pipes.gradients(model, x, target, loss_fn)
    other = pipes.MODELS[kind]()
    pipe = GPipe(other, tied="auto" if kind == "lm" else (), **options)
    loss = pipe.step(x, target, loss_fn)
    assert loss == pytest.approx(expected.item(), rel=tolerance)
    found = {name: p.grad for name, p in pipe.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max()), name
    return pipe


@pytest.mark.parametrize("kind", pipes.MODELS)
@pytest.mark.parametrize("checkpoint", ["always", "except_last", "never"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 4), (4, 10), (5, 16)])
def test_gradients_are_those_of_the_unsplit_model(kind, checkpoint, stages, micro_batches):
    check_gradients(kind, stages=stages, micro_batches=micro_batches, checkpoint=checkpoint)


@pytest.mark.parametrize(("schedule", "visits"), [("1f1b", None), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize("kind", ["mlp", "skips"])
def test_other_schedules_give_the_same(kind, schedule, visits):
    pipe = check_gradients(kind, stages=2, micro_batches=5, schedule=schedule, visits=visits)
    pipe.schedule_of(10).check()


def test_losses_and_gradients_have_the_same_bits_for_every_number_of_stages():
    x, target = pipes.data_of("lm", 7)
    found = []
    for stages in (1, 2, 5):
        pipe = GPipe(pipes.language_model(dropout=0.3), stages=stages, micro_batches=3, tied="auto", seed=5)
        losses = []
        for _ in range(2):
            pipe.zero_grad()
            losses.append(pipe.step(x, target, pipes.token_loss))
        found.append((torch.stack(losses), {name: p.grad for name, p in pipe.named_parameters()}))
    for losses, grads in found[1:]:
        assert torch.equal(losses, found[0][0])
        for name, gradient in grads.items():
            # A tied parameter's parts are added in another order.
            assert torch.allclose(gradient, found[0][1][name], rtol=1e-12, atol=1e-14), name
    assert found[0][0][0] != found[0][0][1], "a new step draws anew"


def test_a_dropout_that_is_raised_in_training_is_repeated_in_recomputation():
    x, target = pipes.batch(8)
    found = []
    for checkpoint in ("always", "never"):
        torch.manual_seed(0)
        drop = nn.Dropout(0.0)
        pipe = GPipe(nn.Sequential(nn.Linear(8, 8), drop, nn.Linear(8, 8)).double(), 3, 2, checkpoint)
        pipe.step(x, target, F.mse_loss)
        pipe.zero_grad()
        drop.p = 0.5
        loss = pipe.step(x, target, F.mse_loss)
        found.append((loss.item(), *(p.grad.sum().item() for p in pipe.parameters())))
    assert found[0] == found[1]


def test_keyed_dropout_is_the_same_for_every_layout():
    x, target = pipes.batch(8)

    def made():
        torch.manual_seed(0)
        layers = [
            nn.Linear(8, 8),
            KeyedDropout(0.5, seed=3, layer=1),
            nn.Linear(8, 8),
            KeyedDropout(0.5, seed=3, layer=3),
        ]
        return nn.Sequential(*layers).double()

    _, wanted = pipes.gradients(made(), x, target, F.mse_loss)
    for stages, micro_batches, checkpoint in ((1, 1, "never"), (2, 3, "always"), (4, 8, "except_last")):
        pipe = GPipe(made(), stages, micro_batches, checkpoint)
        pipe.step(x, target, F.mse_loss)
        assert all(torch.allclose(p.grad, wanted[name], rtol=1e-10) for name, p in pipe.named_parameters())
    # Two pipelines with half of the batch each, and a later step.
    halves = [GPipe(made(), 2, 2) for _ in range(2)]
    for number, pipe in enumerate(halves):
        rows = slice(4 * number, 4 * number + 4)
        pipe.step(x[rows], target[rows], F.mse_loss, first_row=4 * number)
    for one, other in zip(*(pipe.named_parameters() for pipe in halves), strict=True):
        assert torch.allclose((one[1].grad + other[1].grad) / 2, wanted[one[0]], rtol=1e-10)


def test_another_mode_of_recomputation_draws_the_same():
    x, target = pipes.data_of("lm", 6)
    losses = set()
    for checkpoint in ("always", "except_last", "never"):
        pipe = GPipe(pipes.language_model(dropout=0.3), stages=2, micro_batches=2, tied="auto", checkpoint=checkpoint)
        loss = pipe.step(x, target, pipes.token_loss)
        losses.add((loss.item(), sum(p.grad.abs().sum().item() for p in pipe.parameters())))
    assert len(losses) == 1


@pytest.mark.parametrize(("checkpoint", "calls"), [("never", 4), ("always", 8), ("except_last", 7)])
def test_layers_run_as_often_as_said(checkpoint, calls):
    model = pipes.mlp()
    count = [0] * len(model)
    for number, layer in enumerate(model):
        layer.register_forward_hook(lambda *_, number=number: count.__setitem__(number, count[number] + 1))
    x, target = pipes.batch(8)
    pipe = GPipe(model, stages=3, micro_batches=4, checkpoint=checkpoint)
    pipe.step(x, target, F.mse_loss)
    assert count == [calls] * 6
    pipe.eval().step(x, target, F.mse_loss)
    assert count == [calls + 4] * 6, "in evaluation mode nothing is done again"


def test_state_moves_in_and_out():
    model = pipes.mlp()
    pipe = GPipe(pipes.mlp(seed=9), stages=3, micro_batches=2)
    assert list(pipe.state_dict()) == list(model.state_dict())
    pipe.load_state_dict(model.state_dict())
    x, _ = pipes.batch(5)
    assert torch.allclose(pipe(x), model(x), rtol=1e-12)
    named = nn.Sequential()
    named.add_module("first", nn.Linear(8, 8))
    named.add_module("second", nn.Linear(8, 8))
    assert list(GPipe(named, stages=2).state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]


def test_training_goes_as_without_it():
    plain, piped = pipes.mlp(), GPipe(pipes.mlp(), stages=3, micro_batches=4)
    optimizers = [torch.optim.Adam(each.parameters(), 0.01) for each in (plain, piped)]
    for step in range(5):
        x, target = pipes.batch(8, seed=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.mse_loss(plain(x), target).backward()
        piped.step(x, target, F.mse_loss)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(plain.parameters(), piped.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9)
    assert piped.steps == 5


class Pair(nn.Module):
    """Takes and gives a tuple, a number with it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, values):
        x, y, scale = values
        return self.linear(x) * scale, y + x, scale


def test_boundaries_carry_tuples_and_plain_values():
    torch.manual_seed(0)
    model = nn.Sequential(Pair(), Pair(), Pair()).double()
    x, y = pipes.batch(6)

    def loss_fn(output, target):
        return F.mse_loss(output[0] + output[1], target)

    expected, wanted = pipes.gradients(model, (x, y, 2), y, loss_fn)
    model.zero_grad()
    pipe = GPipe(model, stages=3, micro_batches=4)
    assert pipe.step((x, y, 2), y, loss_fn) == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(p.grad, wanted[name]) for name, p in pipe.named_parameters())


def test_a_mean_that_is_not_over_items_is_weighed_by_what_it_is_over():
    model = pipes.language_model()
    x, target = pipes.data_of("lm", 6)
    target = target.clone()
    target[:4, 1:] = -100
    target[0] = -100
    expected, wanted = pipes.gradients(model, x, target, pipes.token_loss)
    model.zero_grad()
    pipe = GPipe(model, stages=2, micro_batches=6, tied="auto")
    loss = pipe.step(x, target, pipes.token_loss, weights=lambda piece: float((piece != -100).sum()))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(p.grad, wanted[name]) for name, p in pipe.named_parameters())


OUTPUTS = {
    "-inf": lambda x: x.masked_fill(torch.arange(8) > 5, -torch.inf),
    "inf": lambda x: x.masked_fill(torch.arange(8) > 5, torch.inf),
    "nan": lambda x: x.masked_fill(torch.arange(8) > 5, torch.nan),
    "complex": lambda x: torch.complex(x, x),
    "parts": lambda x: {
        "x": x,
        "x as float": x.float(),
        "places": x.argmax(-1),
        "is": x > 0,
        "none": x[:, :0],
        "said": "x",
    },
}


class Output(nn.Module):
    """Hands on what the loss is of, as layers of all kinds do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return OUTPUTS[self.kind](x)


@pytest.mark.parametrize("schedule", ["gpipe", "zero-bubble"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_counts_nothing_adds_nothing_whatever_the_output_is(kind, schedule):
    def loss_fn(output, target):
        output = output["x"] if isinstance(output, dict) else output
        return (output.abs()[:, :5] - target[:, :5])[target[:, 0] != 0].square().mean()

    model = nn.Sequential(*pipes.mlp(2), Output(kind))
    x, target = pipes.batch(6)
    target[3:] = 0
    expected, wanted = pipes.gradients(model, x, target, loss_fn)
    model.zero_grad()
    pipe = GPipe(model, stages=2, micro_batches=6, schedule=schedule)
    loss = pipe.step(x, target, loss_fn, weights=lambda piece: float((piece[:, 0] != 0).sum()))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(p.grad, wanted[name]) for name, p in pipe.named_parameters())


def test_deferred_batch_norm_tracks_what_one_pass_over_the_batch_does():
    torch.manual_seed(0)
    x, target = (torch.randn(10, 3, 4, 4) for _ in range(2))
    for momentum in (0.1, None):
        for checkpoint in ("always", "except_last", "never"):
            plain = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.Conv2d(3, 3, 1), nn.ReLU())
            model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.Conv2d(3, 3, 1), nn.ReLU())
            pipe = GPipe(model, stages=2, micro_batches=4, deferred_batch_norm=True, checkpoint=checkpoint)
            for scale in (1, 2):
                plain(x * scale)
                pipe.step(x * scale, target, F.mse_loss)
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                one, other = getattr(plain[0], name).double(), getattr(model[0], name).double()
                assert torch.allclose(one, other, rtol=1e-6, atol=1e-7), (name, momentum, checkpoint)
            assert model[0].track_running_stats


def test_a_recomputation_tracks_nothing():
    x, target = (torch.randn(8, 3) for _ in range(2))
    found = []
    for checkpoint in ("always", "never"):
        model = nn.Sequential(nn.BatchNorm1d(3))
        GPipe(model, stages=1, micro_batches=4, checkpoint=checkpoint).step(x, target, F.mse_loss)
        found.append(model[0].running_mean)
        assert model[0].num_batches_tracked == 4
    assert torch.equal(*found)


def test_layers_that_change_their_input_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ELU(inplace=True), nn.Linear(8, 8), nn.ELU(inplace=True)).double()
    x, target = pipes.batch(6)
    _, wanted = pipes.gradients(model, x, target, F.mse_loss)
    for checkpoint in ("always", "never"):
        model.zero_grad()
        pipe = GPipe(model, balance=[1, 2, 1], micro_batches=3, checkpoint=checkpoint)
        pipe.step(x, target, F.mse_loss)
        assert all(torch.allclose(p.grad, wanted[name]) for name, p in pipe.named_parameters())


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_what_changes_its_input_unseen_is_told():
    x, target = pipes.batch(6)
    pipe = GPipe(nn.Sequential(nn.Linear(8, 8).double(), InPlace()), stages=2, micro_batches=2, checkpoint="always")
    with pytest.raises(StageError, match="layer 1 changes its input in place"):
        pipe.step(x, target, F.mse_loss)


def test_saved_bytes_are_inputs_and_one_recomputation():
    x, target = pipes.batch(64, width=32)
    layers = 16
    found = {}
    for checkpoint in ("always", "never"):
        model = pipes.mlp(layers, 32)
        meter = SavedBytes(ignored=model.parameters())
        pipe = GPipe(model, stages=1, micro_batches=8, checkpoint=checkpoint, meter=meter)
        pipe.step(x, target, F.mse_loss)
        assert meter.now == 0
        found[checkpoint] = meter.most
    whole = x.nbytes
    # Each layer keeps its input, of all micro-batches; or all inputs of the stage, and the layers of one micro-batch.
    assert found["never"] >= layers / 2 * whole
    assert found["always"] <= (whole + (layers + 2) * whole / 8) * 1.05


def test_messages_between_stages_are_logged():
    log = MessageLog(3)
    x, target = pipes.batch(8)
    GPipe(pipes.with_skips(), balance=[2, 2, 2], micro_batches=2, log=log).step(x, target, F.mse_loss)
    half = x.nbytes
    # Forward, and the skips "outer" and "inner", which go from stage 0 to stage 2 without passing by stage 1.
    assert log.bytes_RR.tolist() == [[0, half, 2 * half], [half, 0, half], [2 * half, half, 0]]
    assert len(log.trace()) == len(log) == 16


def test_an_error_of_a_stage_says_where_and_leaves_no_thread():
    import threading

    for kind in ("forward", "backward"):
        layers = list(pipes.mlp(6))
        layers[3] = pipes.Failing(kind)
        pipe = GPipe(nn.Sequential(*layers), balance=[2, 2, 2], micro_batches=2, checkpoint="never")
        x, target = pipes.batch(7)
        number = {"forward": 1, "backward": 1}[kind]
        with pytest.raises(StageError, match=f"stage 1 failed in the {kind} of micro-batch {number}") as caught:
            pipe.step(x, target, F.mse_loss)
        assert isinstance(caught.value.__cause__, ValueError)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]
        x, target = pipes.batch(8)
        pipe.step(x, target, F.mse_loss)


def test_autocast_holds_in_every_stage():
    x, target = pipes.batch(4, dtype=torch.float32)
    pipe = GPipe(pipes.mlp(dtype=torch.float32), stages=3, micro_batches=2)
    seen = []
    for layer in list(pipe.children())[::2]:
        layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        pipe.step(x, target, F.mse_loss)
    assert set(seen) == {torch.bfloat16}


def test_balance_is_chosen_by_what_is_asked():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Linear(1, 64), nn.Linear(64, 64))
    # Parameters of 4,160, none, 65, 128 and 4,160, and 1 for each layer.
    assert GPipe(model, stages=2).partition.balance == (3, 2)
    sample = torch.zeros(4, 64)
    for by in ("flops", "size"):
        assert sum(GPipe(model, stages=2, balance=by, sample=sample).partition.balance) == 5
    assert min(layer_costs(model, "time", sample, budget_s=0.02)) > 0
    assert GPipe(model, balance=[4, 1]).num_stages == 2
    assert GPipe(model, devices=["cpu", "cpu", "cpu"]).num_stages == 3


def test_flops_are_counted():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    # 2 x 3 x 8 x 16 and 2 x 3 x 16 x 4.
    assert layer_costs(model, "flops", torch.zeros(3, 8)) == [769, 1, 385]
    # Outputs, and parameters twice.
    assert layer_costs(model, "size", torch.zeros(3, 8)) == [192 + 2 * 576, 192, 48 + 2 * 272]


X, TARGET = torch.zeros(4, 8), torch.zeros(4, 8)
TWO = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def shared():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: GPipe(nn.Linear(2, 2), 1), TypeError, "model is a Linear"),
        (lambda: GPipe(TWO), InputError, "nothing says how many stages"),
        (lambda: GPipe(TWO, 3), InputError, "the model has 2 layers, too few for 3 stages"),
        (lambda: GPipe(TWO, 0), InputError, "stages is 0"),
        (lambda: GPipe(TWO, True), InputError, "stages is True; use a whole number of at least 1"),
        (lambda: GPipe(TWO, 1.0), InputError, "stages is 1.0"),
        (lambda: GPipe(TWO, balance=[1, 2]), InputError, r"balance is \[1, 2\], which sums to 3, and the model has 2"),
        (lambda: GPipe(TWO, balance=[2, 0]), InputError, "has the entry 0"),
        (lambda: GPipe(TWO, 3, balance=[1, 1]), InputError, "they must agree"),
        (lambda: GPipe(TWO, 2, devices=["cpu"]), InputError, "there are 2 stages and 1 devices"),
        (lambda: GPipe(TWO, 2, 0), InputError, "micro_batches is 0"),
        (lambda: GPipe(TWO, 2, checkpoint="sometimes"), InputError, "checkpoint is 'sometimes'"),
        (lambda: GPipe(TWO, 2, runner="threads"), InputError, "runner is 'threads'"),
        (lambda: GPipe(TWO, 2, runner="distributed"), InputError, "start it with torchrun"),
        (lambda: GPipe(TWO, 2, schedule="zero bubbles"), InputError, "schedule is 'zero bubbles'"),
        (lambda: GPipe(TWO, 2, balance="luck"), InputError, "balance is 'luck'"),
        (lambda: GPipe(TWO, 2, balance="time"), InputError, "give a micro-batch as sample="),
        (lambda: GPipe(shared(), 2), InputError, "layers 0 and 2 are or have the same Linear"),
        (lambda: GPipe(pipes.language_model(), 2), InputError, "0.weight and 4.weight are one parameter"),
        (lambda: GPipe(TWO, 2, tied=[["0.weight", "1.weight"]]), InputError, "tied says that"),
        (lambda: GPipe(TWO, 2, tied=[["0.weights"]]), InputError, "no such parameter"),
        (lambda: GPipe(nn.Sequential(Pop("a", torch.add)), 1), InputError, "which no layer stashes"),
        (lambda: GPipe(nn.Sequential(Stash("a")), 1), InputError, "which no layer pops"),
        (
            lambda: GPipe(nn.Sequential(Stash("a"), Stash("a")), 1),
            InputError,
            "'a' is stashed twice, in layers 0 and 1",
        ),
        (lambda: GPipe(nn.Sequential(Pop("a", torch.add), Stash("a")), 1), InputError, "stashes only later"),
        (lambda: GPipe(TWO, 2).step(X, TARGET[:2], F.mse_loss), InputError, "target has 2 items, and x has 4"),
        (lambda: GPipe(TWO, 2).step(X[:0], TARGET[:0], F.mse_loss), InputError, "x has no items"),
        (lambda: GPipe(TWO, 2).step((X, X[:2]), TARGET, F.mse_loss), InputError, "tensors of 2 and 4 items"),
        (lambda: GPipe(TWO, 2).step(X, TARGET, lambda y, t: y), StageError, r"loss_fn gave a tensor of shape \[4, 8\]"),
    ],
)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()

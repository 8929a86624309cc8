import itertools

import pytest
import torch
from safetensors.torch import load, save

from anabranch.errors import CheckpointError
from anabranch.lm import Decoder
from anabranch.train import TrainConfig
from anabranch.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors


def decayed_names(model, **settings):
    optimizer = make_optimizer(model, TrainConfig(**settings))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


def test_matrices_decay_and_vectors_do_not(routed_model):
    model = Decoder(routed_model)
    names = decayed_names(model)
    assert "shared.experts_0.w13" in names
    assert "blocks.0.feed_forward.router.score.weight" in names
    assert "head.weight" in names
    assert not any("norm" in name or name.startswith("embedding") for name in names)


def test_routers_and_embeddings_as_configured(routed_model):
    model = Decoder(routed_model)
    names = decayed_names(model, router_weight_decay=False, embedding_weight_decay=True)
    assert not any("router" in name for name in names)
    assert "embedding.weight" in names


def test_one_step_by_hand():
    # first step of AdamW: the bias-corrected moments are g and g^2, so p - lr wd p - lr g / (|g| + eps)
    model = torch.nn.Linear(2, 1, bias=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(3.0)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    model.weight.grad, model.bias.grad = torch.tensor([[4.0, -1.0]]), torch.tensor([2.0])
    optimizer.step()
    assert model.weight.tolist()[0] == pytest.approx([0.95 - 0.1, -1.9 + 0.1])
    assert model.bias.tolist() == pytest.approx([2.9])  # not decayed


def test_state_survives_as_named_tensors(routed_model):
    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    one = Decoder(routed_model)
    first = make_optimizer(one, TrainConfig())
    step(one, first, 1)
    two = Decoder(routed_model)
    two.load_state_dict(one.state_dict())
    second = make_optimizer(two, TrainConfig())
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(one, first).items()}
    load_optimizer_tensors(two, second, tensors)
    step(one, first, 2)
    step(two, second, 2)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_another_model_is_refused(routed_model):
    model = Decoder(routed_model)
    optimizer = make_optimizer(model, TrainConfig())
    with pytest.raises(CheckpointError, match=r"other\.weight/exp_avg \[2\], which fits no parameter"):
        load_optimizer_tensors(model, optimizer, {"other.weight/exp_avg": torch.zeros(2)})


def test_moments_of_a_single_number_stored_without_an_axis_are_taken():
    model = torch.nn.Linear(1, 1, bias=True)
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.ones(1)).sum().backward()
    optimizer.step()
    stored = optimizer_tensors(model, optimizer)
    other = make_optimizer(model, TrainConfig())
    old = {name: value[0] if name.startswith("bias/exp") else value for name, value in stored.items()}
    assert old["bias/exp_avg"].shape == ()
    load_optimizer_tensors(model, other, old)
    for name, value in optimizer_tensors(model, other).items():
        assert torch.equal(value, stored[name]), name
        assert value.shape == stored[name].shape, name
    other.step()


class Turned(torch.nn.Module):
    """A parameter [2, 3, 4] that lies in memory in another order of its axes."""

    def __init__(self, order):
        super().__init__()
        start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        back = [order.index(axis) for axis in range(3)]
        self.weight = torch.nn.Parameter(start.permute(order).contiguous().permute(back))


@pytest.mark.parametrize("kind", ["adamw", "galore"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_moments_of_what_lies_otherwise_in_memory_are_of_the_same_numbers(order, kind):
    """A file keeps tensors in one order, whatever that of the parameter is; what goes on from it goes on to the bit."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(2, 3, 4, generator=generator) for _ in range(5)]

    def step(model, optimizer, part):
        for gradient in part:
            model.weight.grad = torch.empty_like(model.weight).copy_(gradient)
            optimizer.step()

    settings = TrainConfig(optimizer=kind, learning_rate=0.1, galore_rank=2)
    whole, stopped, again = (Turned(order) for _ in range(3))
    assert whole.weight.is_contiguous() == (order == (0, 1, 2))
    step(whole, make_optimizer(whole, settings), gradients)
    first, second = make_optimizer(stopped, settings), make_optimizer(again, settings)
    step(stopped, first, gradients[:2])
    with torch.no_grad():
        again.weight.copy_(stopped.weight)
    kept = {name: value.contiguous() for name, value in optimizer_tensors(stopped, first).items()}
    load_optimizer_tensors(again, second, load(save(kept)))
    step(again, second, gradients[2:])
    assert torch.equal(again.weight, whole.weight)
    # Nor does how it lies change what is learned.
    plain = Turned((0, 1, 2))
    step(plain, make_optimizer(plain, settings), gradients)
    torch.testing.assert_close(whole.weight, plain.weight)

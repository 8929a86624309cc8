"""A model of tests whose samples take one branch each, so that some parameters have no part in a step; and one process that learns it."""

import torch
from torch import nn

from elastic_ranks import adam, halved

WIDTH, CLASSES, EXPERTS, APART = 5, 3, 3, 9
# Which branches the samples of a step take, in turns. APART: what comes in has no part, all over the layers in front.
TAKEN = ((0,), (1, 2), (APART,), (0, 2), (2,), (APART, 1), (APART,), (0, 1, 2, APART))


class Branches(nn.Module):
    """Each sample through the expert that it names; an expert that none names is not called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, value):
        x, which = value
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = which == number
            if rows.any():
                out = out.index_copy(0, rows.nonzero()[:, 0], torch.tanh(expert(x[rows])))
        return x + out, which


class Head(nn.Module):
    """Of a sample that is apart one vector that learns, whatever came in; of others what a linear layer makes of it."""

    def __init__(self):
        super().__init__()
        self.linear, self.apart = nn.Linear(WIDTH, CLASSES), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, value):
        x, which = value
        rows = which != APART
        if not rows.any():
            return self.apart.expand(len(x), CLASSES)
        if rows.all():
            return self.linear(x)
        return torch.where(rows[:, None], self.linear(x), self.apart)


def layers_of(dtype=torch.float64):
    torch.manual_seed(3)
    return [layer.to(dtype) for layer in (Branches(), Branches(), Branches(), Head())]


def batch_of(step, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2000 + step)
    x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    taken = torch.tensor(TAKEN[step % len(TAKEN)])
    return (x, taken[torch.arange(size) % len(taken)]), torch.randint(CLASSES, (size,), generator=generator)


def alone(steps, size, factory=adam, *, first=0):
    """(losses, weights, (layer, parameter) that had no part by step) of the same training in one process, as torch does it."""
    layers = layers_of()
    model = nn.Sequential(*layers)
    optimizer = factory(list(model.parameters()))
    rate, losses, without = optimizer.param_groups[0]["lr"], [], []
    for step in range(first, first + steps):
        x, target = batch_of(step, size)
        for group in optimizer.param_groups:
            group["lr"] = rate * halved(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        without.append({name for name, parameter in model.named_parameters() if parameter.grad is None})
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in model.state_dict().items()}, without

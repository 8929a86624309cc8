"""Drawn models with parameters that several stages have, some frozen, some without a part in a step, some with hooks; ranks import this."""

import random
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from anabranch.cluster import GPipe

WIDTH, STEPS = 4, 3
HOOKS = ("none", "mask", "clip", "after")


def drawn(seed, stages):
    """One case: what the model is and how it is cut."""
    chance = random.Random(seed)
    schedule = chance.choice(["gpipe", "1f1b", "interleaved", "zero-bubble"])
    chunks = stages * (2 if schedule == "interleaved" else 1)
    balance = [chance.randint(1, 2) for _ in range(chunks)]
    stage_of = [chunk % stages for chunk, layers in enumerate(balance) for _ in range(layers)]
    ties = {}
    for name in chance.choice([["first"], ["first", "second"]]):
        # A layer of each of two stages or more.
        having = chance.sample(range(stages), chance.randint(2, stages))
        layers = {chance.choice([place for place, stage in enumerate(stage_of) if stage == one]) for one in having}
        layers |= {place for place in range(len(stage_of)) if chance.random() < 0.3}
        ties[name] = {
            "layers": sorted(layers),
            "learns": chance.random() < 0.8,
            "hook": chance.choice(HOOKS),
            # By step, the layers that work with it.
            "used": [[place for place in sorted(layers) if chance.random() < 0.6] for _ in range(STEPS)],
        }
    return {
        "seed": seed,
        "layers": len(stage_of),
        "ties": ties,
        "frozen": [place for place in range(len(stage_of)) if chance.random() < 0.2],
        "unused": [place for place in range(len(stage_of)) if chance.random() < 0.2],
        "masked": [place for place in range(len(stage_of)) if chance.random() < 0.3],
        "items": chance.randint(1, 7),
        "options": {
            "stages": stages,
            "balance": balance,
            "schedule": schedule,
            "micro_batches": chance.randint(1, 5),
            "checkpoint": chance.choice(["always", "except_last", "never"]),
        },
    }


class Layer(nn.Module):
    """A linear map of its own, and for each tied parameter that it has one more."""

    def __init__(self, shared):
        super().__init__()
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64) / 2)
        self.spare = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64) / 2)
        self.shared = nn.ParameterDict(shared)
        self.used, self.has_spare = (), True

    def forward(self, x):
        x = x @ self.own
        if self.has_spare:
            x = x + self.spare
        for name in self.used:
            x = x + torch.tanh(x @ self.shared[name])
        return x


def built(case):
    """(the model, a list to which hooks of what is tied add (its name, what they see))."""
    torch.manual_seed(case["seed"])
    ties = {
        name: nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64) / 2, requires_grad=tie["learns"])
        for name, tie in case["ties"].items()
    }
    layers = [
        Layer({name: ties[name] for name, tie in case["ties"].items() if place in tie["layers"]})
        for place in range(case["layers"])
    ]
    seen = []
    for name, tie in case["ties"].items():
        if tie["learns"] and tie["hook"] != "none":
            hooked(ties[name], tie["hook"], lambda value, name=name: seen.append((name, value.clone())))
    for place, layer in enumerate(layers):
        if place in case["masked"]:
            hooked(layer.own, "mask", lambda value: None)
        layer.own.requires_grad_(place not in case["frozen"])
        layer.has_spare = place not in case["unused"]
    return nn.Sequential(*layers), seen


def hooked(parameter, kind, tell):
    mask = torch.ones(WIDTH, 1, dtype=torch.float64)
    mask[0] = 0

    def changed(gradient):
        tell(gradient)
        # The second is no sum of what it makes of parts.
        return gradient * mask if kind == "mask" else gradient / (1 + gradient.norm())

    if kind == "after":
        parameter.register_post_accumulate_grad_hook(lambda one: tell(one.grad))
    else:
        parameter.register_hook(changed)


def stepped(case, model, module, step, seen):
    """Steps without a zero_grad in between: by step (the loss, gradients and weights by name of ``module``); and what hooks saw."""
    optimizer = torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.1)
    found = []
    for number in range(STEPS):
        for place, layer in enumerate(model):
            layer.used = [name for name, tie in case["ties"].items() if place in tie["used"][number]]
        draw = torch.Generator().manual_seed(number)
        x, target = torch.randn(2, case["items"], WIDTH, generator=draw, dtype=torch.float64)
        loss = float(step(x, target))
        named = dict(module.named_parameters(remove_duplicate=False))
        gradients = {name: None if one.grad is None else one.grad.clone() for name, one in named.items()}
        optimizer.step()
        found.append((loss, gradients, {name: one.detach().clone() for name, one in named.items()}))
    return found, seen


def alone(case):
    """In one process and in one piece."""
    model, seen = built(case)

    def step(x, target):
        loss = F.mse_loss(model(x), target)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    return stepped(case, model, model, step, seen)


def in_stages(case, **options):
    """By a `GPipe`."""
    model, seen = built(case)
    pipe = GPipe(model, tied="auto", **case["options"], **options)
    return stepped(case, model, pipe, partial(pipe.step, loss_fn=F.mse_loss), seen)


def all_in_stages(rank, world, cases):
    return [in_stages(case, runner="distributed") for case in cases]


class Elsewhere(nn.Module):
    """Has a parameter, and reads it from a list beside."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.beside = weight, [weight]

    def forward(self, x):
        return F.linear(x, self.beside[0])


def read_elsewhere(has_hook):
    """The first layer's weight is the second's, which reads it past its attribute."""
    torch.manual_seed(0)
    first = nn.Linear(WIDTH, WIDTH, bias=False)
    if has_hook:
        first.weight.register_hook(lambda gradient: gradient * 2)
    return nn.Sequential(first, Elsewhere(first.weight))


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def recurrent():
    """Two layers that keep lists of their weights beside them, of which one is of both."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Recurrent(WIDTH, WIDTH) for _ in range(2)))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    return model


def sparse():
    """Two embeddings whose gradients are sparse."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, WIDTH, sparse=True), Looked(nn.Embedding(5, WIDTH, sparse=True)))
    model[1].table.weight = model[0].weight
    return model


def half_sparse():
    """An embedding of sparse gradients that is the head too, where they are dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, WIDTH, sparse=True), nn.Linear(WIDTH, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def half_dense():
    """The same the other way round: the dense one stands first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), Looked(nn.Embedding(WIDTH, WIDTH, sparse=True)))
    model[1].table.weight = model[0].weight
    return model


class Looked(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return x + self.table(torch.tensor([1, 3]))[0]


KINDS = {
    "recurrent": (recurrent, ("0.weight_hh_l0", "1.weight_hh_l0"), lambda: torch.ones(3, 2, WIDTH)),
    "sparse": (sparse, ("0.weight", "1.table.weight"), lambda: torch.tensor([[0, 1], [1, 2]])),
    "sparse, then dense": (half_sparse, ("0.weight", "1.weight"), lambda: torch.tensor([[0, 1], [1, 2]])),
    "dense, then sparse": (half_dense, ("0.weight", "1.table.weight"), lambda: torch.ones(3, WIDTH)),
    "elsewhere": (lambda: read_elsewhere(False), ("0.weight", "1.weight"), lambda: torch.ones(3, WIDTH)),
}


def gradient_of(kind, **options):
    """Of what is tied, after two steps."""
    build, names, x = KINDS[kind]
    pipe = GPipe(build(), stages=2, tied="auto", **options)
    name = next(name for name in names if name in dict(pipe.named_parameters()))
    for _ in range(2):
        pipe.step(x(), torch.zeros(len(x())), lambda y, target: (y**2).mean())
    return pipe.get_parameter(name).grad


def over_ranks(rank, world):
    return {kind: gradient_of(kind, runner="distributed").to_dense() for kind in KINDS}


def errors(rank, world):
    """Of steps where one rank alone learns what is tied, where hooks would see parts, and where nobody learns it and nothing is sent."""

    def told(model):
        pipe = GPipe(model, stages=2, tied="auto", runner="distributed")
        try:
            return pipe.step(torch.ones(3, WIDTH), torch.zeros(3, WIDTH), F.mse_loss).shape
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    def model(learns):
        made = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2)))
        made[1].weight = made[0].weight
        made[0].weight.requires_grad_(learns)
        return made

    found = [told(model(rank == 0)), told(read_elsewhere(True))]
    dist.send = dist.recv = None
    return [*found, told(model(False))]

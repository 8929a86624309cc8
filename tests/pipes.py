"""Models, data and ranks for tests of pipelines; other processes import this."""

import os
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import anabranch.cluster.gradients as averaging
from anabranch.cluster import GPipe, MessageLog, Pop, Stash


def mlp(layers=6, width=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    made = [part for _ in range(layers // 2) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*made).to(dtype)


def with_skips(dtype=torch.float64):
    """A U of six layers whose two skips cross each other's stages."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Stash("outer")),
        nn.Sequential(nn.Linear(8, 8), Stash("inner")),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Sequential(Pop("inner", torch.add), nn.Linear(8, 8)),
        nn.Sequential(Pop("outer", torch.mul), nn.Linear(8, 8)),
    ).to(dtype)


class TiedHead(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x):
        return F.linear(x, self.weight)


def language_model(dropout=0.0, dtype=torch.float64, width=12, vocab=17, seed=2):
    """Embedding, three blocks with attention, head with the embedding's weight."""
    torch.manual_seed(seed)
    embedding = nn.Embedding(vocab, width)
    blocks = [
        nn.TransformerEncoderLayer(width, 2, 24, dropout=dropout, batch_first=True, norm_first=True) for _ in range(3)
    ]
    return nn.Sequential(embedding, *blocks, TiedHead(embedding)).to(dtype)


def token_loss(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(items=10, width=8, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(items, width, generator=generator, dtype=dtype) for _ in range(2))


def gradients(model, x, target, loss_fn):
    """(loss, {name: gradient}) of the model as it is."""
    model.zero_grad()
    loss = loss_fn(model(x), target)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


MODELS = {"mlp": mlp, "skips": with_skips, "lm": language_model}


def data_of(kind, items):
    if kind == "lm":
        generator = torch.Generator().manual_seed(4)
        return torch.randint(17, (2, items, 5), generator=generator).unbind()
    return tuple(batch(items))


def loss_of(kind):
    return token_loss if kind == "lm" else F.mse_loss


def steps_of(rank, world, kind, items, options, steps=2):
    """What a rank of a distributed pipeline has after some steps: losses, gradients, the whole state, bytes sent."""
    log = MessageLog(world)
    tied = "auto" if kind == "lm" else ()
    pipe = GPipe(MODELS[kind](), stages=world, runner="distributed", tied=tied, log=log, **options)
    losses = []
    for step in range(steps):
        x, target = data_of(kind, items + step)
        pipe.zero_grad()
        losses.append(pipe.step(x if rank == 0 else None, target if rank == world - 1 else None, loss_of(kind)).item())
    output = pipe.eval()(x if rank == 0 else None)
    grads = {name: p.grad for name, p in pipe.named_parameters() if p.grad is not None}
    state = pipe.state_dict()
    pipe.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    is_read = not any(parameter.any() for parameter in pipe.parameters())
    return {"losses": losses, "gradients": grads, "state": state, "log": log, "output": output, "is_read": is_read}


KEYS = {"of no layer": "7.weight", "of no layer at all": "nothing", "of a layer": "0.nothing"}


def told_of_keys(rank, world, runner="distributed"):
    """What is said of keys too many, and of all that are not there."""
    pipe = GPipe(mlp(), stages=2, runner=runner)
    state = pipe.state_dict()

    def told(state):
        return error_of(lambda: pipe.load_state_dict(state))[0]

    found = {what: told({**state, key: torch.zeros(1)}) for what, key in KEYS.items()}
    found["missing"] = told({})
    found["not strict"] = pipe.load_state_dict({**state, "7.weight": torch.zeros(1)}, strict=False).unexpected_keys
    return found


def all_steps_of(rank, world, cases):
    return [steps_of(rank, world, *case) for case in cases]


class Failing(nn.Module):
    """Fails in a micro-batch of three items: forward, backward, or by giving what cannot be sent."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if len(x) != 3:
            return x
        if self.kind == "forward":
            raise ValueError("out of luck")
        return {1, 2} if self.kind == "boundary" else _Back.apply(x)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("out of luck")


def failing_pipe(world, kind, stage):
    layers = list(mlp(2 * world))
    layers[2 * stage + 1] = Failing(kind)
    model = nn.Sequential(*layers)
    return GPipe(model, balance=[2] * world, micro_batches=2, runner="distributed", checkpoint="never")


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", type(error.__cause__).__name__
    return None, None


def failing_steps(rank, world, where):
    """For each (kind, stage): the error of a step in which that stage fails, and the loss of a step after it in the same pipeline."""
    found = []
    for kind, stage in where:
        pipe = failing_pipe(world, kind, stage)
        x, target = batch(7)
        told = error_of(lambda pipe=pipe, x=x, target=target: pipe.step(x, target, F.mse_loss))
        x, target = batch(8)
        found.append((told, pipe.step(x, target, F.mse_loss).item()))
    return found


def wrong_target(rank, world):
    pipe = GPipe(mlp(), stages=world, micro_batches=2, runner="distributed")
    x, target = batch(4)
    first = error_of(lambda: pipe.step(x, target[:3], F.mse_loss))[0]
    return first, error_of(lambda: pipe.step(x[:0], target, F.mse_loss))[0]


class Exit(nn.Module):
    def forward(self, x):
        import os

        os._exit(3)


def vanishing_step(rank, world):
    layers = [*mlp(2), Exit()]
    GPipe(nn.Sequential(*layers), balance=[2, 1], runner="distributed").step(*batch(4), F.mse_loss)


def replicas(rank, world, items):
    """Two pipelines of two stages, each with half of a batch: gradients of a rank."""
    pipelines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stages = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pipe = GPipe(
        mlp(), stages=2, micro_batches=2, runner="distributed", group=pipelines[rank // 2], data_group=stages[rank % 2]
    )
    x, target = batch(items)
    half = slice(0, items // 2) if rank < 2 else slice(items // 2, None)
    pipe.step(x[half], target[half], F.mse_loss)
    return {name: p.grad for name, p in pipe.named_parameters()}


def sharded(rank, world, items):
    """The same with the layers of a stage in shards over the two pipelines: gradients of a rank, made whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    pipe = GPipe(
        mlp(), stages=2, micro_batches=3, runner="distributed", group=mesh["pipeline"].get_group(), checkpoint="always"
    )
    for layer in pipe.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh["data"])
    x, target = batch(items)
    half = slice(0, items // 2) if rank < 2 else slice(items // 2, None)
    pipe.step(x[half], target[half], F.mse_loss)
    return {name: p.grad.full_tensor() for name, p in pipe.named_parameters()}


def total(rank, world):
    value = torch.ones(250_000)
    dist.all_reduce(value)
    return value[0].item()


def ring(rank, world, numbers):
    """Each rank sends so many float32 to the next."""
    sends = dist.isend(torch.zeros(numbers), (rank + 1) % world)
    dist.recv(torch.empty(numbers), (rank - 1) % world)
    sends.wait()
    dist.barrier()
    return rank


def fail_at(rank, world, which):
    if rank == which:
        raise KeyError("a reason")
    dist.barrier()


def wait_forever(rank, world):
    if rank == 1:
        while True:
            _asleep()
    return rank


def _asleep():
    import time

    time.sleep(0.05)


def vanish(rank, world):
    import os

    print("about to go", flush=True)
    os.abort()


def meet(rank, world, which):
    """Without a group: wait in the store until two have come, and say which. The first rank 1 never comes."""
    import os

    while (rank, which) == (1, "first"):
        _asleep()
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    number = store.add("came", 1)
    store.wait(["second"]) if number == 1 else store.set("second", "here")
    return number


def tell_and_wait(rank, world, folder):
    """Leaves its process id as a file, and waits."""
    (Path(folder) / f"pid-{os.getpid()}").touch()
    time.sleep(600)


def own_gradients(rank, world):
    """Parameters of a rank: gradients on all, on one and on none, of two types, in layouts of their own, and one that does not learn."""
    draw = torch.Generator().manual_seed(rank)
    shapes = {"all": (7, 5), "one": (3,), "none": (2,), "half": (4,), "turned": (5, 3), "fixed": (2,)}
    shapes |= {"sparse": (6, 2), "sparse on some": (6, 2)}
    made = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    made["half"] = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    made["fixed"].requires_grad_(False)
    made["all"].grad = torch.randn(7, 5, generator=draw) * 10.0**rank
    made["half"].grad = torch.randn(4, generator=draw).bfloat16()
    made["turned"].grad = torch.randn(3, 5, generator=draw).T
    rows = torch.tensor([[rank, rank + 1, rank]])
    made["sparse"].grad = torch.sparse_coo_tensor(rows, torch.randn(3, 2, generator=draw), (6, 2))
    if rank != 1:
        # Of rank 2 a product gave it, which is dense.
        made["sparse on some"].grad = made["sparse"].grad.to_dense() if rank == 2 else made["sparse"].grad
    if rank == world - 1:
        made["one"].grad = torch.ones(3)
    return made


def averaged(rank, world, in_pairs, most=None):
    """The gradients of all ranks before, and of this one after they were averaged."""
    if most is not None:
        averaging._MOST = most
    made = own_gradients(rank, world)
    every = [own_gradients(each, world) for each in range(world)]
    before = [{name: None if one.grad is None else one.grad.to_dense() for name, one in made.items()} for made in every]
    averaging.average_gradients(list(made.values()), None, in_pairs=in_pairs)
    return before, {name: one.grad for name, one in made.items()}


def sent_in(rank, world, numbers):
    """When the first rank begins to send so many float32, and when they are with the second: by one clock, as a rank may come late."""
    value = torch.ones(numbers)
    dist.barrier()
    if rank == 0:
        began = time.monotonic()
        dist.send(value, 1)
        return began
    dist.recv(value, 0)
    return time.monotonic()


def addresses(rank, world):
    """What this rank's machine calls its own."""
    told = subprocess.run(["ip", "-4", "-o", "address"], capture_output=True, text=True, check=True).stdout
    return [line.split()[3] for line in told.splitlines()]

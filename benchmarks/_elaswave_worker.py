"""A rank of `benchmarks/elaswave.py`, of ours or of torchft: it learns for ever, and says when each step is committed.

    python _elaswave_worker.py ours RANK WORLD HOST:PORT         python _elaswave_worker.py torchft RANK WORLD http://HOST:PORT

After "ready" it waits for a line; then each step prints "done SECONDS RANKS": the time of day of its commit, and how many took part.
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import nn

WIDTH, LAYERS, SAMPLES = 256, 4, 8


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]


def batch(step: int, count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(step))


def ours(rank: int, world: int, address: str, begin: Callable[[], None]) -> None:
    from anabranch.cluster.elastic import ElasticTrainer

    # Blocks together, as the other computes.
    trainer = ElasticTrainer(
        layers(),
        global_batch=world * SAMPLES,
        optimizer_factory=torch.optim.AdamW,
        loss=nn.functional.mse_loss,
        coordinator=address,
        wish=rank,
        exact=False,
    )
    begin()
    while True:
        x = batch(trainer.steps, world * SAMPLES)
        trainer.step((x, x))
        print("done", time.time(), sum(map(len, trainer.status()["stages"])), flush=True)


def torchft(rank: int, world: int, address: str, begin: Callable[[], None]) -> None:
    import torch.distributed as dist
    from torchft import Manager, Optimizer, ProcessGroupGloo

    model = nn.Sequential(*layers())
    inner = torch.optim.AdamW(model.parameters())
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def state() -> dict[str, object]:
        return {"model": model.state_dict(), "optimizer": inner.state_dict()}

    def load(found: dict[str, dict]) -> None:
        model.load_state_dict(found["model"])
        inner.load_state_dict(found["optimizer"])

    bound = timedelta(seconds=30)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=bound),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        timeout=bound,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=address,
        replica_id=f"replica_{rank}",
        hostname="127.0.0.1",
    )
    optimizer, parameters = Optimizer(manager, inner), list(model.parameters())
    begin()
    while True:
        step = manager.current_step()
        optimizer.zero_grad()
        x = batch(step * world + rank, SAMPLES)
        nn.functional.mse_loss(model(x), x).backward()
        # One bucket of all. Its wrapper for DDP fails an assertion of its own when a peer is lost (0.2.0).
        bucket = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        manager.allreduce(bucket).wait()
        for parameter, part in zip(parameters, bucket.split([one.numel() for one in parameters]), strict=True):
            parameter.grad.copy_(part.view(parameter.shape))
        optimizer.step()
        if manager.current_step() > step:
            print("done", time.time(), manager.num_participants(), flush=True)


def main() -> None:
    kind, rank, world, address = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)

    def begin() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    {"ours": ours, "torchft": torchft}[kind](rank, world, address, begin)


if __name__ == "__main__":
    main()

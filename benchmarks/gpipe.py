"""What does a step of a pipeline cost beside torch's own, and what does it gain over one process?

    step        K = 2 ranks of one thread, M = 8 micro-batches, nothing recomputed, against `torch.distributed.pipelining` (ScheduleGPipe)
                on the same model over gloo. bar: at most 1.05 times its time (a ratio of 0.95)
    speed-up    the same with the two ranks on two cores, against one process of one thread that takes the whole batch. bar: 1.5
    saved       bytes that the fuller rank keeps between forward and backward, with recomputation, over torch's. bar: at most 0.75 (1.33)
    local       stages as two threads of one process, against torchgpipe where it is installed (pip install torchgpipe). bar: 1.0
    refused     five cases that torch's pipelining does not take, and ours does with the gradients of the unsplit model: uneven
                micro-batches, fewer than stages, shapes that change from step to step, skips across stages, recomputation

Gradients are compared first. The speed-up means what it says only where two cores are idle; two products at once are timed before.

    python benchmarks/gpipe.py --json benchmarks/results/gpipe.json
"""
# Shapes: B sequences, L positions, D width

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from _harness import arguments, compare, finish, start
from anabranch.cluster import GPipe, Pop, SavedBytes, Stash
from anabranch.testing import run_ranks

STAGES, MICRO_BATCHES = 2, 8
SIZES = {"256 wide, 8 layers, 16 x 64": (256, 8, 16, 64), "512 wide, 8 layers, 8 x 128": (512, 8, 8, 128)}
TOLERANCE = 1e-4


def model_of(width: int, layers: int) -> nn.Sequential:
    """Transformer layers, the same weights each time."""
    torch.manual_seed(0)
    made = [
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(layers)
    ]
    return nn.Sequential(*made)


def batch_of(width: int, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(sequences, length, width, generator=generator) for _ in range(2))  # type: ignore[return-value]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Theirs:
    """A step by torch's pipelining."""

    def __init__(self, rank: int, model: nn.Sequential) -> None:
        half = len(model) // 2
        self.stage = model[:half] if rank == 0 else model[half:]
        stage = PipelineStage(self.stage, rank, STAGES, torch.device("cpu"))
        self.schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=loss_fn)
        self.rank = rank

    def step(self, x: Tensor, target: Tensor) -> float:
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(x)
            return 0.0
        self.schedule.step(target=target, losses=losses)
        return float(torch.stack(losses).mean())


def contest(rank: int, world: int, size: tuple[int, int, int, int], rounds: int, checkpoint: str) -> dict[str, Any]:
    """Seconds of steps in turns, after both have given the same; and the bytes that each keeps."""
    width, layers, sequences, length = size
    x, target = batch_of(width, sequences, length)
    theirs = Theirs(rank, model_of(width, layers))
    # One is timed, and another is measured: counting bytes takes time.
    ours, measured = (
        GPipe(
            model_of(width, layers),
            balance=[layers // 2] * 2,
            micro_batches=MICRO_BATCHES,
            runner="distributed",
            checkpoint=checkpoint,
        )  # type: ignore[arg-type]
        for _ in range(2)
    )
    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.step(x, target, loss_fn),
        "theirs": lambda: theirs.step(x, target),
    }
    parts: dict[str, nn.Module] = {"ours": ours, "theirs": theirs.stage}
    saved = {}
    steps["ours"]()
    (meter,) = measured.measure_saved()
    measured.step(x, target, loss_fn)
    saved["ours"] = meter.most
    with SavedBytes(ignored=theirs.stage.parameters()) as meter:
        steps["theirs"]()
    saved["theirs"] = meter.most
    differ = max(
        float((one.grad - other.grad).abs().max() / other.grad.abs().max())
        for one, other in zip(parts["ours"].parameters(), parts["theirs"].parameters(), strict=True)
        if one.grad is not None and other.grad is not None
    )
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 else list(steps)[::-1]:
            parts[name].zero_grad()
            dist.barrier()
            begin = time.perf_counter()
            steps[name]()
            # A step has ended when it has on both ranks.
            dist.barrier()
            taken[name].append(time.perf_counter() - begin)
    return {"taken": taken, "saved": saved, "differ": differ}


def alone(rank: int, world: int, size: tuple[int, int, int, int], rounds: int) -> list[float]:
    """Seconds of steps of the unsplit model, in one process."""
    width, layers, sequences, length = size
    x, target = batch_of(width, sequences, length)
    model = model_of(width, layers)
    taken = []
    for _ in range(rounds + 1):
        model.zero_grad()
        begin = time.perf_counter()
        loss_fn(model(x), target).backward()
        taken.append(time.perf_counter() - begin)
    return taken[1:]


def products(rank: int, world: int) -> float:
    """Seconds of some matrix products, when both ranks do them at once or one alone."""
    a = torch.randn(600, 600)
    if world > 1:
        dist.barrier()
    begin = time.perf_counter()
    for _ in range(40):
        a @ a
    return time.perf_counter() - begin


def local(name: str, size: tuple[int, int, int, int], rounds: int) -> list[dict[str, Any]]:
    """A row of the local runner; none where torchgpipe is not installed."""
    if importlib.util.find_spec("torchgpipe") is None:
        print("torchgpipe is not installed; its row is left out", flush=True)
        return []
    import torchgpipe

    width, layers, sequences, length = size
    x, target = batch_of(width, sequences, length)
    half = [layers // 2] * 2
    ours = GPipe(model_of(width, layers), balance=half, micro_batches=MICRO_BATCHES)
    theirs = torchgpipe.GPipe(model_of(width, layers), half, devices=["cpu", "cpu"], chunks=MICRO_BATCHES)

    def our_step() -> None:
        ours.zero_grad()
        ours.step(x, target, loss_fn)

    def their_step() -> None:
        theirs.zero_grad()
        loss_fn(theirs(x), target).backward()

    our_step()
    their_step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    worst = max(float((one.grad - other.grad).abs().max() / other.grad.abs().max()) for one, other in pairs)
    if not worst <= TOLERANCE:
        raise SystemExit(f"{name}: gradients differ by {worst:.1e}, more than {TOLERANCE:.0e}")
    return [compare(f"local, {name}", our_step, {"torchgpipe": their_step}, rounds=rounds)]


def row(case: str, ours: list[float], theirs: list[float], peer: str, unit: str = "ms") -> dict[str, Any]:
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    scale = 1e3 if unit == "ms" else 2**-20
    found = {
        "case": case,
        "ours": round(scale * statistics.median(ours), 4),
        "peer": round(scale * statistics.median(theirs), 4),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": unit,
        "peer_name": peer,
    }
    print(found, flush=True)
    return found


# What torch's pipelining refuses


def refused(rank: int, world: int, case: str) -> float:
    """The largest relative difference of this rank's gradients from those of the unsplit model."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), Stash("a"), nn.Tanh(), Pop("a", torch.add)]
    if case != "skips across stages":
        layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    model = nn.Sequential(*layers).double()
    whole = copy.deepcopy(model)
    micro_batches = {"fewer micro-batches than stages": 1, "uneven micro-batches": 4}.get(case, 2)
    pipe = GPipe(
        model,
        balance=[2, 2],
        micro_batches=micro_batches,
        runner="distributed",
        checkpoint="always" if case == "recomputation" else "never",
    )
    for items in (6, 10) if case == "shapes that change" else (10,):
        x, target = torch.randn(2, items, 8, dtype=torch.float64).unbind()
        whole.zero_grad()
        pipe.zero_grad()
        loss_fn(whole(x), target).backward()
        pipe.step(x, target, loss_fn)
    wanted = dict(whole.named_parameters())
    return max(
        [
            float((p.grad - wanted[name].grad).abs().max() / wanted[name].grad.abs().max())
            for name, p in pipe.named_parameters()
        ],
        default=0.0,
    )


REFUSED = (
    "uneven micro-batches",
    "fewer micro-batches than stages",
    "shapes that change",
    "skips across stages",
    "recomputation",
)


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    for case in REFUSED:
        if options.only in f"refused, {case}":
            worst = max(run_ranks(refused, STAGES, case))
            if not worst <= 1e-10:
                raise SystemExit(f"{case}: gradients differ by {worst:.1e}")
            print(f"refused, {case}: gradients of the unsplit model to {worst:.1e}", flush=True)
    both, one = max(run_ranks(products, 2)), run_ranks(products, 1)[0]
    print(f"two ranks at once have {one / both:.2f} of the speed of one alone", flush=True)
    for name, size in list(SIZES.items())[: 1 if options.quick else None]:
        if options.only not in name:
            continue
        plain = run_ranks(contest, STAGES, size, options.rounds, "never", timeout_s=600)
        spared = run_ranks(contest, STAGES, size, 1, "except_last", timeout_s=600)
        worst = max(found["differ"] for found in (*plain, *spared))
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name}: gradients differ by {worst:.1e}, more than {TOLERANCE:.0e}")
        taken = plain[0]["taken"]
        rows.append(row(f"step, {name}", taken["ours"], taken["theirs"], "torch.distributed.pipelining"))
        single = run_ranks(alone, 1, size, options.rounds, timeout_s=600)[0]
        rows.append(
            {**row(f"speed-up, {name}", taken["ours"], single, "one process"), "cores_at_once": round(one / both, 2)}
        )
        held = {key: [float(max(found["saved"][key] for found in spared))] for key in ("ours", "theirs")}
        rows.append(row(f"saved, {name}", held["ours"], held["theirs"], "torch.distributed.pipelining", "MB"))
        rows += local(name, size, options.rounds)
    finish("gpipe", rows, options, ["torch"])


if __name__ == "__main__":
    main()

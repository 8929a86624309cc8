"""What does a step of a pipeline cost beside torch's own, and what does it gain over one process?

    step        K = 2 ranks of one thread, M = 8 micro-batches, against `torch.distributed.pipelining` (ScheduleGPipe) on the same model
                over gloo: nothing recomputed; and both recomputing every stage, theirs by `torch.utils.checkpoint` around it. bar: at
                most 1.05 times its time (a ratio of 0.95)
    speed-up    the same with the two ranks on two cores, against one process of one thread that takes the whole batch. bar: 1.5
    saved       bytes that the fuller rank keeps between forward and backward, where both recompute, over torch's. bar: at most 0.75 (1.33)
    local       stages as two threads of one process, against torchgpipe where it is installed (pip install torchgpipe). bar: 1.0
    refused     five cases that ours takes with the gradients of the unsplit model: uneven micro-batches, fewer than stages, shapes that
                change from step to step, skips across stages, recomputation. torch's pipelining is asked for each; refused is what it
                ends at, or has other gradients of

Gradients are compared first. The speed-up means what it says only where two cores are idle; two products at once are timed before. What
torch recomputes the hooks of its checkpoint hide from the meter: it is one micro-batch through the stage, which is measured beside and
added.

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
from torch.utils.checkpoint import checkpoint

from _harness import arguments, compare, finish, start
from anabranch.cluster import GPipe, Pop, SavedBytes, Stash
from anabranch.testing import RankError, run_ranks

STAGES, MICRO_BATCHES = 2, 8
SIZES = {"256 wide, 8 layers, 16 x 64": (256, 8, 16, 64), "512 wide, 8 layers, 8 x 128": (512, 8, 8, 128)}
TOLERANCE = 1e-4
PEER = "torch.distributed.pipelining"


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


class Recomputed(nn.Module):
    """A stage of which the inputs alone are kept, as users of torch's pipelining have it."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: Tensor) -> Any:
        return checkpoint(self.stage, *inputs, use_reentrant=False)


class Theirs:
    """A step by torch's pipelining, of this rank's stage."""

    def __init__(self, rank: int, stage: nn.Module, micro_batches: int, *, recomputes: bool) -> None:
        self.stage = stage
        made = PipelineStage(Recomputed(stage) if recomputes else stage, rank, STAGES, torch.device("cpu"))
        self.schedule = ScheduleGPipe(made, micro_batches, loss_fn=loss_fn)
        self.rank = rank

    def step(self, x: Tensor, target: Tensor) -> float:
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(x)
            return 0.0
        self.schedule.step(target=target, losses=losses)
        return float(torch.stack(losses).mean())


def half(model: nn.Sequential, rank: int) -> nn.Sequential:
    """A rank's stage of two."""
    middle = len(model) // 2
    return model[:middle] if rank == 0 else model[middle:]


def contest(rank: int, world: int, size: tuple[int, int, int, int], rounds: int, recomputes: bool) -> dict[str, Any]:
    """Seconds of steps in turns, after both have given the same; and the bytes that each keeps."""
    width, layers, sequences, length = size
    x, target = batch_of(width, sequences, length)
    theirs = Theirs(rank, half(model_of(width, layers), rank), MICRO_BATCHES, recomputes=recomputes)
    # One is timed, and another is measured: counting bytes takes time.
    ours, measured = (
        GPipe(
            model_of(width, layers),
            balance=[layers // 2] * 2,
            micro_batches=MICRO_BATCHES,
            runner="distributed",
            checkpoint="always" if recomputes else "never",
        )
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
    saved["theirs"] = meter.most + (recomputed_bytes(theirs.stage, x) if recomputes else 0)
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


def recomputed_bytes(stage: nn.Module, x: Tensor) -> int:
    """What one micro-batch keeps on its way through a stage, beside what comes in: that is kept anyway."""
    entry = x[: len(x) // MICRO_BATCHES].clone().requires_grad_()
    with SavedBytes(ignored=[*stage.parameters(), entry]) as meter:
        # The meter counts what is kept while the output is there.
        output = stage(entry)
    del output
    return meter.most


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

CASES = (
    "uneven micro-batches",
    "fewer micro-batches than stages",
    "shapes that change",
    "skips across stages",
    "recomputation",
)


class HandsOn(nn.Module):
    """The first stage of a skip as torch's pipelining has it: a tuple is handed on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return torch.tanh(y), y


class Joins(nn.Module):
    """The second stage of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return self.layer(x) + kept


def gradients_in(rank: int, world: int, case: str, side: str) -> float:
    """The largest relative difference of this rank's gradients from those of the unsplit model; ``side``: ours or theirs."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    if case == "skips across stages":
        layers = [nn.Linear(8, 8), Stash("a"), nn.Tanh(), nn.Linear(8, 8), Pop("a", torch.add)]
    model = nn.Sequential(*layers).double()
    whole = copy.deepcopy(model)
    micro_batches = {"fewer micro-batches than stages": 1, "uneven micro-batches": 4}.get(case, 2)
    recomputes = case == "recomputation"
    step: Callable[[Tensor, Tensor], Any]
    if side == "ours":
        pipe = GPipe(
            model,
            balance=[len(layers) - 2, 2],
            micro_batches=micro_batches,
            runner="distributed",
            checkpoint="always" if recomputes else "never",
        )
        own = dict(pipe.named_parameters())

        def step(x: Tensor, target: Tensor) -> Any:
            return pipe.step(x, target, loss_fn)
    else:
        stage: nn.Module = half(model, rank)
        if case == "skips across stages":
            stage = HandsOn(model[0]) if rank == 0 else Joins(model[3])
        theirs = Theirs(rank, stage, micro_batches, recomputes=recomputes)
        here = {id(parameter) for parameter in stage.parameters()}
        own, step = {name: p for name, p in model.named_parameters() if id(p) in here}, theirs.step
    for items in (6, 10) if case == "shapes that change" else (10,):
        x, target = torch.randn(2, items, 8, dtype=torch.float64).unbind()
        for parameter in (*whole.parameters(), *own.values()):
            parameter.grad = None
        loss_fn(whole(x), target).backward()
        step(x, target)
    wanted = dict(whole.named_parameters())
    return max(
        float((p.grad - wanted[name].grad).abs().max() / wanted[name].grad.abs().max()) for name, p in own.items()
    )


def refusal(case: str) -> str | None:
    """What torch's pipelining says of a case, in a line; None where it takes it with the gradients of the unsplit model."""
    try:
        worst = max(run_ranks(gradients_in, STAGES, case, "theirs"))
    except RankError as error:
        return error.why.splitlines()[0]
    return None if worst <= 1e-10 else f"its gradients differ by {worst:.1e}"


def refusals(only: str) -> str | None:
    """Which of the cases that ours takes torch's pipelining refuses, in a sentence; None where none was asked for."""
    told: dict[str, str | None] = {}
    for case in CASES:
        if only in f"refused, {case}":
            worst = max(run_ranks(gradients_in, STAGES, case, "ours"))
            if not worst <= 1e-10:
                raise SystemExit(f"{case}: gradients differ by {worst:.1e}")
            told[case] = refusal(case)
            said = "takes it as well" if told[case] is None else f"refuses it: {told[case]}"
            print(f"refused, {case}: gradients of the unsplit model to {worst:.1e}; torch {said}", flush=True)
    if not told:
        return None
    refused = [case for case, why in told.items() if why is not None]
    return f"Of {len(told)} cases that ours takes torch {torch.__version__} refuses {len(refused)}" + (
        f": {', '.join(refused)}." if refused else "."
    )


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    note = refusals(options.only)
    both, one = max(run_ranks(products, 2)), run_ranks(products, 1)[0]
    print(f"two ranks at once have {one / both:.2f} of the speed of one alone", flush=True)
    for name, size in list(SIZES.items())[: 1 if options.quick else None]:
        if options.only not in name:
            continue
        plain = run_ranks(contest, STAGES, size, options.rounds, False, timeout_s=600)
        spared = run_ranks(contest, STAGES, size, options.rounds, True, timeout_s=600)
        worst = max(found["differ"] for found in (*plain, *spared))
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name}: gradients differ by {worst:.1e}, more than {TOLERANCE:.0e}")
        taken, again = plain[0]["taken"], spared[0]["taken"]
        rows.append(row(f"step, {name}", taken["ours"], taken["theirs"], PEER))
        rows.append(row(f"step, both recompute, {name}", again["ours"], again["theirs"], PEER))
        single = run_ranks(alone, 1, size, options.rounds, timeout_s=600)[0]
        rows.append(
            {**row(f"speed-up, {name}", taken["ours"], single, "one process"), "cores_at_once": round(one / both, 2)}
        )
        held = {key: [float(max(found["saved"][key] for found in spared))] for key in ("ours", "theirs")}
        rows.append(row(f"saved, {name}", held["ours"], held["theirs"], PEER, "MB"))
        rows += local(name, size, options.rounds)
    finish("gpipe", rows, options, ["torch"], note=note)


if __name__ == "__main__":
    main()

"""The contract of data parallel training: two processes learn what one does. `anabranch.testing` gives it out as ``check_parallel``.

    from anabranch.testing import check_parallel

    def test_contract():
        check_parallel({"mine": Decoder.Config(num_layers=2, feed_forward=MyLayer.Config(num_experts=8))})

One pair of processes checks all models, as starting them takes longer than the checks.
"""
# Shapes: B sequences, L positions

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.cluster.ranks import RankError, run_ranks
from anabranch.lm.decoder import Decoder
from anabranch.nn.pool import ExpertPool
from anabranch.routing import sync_loads
from anabranch.train.config import Parallel, TrainConfig
from anabranch.train.hooks import StepHooks
from anabranch.train.language_model import decoder_parts
from anabranch.train.optimizer import full_tensor
from anabranch.train.parallel import Workers

WAYS = ("ddp", "fsdp")
# Ways of models whose pools both processes can share.
WITH_EXPERTS = ("experts", "experts and fsdp")
RANKS, SEQUENCES, LENGTH, STEPS = 2, 4, 12, 3
# The same numbers are summed in another order.
TOLERANCE = 1e-4
# For how long the other process is waited for.
PATIENCE = timedelta(seconds=60)
# For how long both together, however many models there are.
LONGEST_S = 1800.0

Models = Mapping[str, Decoder.Config]


def check_parallel(models: Models) -> None:
    """Every model has the losses, gradients and balance of one process in two gloo processes on the CPU, replicated and in shards.

    A model with experts that two processes can share is also checked with each keeping half of them, beside replicas and beside shards.

    Each process takes half of a batch. What one process is compared with takes the whole batch at once, or, where a loss or a limit is
    taken over a micro-batch by definition, both halves one after the other. As in training, what is drawn at random is a function of the
    step and the process. So a model that draws in training is compared with the halves, for each of which the same is drawn; a loss over
    the whole batch is best checked in a model that draws nothing. There are three steps, with the step hooks between them.

    Args:
        models: small ones by name. Their parts must be importable by name, as other processes must find them.

    Raises AssertionError that names the model, the way (``ddp``, ``fsdp``, ``experts``, ``experts and fsdp``) and what differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ranks(_check, RANKS, dict(models), folder, backend=None, timeout_s=LONGEST_S)
        except RankError as error:
            raise AssertionError("\n".join(_wrong(folder)) or str(error)) from error
        wrong = _wrong(folder)
    if wrong:
        raise AssertionError("\n".join(wrong))


def _wrong(folder: str) -> list[str]:
    """What the processes found wrong: one line for each model and way."""
    lines = [line for file in sorted(Path(folder).glob("wrong-*")) for line in file.read_text().splitlines()]
    return list({line.partition(": ")[0]: line for line in reversed(lines)}.values())[::-1]


@dataclass
class _Learned:
    """What some steps gave.

    Attributes:
        losses: of each step.
        gradients: of each step, by parameter; those of parameters that had no part in it are missing.
        buffers: after the last step, by name.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Expected:
    """What one process learns: from the whole batch, from its halves one after the other, and whether it draws random numbers."""

    joined: _Learned
    halves: _Learned
    is_random: bool


def _check(rank: int, world: int, models: Models, folder: str) -> None:
    # Before there is a group that would sum its loads.
    expected = {name: _expected(config) for name, config in models.items()}
    dist.init_process_group("gloo", timeout=PATIENCE)
    with (Path(folder) / f"wrong-{rank}").open("w") as wrong:
        for name, config in models.items():
            for way in (*WAYS, *(WITH_EXPERTS if _shares_experts(config) else ())):
                try:
                    problem = _problem(_learned_by_ranks(config, way), expected[name])
                except Exception as error:
                    wrong.write(f"{name} under {way}: {' '.join(str(error).split())}\n")
                    # The processes are no longer at the same place, so nothing more can be compared.
                    raise
                if problem is not None:
                    wrong.write(f"{name} under {way}: {problem}\n")


def _expected(config: Decoder.Config) -> _Expected:
    joined, other = (_learned_by_one(config, parts=1, seed=seed) for seed in (0, 1))
    return _Expected(joined, _learned_by_one(config, parts=RANKS), is_random=_difference(other, joined) is not None)


def _learned_by_one(config: Decoder.Config, *, parts: int, seed: int = 0) -> _Learned:
    model = config.build(seed=0).train()

    def run(step: int) -> float:
        total = 0.0
        for part, token_BL in enumerate(_batch(config).chunk(parts)):
            _seed(step, part, seed)
            loss = model(token_BL, token_BL.roll(-1, 1)).loss / parts
            loss.backward()
            total += float(loss.detach())
        return total

    return _learned(model, run)


def _shares_experts(config: Decoder.Config) -> bool:
    """Whether all pools can be shared by the processes."""
    with torch.device("meta"):
        pools = [module for module in config.build(seed=0).modules() if isinstance(module, ExpertPool)]
    return bool(pools) and all(pool.layers is None and pool.num_experts % RANKS == 0 for pool in pools)


def _learned_by_ranks(config: Decoder.Config, way: str) -> _Learned:
    train = TrainConfig(parallel="fsdp" if "fsdp" in way else "ddp", device="cpu")
    workers = Workers(train, Parallel(experts=RANKS if "experts" in way else 1))
    model = config.build(seed=0).train()
    wrapped = workers.wrap(model, decoder_parts(model))
    token_BL = _batch(config).chunk(workers.size)[workers.rank]

    def run(step: int) -> float:
        _seed(step, workers.rank)
        loss = wrapped(token_BL, token_BL.roll(-1, 1)).loss
        loss.backward()
        return float(workers.mean(loss.detach().clone()))

    return _learned(model, run)


def _seed(step: int, part: int, seed: int = 0) -> None:
    """What is drawn from here on is a function of all three, as it is in the trainer."""
    torch.manual_seed((seed * STEPS + step) * RANKS + part)


def _learned(model: Decoder, run: Callable[[int], float]) -> _Learned:
    """Some steps as the trainer does them, but without updates, so that one difference does not grow into many."""
    learned = _Learned()
    hooks = StepHooks(model, STEPS)
    hooks.run_after(0)
    for number in range(STEPS):
        # What a hook draws is the same in all processes.
        _seed(number, 0)
        hooks.run_before(number)
        learned.losses.append(run(number))
        learned.gradients.append(
            {name: full_tensor(one.grad).clone() for name, one in model.named_parameters() if one.grad is not None}
        )
        model.zero_grad(set_to_none=True)
        sync_loads(model)
        hooks.run_after(number + 1)
    learned.buffers = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers()}
    return learned


def _batch(config: Decoder.Config) -> Tensor:
    return torch.randint(config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def _problem(found: _Learned, expected: _Expected) -> str | None:
    for number, loss in enumerate(found.losses):
        if not math.isfinite(loss):
            return f"the loss of step {number} is {loss}"
        for name, gradient in found.gradients[number].items():
            if not gradient.isfinite().all():
                return f"the gradient of {name} in step {number} is not finite"
    from_halves = _difference(found, expected.halves)
    if expected.is_random or from_halves is None:
        return from_halves
    from_joined = _difference(found, expected.joined)
    return from_joined and f"{from_halves} (the halves one after the other); {from_joined} (the whole batch)"


def _difference(found: _Learned, expected: _Learned) -> str | None:
    """The first thing that is not as it should be, None if all is."""
    for number, (loss, gradients) in enumerate(zip(found.losses, found.gradients, strict=True)):
        if not math.isclose(loss, expected.losses[number], rel_tol=TOLERANCE):
            return f"the loss of step {number} is {loss}, that of one process {expected.losses[number]}"
        others = expected.gradients[number]
        if gradients.keys() != others.keys():
            return f"parameters with a gradient in step {number} differ: {sorted(gradients.keys() ^ others.keys())}"
        for name, gradient in gradients.items():
            if not _is_close(gradient, others[name]):
                return f"the gradient of {name} in step {number} differs by {float((gradient - others[name]).abs().max()):.2g}"
    for name, buffer in found.buffers.items():
        if not _is_close(buffer, expected.buffers[name]):
            return f"the buffer {name} differs after {STEPS} steps"
    return None


def _is_close(found: Tensor, expected: Tensor) -> bool:
    # Buffers may be whole numbers or bools.
    found, expected = found.double(), expected.double()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * scale)

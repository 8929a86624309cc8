"""The contract of a task: trained, interrupted, resumed to the bit, and shared by two processes. `anabranch.testing` gives it out.

from anabranch.testing import check_task

def test_contract():
    check_task(TaskRunConfig(task=Mine.Config(), train=TrainConfig(batch_size=8)))
"""

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.cluster.ranks import RankError, run_ranks
from anabranch.train.checkpoint import checkpoints
from anabranch.train.config import RunConfig, TaskRunConfig
from anabranch.train.metrics import read_metrics
from anabranch.train.optimizer import full_tensor
from anabranch.train.parallel_contract import LONGEST_S, PATIENCE, RANKS, WAYS
from anabranch.train.result import Event
from anabranch.train.trainer import Trainer

STEPS = 4
# The same numbers are summed in another order.
TOLERANCE = 1e-4

Run = RunConfig | TaskRunConfig


class _StopError(Exception):
    pass


def check_task(run: Run, *, is_random: bool = False, ranks: bool = True, **given: Any) -> None:
    """A task keeps what the trainer relies on, in a few steps on the CPU.

    Losses are finite and the sum of their terms; what does not learn stays as it is; the evaluation has its headline; a run that is
    interrupted and resumed ends as one that is not, to the bit; two processes, with replicas or shards, learn what one does.

    Args:
        run: a small one; an even ``batch_size``. How long and where it trains is replaced.
        is_random: the task draws random numbers in a step, so that two processes draw others than one; they must then only agree.
        ranks: check two processes, for which the task's class and what is ``given`` must be importable by name.
        given: as of `Trainer`; copied for each training.

    Raises AssertionError that says what is broken.
    """
    train = run.train.replace(
        steps=STEPS,
        checkpoint_every=2,
        eval_every=2,
        log_every=1,
        device="cpu",
        parallel="none",
        keep_checkpoints=STEPS,
    )
    run = run.replace(train=train)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        trainer = Trainer(run, place / "straight", **copy.deepcopy(given))
        _check_straight(trainer)
        _check_resumed(run, place, given)
        if ranks:
            _check_ranks(run, place, is_random, given)


def _check_straight(trainer: Trainer) -> None:
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    learns = {name: trainer.task.learns(name, parameter) for name, parameter in trainer.model.named_parameters()}
    result = trainer.fit()
    records = read_metrics(trainer.out)
    for record in records:
        if record["kind"] == "train":
            _is(_is_number(record["loss"]), f"the loss of step {record['step']} is {record['loss']}")
            main = list(record)[3]
            parts = record[main] + sum(record["auxiliary"].values())
            _is(
                math.isclose(record["loss"], parts, rel_tol=TOLERANCE),
                f"the loss of step {record['step']} is {record['loss']}, and its terms add up to {parts}",
            )
    if result.measures:
        _is(math.isfinite(result.headline), f"the headline {trainer.task.headline} is {result.headline}")
    for name, parameter in trainer.model.named_parameters():
        if not learns[name]:
            _is(torch.equal(parameter, before[name]), f"{name} does not learn, and has changed")
    moved = [name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])]
    _is(moved, f"nothing has changed after {STEPS} steps")


def _check_resumed(run: Run, place: Path, given: dict[str, Any]) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "checkpoint" and event.step == 2:
            raise _StopError

    try:
        Trainer(run, place / "resumed", on_event=interrupt, **copy.deepcopy(given)).fit()
    except _StopError:
        pass
    Trainer(run, place / "resumed", resume=True, **copy.deepcopy(given)).fit()
    straight, resumed = (checkpoints(place / name)[-1] for name in ("straight", "resumed"))
    for file in sorted(straight.glob("*.safetensors")):
        difference = _difference(load_file(resumed / file.name), load_file(file))
        _is(difference is None, f"resumed, {file.name} is another: {difference}")
    ours, theirs = (json.loads((path / "trainer.json").read_text(encoding="utf-8")) for path in (resumed, straight))
    for state in (ours, theirs):
        del state["progress"]["seconds"]
    _is(ours == theirs, f"resumed, the state is another: {ours}, it was {theirs}")
    lines = [[_timeless(record) for record in read_metrics(place / name)] for name in ("resumed", "straight")]
    _is(lines[0] == lines[1], "resumed, the metrics are others")


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds" and not name.endswith("_per_second")}


def _check_ranks(run: Run, place: Path, is_random: bool, given: dict[str, Any]) -> None:
    try:
        run_ranks(_train_rank, RANKS, run, str(place), given, backend=None, timeout_s=LONGEST_S)
    except RankError as error:
        raise AssertionError(f"with two processes: {error}") from error
    for way in WAYS:
        first, second = (load_file(place / f"{way}-{rank}.safetensors") for rank in range(RANKS))
        difference = _difference(first, second)
        _is(difference is None, f"under {way} two processes have learned different things: {difference}")
        pairs = zip(_losses(place / way), _losses(place / "straight"), strict=True)
        for step, (ours, theirs) in enumerate([] if is_random else pairs, start=1):
            _is(
                math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE),
                f"the loss of step {step} in two processes under {way} is {ours}, that of one {theirs}",
            )


def _train_rank(rank: int, world: int, run: Run, folder: str, given: dict[str, Any]) -> None:
    dist.init_process_group("gloo", timeout=PATIENCE)
    for way in WAYS:
        # Each way moves weights of its own.
        own = copy.deepcopy(given)
        trainer = Trainer(run.replace(train=run.train.replace(parallel=way)), Path(folder) / way, **own)
        trainer.fit()
        parameters = trainer.model.named_parameters()
        state = {name: full_tensor(parameter.detach()).clone() for name, parameter in parameters}
        save_file(state, Path(folder) / f"{way}-{rank}.safetensors")


def _losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out) if record["kind"] == "train"]


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first tensor that is not the same to the bit, None if all are."""
    if found.keys() != expected.keys():
        return f"there are other tensors: {sorted(found.keys() ^ expected.keys())}"
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            return f"{name} differs by {float((found[name].double() - value.double()).abs().max()):.2g}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)

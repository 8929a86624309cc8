"""The folder of a run: started anew, or resumed with a config that may differ only in what does not change the training."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_write_text
from anabranch.lm.folder import STEPS_FOLDER
from anabranch.locks import is_locked, locked
from anabranch.run_folder import CONFIG_FILE
from anabranch.train.checkpoint import BEGIN_AGAIN, checkpoints, remove_leftovers
from anabranch.train.config import RunConfig, TaskRunConfig, TrainConfig, differences, read_same_run
from anabranch.train.metrics import METRICS_FILE, recorded_updates

# What a resumed run may change: how long, how often, where, on what, how much others may be asked meanwhile, and where files are that a
# checkpoint knows by their content. All else would make it another run.
_CHANGEABLE = (
    frozenset(
        f"task.world.{name}"
        for name in ("kept", "tokenizer", "max_calls", "max_usd", "max_failures", "base_url", "key_env")
    )
    | frozenset(
        f"parallel.{name}" for name in ("experts", "context", "pipeline", "micro_batches", "schedule", "visits", "data")
    )
    | frozenset(
        f"train.{name}"
        for name in (
            "steps",
            "eval_every",
            "eval_tokens",
            "patience",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "max_skipped",
            "tensorboard",
            "accumulation",
            "device",
            "compile",
            "recompute",
            "parallel",
        )
    )
)


# Held by who trains.
LOCK = ".run.lock"
# Which torchrun trains, where one does.
_JOB = ".run.torchrun"
# The id of every torchrun without --rdzv-id.
_UNNAMED = "none"
# Seconds to wait for the lock: who only looks whether it is free holds it for an instant.
_WAIT_S = 0.15


def check_free(out: Path) -> None:
    """Raise DataError if a process trains in ``out`` now."""
    if is_locked(out / LOCK):
        raise _in_use(out)


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Be the only one who trains in ``out`` meanwhile; it is made if it is not there. Raises DataError if another process does.

    However a process ends, the system frees what it held.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, wait_s=_WAIT_S) as alone:
        if not alone:
            raise _in_use(out)
        yield


def _in_use(out: Path) -> DataError:
    return DataError(f"another process is training in {out}; wait for it, stop it, or choose another folder")


def check_new(out: Path, *, hint: str = "") -> None:
    """Raise DataError if ``out`` is a file or holds a run; ``hint`` says what else can be done of the latter."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file, and the run needs a folder; choose another name")
    held = [name for name in (CONFIG_FILE, METRICS_FILE, STEPS_FOLDER) if (out / name).exists()]
    if held:
        raise DataError(
            f"{out} already holds a run ({held[0]}); resume it with --resume, or choose another folder{hint and f'; {hint}'}"
        )


def holds_run(out: Path) -> bool:
    """Whether there is a run in ``out`` that can be resumed."""
    return (out / CONFIG_FILE).is_file()


def is_restart(out: Path) -> bool:
    """Whether torchrun started this process anew after it, the same torchrun, had begun the run in ``out`` (``--max-restarts``).

    Where torchrun has no name of its own, the first node knows its agent, and the others where the processes meet. Other torchruns may
    meet there later, but their first node refuses, and nobody trains without it.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        held = (out / _JOB).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    if os.environ.get("TORCHELASTIC_RUN_ID") != _UNNAMED:
        return held == _torchrun()
    agent, _, meeting = held.partition("\n")
    return agent == _agent() if os.environ.get("GROUP_RANK", "0") == "0" else meeting == _meeting() != ""


def _torchrun() -> str | None:
    """What tells one torchrun from all others; None where none started this process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{_agent()}\n{_meeting()}" if name == _UNNAMED else name


def _agent() -> str:
    return f"{socket.gethostname()} {os.getppid()}"


def _meeting() -> str:
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"{address}:{port}" if address and port else ""


def find_checkpoint(out: Path, config: RunConfig | TaskRunConfig) -> Path | None:
    """The newest complete checkpoint of the run in ``out``; None if it was stopped before the first.

    Raises DataError if there is no run, or its checkpoints are gone, ConfigError if ``config`` changes what a resumed run may not change.
    """
    if not holds_run(out):
        raise DataError(f"no training run in {out} to resume; leave out --resume to start one")
    held = read_same_run(out, config)
    changed = {
        path: values
        for path, values in differences(held, config).items()
        if path not in _CHANGEABLE
        # Whoever comes back comes as a newcomer, and learns on with whom it likes, in any layout.
        and not path.startswith(("parallel.diloco.", "parallel.elastic."))
        # Moved data is recognised by its content.
        and path.rpartition(".")[2] != "paths"
        # A lower learning rate is the way out of a run that diverged.
        and not (path == "train.learning_rate" and values[1] < values[0])
        # Of what was the best before nothing may be there; but it may be let go.
        and not (path == "train.keep_best" and values[0])
    }
    if changed:
        shown = "; ".join(f"{path} was {old!r} and is now {new!r}" for path, (old, new) in changed.items())
        raise ConfigError(f"cannot resume {out} with another config: {shown}; change it back, or start a new run")
    found = checkpoints(out)
    if not found:
        _check_never_saved(out, held.train)
    return found[-1] if found else None


def _check_never_saved(out: Path, train: TrainConfig) -> None:
    """Raise DataError if a run without checkpoints has trained for so long that it must have had one."""
    updates = recorded_updates(out)
    if (out / STEPS_FOLDER / BEGIN_AGAIN).exists():
        # The run itself set aside all there was, and told the user to begin again.
        return
    if updates >= train.steps or (train.checkpoint_every is not None and updates > train.checkpoint_every):
        raise DataError(
            f"the run in {out} had come to step {updates} and has no checkpoint to go on from; put {out / STEPS_FOLDER} back, "
            f"or remove {out / METRICS_FILE} to begin again at step 0"
        )


def prepare(out: Path, config: RunConfig | TaskRunConfig) -> None:
    """Make the folder, clear what a killed process left, and save the config."""
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    # What is trained from here on has diverged no more, and its checkpoints may be lost like any other's.
    (out / STEPS_FOLDER / BEGIN_AGAIN).unlink(missing_ok=True)
    (out / _JOB).unlink(missing_ok=True)
    job = _torchrun()
    if job is not None:
        atomic_write_text(out / _JOB, job)
    config.save(out)

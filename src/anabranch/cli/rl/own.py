"""Trainings on questions of one's own: which model, which questions, and the pool or the reward; from options to a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import finite_number, load, read_toml
from anabranch.cli.output import fact
from anabranch.cli.rl.kinds import ANSWERS
from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_write_json, parse_json

if TYPE_CHECKING:
    from anabranch.data import Tokenizer
    from anabranch.lm import Decoder
    from anabranch.train import TaskRunConfig

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Model to start from: a run, a saved model, a Hugging Face folder or a .gguf file.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Your questions as JSON lines with question and answer (or answers)."),
]
PoolFile = Annotated[
    Path | None,
    typer.Option(
        "--pool",
        metavar="FILE",
        help="TOML file of the models that a router may ask: endpoints, local engines, recorded answers.",
    ),
]
Reward = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="NAME",
        help="How grpo and token-ppo check an answer: exact, letter, boxed, number, match, f1, examples, tests, or your own function as "
        "module:name or file.py:name. Default: exact.",
    ),
]
MaxCalls = Annotated[
    int | None,
    typer.Option(
        "--max-calls", metavar="N", min=0, help="Maximum number of calls to models of the pool, over the whole run."
    ),
]
MaxUsd = Annotated[
    float | None,
    typer.Option(
        "--max-usd",
        metavar="USD",
        min=0,
        callback=finite_number,
        help="Maximum cost of these calls in dollars, by the prices of the pool.",
    ),
]

# In the folder of a run: what its pool said, its tokenizer, and what it started from.
KEPT, _TOKENIZER, _START = "pool.jsonl", "tokenizer", "start.json"
# Of a pool's file; what else a world has is set by --set.
_OF_POOL = ("base_url", "key_env", "table", "reply_tokens", "call_s", "max_failures", "retries", "models")


@dataclass(frozen=True)
class Own:
    """What was said of questions of one's own; None for what was not.

    Attributes:
        model, data, pool, reward, max_calls, max_usd: the options.
    """

    model: str | None = None
    data: Path | None = None
    pool: Path | None = None
    reward: str | None = None
    max_calls: int | None = None
    max_usd: float | None = None

    @property
    def given(self) -> list[str]:
        """Options that were."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]

    def refuse(self, what: str | Path, allowed: tuple[str, ...] = ()) -> None:
        """Raise ConfigError where an option was given that does not go with what is learned."""
        wrong = [name for name in self.given if name not in allowed]
        if wrong:
            raise ConfigError(
                f"{wrong[0]} does not go with {what}; it is for questions of your own (router-r1, router-r1-grpo, grpo, token-ppo)"
            )

    @property
    def limits(self) -> dict[str, Any]:
        """Fields of the world."""
        told = {"task.world.max_calls": self.max_calls, "task.world.max_usd": self.max_usd}
        return {name: value for name, value in told.items() if value is not None}


def own_training(
    name: str, own: Own, out: Path, *, samples: int | None, seed: int, settings: dict[str, Any]
) -> tuple[TaskRunConfig, Decoder]:
    """The run, and the model that it starts from. What is needed to go on stands in ``out`` then.

    Raises ConfigError where an option is missing or does not fit, and for a pool that may cost something without a limit.
    """
    model_path, data = own.model, own.data
    needed = ("model", "data") if name in ANSWERS else ("model", "data", "pool")
    missing = [option for option in needed if getattr(own, option) is None]
    if missing or model_path is None or data is None:
        raise ConfigError(
            f"{name} on questions of your own needs --{missing[0]}; give {', '.join(f'--{one}' for one in needed)}"
        )
    own.refuse(
        name,
        ("--model", "--data", "--reward")
        if name in ANSWERS
        else ("--model", "--data", "--pool", "--max-calls", "--max-usd"),
    )
    model, tokenizer = load(model_path, "float32", "cpu")
    with _saved(tokenizer) as folder:
        if name in ANSWERS:
            run = _answers(name, own, folder, model, samples=samples, seed=seed, settings=settings)
        else:
            run = _router(name, own, out, folder, model, samples=samples, seed=seed, settings=settings)
            tell_most(run)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / _TOKENIZER)
    atomic_write_json(out / _START, {"model": str(Path(model_path).resolve())})
    task: Any = run.task
    world = task.world.replace(tokenizer=str((out / _TOKENIZER).resolve()))
    return run.replace(task=task.replace(world=world)), model


def start_of(out: Path) -> Decoder | None:
    """The model that a run in ``out`` starts from; None for one that starts from none of one's own. Raises DataError for a damaged file."""
    from anabranch.lm import load_model

    path = out / _START
    if not path.exists():
        return None
    try:
        place = parse_json(path.read_text("utf-8"))["model"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} does not say what the run started from: {error}") from None
    import torch

    return load_model(place, dtype=torch.float32)[0]


def kept_at(out: Path) -> dict[str, Any]:
    """Where a run in ``out`` keeps what its pool said, wherever that folder is now; nothing for a run without a pool."""
    from anabranch.run_folder import CONFIG_FILE

    try:
        world = parse_json((out / CONFIG_FILE).read_text("utf-8"))["task"]["world"]
    except (OSError, ValueError, LookupError, TypeError):
        # Whoever reads it says what is wrong.
        return {}
    moved = {"task.world.tokenizer": str((out / _TOKENIZER).resolve())} if (out / _TOKENIZER).exists() else {}
    is_live = isinstance(world, dict) and world.get("kind") == "live"
    return moved | ({"task.world.kept": str((out / KEPT).resolve())} if is_live else {})


@contextmanager
def _saved(tokenizer: Tokenizer) -> Iterator[str]:
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        yield folder


def _answers(name: str, own: Own, tokenizer: str, model: Decoder, *, samples: int | None, **how: Any) -> TaskRunConfig:
    from anabranch.rl.tokens.answers import AnswersWorld
    from anabranch.rl.tokens.runs import own_run

    assert own.data is not None, "looked at before"
    world = AnswersWorld.Config(
        questions=str(own.data.resolve()), tokenizer=tokenizer, reward=_placed(own.reward or "exact")
    )
    many = 12_800 if samples is None else samples
    return own_run(ANSWERS[name], world, model, samples=many, **how)


def _placed(reward: str) -> str:
    """``file.py:name`` from wherever the run goes on."""
    place, colon, attribute = reward.rpartition(":")
    return f"{Path(place).resolve()}:{attribute}" if colon and place.endswith(".py") else reward


def _router(name: str, own: Own, out: Path, tokenizer: str, model: Decoder, **how: Any) -> TaskRunConfig:
    from anabranch.config import from_dict
    from anabranch.rl.router_r1 import LiveWorld
    from anabranch.rl.router_r1.runs import own_router_training

    assert own.data is not None, "looked at before"
    assert own.pool is not None, "looked at before"
    table = read_toml(own.pool)
    unknown = sorted(table.keys() - set(_OF_POOL))
    if unknown:
        raise ConfigError(f"{own.pool} has {unknown[0]!r}; a pool has {', '.join(_OF_POOL)}")
    if not isinstance(table.get("models"), dict) or not table["models"]:
        raise ConfigError(f"{own.pool} has no [models.NAME]; a pool needs at least one model with a price")
    if isinstance(table.get("table"), str) and table["table"]:
        table["table"] = str(Path(table["table"]).resolve())
    files = {"questions": str(own.data.resolve()), "tokenizer": tokenizer, "kept": str((out / KEPT).resolve())}
    try:
        world = from_dict(LiveWorld.Config, {**table, **files})
    except ConfigError as error:
        raise ConfigError(f"{own.pool}: {error}") from None
    return own_router_training(name, world, model, settings=how.pop("settings") | own.limits, **how)


def tell_most(run: TaskRunConfig) -> None:
    """Say what a training may ask of others at most.

    Raises ConfigError where that costs something and nobody has said how much it may, and for several processes: each would count alone.
    """
    from anabranch.rl.router_r1.runs import most_of

    task: Any = run.task
    world, most = task.world, most_of(run)
    if not most.calls:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a pool that is asked is asked by one process, which counts calls and money; train without torchrun"
        )
    if most.is_billed and world.max_calls is None and world.max_usd is None:
        raise ConfigError(
            f"the training may ask models {most.calls:,} times, which may cost ${most.usd:,.2f} at most; say how far it may go: "
            "--max-usd USD or --max-calls N"
        )
    calls = [] if world.max_calls is None else [f"{world.max_calls:,} calls"]
    usd = [] if world.max_usd is None else [f"${world.max_usd:,.2f}"]
    ends = f"; it ends before more than {' or '.join([*calls, *usd])}" if calls or usd else ""
    told = f"at most {most.calls:,} calls, ${most.usd:,.2f} were each as dear as can be{ends}"
    fact("pool", f"{', '.join(world.models)}: {told}", to=sys.stderr)

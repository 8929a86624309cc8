"""One training that several processes share, and that goes on when some are lost or come (``parallel.elastic``), as the trainer sees it.

anabranch cluster coordinate --replicas 2 --stages 2
anabranch train dense --out runs/a --resume auto --set parallel.elastic.coordinator=127.0.0.1:48149        # in each process

torchrun may start them, and start them again: a torchrun of its own for each process, so that one that ends is started alone, and comes in
as a newcomer; or one for several, which it ends and starts together. Either way no group of torch.distributed has a part in it.

A step is made by `anabranch.cluster.elastic.ElasticTrainer`: a call of `Elastic` as the model is the whole step with its update. All
processes see the whole batch, evaluate all of the held-out data, and have all weights after steps that are evaluated or saved; the first
of them writes the run's folder, and where it is lost the next one does.
"""
# Shapes: B sequences, L positions

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from anabranch.cluster.elastic import ElasticTrainer
from anabranch.cluster.elastic.clocks import frequency_control
from anabranch.cluster.elastic.state import PARAM, Slice, apart, learning, together
from anabranch.cluster.elastic.updating import Groups
from anabranch.cluster.pccl.handshake import run_secret
from anabranch.config import to_dict
from anabranch.errors import ConfigError, PeerError
from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.routing.balance import LoadCounter
from anabranch.sockets import is_local
from anabranch.train.config import ElasticConfig, RunConfig, TaskRunConfig
from anabranch.train.elastic_layers import block_loss, elastic_layers
from anabranch.train.optimizer import FACTOR
from anabranch.train.pipeline import check_cut
from anabranch.train.pipeline_layers import METRIC
from anabranch.train.task import Stream, Task

log = logging.getLogger(__name__)

__all__ = ["Elastic"]

# Seconds of waiting after which it is said.
_TELL_S = 3.0
# Of ``train``, what processes need not agree on.
_DATA = ("sequence_length",)
_OWN = frozenset({"device", "log_every", "keep_checkpoints", "tensorboard", "max_skipped", "eval_tokens"})


class Elastic:
    """This process among those that share the training. It joins them before its first step.

    Args:
        config: of the run.
        model: what learns.
        optimizer: its groups say how parameters learn, its state is what training goes on from.
        task: of which data is it.
        stream: of the whole batches.

    Attributes:
        is_stopped: whether the run was told to stop, so that it waits for nobody any more.
        holds_folder: whether this process writes; set by the trainer.
        at_step: called with finished steps before a step is made again, whose hooks have been called for a later one; set by the trainer.

    Raises ConfigError for what does not go together.
    """

    def __init__(
        self,
        config: RunConfig | TaskRunConfig,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        task: Task,
        stream: Stream,
    ) -> None:
        self._config, self._model, self._optimizer = config, model, optimizer
        self._task, self._stream = task, stream
        self._layers = elastic_layers(model, precision=config.train.precision)
        # Early: who has no such clock is told before it waits for others.
        self._clock = frequency_control(config.parallel.elastic.clock, int(os.environ.get("LOCAL_RANK", "0")))
        self.is_stopped: Callable[[], bool] = lambda: False
        self.holds_folder = False
        self.at_step: Callable[[int], None] = lambda step: None
        # Where its batches begin, whatever checkpoint it comes from.
        self._began = copy.deepcopy(stream.state_dict())
        self._trainer: ElasticTrainer | None = None
        self._is_done = False

    @classmethod
    def check(cls, config: RunConfig | TaskRunConfig) -> None:
        """Raise ConfigError where other settings do not go together with it."""
        train, parallel = config.train, config.parallel
        coordinator = parallel.elastic.coordinator
        if coordinator is None:
            return
        _check_host(coordinator, parallel.elastic.host)
        beside = {
            "train.parallel": train.parallel != "none",
            "train.compile": train.compile,
            "train.recompute": train.recompute,
            "train.accumulation (parallel.elastic.block says what goes through layers together)": train.accumulation
            > 1,
            "parallel.experts": parallel.experts > 1,
            "parallel.context": parallel.context > 1,
            "parallel.pipeline": parallel.pipeline > 1,
            "parallel.data": parallel.data is not None,
            "parallel.micro_batches": parallel.micro_batches is not None,
            "parallel.exact": parallel.exact is not None,
            "parallel.diloco.master": parallel.diloco.master is not None,
        }
        said = f"parallel.elastic.coordinator is {coordinator!r}"
        if refused := [name for name, is_set in beside.items() if is_set]:
            raise ConfigError(
                f"{said}, and {refused[0]} is set; the coordinator says what replicas and stages there are"
            )
        if train.device_kind() != "cpu":
            raise ConfigError(f"{said}, and train.device is {train.device!r}; set it to cpu")

    @classmethod
    def of(
        cls,
        config: RunConfig | TaskRunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Task,
        stream: Stream,
    ) -> Self | None:
        """That of a run; None where it is alone. Raises ConfigError for a model whose layers cannot be shared so."""
        where = config.parallel.elastic.coordinator
        if where is None:
            return None
        said = f"parallel.elastic.coordinator is {where!r}"
        check_cut(model, said)
        assert isinstance(model, Decoder)
        for name, module in model.named_modules():
            # What moves by the loads of a step would have to know those of all ranks, also of a step that is taken back.
            if isinstance(module, LoadCounter) and type(module).on_step is not LoadCounter.on_step:
                raise ConfigError(
                    f"{said}, and {name} ({type(module).__name__}) learns from the loads of each step, which ranks do not share; "
                    "balance by a loss instead"
                )
            if callable(getattr(module, "before_step", None)):
                raise ConfigError(
                    f"{said}, and {name} ({type(module).__name__}) draws before each step, which a step that is made again does not; "
                    "leave it out"
                )
        return cls(config, model, optimizer, task, stream)

    # A step, as the model

    def __call__(self, token_BL: Tensor, target_BL: Tensor | None = None, **options: Any) -> DecoderOutput:
        """A whole step with its update, of the whole batch; its loss, whose backward does nothing.

        Raises ConfigError for any other call of a decoder.
        """
        if target_BL is None or options:
            raise ConfigError(
                "parallel.elastic.coordinator is set, and the task asks the model for more than the loss of tokens and targets; "
                "leave it out"
            )
        assert self._trainer is not None
        mean = float((target_BL != -100).sum()) / len(target_BL)
        self._trainer.step((token_BL, (target_BL, torch.full((len(target_BL),), mean))))
        terms = {name: torch.tensor(value) for name, value in self._trainer.last.terms.items()}
        cross_entropy = terms.pop("cross_entropy")
        metrics = {name.removeprefix(METRIC): value for name, value in terms.items() if name.startswith(METRIC)}
        auxiliary = {name: value for name, value in terms.items() if not name.startswith(METRIC)}
        loss = torch.tensor(self._trainer.last.loss, requires_grad=True)
        return DecoderOutput(loss=loss, cross_entropy=cross_entropy, auxiliary=auxiliary, metrics=metrics)

    @property
    def norm(self) -> float:
        """Of the gradient of the last step, before it was clipped."""
        assert self._trainer is not None
        assert self._trainer.last.norm is not None
        return self._trainer.last.norm

    # Around steps, as the trainer asks

    def before(self, step: int) -> int | None:
        """Before a step, ``step`` being finished ones. Returns how many are committed, which a newcomer goes on from.

        None where the run was told to stop while it waited for others.
        """
        if self._trainer is None:
            try:
                self._trainer = self._joined(step)
            except PeerError:
                if self.is_stopped():
                    return None
                raise
            # Each step has its batch, also those that were made without this process; and those that the others have yet to make.
            if self._trainer.steps < step:
                log.warning(
                    "the others are at step %d and this process at %d: it goes back to where they are",
                    self._trainer.steps,
                    step,
                )
                self._stream.load_state_dict(self._began)
                step = 0
            for _ in range(self._trainer.steps - step):
                self._stream.next_batch(self._config.train.batch_size)
            return self._trainer.steps
        return step

    def after(self, *, is_last: bool = False) -> None:
        """After a step: nothing, it is committed."""

    def finish(self) -> None:
        """At the end of the steps: nothing is on its way."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that is to write."""
        return self._trainer is not None and self._trainer.is_first

    @property
    def has_weights(self) -> bool:
        """Whether the model here is whole, as of the last step."""
        return self._trainer is not None and self._trainer.has_weights

    def moments(self, step: int) -> dict[str, Tensor] | None:
        """The optimizer's state after ``step`` steps as `optimizer_tensors` gives it; None where it is not here."""
        gathered = None if self._trainer is None else self._trainer.gathered
        if gathered is None or gathered[0] != step or not self.holds_folder:
            return None
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found: dict[str, Tensor] = {}
        for layer, whole in gathered[1].items():
            parameters = learning(self._layers[layer])
            parts = apart(whole, [parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                name = names[id(parameter)]
                found |= {
                    f"{name}/{moment}": tensor.view(parameter.shape)
                    for moment, tensor in part.tensors.items()
                    if moment != PARAM
                }
                found |= {f"{name}/{moment}": value.clone() for moment, value in part.scalars.items()}
        return found

    def wrote(self, where: Path) -> None:
        """Tell the coordinator of a checkpoint."""
        assert self._trainer is not None
        self._trainer.wrote(str(where))

    def conclude(self, write: Callable[[], Path]) -> Path | None:
        """Stay until what was learned is written, here by ``write`` where this process is to; where it is. None where nothing was done."""
        if self._trainer is None:
            return None
        where = self._trainer.finish(lambda: str(write()))
        self._is_done = True
        return Path(where)

    def fail(self, error: BaseException) -> None:
        """This process ends by an error, and the others go on."""
        if self._trainer is not None:
            self._trainer.close(error)

    def close(self) -> None:
        """Leave the others, who go on where training is not done."""
        if self._trainer is not None:
            self._trainer.close(is_done=self._is_done)

    # Joining

    def _joined(self, step: int) -> ElasticTrainer:
        config = self._config.parallel.elastic
        assert config.coordinator is not None
        told = threading.Timer(
            _TELL_S, log.warning, ("waiting at %s for the processes that share this run", config.coordinator)
        )
        told.daemon = True
        told.start()
        try:
            return self._join(config, config.coordinator, step)
        finally:
            told.cancel()

    def _join(self, config: ElasticConfig, coordinator: str, step: int) -> ElasticTrainer:
        train = self._config.train
        schedule = train.schedule.build()
        loaded = (step, self._loaded()) if step else None
        # What the optimizer had is in slices from here on.
        self._optimizer.state.clear()

        def gathers(version: int) -> bool:
            every = (train.eval_every, train.checkpoint_every)
            return version == train.steps or any(one is not None and version % one == 0 for one in every)

        return ElasticTrainer(
            self._layers,
            global_batch=train.batch_size,
            # Not fused: it rounds differently at the end of a slice.
            optimizer_factory=lambda groups: torch.optim.AdamW(
                groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, foreach=False
            ),
            loss=block_loss,
            coordinator=coordinator,
            secret=run_secret(None).decode(),
            seed=train.seed,
            micro_batches=config.micro_batches,
            snapshot_copies=config.snapshot_copies,
            block=config.block,
            learning_rate=lambda version: schedule.factor(version, train.steps),
            # Designs draw by whatever means.
            draws=True,
            resume=loaded,
            groups=self._groups(),
            clip=train.clip,
            skips_infinite=True,
            gathers=gathers,
            signature=self._signature(),
            host=config.host,
            timeout_s=config.timeout_s,
            on_epoch_change=_tell_change,
            gives_up=lambda: self.is_stopped(),
            at_step=lambda version: self.at_step(version),
            wish=_own_number(),
            clock=self._clock,
        )

    def _signature(self) -> dict[str, Any]:
        """What processes must agree on."""
        train = to_dict(self._config.train)
        assert isinstance(train, dict)
        shared = {f"train.{name}": value for name, value in train.items() if name not in _OWN}
        # Of the data what each says by its content: where it is may be another place on each machine.
        data = to_dict(getattr(self._config, "data", None)) or {}
        shared |= {f"data.{name}": data[name] for name in _DATA if isinstance(data, dict) and name in data}
        return {"model": to_dict(self._model.config), "data": self._task.fingerprint(), **shared}

    def _groups(self) -> Groups:
        """By layer, runs of parameters that learn alike, as the optimizer has them."""
        train = self._config.train
        options = {
            id(parameter): {"weight_decay": group["weight_decay"], "lr": train.learning_rate * group.get(FACTOR, 1.0)}
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        found: dict[int, list[tuple[int, int, dict[str, Any]]]] = {}
        for number, layer in enumerate(self._layers):
            runs = found.setdefault(number, [])
            place = 0
            for parameter in learning(layer):
                own, end = options[id(parameter)], place + parameter.numel()
                if runs and runs[-1][2] == own:
                    place = runs.pop()[0]
                runs.append((place, end, own))
                place = end
        return found

    def _loaded(self) -> dict[int, Slice]:
        """Each layer with the optimizer's state, of each of its parameters by itself where they have not made the same steps."""
        found = {}
        for number, layer in enumerate(self._layers):
            parts, place = [], 0
            for parameter in learning(layer):
                state, end = self._optimizer.state.get(parameter, {}), place + parameter.numel()
                tensors = {name: value.reshape(-1) for name, value in state.items() if name != "step"}
                scalars = {name: value for name, value in state.items() if name == "step"}
                parts.append(Slice(place, end, {PARAM: parameter.detach().clone().reshape(-1), **tensors}, scalars))
                place = end
            if parts:
                found[number] = together(0, place, parts)
        return found


def _own_number() -> int | None:
    """The rank that this process would like to be: that of torchrun, where that started several; of one alone each would wish the same."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _check_host(coordinator: str, host: str) -> None:
    """Raise ConfigError where processes of other machines would be told an address that is each one's own."""
    if is_local(host) and not is_local(coordinator.rpartition(":")[0].strip("[]")):
        raise ConfigError(
            f"parallel.elastic.host is {host!r}, where no other machine reaches this one, and the coordinator is at {coordinator!r}; "
            "set it to an address of this machine that they reach"
        )


def _tell_change(told: dict[str, Any]) -> None:
    stages = " and ".join(str(list(stage)) for stage in told["layout"].grid.stages)
    log.info("from step %d on ranks %s", told["version"], stages)
    for rank, why in told["lost"].items():
        log.warning("rank %d is lost: %s; the others go on from step %d", rank, why, told["version"])

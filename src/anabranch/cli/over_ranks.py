"""``--context``: the processes of a torchrun continue texts together, over keys and values of which each has a share."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.lm import Decoder

Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="N",
        min=1,
        help="Split keys and values over the N processes that torchrun started, for texts that do not fit into one.",
    ),
]
# Tokens of a prompt that a process runs at a time: what they take beside keys and values is bounded so.
_CHUNK = 4096
# For the end of what processes send each other.
_LEAVE_S = 5.0


class OverRanks:
    """This process among those that continue a prompt together.

    Attributes:
        is_first: whether it reads what is piped in, chooses tokens and talks.
        device: its own, None as the user says.
    """

    def __init__(self, context: int) -> None:
        self.world = context
        self.is_first = int(os.environ.get("RANK", "0")) == 0
        self.device: str | None = None

    def text(self, prompt: str) -> str:
        """The prompt; - is what is piped into the first process."""
        import torch.distributed as dist

        if prompt != "-":
            return prompt
        told: list[Any] = [sys.stdin.read() if self.is_first else None]
        if self.world > 1:
            dist.broadcast_object_list(told, src=0)
        return str(told[0])

    def checkpoint(self, model: str) -> str:
        """What `anabranch.lm.checkpoint.find_model` finds; of a training run the step that it found in the first process."""
        import torch.distributed as dist

        from anabranch.lm.checkpoint import find_model
        from anabranch.lm.folder import run_of

        place = find_model(model)
        is_step = run_of(place) is not None
        told = [place.name if is_step else None]
        if self.world > 1:
            dist.broadcast_object_list(told, src=0)
        return str(place.with_name(told[0]) if is_step and told[0] is not None else place)

    def tokens(self, model: Decoder, prompt: Sequence[int], fields: dict[str, Any]) -> Iterator[int]:
        """The new tokens as they come; ``fields`` of `anabranch.lm.SamplingConfig`."""
        from anabranch.cluster.ring import ContextParallel
        from anabranch.lm import SamplingConfig
        from anabranch.lm.generate import stream

        cut: Any = ContextParallel(model, chunk=_CHUNK * self.world)
        for step in stream(cut, [prompt], SamplingConfig(**fields)):
            yield from step.tokens


@contextmanager
def over_ranks(
    context: int | None, device: str | None, others: dict[str, Any], *, command: str = "generate"
) -> Iterator[OverRanks | None]:
    """The processes while they work together, None without --context. ``others`` are values of options that do not go with it.

    Raises ConfigError for such an option, and where torchrun did not start so many processes.
    """
    if context is None:
        yield None
        return
    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"{name} cannot be combined with --context; leave one of them out")
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if started != context:
        raise ConfigError(
            f"--context is {context}, and there {'is 1 process' if started == 1 else f'are {started} processes'}; start it with "
            f"torchrun --nproc-per-node {context} -m anabranch {command} ..., or say --context {started}"
        )
    found = OverRanks(context)
    if context == 1:
        yield found
        return
    import torch.distributed as dist

    from anabranch.train.parallel import find_device

    place = find_device(device or "auto", local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    found.device = str(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield found
    finally:
        # It waits for what is under way, and one that is lost never takes it.
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_S)

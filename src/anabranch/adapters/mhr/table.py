"""`RoutingTable`: the weights of skills by task, one row of numbers for each task, for one linear layer or for all of a bin.

    Z in R^{T x q x K}, uniform in +-1e-3 at first;  alpha = weights(Z[task])

Bins (``granularity``): ``finegrained``, every linear layer has a table of its own; ``layerwise``, one for the attention and one for the
feed-forward part of a block; ``blockwise``, one for each block; ``coarsegrained``, one for all (``coderwise``, one for an encoder and one
for a decoder, is the same in a model that is a decoder alone).
"""
# Shapes: T tasks, q heads, K skills, U rows, qK = q K

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.mhr.weights import Weights
from anabranch.errors import ConfigError, InputError

__all__ = ["GRANULARITIES", "Granularity", "RoutingTable", "bin_of"]

Granularity = Literal["finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"]
GRANULARITIES: tuple[Granularity, ...] = ("finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained")
_START = 1e-3


def bin_of(name: str, granularity: Granularity) -> str | None:
    """The bin of the linear layer ``name`` (``blocks.3.attention.q``), whose layers share a table; None where it has one of its own.

    In a model that is not ours the first number in a name counts blocks.

    Parts that stand in no block (a head, a pool that blocks share) are bins of their own in all but the coarse ones.
    """
    if granularity == "finegrained":
        return None
    if granularity in ("coderwise", "coarsegrained"):
        return "all"
    words = name.split(".")
    # Of a model that is not ours the first number counts blocks: transformer.h.3.attn.c_attn.
    block = next((place for place, word in enumerate(words) if word.isdigit()), None) if words[0] != "shared" else None
    depth = 2 if block is None else {"blockwise": block + 1, "layerwise": block + 2}[granularity]
    return ".".join(words[: min(depth, max(1, len(words) - 1))])


class RoutingTable(nn.Module):
    """Weights of skills by task.

    Args:
        tasks: names, in the order of their numbers.
        heads: q.
        skills: K.
        weights: how numbers become weights.
        predicts_task: whether there is a head that names the task by its row, see `penalties`.
        generator: of the first numbers.

    Attributes:
        z: parameter [T, q, K].
        share: buffer, a in alpha_t = a alpha + (1 - a) / K; 1 but while weights are annealed to the average.
        head: what names a task by its row; None without.

    Raises ConfigError for no task, one that is named twice, and sizes below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        heads: int,
        skills: int,
        *,
        weights: Weights | None = None,
        predicts_task: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) < len(tasks):
            twice = next((task for task in tasks if list(tasks).count(task) > 1), None)
            raise ConfigError(f"task {twice!r} is named twice" if tasks else "there are no tasks; name at least one")
        for name, value in (("heads", heads), ("skills", skills)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self.tasks, self.weights = tuple(tasks), weights or Weights()
        self.z = nn.Parameter(torch.empty(len(tasks), heads, skills))
        self.register_buffer("share", torch.ones(()))
        self.share: Tensor
        self.head = nn.Linear(heads * skills, len(tasks)) if predicts_task else None
        if not self.z.is_meta:
            nn.init.uniform_(self.z, -_START, _START, generator=generator)
        if self.head is not None and not self.head.weight.is_meta:
            bound = 1 / math.sqrt(heads * skills)
            nn.init.uniform_(self.head.weight, -bound, bound, generator=generator)
            nn.init.zeros_(self.head.bias)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(T, q, K)."""
        return tuple(self.z.shape)  # type: ignore[return-value]

    def forward(self, task_U: Tensor) -> Tensor:
        """alpha_UqK of the tasks of these numbers, int64; 1 / K each for -1, the average of all skills.

        Raises InputError for a number that is beyond the table.
        """
        self.check(task_U)
        _, _, skills = self.z.shape
        alpha_UqK = self.weights.of(self.z[task_U.clamp_min(0)], training=self.training)
        alpha_UqK = self.share * alpha_UqK + (1 - self.share) / skills
        return torch.where(task_U[:, None, None] < 0, 1 / skills, alpha_UqK)

    def check(self, task_U: Tensor) -> None:
        """Raise InputError for a number that is beyond the table, with both."""
        if torch.compiler.is_compiling() or not task_U.numel():
            return
        greatest, least = int(task_U.max()), int(task_U.min())
        if greatest >= len(self.tasks) or least < -1:
            wrong = greatest if greatest >= len(self.tasks) else least
            raise InputError(f"task number {wrong} is told, and the routing table has {len(self.tasks)} tasks")

    def anneal(self, done: float) -> None:
        """Weights on their way to the average: a = cos(pi / 2 done) of them is left, with ``done`` from 0 to 1."""
        self.share.fill_(math.cos(math.pi / 2 * min(max(done, 0.0), 1.0)))

    @torch.no_grad()
    def evaluated(self) -> Tensor:
        """alpha_TqK of all tasks, as evaluation has them."""
        was, self.training = self.training, False
        try:
            return self(torch.arange(len(self.tasks), device=self.z.device))
        finally:
            self.training = was

    def task_loss(self) -> Tensor:
        """-log p(task | its row), mean over tasks; of a table with a head."""
        assert self.head is not None, "asked only where there is one"
        logits_TT = self.head(self.z.flatten(1))
        return F.cross_entropy(logits_TT, torch.arange(len(self.tasks), device=self.z.device))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        tasks, heads, skills = self.z.shape
        return f"tasks={tasks}, heads={heads}, skills={skills}"


def tables_of(model: nn.Module) -> dict[str, RoutingTable]:
    """The tables of a model by the names of the modules, each once."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutingTable):
            found.setdefault(id(module), (name, module))
    return dict(found.values())

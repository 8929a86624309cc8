"""`SkilledLowRank`: low-rank skills that each task mixes in its own way (Poly, Ponti et al. 2022, arXiv 2202.13914; with several splits
multi-head routing, Caccia et al. 2022, arXiv 2211.03831), as peft has it.

    y = W x + (1 / rank) B_t A_t x,   A_t = sum_k w_tk A_k,   B_t = sum_k w_tk B_k,   w_t = s_t / sum s_t,   s_tk = sigmoid(logit_tk)

With S splits, inputs and outputs are cut into S pieces, and each piece has weights of its own. While it learns, s is drawn anew for each
row: relaxed Bernoulli at temperature 1.
"""
# Shapes: B rows, L positions, N items, T tasks, S splits, K skills, R rank, C inputs, O outputs, P = C / S, Q = O / S; x is [..., C]

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import draw_a
from anabranch.adapters.numbers import Numbers, frozen_as
from anabranch.adapters.tasks import TASK
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection

__all__ = ["SkilledLowRank", "Skills"]

# As peft: of sums of weights, and of probabilities.
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Skills(Numbers):
    """The numbers of one linear layer.

    Attributes:
        a_SKPR: A of each skill, in pieces of the inputs.
        b_SKRQ: B of each skill, in pieces of the outputs.
        logit_TX: what each task makes of each skill, of one split after another (X = S K).
        task: of rows that are told none; None where they must be told one, unless there is but one.
    """

    what: ClassVar[str] = "Poly"
    holds: ClassVar[str] = "poly_lora_A, poly_lora_B and poly_router.module_logits"
    merges: ClassVar[bool] = False

    a_SKPR: Tensor
    b_SKRQ: Tensor
    logit_TX: Tensor
    task: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(C, O)."""
        splits = self.a_SKPR.shape[0]
        return splits * self.a_SKPR.shape[2], splits * self.b_SKRQ.shape[3]

    @property
    def rank(self) -> int:
        """R."""
        return self.a_SKPR.shape[3]

    def tensors(self) -> dict[str, Tensor]:
        """A, B and the logits."""
        return {
            "poly_lora_A": self.a_SKPR,
            "poly_lora_B": self.b_SKRQ,
            "poly_router.module_logits": self.logit_TX,
        }

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """With the outputs of B in another order. Raises ConfigError with several splits, which are of outputs next to each other."""
        splits, _, _, size = self.b_SKRQ.shape
        if splits > 1:
            raise ConfigError(
                f"the outputs of a matrix stand in another order here than in transformers, and {splits} splits of them cannot"
            )
        b_QX = order(self.b_SKRQ.movedim(3, 0).flatten(1))
        return replace(self, b_SKRQ=b_QX.view(size, *self.b_SKRQ.shape[:3]).movedim(0, 3).contiguous())

    def config(self, *, dropout: float = 0.0, learns: bool = False) -> Linear.Config:
        """A `SkilledLowRank` of these sizes."""
        splits, skills, _, rank = self.a_SKPR.shape
        return SkilledLowRank.Config(
            rank=rank, num_tasks=len(self.logit_TX), num_skills=skills, num_splits=splits, task=self.task
        )


class SkilledLowRank(Linear, kind="skilled_low_rank"):
    """(1 / R) B_t A_t x of the task t of each row, which stands beside the matrix. B is zero at first."""

    told_by: ClassVar[tuple[str, ...]] = (TASK,)

    @configclass
    class Config(Linear.Config):
        """The sizes.

        Attributes:
            rank: R.
            num_tasks: T.
            num_skills: K.
            num_splits: S, which divides inputs and outputs.
            task: of rows that are told none; None where they must be told one, unless there is but one.
        """

        is_added: ClassVar[bool] = True

        rank: Size = Field(default=8, ge=1)
        num_tasks: Size = Field(default=1, ge=1)
        num_skills: Size = Field(default=4, ge=1)
        num_splits: Size = Field(default=1, ge=1)
        task: int | None = Field(default=None, ge=0)

        def __post_init__(self) -> None:
            if self.task is not None and self.task >= self.num_tasks:
                raise ConfigError(f"task is {self.task}; there are 0 to {self.num_tasks - 1}")

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """K R (C + O) weights and T S K logits; a row uses those of its task."""
            for name, size in (("inputs", projection.in_dim), ("outputs", projection.out_dim)):
                if size % self.num_splits:
                    raise ConfigError(
                        f"num_splits is {self.num_splits}, which does not divide the {size} {name} of {projection.name}"
                    )
            pair, weights = self.rank * (projection.in_dim + projection.out_dim), self.num_splits * self.num_skills
            return Count(self.num_skills * pair + self.num_tasks * weights, self.num_skills * pair + weights, 2 * pair)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        config.count(projection, context)
        splits, skills, rank = config.num_splits, config.num_skills, config.rank
        a_SKRP = torch.empty(splits, skills, rank, projection.in_dim // splits)
        draw_a(a_SKRP, context.generator)
        self.a = nn.Parameter(a_SKRP.transpose(2, 3).contiguous())
        self.b = nn.Parameter(torch.zeros(splits, skills, rank, projection.out_dim // splits))
        self.logits = nn.Parameter(torch.empty(config.num_tasks, splits * skills))
        if not self.logits.is_meta:
            nn.init.uniform_(self.logits, -1e-3, 1e-3, generator=context.generator)

    @property
    def routes_by_task(self) -> bool:
        """Whether rows must say their tasks, see `anabranch.adapters.tasks`."""
        return self.config.num_tasks > 1 and self.config.task is None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names: peft has numbers alone."""
        return tuple(map(str, range(self.config.num_tasks)))

    def weights(self, task_B: Tensor) -> Tensor:
        """w_BSK: how much of each skill each row uses in each split; they add up to 1. Drawn anew while the layer learns."""
        logit_BSK = self.logits[task_B].unflatten(-1, (self.config.num_splits, self.config.num_skills))
        if self.training:
            tiny = torch.finfo(logit_BSK.dtype).eps
            drawn_BSK = torch.rand_like(logit_BSK).clamp(tiny, 1 - tiny)
            logit_BSK = logit_BSK + drawn_BSK.log() - torch.log1p(-drawn_BSK)
        share_BSK = logit_BSK.sigmoid()
        return share_BSK / (share_BSK.sum(-1, keepdim=True) + _LEAST)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y. Raises InputError for rows that are told no task, or one that there is not."""
        task_B = self._tasks(x, context)
        w_BSK, x = self.weights(task_B), x.to(self.a.dtype)
        if x.dim() == 2 and len(w_BSK) > 1:
            return self._of_items(x, w_BSK) / self.config.rank
        a_BCR = torch.einsum("bsk,skpr->bspr", w_BSK, self.a).flatten(1, 2)
        b_BRO = torch.einsum("bsk,skrq->brsq", w_BSK, self.b).flatten(2)
        if len(w_BSK) == 1:
            a_BCR, b_BRO = a_BCR[0], b_BRO[0]
        return x @ a_BCR @ b_BRO / self.config.rank

    def _of_items(self, x_NC: Tensor, w_NSK: Tensor) -> Tensor:
        """R B A x of items that are of different rows."""
        z_NSKR = torch.einsum("nsp,skpr->nskr", x_NC.unflatten(-1, (self.config.num_splits, -1)), self.a)
        h_NR = torch.einsum("nsk,nskr->nr", w_NSK, z_NSKR)
        return torch.einsum("nsk,nskq->nsq", w_NSK, torch.einsum("nr,skrq->nskq", h_NR, self.b)).flatten(1)

    def _tasks(self, x: Tensor, context: Any) -> Tensor:
        """The task of each row, or of each item where x is of items; one for all where none is told and nothing is drawn."""
        told = None if context is None else context.state.get(TASK)
        if told is None:
            return self._untold(len(x), x.device)
        shape = tuple(x.shape[:-1])
        if tuple(told.shape) != shape and not (len(shape) == 1 and told.numel() == shape[0]):
            raise InputError(f"tasks are told of {list(told.shape)} rows and tokens in a pass of {list(shape)}")
        task_B = told.flatten() if len(shape) == 1 else told[:, 0] if told.shape[1] else told.new_zeros(len(told))
        if not torch.compiler.is_compiling() and task_B.numel():
            for task in (int(task_B.min()), int(task_B.max())):
                if not 0 <= task < self.config.num_tasks:
                    raise InputError(f"task {task} is told; the adapter has 0 to {self.config.num_tasks - 1}")
        return task_B

    def _untold(self, rows: int, device: torch.device) -> Tensor:
        task = 0 if self.config.num_tasks == 1 else self.config.task
        if task is None:
            raise InputError(
                f"the adapter has {self.config.num_tasks} tasks, and no row says which is its own; say state=task_rows(...), or load the "
                "adapter with a task for all"
            )
        return torch.full((rows if self.training else 1,), task, device=device)

    def put(self, numbers: Any, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of `Skills` of the same sizes."""
        self.a, self.b, self.logits = (
            frozen_as(part, device, trainable=trainable) for part in (numbers.a_SKPR, numbers.b_SKRQ, numbers.logit_TX)
        )

    def numbers(self) -> Numbers:
        """Its numbers as they are now."""
        return Skills(self.a.detach(), self.b.detach(), self.logits.detach(), self.config.task)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        config = self.config
        return f"tasks={config.num_tasks}, skills={config.num_skills}, splits={config.num_splits}, rank={config.rank}"

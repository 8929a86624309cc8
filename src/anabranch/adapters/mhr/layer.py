"""`MultiHeadRouted`: skills of an inventory beside one matrix, weighed by task (MHR; with one head, Poly).

    Decoder.Config(linears={"*.attention.*": MultiHeadRouted.Config(tasks=("summaries", "sql"), skills=8, heads=8, rank=4)})
    model(token_BL, state=task_rows(model, ["sql", "summaries"], token_BL.shape[1]))

A pass merges weights once for each task that is in it, not for each row: where all rows are of one task, there is one adapter.
"""
# Shapes: B rows, L positions, N items, U tasks of a pass, q heads, K skills, C inputs, O outputs, R rank

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.mhr.inventory import AdapterInventory, check_heads
from anabranch.adapters.mhr.penalties import Penalties
from anabranch.adapters.mhr.product import add_rows, add_to_rows, rows_through
from anabranch.adapters.mhr.table import Granularity, RoutingTable, bin_of
from anabranch.adapters.mhr.weights import Weights
from anabranch.adapters.tasks import AVERAGE, TASK, Unknown, numbers_of
from anabranch.adapters.together import can_go_together
from anabranch.config import Config, Field, Size, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.context import set_unregistered
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.linear import Projection, Rows, is_hooked
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

__all__ = ["MultiHeadRouted", "Skills"]


@configclass
class Skills(Config):
    """Sizes of an inventory, and how it is routed.

    Attributes:
        skills: K.
        heads: q; it divides inputs and outputs of every layer. 1 is Poly.
        rank: R.
        alpha: the scale is alpha / R.
        granularity: which layers share a routing table, see `anabranch.adapters.mhr.table`.
        mixes: ``weights``, the method's definition; or ``outputs`` of the skills, of one head.
        unknown: what a pass is that no task is told: an error, or the average of all skills.
        anneal: share of the training, at its end, in which weights move to the average (zero-shot MHR-mu); 0 for none.
        weights: how they are made of a table's numbers.
        penalties: what is added to the loss.
    """

    skills: Size = Field(default=8, ge=1)
    heads: Size = Field(default=8, ge=1)
    rank: Size = Field(default=16, ge=1)
    alpha: float = 1.0
    granularity: Granularity = "finegrained"
    mixes: Literal["weights", "outputs"] = "weights"
    unknown: Unknown = "error"
    anneal: float = Field(default=0.0, ge=0, le=1)
    weights: Weights = Weights()
    penalties: Penalties = Penalties()


class MultiHeadRouted(Linear, kind="multi_head_routed"):
    """scale (x A_tau) B_tau, with the halves of the task tau merged of K skills, head by head. B is zero at first."""

    # Of modules that `anabranch.adapters.tasks` asks for names.
    routes_by_task: ClassVar[bool] = True

    @configclass
    class Config(Skills, Linear.Config):
        """As `Skills`, and of which tasks.

        Attributes:
            tasks: names of the tasks; a row is of one of them.
            uniform: all skills weigh the same whatever the task, so that the average learns in this form (MHR-mu of the reference).
        """

        is_added: ClassVar[bool] = True

        tasks: tuple[str, ...] = Field(default=("all",), min_length=1)
        uniform: bool = False

        def __post_init__(self) -> None:
            twice = next((task for task in self.tasks if self.tasks.count(task) > 1), None)
            if len(set(self.tasks)) < len(self.tasks):
                raise ConfigError(f"tasks has {twice!r} twice; each is named once")
            if self.mixes == "outputs" and self.heads > 1:
                raise ConfigError(
                    f"mixes is 'outputs', which is for one head, and heads is {self.heads}; set heads to 1"
                )

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """K R (C + O) weights, and a table of T q K in each layer that has its own (the first of a bin counts it)."""
            check_heads(self.heads, projection.in_dim, projection.out_dim, projection.name)
            pair = self.rank * (projection.in_dim + projection.out_dim)
            return Count(self.skills * pair, pair, 2 * pair) + self._table(projection, context)

        def _table(self, projection: Projection, context: BuildContext) -> Count:
            bin_name = bin_of(projection.name, self.granularity)
            if bin_name is not None:
                # Counting builds nothing: what has been counted is noted where shared modules would stand.
                key = f"counted_{_shared_name(bin_name)}"
                if key in context.shared:
                    return Count()
                context.shared[key] = nn.Identity()
            row = self.heads * self.skills
            numbers = len(self.tasks) * row
            head = (row + 1) * len(self.tasks) if self.penalties.prediction else 0
            return Count(numbers + head, row, 0)

    config: Config
    told_by: ClassVar[tuple[str, ...]] = (TASK,)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config, self.name = config, projection.name
        self.inventory = AdapterInventory(
            projection.in_dim,
            projection.out_dim,
            skills=config.skills,
            heads=config.heads,
            rank=config.rank,
            alpha=config.alpha,
            layer=projection.name,
            generator=context.generator,
        )
        self.out_dim = projection.out_dim
        self.table: RoutingTable
        bin_name = bin_of(projection.name, config.granularity)
        if bin_name is None:
            self.table = self._new_table(context)
        else:
            shared = context.share(_shared_name(bin_name), lambda: self._new_table(context))
            set_unregistered(self, "table", shared)
        wanted = (len(config.tasks), config.heads, config.skills)
        if self.table.sizes != wanted or self.table.tasks != config.tasks:
            raise ConfigError(
                f"{projection.name} shares the table of {bin_name!r} with layers of other tasks or sizes (T, q, K) {self.table.sizes}, and "
                f"has {wanted}; give them the same, or granularity 'finegrained'"
            )

    def _new_table(self, context: BuildContext) -> RoutingTable:
        config = self.config
        table = RoutingTable(
            config.tasks,
            config.heads,
            config.skills,
            weights=config.weights,
            predicts_task=config.penalties.prediction > 0,
            generator=context.generator,
        )
        # What nobody asks does not learn.
        return table.requires_grad_(not config.uniform)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order of their numbers."""
        return self.config.tasks

    def on_step(self, step: int, fraction: float) -> None:
        """Anneal, near the end of a training."""
        if self.config.anneal:
            self.table.anneal((fraction - (1 - self.config.anneal)) / self.config.anneal)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y, in the inventory's type. Raises InputError where no task is told, or one beyond the table."""
        return self._added(x, self._begun(x, context), context)

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y, with what is added to it in one product (`anabranch.adapters.mhr.product`) where one task is that of a whole row."""
        x, inventory = rows.x, self.inventory
        task_BL = self._begun(x, context)
        frozen = rows.frozen()
        if self.config.mixes == "weights" and can_go_together(x, rows.y if frozen is None else frozen[0], inventory.a):
            found = self._by_row(x, task_BL, context)
            if found is not None:
                alpha_UqK, place_B, shape = found
                x_BLC = x.reshape(*shape, -1)
                mixed = x_BLC, alpha_UqK, inventory.a, inventory.b, place_B, inventory.scale
                if frozen is None:
                    return add_rows(rows.y.reshape(*shape, -1), *mixed).view(rows.y.shape)
                weight_OC, bias_O = frozen
                return rows_through(weight_OC, bias_O, *mixed).view(*x.shape[:-1], self.out_dim)
        y = rows.y
        return y + self._added(x, task_BL, context).to(y.dtype)

    def add_to(self, y: Tensor, x: Tensor, context: Any = None) -> None:
        """See `Linear.add_to`: as `around`."""
        inventory = self.inventory
        if is_hooked(self) or self.config.mixes != "weights" or not can_go_together(x, y, inventory.a):
            return super().add_to(y, x, context)
        task_BL = self._begun(x, context)
        found = self._by_row(x, task_BL, context)
        if found is None:
            y.add_(self._added(x, task_BL, context))
        else:
            alpha_UqK, place_B, shape = found
            y_BLO, x_BLC = y.view(*shape, -1), x.reshape(*shape, -1)
            add_to_rows(y_BLO, x_BLC, alpha_UqK, inventory.a, inventory.b, place_B, inventory.scale)

    @classmethod
    def only_adds(cls) -> bool:
        """So it does, in one product."""
        return True

    def _begun(self, x: Tensor, context: Any) -> Tensor | None:
        """The task of each item as `_told`; what is added to the loss is emitted."""
        task_BL = self._told(context, x)
        if context is not None and context.training:
            self._punish(context)
        return task_BL

    def _added(self, x: Tensor, task_BL: Tensor | None, context: Any) -> Tensor:
        """What is added to y."""
        x_NC = x.flatten(0, -2).to(self.inventory.a.dtype)
        alpha_1qK = self._alone(task_BL, x.device)
        if alpha_1qK is not None:
            y_NO = self._one(x_NC, alpha_1qK)
        elif self.config.mixes == "outputs":
            y_NO = self._mixed(x_NC, task_BL)
        else:
            y_NO = self._merged(x_NC, task_BL, context)
        return y_NO.view(*x.shape[:-1], self.out_dim)

    def _alone(self, task_BL: Tensor | None, device: torch.device) -> Tensor | None:
        """Weights of a pass that has but one adapter whatever its rows are: the average. None for any other."""
        if self.config.uniform:
            return self._average(self.inventory.a)
        # Asked, so that the table has a gradient, of zero.
        return self.table(torch.full((1,), AVERAGE, device=device)) if task_BL is None else None

    def _by_row(self, x: Tensor, task_BL: Tensor | None, context: Any) -> tuple[Tensor, Tensor, tuple[int, int]] | None:
        """(alpha_UqK, which of them each row has, [B, L] that x is of); None where items of one row are of several tasks."""
        items = x.numel() // x.shape[-1]
        if not items:
            return None
        alpha_1qK = self._alone(task_BL, x.device)
        if alpha_1qK is None:
            distinct_U, place_X, is_by_row = self._places(task_BL, items, context)
            if is_by_row:
                return self.table(distinct_U), place_X, (len(place_X), items // len(place_X))
            if len(distinct_U) != 1:
                return None
            alpha_1qK = self.table(distinct_U)
        return alpha_1qK, torch.zeros(1, dtype=torch.int64, device=x.device), (1, items)

    def _told(self, context: Any, x: Tensor) -> Tensor | None:
        """The task of each item, ``[B, L]`` or ``[N]``; None where nobody says, and that is the average."""
        task_BL = None if context is None else context.state.get(TASK)
        if task_BL is None:
            if self.config.unknown == "error" and not self.config.uniform:
                raise InputError(
                    f"{self.name} routes by task, and no task is told; say state=task_rows(model, names, length), or use on_tasks"
                )
            return None
        num_items = x.numel() // x.shape[-1]
        if task_BL.numel() * context.num_streams == num_items and context.num_streams > 1:
            # One stream after another.
            task_BL = task_BL.repeat(context.num_streams, *[1] * (task_BL.dim() - 1))
        if task_BL.numel() != num_items:
            raise InputError(f"tasks are told for {task_BL.numel()} tokens of a pass of {num_items}")
        return task_BL

    def _average(self, like: Tensor) -> Tensor:
        """alpha_1qK of the average."""
        return like.new_full((1, self.config.heads, self.config.skills), 1 / self.config.skills)

    def _one(self, x_NC: Tensor, alpha_1qK: Tensor) -> Tensor:
        """One adapter for all items."""
        if self.config.mixes == "outputs":
            return self.inventory.outputs_of(x_NC, alpha_1qK[:, 0].expand(len(x_NC), -1))
        a_1CR, b_1RO = self.inventory.merged(alpha_1qK)
        return (x_NC @ a_1CR[0]) @ b_1RO[0] * self.inventory.scale

    def _mixed(self, x_NC: Tensor, task_BL: Any) -> Tensor:
        """Outputs of skills, mixed."""
        task_N = task_BL.flatten()
        if self.config.weights.is_random and self.training:
            # Drawn for each row.
            row_BK = self.table(task_BL[:, 0] if task_BL.dim() == 2 else task_N)[:, 0]
            return self.inventory.outputs_of(x_NC, row_BK.repeat_interleave(len(x_NC) // len(row_BK), dim=0))
        distinct_U, place_N = self._distinct(task_N)
        return self.inventory.outputs_of(x_NC, self.table(distinct_U)[:, 0][place_N])

    def _places(self, task_BL: Any, items: int, context: Any) -> tuple[Tensor, Tensor, bool]:
        """(tasks, which of them each row has, or each item, whether it is each row)."""
        # Rows of a pass as it was told; what was gathered from several may differ within a row.
        is_by_row = task_BL.dim() == 2 and task_BL.shape[1] > 1 and task_BL.stride(1) == 0
        first_B = task_BL[:, 0] if task_BL.dim() == 2 else task_BL
        if self.config.weights.is_random and self.training and (is_by_row or len(first_B) == items):
            # Each row has weights of its own.
            return first_B, torch.arange(len(first_B), device=first_B.device), is_by_row
        return *self._once(context, first_B if is_by_row else task_BL.flatten()), is_by_row

    def _merged(self, x_NC: Tensor, task_BL: Any, context: Any) -> Tensor:
        """Weights merged once for each task, and one product for each row, or group of items."""
        distinct_U, place_B, is_by_row = self._places(task_BL, len(x_NC), context)
        alpha_UqK = self.table(distinct_U)
        if len(distinct_U) == 1:
            return self._one(x_NC, alpha_UqK)
        a_UCR, b_URO = self.inventory.merged(alpha_UqK)
        if is_by_row:
            x_BLC = x_NC.view(*task_BL.shape, x_NC.shape[-1])
            return torch.bmm(torch.bmm(x_BLC, a_UCR[place_B]), b_URO[place_B]).flatten(0, 1) * self.inventory.scale
        return self._grouped(x_NC, place_B, a_UCR, b_URO)

    def _grouped(self, x_NC: Tensor, place_N: Tensor, a_UCR: Tensor, b_URO: Tensor) -> Tensor:
        """The product of single items, sorted by adapter, as that of experts is made."""
        weight_N1 = x_NC.new_full((len(x_NC), 1), self.inventory.scale)
        routing = Routing(place_N.unsqueeze(1), weight_N1, x_NC.new_zeros(len(x_NC), len(a_UCR)))
        a_URC, b_UOR = a_UCR.transpose(1, 2).contiguous(), b_URO.transpose(1, 2).contiguous()
        return expert_mlp(x_NC, plan_dispatch(routing), weight_N1, a_URC, b_UOR, activation="identity")

    def _once(self, context: Any, task_X: Tensor) -> tuple[Tensor, Tensor]:
        """`_distinct`, looked for once in a pass: every layer is told the same."""
        told = None if context is None else context.state.get(TASK)
        if told is None or torch.compiler.is_compiling():
            return self._distinct(task_X)
        # What is told is kept with it, so that no other tensor gets its id meanwhile.
        found = context.once(told, lambda: {"told": told})
        key = tuple(task_X.shape)
        if key not in found:
            found[key] = self._distinct(task_X)
        return found[key]

    def _distinct(self, task_X: Tensor) -> tuple[Tensor, Tensor]:
        """(the tasks that there are, which of them each is)."""
        if torch.compiler.is_compiling():
            # How many there are a compiled graph must not ask: all tasks, and the average.
            tasks = len(self.tasks)
            every = torch.arange(-1, tasks, device=task_X.device)
            return every, task_X + 1
        distinct_U, place_X = torch.unique(task_X, return_inverse=True)
        return distinct_U, place_X

    def _punish(self, context: Any) -> None:
        """Emit what is added to the loss."""
        for name, loss in self.config.penalties.of(self.table, self.inventory.a, self.inventory.b).items():
            context.emit_loss(name, loss)

    @torch.no_grad()
    def pair(self, task: str | None) -> Pair:
        """The adapter of a task as plain LoRA; None for the average. Raises InputError for a task that there is not."""
        number_1 = torch.tensor(numbers_of([task], self.tasks), device=self.table.z.device)
        was, self.table.training = self.table.training, False
        try:
            alpha_1qK = self._average(self.inventory.a) if self.config.uniform else self.table(number_1)
        finally:
            self.table.training = was
        return self.inventory.pair(alpha_1qK[0], mixes_outputs=self.config.mixes == "outputs")


def _shared_name(bin_name: str) -> str:
    """Of a table among the modules that layers share, whose names hold no dots."""
    return f"routing_table_{bin_name.replace('.', '_')}"


def routed_layers(model: nn.Module) -> Sequence[MultiHeadRouted]:
    """The layers of a model, in its order. Raises ConfigError where there is none."""
    found = [module for module in model.modules() if isinstance(module, MultiHeadRouted)]
    if not found:
        raise ConfigError("the model has no MultiHeadRouted layers; put them on first (anabranch.adapters.put_on)")
    return found

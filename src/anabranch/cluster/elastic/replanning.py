"""The coordinator's plans: layouts for the ranks that there are, from what ranks say of the model and measure of its layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.planner import ElasticPlan, Policy, plan
from anabranch.cluster.elastic.stages import Memory
from anabranch.cluster.elastic.wire import Header
from anabranch.errors import InputError

__all__ = ["Replanner"]


class Replanner:
    """Of one training.

    Args:
        stages: P.
        policy: of the planner; None for that of the ranks.
        memory: what layers take and ranks have.
        layer_costs: seconds of each layer; None for those that ranks measure.

    Attributes:
        signature: what ranks said of the model; set by the first.
    """

    def __init__(
        self, stages: int, policy: Policy | None, memory: Memory | None, layer_costs: Sequence[float] | None
    ) -> None:
        self.signature: Header = {}
        self._stages, self._given_policy, self._memory, self._given_costs = stages, policy, memory, layer_costs
        self._measured: dict[int, float] = {}

    @property
    def policy(self) -> Policy:
        """As it was given; else as ranks say."""
        return self._given_policy or _policy_of(self.signature.get("policy")) or Policy()

    def refusal(self, signature: Header) -> str | None:
        """Why a rank that says this cannot be planned for; None where it can."""
        try:
            theirs = _policy_of(signature.get("policy"))
        except (TypeError, InputError) as error:
            return f"its policy makes no sense: {error}"
        if theirs is not None and self._given_policy not in (None, theirs):
            return f"its policy is {theirs}, and the coordinator has {self._given_policy}"
        return None

    @property
    def sizes(self) -> list[int]:
        """Numbers of each layer."""
        return list(self.signature["sizes"])

    @property
    def micro_batches(self) -> int:
        """M: as ranks say, or twice the stages."""
        return int(self.signature["micro_batches"] or 2 * self._stages)

    @property
    def layer_costs(self) -> list[float]:
        """Seconds of each layer: given, or measured once all are."""
        sizes = self.sizes
        if self._given_costs is not None:
            return list(self._given_costs)
        if len(self._measured) == len(sizes):
            return [self._measured[layer] for layer in range(len(sizes))]
        # Until they are measured: by parameters, and something for layers without.
        return [1e-9 * (size + 1) for size in sizes]

    def measured(self, costs: dict[str, Any]) -> None:
        """What a rank measured of its layers. Raises ValueError for no seconds, or of no layer, and then takes none of it."""
        found = {int(layer): float(seconds) for layer, seconds in costs.items()}
        for layer, seconds in found.items():
            if not (0 <= layer < len(self.sizes) and 0 <= seconds < math.inf):
                raise ValueError(f"layer {layer} of {len(self.sizes)} takes {seconds} s")
        self._measured |= found

    def planned(self, grid: Grid, bounds: tuple[int, ...] | None, *, moves_layers: bool) -> ElasticPlan:
        """The plan for some ranks, from where layers begin now."""
        sizes = self.sizes
        has_as_many = bounds is not None and len(bounds) == len(grid.stages) - 1
        return plan(
            grid,
            self.layer_costs,
            global_batch=int(self.signature["global_batch"]),
            micro_batches=self.micro_batches,
            block=int(self.signature["block"]),
            memory=self._memory,
            size_L=sizes,
            # Who answers for whom is in the announcement; here only bounds count.
            previous=Layout(grid, bounds, len(sizes)) if has_as_many and bounds is not None else None,
            policy=self.policy if moves_layers else replace(self.policy, moves_layers=False),
        )

    def grown(self, layout: Layout, joins: Sequence[int]) -> Layout | None:
        """The layout with ranks that come in, and with layers moved where it is worth it; None where that is the same."""
        grid = layout.grid
        for rank in joins:
            grid = grid.with_rank(rank)
        made = self.planned(grid, layout.bounds, moves_layers=True)
        return None if made.layout == layout else made.layout


def _policy_of(told: Any) -> Policy | None:
    """Of a signature. Raises TypeError and InputError for what is none."""
    if told is None:
        return None
    if not isinstance(told, dict):
        raise InputError(f"it is {told!r}")
    return Policy(**{**told, "schedule_names": tuple(told.get("schedule_names", Policy.schedule_names))})

"""What pools went by where they chose adapters for the new tokens of a request: what its query says of each, and what the tokens do."""
# Shapes: E adapters, K choices of an item

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.glider.explaining import Explained, global_shares
from anabranch.routing import Routing
from anabranch.serving.engine.asking import Terms

__all__ = ["MOST_EXPLAINED", "Tally", "TokenRoute", "explained"]

# Adapters of a pool that are told, those that were used most.
MOST_EXPLAINED = 16


@dataclass(eq=False)
class Tally:
    """Decisions of one pool.

    Attributes:
        local_E: sums of what tokens say of each adapter.
        open_E: decisions in which each could be chosen.
        weight_E: sums of what each was multiplied by.
        decisions: how many.
        tokens: that they are of.
    """

    local_E: Tensor
    open_E: Tensor
    weight_E: Tensor
    decisions: int = 0
    tokens: int = 1

    @classmethod
    def of(cls, num_adapters: int) -> "Tally":
        """None yet, of a token."""
        local_E, open_E, weight_E = torch.zeros(3, num_adapters, dtype=torch.float64)
        return cls(local_E, open_E, weight_E)

    def note(self, local_E: Tensor, open_E: Tensor, routing: Routing, item: int) -> None:
        """The decision for an item."""
        self.local_E += local_E.double().cpu()
        self.open_E += open_E
        weight_K = (routing.weight_NK[item] * routing.used_NK[item]).double().cpu()
        self.weight_E.index_add_(0, routing.index_NK[item].clamp_min(0).cpu(), weight_K)
        self.decisions += 1

    def add(self, other: "Tally") -> None:
        """Those of another token."""
        self.local_E += other.local_E
        self.open_E += other.open_E
        self.weight_E += other.weight_E
        self.decisions += other.decisions
        self.tokens += other.tokens


@dataclass(eq=False)
class TokenRoute(dict[int | str, tuple[int | str, ...]]):
    """Where a token goes, and beside it what pools that chose for it went by.

    Attributes:
        pools: by the key of a use, see `anabranch.serving.engine.pass_adapters.Use`.
    """

    pools: dict[Hashable, Tally] = field(default_factory=dict)


def explained(tally: Tally, terms: Terms | None, names: Sequence[str]) -> dict[str, Any]:
    """For JSON: the ``instruction`` that was compared (None for none), ``a``, ``tokens``, and of the `MOST_EXPLAINED` adapters that were
    used most the fields of `anabranch.adapters.glider.Explained`."""
    terms = Terms.nothing(len(names)) if terms is None else terms
    bias_E = torch.tensor(terms.bias or (0.0,) * len(names), dtype=torch.float64)
    local_E, weight_E = tally.local_E / tally.open_E.clamp_min(1), tally.weight_E / max(1, tally.decisions)
    share_E = global_shares(bias_E, local_E)
    most = torch.sort(weight_E, descending=True, stable=True).indices[:MOST_EXPLAINED].tolist()
    rows = [
        Explained(
            names[e], terms.cosines[e], float(bias_E[e]), float(local_E[e]), float(weight_E[e]), float(share_E[e])
        )
        for e in most
    ]
    experts = [
        {name: value if isinstance(value, str) else round(value, 6) for name, value in row.__dict__.items()}
        for row in rows
    ]
    return {"instruction": terms.instruction, "a": terms.a, "tokens": tally.tokens, "experts": experts}

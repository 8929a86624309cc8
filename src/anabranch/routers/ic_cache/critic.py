"""What each arm's answer is worth in a context, learned from ratings and preferences through a prioritised replay buffer.

mu_i = sigmoid(s_i(x))                     s: a small network with one output per arm
rating q of arm i             loss = cross entropy of sigmoid(s_i) and q
i preferred to j (t = 1)      loss = cross entropy of sigmoid(s_i - s_j) and t        Bradley-Terry; 1/2 for a tie
drawn with chance ~ |error|^alpha, weighted (N P)^-beta / max         Schaul et al., arXiv 1511.05952
"""
# Shapes: N remembered, B drawn, I inputs, M arms

import json
from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.routers.contract.strategy import Arrays
from anabranch.routers.ic_cache.mlp import Network
from anabranch.routers.logistic import sigmoid

# Of a priority: nothing is never drawn again.
SMALLEST = 1e-3


class ReplayBuffer:
    """The last so many outcomes: context, first arm, second arm (-1 for a rating), target.

    Args:
        capacity: entries; the oldest make room.
        inputs: I.
        alpha: how much the error decides who is drawn; 0 not at all.
        beta: how much the weights take that back; 1 wholly.
    """

    def __init__(self, capacity: int, inputs: int, *, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.x_NI = np.zeros((capacity, inputs), np.float32)
        self.arm_N2 = np.zeros((capacity, 2), np.int64)
        self.target_N, self.priority_N = np.zeros(capacity), np.zeros(capacity)
        self.owner_N: list[tuple[str, str]] = [("", "")] * capacity
        self._count = 0  # ever

    def __len__(self) -> int:
        return min(self._count, len(self.target_N))

    def add(self, x_I: np.ndarray, first: int, second: int, target: float, owner: tuple[str, str] = ("", "")) -> None:
        """Remember; as urgent as the most urgent so far. ``owner``: tenant and user, by whom it can be forgotten."""
        at = self._count % len(self.target_N)
        self.priority_N[at] = max(1.0, float(self.priority_N.max()))
        self.x_NI[at], self.arm_N2[at], self.target_N[at] = x_I, (first, second), target
        self.owner_N[at] = owner
        self._count += 1

    def forget(self, tenant: str, user: str | None) -> int:
        """Forget what is a tenant's, or a user's of it; returns how many entries went."""
        held = len(self)
        kept = [
            at for at, owner in enumerate(self.owner_N[:held]) if owner[0] != tenant or user not in (None, owner[1])
        ]
        self._keep(kept)
        return held - len(kept)

    def forget_context(self, x_I: np.ndarray) -> int:
        """Forget what was learned in one context; returns how many entries went."""
        held = len(self)
        kept = np.flatnonzero((self.x_NI[:held] != x_I).any(axis=1)).tolist()
        self._keep(kept)
        return held - len(kept)

    def _keep(self, kept: list[int]) -> None:
        if len(kept) < len(self):
            for name in ("x_NI", "arm_N2", "target_N", "priority_N"):
                array = getattr(self, name)
                array[: len(kept)] = array[kept]
                array[len(kept) :] = 0
            blank = ("", "")
            self.owner_N = [self.owner_N[at] for at in kept] + [blank] * (len(self.owner_N) - len(kept))
            self._count = len(kept)

    def draw(self, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and their weights (largest 1)."""
        chance_N = self.priority_N[: len(self)] ** self.alpha
        chance_N = chance_N / chance_N.sum()
        rows = random.choice(len(chance_N), count, p=chance_N)
        weight_B = (len(chance_N) * chance_N[rows]) ** -self.beta
        return rows, weight_B / weight_B.max()

    def update(self, rows: np.ndarray, error_B: np.ndarray) -> None:
        """New priorities."""
        self.priority_N[rows] = np.abs(error_B) + SMALLEST

    def state(self) -> Arrays:
        """What is remembered."""
        held = len(self)
        return {
            "x_NI": self.x_NI[:held],
            "arm_N2": self.arm_N2[:held],
            "target_N": self.target_N[:held],
            "priority_N": self.priority_N[:held],
            "count": np.array(self._count),
            # As bytes of JSON, since files hold numbers.
            "owners": np.frombuffer(json.dumps(self.owner_N[:held]).encode(), np.uint8).copy(),
        }

    def load_state(self, arrays: Arrays) -> None:
        """Take it back."""
        held = len(arrays["target_N"])
        for name in ("x_NI", "arm_N2", "target_N", "priority_N"):
            getattr(self, name)[:held] = arrays[name]
        self.owner_N[:held] = [(str(tenant), str(user)) for tenant, user in json.loads(bytes(arrays["owners"]))]
        self._count = int(arrays["count"])


class Critic(Part):
    """See the module.

    Args:
        config: sizes and training.
        inputs: I.
        arms: M.
        seed: of weights and draws.
        prior_M: s of each arm before anything is learned; None for 0.
    """

    @configclass
    class Config(BaseConfig):
        """Sizes and training. The defaults make 0.33 million parameters with vectors of 384 numbers (paper: 0.5).

        Attributes:
            hidden: widths.
            learning_rate: of Adam.
            weight_decay: decoupled.
            batch_size: outcomes per step.
            memory: outcomes remembered.
            alpha: see `ReplayBuffer`.
            beta: see there.
        """

        hidden: tuple[int, ...] = (512, 256)
        learning_rate: float = Field(default=1e-3, gt=0)
        weight_decay: float = Field(default=1e-3, ge=0)
        batch_size: int = Field(default=32, ge=1)
        memory: int = Field(default=4096, ge=1)
        alpha: float = Field(default=0.6, ge=0)
        beta: float = Field(default=0.4, ge=0, le=1)

    def __init__(self, config: Any, inputs: int, arms: int, *, seed: int, prior_M: np.ndarray | None = None) -> None:
        self.config, self.num_arms = config, arms
        self.network = Network(
            (inputs, *config.hidden, arms),
            seed=seed,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        if prior_M is not None:
            self.network.parameters[-1][:] = prior_M
        self.buffer = ReplayBuffer(config.memory, inputs, alpha=config.alpha, beta=config.beta)
        self.random = np.random.default_rng([seed, 1])

    def utilities(self, x_I: np.ndarray) -> np.ndarray:
        """mu of each arm, float64 [M]."""
        return sigmoid(self.network(x_I[None])[0].astype(np.float64))

    def rate(self, x_I: np.ndarray, arm: int, quality: float, owner: tuple[str, str] = ("", "")) -> None:
        """Remember a rating, 0 to 1."""
        self.buffer.add(x_I, arm, -1, quality, owner)

    def prefer(
        self, x_I: np.ndarray, first: int, second: int, outcome: float, owner: tuple[str, str] = ("", "")
    ) -> None:
        """Remember a preference: 1 the first, 0 the second, 1/2 a tie."""
        self.buffer.add(x_I, first, second, outcome, owner)

    def train(self, steps: int = 1) -> float:
        """Take steps on what is remembered; returns the mean absolute error of the last batch, 0 if there is nothing."""
        error = 0.0
        for _ in range(steps if len(self.buffer) else 0):
            rows, weight_B = self.buffer.draw(self.config.batch_size, self.random)
            error = self._step(rows, weight_B)
        return error

    def _step(self, rows: np.ndarray, weight_B: np.ndarray) -> float:
        x_BI, arm_B2, target_B = self.buffer.x_NI[rows], self.buffer.arm_N2[rows], self.buffer.target_N[rows]
        score_BM = self.network(x_BI).astype(np.float64)
        at, pair = np.arange(len(rows)), arm_B2[:, 1] >= 0
        rival_B = np.where(pair, score_BM[at, arm_B2[:, 1]], 0.0)
        error_B = sigmoid(score_BM[at, arm_B2[:, 0]] - rival_B) - target_B
        slope_BM = np.zeros_like(score_BM)
        slope_BM[at, arm_B2[:, 0]] += weight_B * error_B
        slope_BM[at[pair], arm_B2[pair, 1]] -= (weight_B * error_B)[pair]
        self.network.step(x_BI, slope_BM / len(rows))
        self.buffer.update(rows, error_B)
        return float(np.abs(error_B).mean())

    def state(self) -> Arrays:
        """Network and memory."""
        parts = (("network", self.network.state()), ("buffer", self.buffer.state()))
        return {f"{part}.{name}": value for part, arrays in parts for name, value in arrays.items()}

    def load_state(self, arrays: Arrays) -> None:
        """Take them back."""
        for part in ("network", "buffer"):
            own = {name.partition(".")[2]: value for name, value in arrays.items() if name.startswith(f"{part}.")}
            getattr(self, part).load_state(own)

"""Which arm answers: a contextual bandit whose scores are pushed towards cheap arms as load grows (IC-Cache, section 5).

    S_i(L) = mu_i - lambda0 tanh(gamma max(0, L - threshold)) C_i         L: moving average of load; C_i: cost over the largest cost
    arm    = argmax S, or drawn by softmax(S / temperature)
    uncertain: the standard deviation of mu over the arms < 0.1; then a second arm, by Thompson sampling from a Beta belief of each, is
    to answer too, and which answer is preferred (Bradley-Terry) moves the beliefs and teaches the critic

Below the threshold the push is nothing; above it grows to lambda0 C_i at most. How large it stays says whether machines are missing.
"""
# Shapes: M arms, I inputs, D dimensions of a request's vector

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.selector import Selection

Owner = tuple[str, str]

# Inputs of the critic beside the request's vector.
EXTRAS = 8


class Ema:
    """Exponential moving average over time: what is a half-life old weighs half.

    Args:
        half_life_s: seconds.
    """

    def __init__(self, half_life_s: float) -> None:
        self.half_life_s, self.value = half_life_s, 0.0
        self._last_s: float | None = None

    def observe(self, value: float, now_s: float) -> float:
        """Take in a value that held since the last one; the first counts whole. Time that runs backwards counts as none."""
        if self._last_s is None:
            self.value = value
        else:
            keep = 0.5 ** (max(0.0, now_s - self._last_s) / self.half_life_s)
            self.value = keep * self.value + (1 - keep) * value
        self._last_s = now_s if self._last_s is None else max(now_s, self._last_s)
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Of one request.

    Attributes:
        arm: that answers.
        arms: names, as in the arrays.
        mu_M: expected utilities.
        score_M: S; -inf where an arm is not available.
        probability_M: with which each would have been chosen.
        push: lambda0 tanh(...), the share of C_i that was taken off.
        spread: standard deviation of mu over available arms.
        second: arm that is to answer too; None where nothing is to be learned.
    """

    arm: str
    arms: tuple[str, ...]
    mu_M: np.ndarray
    score_M: np.ndarray
    probability_M: np.ndarray
    push: float
    spread: float
    second: str | None = None


class Router(Part):
    """See the module.

    Args:
        config: of the bandit.
        arms: names.
        cost_M: of a usual answer, in any unit.
        dim: D.
        seed: of all that is drawn.
    """

    @configclass
    class Config(BaseConfig):
        """Of the bandit.

        Attributes:
            critic: what predicts mu.
            lambda0: most that load takes off the dearest arm's score (paper: not published).
            load_threshold: load up to which nothing is taken off; 1 is the dearest arm's capacity.
            gamma: steepness of the push; None for 4 / load_threshold.
            load_half_life_s: of the average of load.
            autoscale_half_life_s: of the average of the push.
            temperature: of the softmax; 0 takes the best.
            explore: share of requests that go to any arm, so that none is never seen and the log can value other policies.
            prior: log-odds by which an arm of C = 1 is thought better before anything is known: what is unknown goes to the dear arm.
            uncertain_below: spread of mu below which feedback is sought.
            ask_share: of uncertain requests that get a second answer.
        """

        critic: Critic.Config = Field(default_factory=Critic.Config)
        lambda0: float = Field(default=1.0, ge=0)
        load_threshold: float = Field(default=1.0, gt=0)
        gamma: float | None = Field(default=None, gt=0)
        load_half_life_s: float = Field(default=5.0, gt=0)
        autoscale_half_life_s: float = Field(default=300.0, gt=0)
        temperature: float = Field(default=0.02, ge=0)
        explore: float = Field(default=0.02, ge=0, le=1)
        prior: float = 0.5
        uncertain_below: float = Field(default=0.1, ge=0)
        ask_share: float = Field(default=1.0, ge=0, le=1)

    def __init__(self, config: Any, arms: Sequence[str], cost_M: Sequence[float], dim: int, *, seed: int = 0) -> None:
        cost = np.asarray(cost_M, np.float64)
        if not arms or len(set(arms)) < len(arms) or cost.shape != (len(arms),):
            raise InputError(f"{len(arms)} arms with {cost.size} costs; give different names, and a cost for each")
        if not (np.isfinite(cost).all() and (cost >= 0).all()):
            raise InputError(f"costs are {cost.tolist()}; they must be at least 0 and finite")
        self.config, self.arms, self.dim = config, tuple(arms), dim
        self.cost_M = cost / cost.max() if cost.max() > 0 else cost
        self.critic = Critic(config.critic, dim + EXTRAS, len(arms), seed=seed, prior_M=config.prior * self.cost_M)
        self.load, self.scarcity = Ema(config.load_half_life_s), Ema(config.autoscale_half_life_s)
        self.wins_M, self.losses_M = np.ones(len(arms)), np.ones(len(arms))  # Beta beliefs
        self._random = np.random.default_rng([seed, 2])

    # Load

    def observe_load(self, load: float, now_s: float) -> None:
        """Tell the load now; NaN is passed over."""
        if math.isfinite(load):
            self.load.observe(load, now_s)
            self.scarcity.observe(math.tanh(self._over()), now_s)

    def _over(self) -> float:
        config = self.config
        gamma = 4 / config.load_threshold if config.gamma is None else config.gamma
        return gamma * max(0.0, self.load.value - config.load_threshold)

    @property
    def push(self) -> float:
        """lambda0 tanh(gamma max(0, L - threshold)): what is taken off an arm of C = 1."""
        return self.config.lambda0 * math.tanh(self._over())

    @property
    def autoscale(self) -> float:
        """Mean tanh of the push over minutes, 0 to 1: stays high where capacity is missing."""
        return self.scarcity.value

    # Choosing

    def context(self, vector_D: np.ndarray, selection: Selection, prompt_tokens: int) -> np.ndarray:
        """What the critic sees of a request and its examples, float32 [I]."""
        similarity = [item.similarity for item in selection.chosen] or [0.0]
        utility = [item.utility for item in selection.chosen] or [0.0]
        extras = [
            len(selection.chosen) / 5,
            float(bool(selection.chosen)),
            max(similarity),
            sum(similarity) / len(similarity),
            max(utility),
            sum(utility) / len(utility),
            math.log1p(selection.tokens) / 8,
            math.log1p(prompt_tokens) / 8,
        ]
        return np.concatenate([vector_D, np.array(extras)]).astype(np.float32)

    def choose(self, x_I: np.ndarray, available: Sequence[str] | None = None) -> Choice:
        """An arm for a context. ``available``: names that may be chosen; None, or none that is known, for all."""
        mu_M = self.critic.utilities(x_I)
        is_open_M = np.array([available is None or name in available for name in self.arms])
        is_open_M |= ~is_open_M.any()
        score_M = np.where(is_open_M, mu_M - self.push * self.cost_M, -np.inf)
        explore = self.config.explore
        probability_M = (1 - explore) * softmax(
            score_M, self.config.temperature
        ) + explore * is_open_M / is_open_M.sum()
        at = int(self._random.choice(len(self.arms), p=probability_M))
        spread = float(mu_M[is_open_M].std())
        return Choice(
            arm=self.arms[at],
            arms=self.arms,
            mu_M=mu_M,
            score_M=score_M,
            probability_M=probability_M,
            push=self.push,
            spread=spread,
            second=self._second(at, is_open_M, spread),
        )

    def _second(self, at: int, is_open_M: np.ndarray, spread: float) -> str | None:
        """Thompson sampling among the others, where mu cannot tell arms apart."""
        rivals = is_open_M & (np.arange(len(self.arms)) != at)
        if not rivals.any() or spread >= self.config.uncertain_below:
            return None
        if self._random.random() >= self.config.ask_share:
            return None
        belief_M = self._random.beta(self.wins_M, self.losses_M)
        return self.arms[int(np.argmax(np.where(rivals, belief_M, -1.0)))]

    # Learning

    def prefer(
        self, x_I: np.ndarray, first: str, second: str, outcome: float, *, steps: int = 1, owner: Owner = ("", "")
    ) -> None:
        """Learn that the first's answer was preferred (1), or the second's (0), or neither (1/2). ``owner``: tenant and user."""
        i, j = self.arms.index(first), self.arms.index(second)
        self.wins_M[i] += outcome
        self.losses_M[i] += 1 - outcome
        self.wins_M[j] += 1 - outcome
        self.losses_M[j] += outcome
        self.critic.prefer(x_I, i, j, outcome, owner)
        self.critic.train(steps)

    def rate(self, x_I: np.ndarray, arm: str, quality: float, *, steps: int = 1, owner: Owner = ("", "")) -> None:
        """Learn how good an arm's answer was, 0 to 1. ``owner``: tenant and user."""
        self.critic.rate(x_I, self.arms.index(arm), quality, owner)
        self.critic.train(steps)

    def state(self) -> tuple[Arrays, Facts]:
        """Critic, beliefs and what will be drawn next; load is of the moment, and not kept."""
        own = {"wins_M": self.wins_M, "losses_M": self.losses_M, "cost_M": self.cost_M}
        return {**own, **{f"critic.{name}": value for name, value in self.critic.state().items()}}, {
            "arms": list(self.arms),
            "dim": self.dim,
            "random": [self._random.bit_generator.state, self.critic.random.bit_generator.state],
        }

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take them back. Raises InputError if they are of other arms or another dimension."""
        if tuple(facts["arms"]) != self.arms or facts["dim"] != self.dim:
            raise InputError(
                f"the stored router is of {facts['arms']} and {facts['dim']} dimensions, not {list(self.arms)} and {self.dim}"
            )
        self.wins_M, self.losses_M, self.cost_M = (arrays[name].copy() for name in ("wins_M", "losses_M", "cost_M"))
        self._random.bit_generator.state, self.critic.random.bit_generator.state = facts["random"]
        self.critic.load_state(
            {name.removeprefix("critic."): value for name, value in arrays.items() if name.startswith("critic.")}
        )


def softmax(score_M: np.ndarray, temperature: float) -> np.ndarray:
    """exp(S / temperature) over its sum; all on the best, the first of equals, at 0."""
    if not temperature:
        return (np.arange(len(score_M)) == np.argmax(score_M)).astype(np.float64)
    raised_M = np.exp((score_M - score_M.max()) / temperature)
    return raised_M / raised_M.sum()

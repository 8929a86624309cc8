"""`ExpertsConfig`: how the experts of a model come and go where a budget of bytes holds only some of them."""

from typing import Any, Literal

from anabranch.config import Config, Field, Size, configclass
from anabranch.errors import ConfigError

__all__ = ["AUTO", "NONE", "ExpertsConfig"]

# Words in the place of a predictor.
AUTO, NONE = "auto", "none"
# Policies that replace by what happened alone, whatever is predicted.
_UNTOLD = ("lru", "lfu", "random", "cache_moe", "se_moe")


@configclass
class ExpertsConfig(Config):
    """Options of ExpertFlow (`anabranch.serving.expertflow`) in an engine that has an ``expert_budget``. None changes outputs.

    Attributes:
        predictor: what names experts ahead: the file of a fitted predictor (``anabranch experts fit-predictor``), ``tlp``, ``slp`` or
            ``router_lookahead``, or ``none``. ``auto`` is the file ``route-predictor.safetensors`` beside the model, which sees whole
            paths, and ``router_lookahead``, which sees one layer ahead, where there is no such file.
        policy: which expert leaves for another, see `anabranch.serving.expertflow.policy`. All but ``plec``, ``lru_ahead`` and ``belady``
            ask for no predictions.
        least: of a predictor that gives probabilities, experts that some token of a step takes with this probability are loaded ahead.
        extra: of a predictor that only orders experts, so many more than each token takes are.
        drop_cache: do not let the system's page cache keep what was read of experts.
        workers: threads that load.
        dual_batch: the paper's dual-batch pipeline: of the requests that decode at most so many are in a step, those of two steps are a
            unit whose routes are predicted together, and its tokens are regrouped before the first one. Steps are formed one by one
            (``scheduling`` is ``sync``). None for all requests in each step.
        regroup: the paper's Token Scheduler: requests of a unit that go to the same experts run in the same step. False leaves them in
            the order in which they came.
    """

    predictor: str = AUTO
    policy: Literal["plec", "lru_ahead", "belady", "lru", "lfu", "random", "cache_moe", "se_moe"] = "plec"
    least: float = Field(default=0.4, gt=0, le=1)
    extra: int = Field(default=1, ge=0)
    drop_cache: bool = False
    workers: Size = Field(default=3, ge=1, le=256)
    dual_batch: Size | None = Field(default=None, ge=1)
    regroup: bool = True

    @property
    def is_told(self) -> bool:
        """Whether the policy asks for predictions."""
        return self.policy not in _UNTOLD

    def __post_init__(self) -> None:
        if not self.is_told and self.predictor not in (AUTO, NONE):
            raise ConfigError(
                f"experts.predictor is {self.predictor!r}, but the policy {self.policy!r} asks for no predictions; leave one of them out"
            )
        if self.dual_batch is None and not self.regroup:
            raise ConfigError(
                "experts.regroup is False, but without experts.dual_batch nothing is regrouped; leave it out"
            )
        if self.dual_batch is not None and self.regroup and (not self.is_told or self.predictor in _NOT_AHEAD):
            name = f"policy {self.policy!r}" if not self.is_told else f"predictor {self.predictor!r}"
            raise ConfigError(
                f"experts.dual_batch regroups requests by predicted routes of all layers, which the {name} does not bring; give the file "
                "of a fitted predictor (anabranch experts fit-predictor), or set experts.regroup=false"
            )

    def check_budget(self, has_budget: bool) -> None:
        """Raise ConfigError if anything is said here where all experts are resident."""
        said = _first_said(self)
        if not has_budget and said is not None:
            raise ConfigError(
                f"experts.{said} is {getattr(self, said)!r}, but no expert_budget is set, so all experts are in memory; set both or none"
            )


# That say nothing of a step before it runs.
_NOT_AHEAD = (NONE, "slp", "router_lookahead")


def _first_said(config: Any) -> str | None:
    """The first field that is not as it is by default."""
    plain = ExpertsConfig()
    names = plain.__dataclass_fields__
    return next((name for name in names if getattr(config, name) != getattr(plain, name)), None)

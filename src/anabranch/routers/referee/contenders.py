"""What a verdict compares with the best single model: strategies at their own setting, along their knobs, and other single models."""

from typing import TYPE_CHECKING

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.referee.baselines import Baseline, single
from anabranch.routers.referee.judging import Contender, compared

if TYPE_CHECKING:
    from anabranch.routers.referee.evaluate import Trial


def own_setting(trial: "Trial", best: Baseline) -> Contender:
    """A strategy as it was given."""
    cost_N = None if best.cost_N is None else trial.cost_N
    return compared("strategy", trial.name, trial.quality_N, cost_N, best.quality_N, best.cost_N)


def sequences_of(trial: "Trial", best: Baseline) -> list[list[Contender]]:
    """A strategy's own setting, and those of its knob from dear to cheap, unless its own is among them."""
    knob = trial.strategy.knob
    own = None if knob is None else getattr(trial.strategy.config, knob, None)
    along = [
        compared("strategy", trial.name, quality_N, cost_N, best.quality_N, best.cost_N, setting)
        for setting, quality_N, cost_N in trial.settings
    ]
    alone = [] if own in [one.setting for one in along] else [[own_setting(trial, best)]]
    return [*alone, along] if along else alone


def other_models(best: Baseline, test: Recorded) -> list[list[Contender]]:
    """Each model but the best single one."""
    found = []
    for model in test.models:
        if model != best.facts["model"]:
            one = single(test, model)
            found.append([compared("model", model, one.quality_N, one.cost_N, best.quality_N, best.cost_N)])
    return found

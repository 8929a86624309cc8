"""What an engine may be told about its experts, and what contradicts itself."""

import pytest

from anabranch.config import override
from anabranch.errors import ConfigError
from anabranch.serving.config import ServingConfig
from anabranch.serving.expertflow.policy import POLICIES
from anabranch.serving.expertflow.predictors import PREDICTORS
from anabranch.serving.experts import ExpertsConfig
from anabranch.serving.http.serve import ServeConfig


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_are_those_that_there_are_and_ask_for_predictions_as_they_do(policy):
    assert ExpertsConfig(policy=policy).is_told == POLICIES[policy].needs_reference


@pytest.mark.parametrize("name", [*PREDICTORS, "none"])
def test_dual_batches_are_regrouped_by_predictors_that_know_a_step(name):
    knows = name in PREDICTORS and PREDICTORS[name].knows_steps
    ExpertsConfig(predictor=name, dual_batch=2, regroup=False)
    if knows:
        assert ExpertsConfig(predictor=name, dual_batch=2).regroup
    else:
        with pytest.raises(ConfigError, match=f"the predictor '{name}' does not bring"):
            ExpertsConfig(predictor=name, dual_batch=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "lru", "predictor": "tlp"}, "'lru' asks for no predictions"),
        ({"policy": "lru", "dual_batch": 2}, "the policy 'lru' does not bring"),
        ({"regroup": False}, "without experts.dual_batch nothing is regrouped"),
        ({"policy": "mru"}, "policy"),
        ({"least": 0}, "least"),
        ({"extra": -1}, "extra"),
        ({"workers": 0}, "workers"),
        ({"dual_batch": 0}, "dual_batch"),
    ],
)
def test_what_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ExpertsConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"predictor": "tlp"},
        {"policy": "lru"},
        {"least": 0.5},
        {"extra": 2},
        {"drop_cache": True},
        {"workers": 1},
        {"predictor": "tlp", "dual_batch": 2},
    ],
)
def test_without_a_budget_nothing_can_be_said_of_experts(fields):
    with pytest.raises(ConfigError, match=f"experts.{next(iter(fields))} is .* no expert_budget"):
        ServingConfig(model="m", experts=ExpertsConfig(**fields))
    assert ServingConfig(model="m", experts=ExpertsConfig(**fields), expert_budget="1MiB").expert_budget == "1MiB"
    # Which may mean a budget.
    assert ServingConfig(model="m", experts=ExpertsConfig(**fields), memory="8GiB").memory == "8GiB"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_seqs": 4}, "at most max_seqs=4 requests"),
        ({"scheduling": "async"}, "leave scheduling='async' out"),
        ({"nano_batches": True}, "leave nano_batches out"),
    ],
)
def test_dual_batches_need_steps_that_are_formed_one_by_one(fields, message):
    experts = ExpertsConfig(dual_batch=4, predictor="tlp")
    with pytest.raises(ConfigError, match=message):
        ServingConfig(model="m", expert_budget="1MiB", experts=experts, **fields)
    assert not ServingConfig(model="m", expert_budget="1MiB", experts=experts, device="cuda").is_async
    assert ServingConfig(model="m", expert_budget="1MiB", device="cuda").is_async


def test_every_field_has_a_path_on_the_command_line():
    paths = {"engine.expert_budget": "1MiB", "engine.experts.policy": "lfu", "engine.experts.workers": 1}
    engine = override(ServeConfig(), paths).engine
    assert (engine.experts.policy, engine.experts.workers) == ("lfu", 1)


def test_a_group_of_devices_takes_none_of_it():
    engine = ServingConfig(model="m", expert_budget="1MiB")
    with pytest.raises(ConfigError, match=r"engine\.expert_budget is for one engine"):
        ServeConfig(engine=engine, devices=2)

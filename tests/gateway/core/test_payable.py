"""Models of which nobody knows what they cost, where money is limited."""

import pytest

from anabranch.gateway.asked import Asked
from anabranch.gateway.config import DeploymentConfig, LimitsConfig
from anabranch.gateway.core.payable import payable, refusal
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.runtime import Runtime
from anabranch.routers.contract.query import Candidate
from anabranch.web.api_error import ApiError
from gateway_states import config, model, run


def unpriced(name):
    provider = OpenAI.Config(model=name, base_url="http://127.0.0.1:9/v1", key_env=None)
    return model(name).replace(price=None, deployments=(DeploymentConfig(provider=provider),))


def told(is_limited, asked=None, names=("dark", "small"), **limits):
    runtime = Runtime(config(unpriced("dark"), model("small"), limits=LimitsConfig(**limits)))
    questions = []

    async def ask():
        questions.append(1)
        return is_limited

    async def work():
        return await payable(runtime, asked or Asked(), [Candidate(model=name, score=0) for name in names], ask)

    try:
        return [one.model for one in run(work)], len(questions)
    except ApiError as error:
        return error.code, len(questions)


def test_what_has_no_price_is_left_out_where_money_is_limited():
    assert told(True) == (["small"], 1)
    assert told(False) == (["dark", "small"], 1)
    # Where all have a price, nobody asks the store.
    assert told(True, names=("small",)) == (["small"], 0)
    assert told(True, names=("dark",)) == ("model_not_priced", 1)
    assert told(True, names=("dark",), allow_unpriced=True) == (["dark"], 0)


def test_what_is_asked_for_must_have_a_price_whether_or_not_money_is_limited():
    assert told(False, Asked(searches=2), names=("small",)) == ("unpriced", 0)
    assert told(False, Asked(searches=2)) == (["dark"], 1)


@pytest.mark.parametrize("name", ["nobody", "small"])
def test_a_model_that_is_not_there_is_refused_elsewhere(name):
    async def work():
        return await refusal(Runtime(config()), name, Asked(), None)

    assert run(work) is None

"""Requests for pictures and moderation that name no model: OpenAI's clients may leave it out."""

import asyncio

import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.config.default_models import KINDS, default_model
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.runtime import Runtime
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from gateway_process import call
from gateway_scripted import fronted, model, scripted, whole

openai = pytest.importorskip("openai")
FLAGGED = {"id": "m", "model": "x", "results": [{"flagged": True, "categories": {}, "category_scores": {}}]}
PICTURE = {"created": 1, "data": [{"b64_json": "AAAA"}]}


def made(name, upstream=None, **fields):
    provider = OpenAI.Config(model=upstream or name, base_url="http://127.0.0.1:9/v1", key_env=None)
    return ModelConfig(name=name, deployments=(DeploymentConfig(provider=provider),), **fields)


CHAT, JUDGE, PAINTER = made("chat"), made("judge", "omni-moderation-latest"), made("gpt-image-1")


@pytest.mark.parametrize(
    ("models", "fields", "moderations", "images"),
    [
        ((CHAT, JUDGE, PAINTER), {}, "judge", "gpt-image-1"),
        ((CHAT,), {}, None, None),
        ((CHAT, JUDGE, made("text-moderation-stable")), {}, None, None),
        ((CHAT, JUDGE, made("text-moderation-stable")), {"moderations": "judge", "images": "chat"}, "judge", "chat"),
        # A price of pictures says what a name does not.
        ((CHAT, made("painter", price=Price(image_output=40))), {}, None, "painter"),
        # One that runs where there is no such endpoint is none.
        ((CHAT, ModelConfig(name="dall-e-2", deployments=(DeploymentConfig(provider=Mock.Config()),))), {}, None, None),
    ],
)
def test_which_model_is_meant(models, fields, moderations, images):
    config = GatewayConfig(models=models, default_models=fields)
    for endpoint, name in (("moderations", moderations), ("images", images), ("image_edits", images)):
        if name is not None:
            assert default_model(config, endpoint) == name
            continue
        with pytest.raises(InputError, match=r"model is missing, .*; name one, or set default_models\.\w+"):
            default_model(config, endpoint)


def test_what_a_key_may_not_use_is_neither_meant_nor_told():
    config = GatewayConfig(models=(CHAT, JUDGE, made("text-moderation-stable")))
    assert default_model(config, "moderations", lambda name: name != "judge") == "text-moderation-stable"
    with pytest.raises(InputError) as caught:
        default_model(config, "moderations", lambda name: name == "chat")
    assert "judge" not in str(caught.value)


def test_a_default_that_leads_nowhere_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r"default_models\.images is 'gpt', which is no name of a model"):
        GatewayConfig(models=(CHAT,), default_models={"images": "gpt"})
    with pytest.raises(ConfigError, match="default_models has 'speech'; it may have moderations and images"):
        GatewayConfig(models=(CHAT,), default_models={"speech": "chat"})
    assert KINDS == ("moderations", "images")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", [Mock.Config(model="x"), Anthropic.Config(model="x", key_env=None)])
def test_a_default_that_its_provider_cannot_be_asked_for_is_an_error_of_the_config(kind, provider):
    small = ModelConfig(name="small", deployments=(DeploymentConfig(provider=provider),))
    with pytest.raises(
        ConfigError, match=rf"default_models\.{kind} is 'small', and {kind} cannot be asked of \w+; name a model"
    ):
        Runtime(GatewayConfig(models=(small,), default_models={kind: "small"}))
    mixed = small.replace(deployments=(*small.deployments, *CHAT.deployments))
    assert Runtime(GatewayConfig(models=(mixed,), default_models={kind: "small"})).models


@pytest.mark.parametrize(
    ("allowed", "meant"), [(("painter",), "painter"), (("painter", "dear"), "dear"), (("chat",), None)]
)
def test_a_key_that_may_not_use_the_default_means_the_only_one_that_it_may(allowed, meant):
    painter = made("painter", "flux")
    config = GatewayConfig(models=(CHAT, painter, made("dear", "gpt-image-1")), default_models={"images": "dear"})
    if meant is not None:
        assert default_model(config, "images", lambda name: name in allowed) == meant
        return
    with pytest.raises(InputError, match="model is missing, and of the models here none that is known") as caught:
        default_model(config, "images", lambda name: name in allowed)
    assert "dear" not in str(caught.value)


def test_the_body_of_who_asks_is_left_as_it_is(tmp_path):
    body = {"input": "hello"}

    async def main():
        config = GatewayConfig(models=(CHAT,), store=str(tmp_path / "g.db"), require_key=False)
        async with Gateway(config) as gateway:
            with pytest.raises(ApiError, match="model is missing"):
                await gateway.handle("moderations", body)

    asyncio.run(main())
    assert body == {"input": "hello"}


def test_the_official_client_need_not_name_one(tmp_path):
    answers = {"judge": whole(FLAGGED), "painter": whole(PICTURE)}
    with scripted(answers) as url:
        models = [
            model("judge", "openai", url, "omni-moderation-latest", key_env=""),
            model("painter", "openai", url, "a-model", key_env=""),
        ]
        for one in models:
            one["price"] = {"input_usd": 1, "output_usd": 1}
        with fronted(tmp_path, models, {}, default_models={"images": "painter"}) as running:
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
                raw = client.moderations.with_raw_response.create(input="hello")
                assert (raw.parse().results[0].flagged, raw.headers["x-route-model"]) == (True, "judge")
                raw = client.images.with_raw_response.generate(prompt="a river")
                assert (raw.parse().data[0].b64_json, raw.headers["x-route-model"]) == ("AAAA", "painter")
                assert client.images.edit(prompt="a river", image=("a.png", b"\x89PNG--")).data[0].b64_json == "AAAA"
            # What has no default needs a model as before, and a name that is no text is one.
            for path, body in (
                ("/v1/rerank", {"query": "a", "documents": ["b"]}),
                ("/v1/moderations", {"model": 5, "input": "hello"}),
            ):
                status, told, _ = call(running.url, "POST", path, body)
                assert (status, told["error"]["param"]) == (400, "model")

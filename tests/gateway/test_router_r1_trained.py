"""A router that was trained, behind a real gateway: its checkpoint in the gateway's engine, the world's models as providers."""

import json

import pytest

from anabranch.rl.router_r1 import load_router, router_training, warm_model, warm_up
from anabranch.rl.tokens import Drawn
from anabranch.train import TaskContext, Trainer
from gateway_process import served
from gateway_scripted import scripted, whole
from rl_router_small import SMALL

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

# One relation and two models, so that the language is learned in seconds; to copy takes longer, and is not needed here.
LEARNED = SMALL | {
    "task.world.entities": 8,
    "task.world.relations": 1,
    "task.world.experts": 1,
    "task.world.reading": 0.0,
    "task.model.dim": 48,
    "task.model.num_layers": 2,
    "task.model.attention.num_heads": 3,
    "task.model.feed_forward.hidden_dim": 96,
    "task.questions": 16,
    "warm.traces": 2048,
    "warm.batch_size": 32,
    "warm.steps": 200,
    "warm.learning_rate": 3e-3,
}
ASKS = "Somebody who is putting an answer together"


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    out = tmp_path_factory.mktemp("router") / "run"
    made = router_training("router-r1", samples=64, settings=LEARNED)
    assert warm_up(made.warm, out).status == "finished"
    trainer = Trainer(made.run, out, model=warm_model(out))
    try:
        trainer.fit()
    finally:
        trainer.stream.close()
    return out


@pytest.fixture(scope="module")
def gateway(router, tmp_path_factory):
    """The router, and the world's models by the names of one episode."""
    world = load_router(router).task.world
    names = world.names(0)

    def model_of(name):
        def says(body):
            text = body["messages"][-1]["content"]
            reply = world.facts.reply(names[name], text.splitlines()[-1] if ASKS in text else text)
            usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
            message = {"role": "assistant", "content": reply.text}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            head = {"id": "c", "created": 1, "model": name, "object": "chat.completion"}
            return whole(head | {"choices": [choice], "usage": usage | {"total_tokens": sum(usage.values())}})

        return says

    folder = tmp_path_factory.mktemp("gateway")
    engine = '{ dtype = "float32", num_blocks = 200, threads = 1 }'
    with scripted({name: model_of(name) for name in names}) as url:
        models = [
            f'[[models]]\nname = "router"\ndeployments = [{{ provider = {{ kind = "local", model = "{router}", engine = {engine} }} }}]'
        ]
        models += [
            f'[[models]]\nname = "{name}"\nprice = {{ input_usd = 0, output_usd = {world.facts.prices[model]} }}\n'
            f'deployments = [{{ provider = {{ kind = "openai", model = "m", base_url = "{url}/{name}", key_env = "" }} }}]'
            for name, model in names.items()
        ]
        strategy = {**world.strategy(), "policy": "router"}
        lines = ["[strategies.router-r1]", *(f"{name} = {json.dumps(value)}" for name, value in strategy.items())]
        lines += [
            "[strategies.router-r1.about]",
            *(f"{name} = {json.dumps(world.facts.about(model))}" for name, model in names.items()),
        ]
        config = folder / "gateway.toml"
        config.write_text("\n".join(["require_key = false", *models, *lines]) + "\n")
        with served("--config", str(config)) as running:
            yield running.url, world


def test_a_trained_router_does_behind_the_front_door_what_it_did_in_training(gateway, router):
    url, world = gateway
    learned = load_router(router)
    stream = learned.task.training_data(TaskContext(learned.config.train, 1))
    learned.task._policy = learned.model
    count = world.num_tests
    drawn = Drawn(temperature=0.0, turn_tokens=world.turn_tokens)
    played = stream.play(list(range(count)), [0] * count, drawn, split="test")
    stream.close()
    answered = 0
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for number, trajectory in enumerate(played):
            answer = trajectory.outcome.facts.answer
            asked = world.facts.question(number, "test").text
            found = client.chat.completions.create(
                model="auto/router-r1", messages=[{"role": "user", "content": asked}]
            )
            if answer:
                answered += 1
                assert found.choices[0].message.content == answer
                # It was asked turn by turn, and models between them.
                assert found.usage.completion_tokens > sum(trajectory.own) - 2 * trajectory.turns
            else:
                # A model was asked directly.
                assert found.choices[0].message.content
    # It is a router that was taught for seconds: what it gave in training is compared, however often that was.
    assert answered >= 1

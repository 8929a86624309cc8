"""A model of our engine in the gateway's process: what its config may say, what the engine's errors mean, and how long it lives."""

import ast
import asyncio
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    HedgeConfig,
    ModelConfig,
    StrategyConfig,
    load_config,
)
from anabranch.gateway.config.needs import inside, lacking
from anabranch.gateway.core.call_bodies import CallBodies
from anabranch.gateway.dispatch.breaker import Breaker
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers import local, local_engines
from anabranch.gateway.providers.local import Local
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import HttpCall, UpstreamError, UpstreamRequest, read_all
from anabranch.gateway.providers.recorded import Record
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.money import Price
from anabranch.testing import check_provider
from anabranch.web.api_error import ApiError
from serving_models import saved_moe
from waiting import until_async

ENGINE = {"dtype": "float32", "num_blocks": 200, "threads": 1}
ASKED = [{"role": "user", "content": "hello"}]


def provider(**fields):
    return Local.Config(**{"model": saved_moe(), "engine": ENGINE, **fields})


def model(name, *made, **fields):
    deployments = tuple(DeploymentConfig(provider=one) for one in made)
    return ModelConfig(name=name, deployments=deployments, **fields)


def config(tmp_path, *models, **fields):
    return GatewayConfig(
        models=models,
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        store=str(tmp_path / "g.db"),
        require_key=False,
        **fields,
    )


def engines():
    """Threads of engines in this process."""
    return sum(thread.name == "anabranch-engine" for thread in threading.enumerate())


# What a config may say


def written(tmp_path, text):
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[[models]]\nname = "a"\n[[models.deployments]]\n[models.deployments.provider]\nkind = "local"\n{text}\n'
    )
    return path


def test_the_path_is_relative_to_the_config_and_options_are_those_of_serve(tmp_path):
    (tmp_path / "here").symlink_to(saved_moe())
    path = written(
        tmp_path, 'model = "here"\nengine = { memory = "4GiB", quantize = "int8" }\nadmission = { max_queued = 3 }'
    )
    [(name, field, found)] = inside(load_config(path, reads_models=True))
    made = found.inside()
    assert field == "models.0.deployments.0.provider"
    assert (name, found.model) == ("a", str(tmp_path / "here"))
    assert (made.engine.memory, made.engine.quantize, made.engine.process) == ("4GiB", "int8", False)
    assert (made.admission.max_queued, made.http.name) == (3, "here")
    assert provider(engine={"process": True}).inside().engine.process


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('model = "nowhere"', 6, r"provider\.model is '.*nowhere', and there is no such file or folder"),
        ('model = ""', 6, r"provider\.model is ''; give the folder or file of a model"),
        ('model = "x"\n\nengine = { quantize = "int5" }', 8, r"provider\.engine\.quantize is 'int5'"),
        ('model = "x"\nengine = { quantise = "int8" }', 7, r"no field 'quantise'; did you mean 'quantize'"),
        ('model = "x"\nengine = { model = "y" }', 7, "the model's path is the provider's own field model"),
        ('model = "x"\nengine = { memory = "much" }', 7, r"provider\.engine\.memory is 'much'"),
        ('model = "x"\nadmission = { max_queued = 0 }', 7, r"provider\.admission\.max_queued is 0"),
        ('model = "x"\ntool_format = "morse"', 7, r"provider\.tool_format is 'morse'"),
        ('model = "x"\nengine = { disk_kv = "1GiB" }', 7, "disk_kv is set, but host_kv is not"),
        ('model = "x"\nbase_url = "http://x"', 7, "no field 'base_url'"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, text, line, says):
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(written(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'gateway.toml'}:{line}: models.0.deployments.0.provider")


def test_a_folder_without_a_model_is_told_where_files_are_looked_into(tmp_path):
    (tmp_path / "empty").mkdir()
    path = written(tmp_path, 'model = "empty"')
    assert load_config(path).models
    with pytest.raises(ConfigError, match=r"gateway.toml:\d+: models.0.deployments.0.provider: no model in .*empty"):
        load_config(path, reads_models=True)


def test_without_the_extra_the_pip_command_is_told(tmp_path, monkeypatch):
    path = written(tmp_path, f'model = "{saved_moe()}"')
    found = load_config(path)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ConfigError, match=r"gateway.toml:\d+: .*kind = \"local\" needs llguidance; pip install 'anabranch\[serve\]'"
    ):
        load_config(path)
    assert lacking(found) == ["the provider local (of model a) needs llguidance; pip install 'anabranch[serve]'"]


# What is asked and answered


def test_it_keeps_the_contract_of_providers():
    answer = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
    check_provider(provider(), answer=json.dumps(answer).encode(), text="hi")


def test_a_call_has_the_engines_name_of_the_model_and_nothing_that_others_know():
    made = provider().build()
    request = UpstreamRequest(
        "chat",
        {"model": "a", "messages": [{"role": "user", "content": "x"}], "top_k": 3, "stream": True},
        is_foreign=True,
    )
    sent = json.loads(made.build(request).body)
    assert sent["model"] == "small-moe"
    assert "top_k" not in sent
    assert sent["stream_options"] == {"include_usage": True}
    assert json.loads(provider(engine={"name": "smol"}).build().build(request).body)["model"] == "smol"
    with pytest.raises(UpstreamError, match="moderations cannot be asked"):
        made.build(UpstreamRequest("moderations", {"input": "x"}))


def test_an_end_that_the_gateway_adds_is_no_wish_of_the_senders():
    made = provider().build()
    asked = UpstreamRequest("chat", {"model": "a", "messages": ASKED})
    call = made.build(asked.bounded(5000))
    assert ("max_tokens" in json.loads(call.body), dict(call.headers)) == (False, {"x-default-tokens": "5000"})
    own = made.build(UpstreamRequest("chat", {"model": "a", "messages": ASKED, "max_tokens": 7}).bounded(5000))
    assert (json.loads(own.body)["max_tokens"], dict(own.headers)) == (7, {})


@pytest.mark.parametrize(
    ("status", "code", "kind", "told", "says"),
    [
        (429, "overloaded", "busy", 429, "rate_limit_exceeded"),
        (503, "busy", "busy", 503, "busy"),
        (503, "loading", "busy", 503, "loading"),
        (500, "request_failed", "excess", 502, "request_failed"),
        (500, "engine_failed", "server", 502, "engine_failed"),
        (503, "failed", "server", 502, "failed"),
        (501, "not_supported", "unsupported", 400, "not_supported"),
        (400, "context_length_exceeded", "context", 400, "context_length_exceeded"),
        (400, "invalid_value", "request", 400, "invalid_value"),
    ],
)
def test_what_the_engine_says_is_a_failure_of_the_gateways(status, code, kind, told, says):
    body = ApiError(status, code, "so it is", headers={}).to_dict()
    failure = provider().build().error(status, {"retry-after": "7"}, json.dumps(body).encode())
    error = UpstreamError(failure)
    assert (failure.kind, failure.retry_after_s, error.status, error.to_dict()["error"]["code"]) == (
        kind,
        7,
        told,
        says,
    )


def test_before_it_is_loaded_it_says_so():
    made = provider().build()
    with pytest.raises(UpstreamError, match="being loaded") as caught:
        asyncio.run(made.transport(None).open(HttpCall("/chat/completions", {}, b"{}")))
    assert (caught.value.status, caught.value.failure.kind) == (503, "busy")
    asyncio.run(made.close())


# A gateway with it


def test_deployments_a_reload_and_who_looks_on_share_one_engine_and_the_last_ends_it(tmp_path):
    recorded = Record.Config(provider=provider(), path=str(tmp_path / "log.jsonl"))
    old = config(
        tmp_path, model("a", provider(), recorded), model("b", provider(), price=Price(input=10**9, output=10**9))
    )
    other = config(tmp_path, model("a", provider(engine={**ENGINE, "max_positions": 64})), model("c", Mock.Config()))

    async def work():
        async with Gateway(old) as gateway:
            assert engines() == 1
            ask = {"messages": ASKED, "max_tokens": 2, "temperature": 0}
            first = await gateway.achat({"model": "a", **ask})
            assert [first["model"], first["usage"]["completion_tokens"]] == ["small-moe", 2]
            assert (await gateway.achat({"model": "b", **ask}))["choices"] == first["choices"]
            await gateway.reload(old.replace(deadline_s=60))
            assert engines() == 1
            assert (await gateway.achat({"model": "a", **ask}))["choices"] == first["choices"]
            stream = await gateway.achat({"model": "a", **ask, "max_tokens": 200, "stream": True})
            await anext(stream)
            await gateway.reload(other)
            # The old one answers to its end.
            assert engines() == 2
            chunks = [chunk async for chunk in stream]
            assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
            await until_async(lambda: engines() == 1 and gateway.runtime.models["a"].context == 64)
            # It knows how far its model reads, and so how long an answer may be that names no end.
            assert gateway.runtime.counters["a"]("hello") == 5
            answer = await gateway.achat({"model": "a", "messages": ASKED})
            assert answer["choices"][0]["finish_reason"] in ("stop", "length")
            with pytest.raises(
                ConfigError, match=r"^models\.0\.deployments\.0\.provider: deployment a cannot start: kv_memory is 1KiB"
            ):
                await gateway.reload(
                    config(tmp_path, model("a", provider(engine={"kv_memory": "1KiB", "block_tokens": 64})))
                )
            assert engines() == 1
            assert (await gateway.achat({"model": "a", "messages": ASKED, "max_tokens": 1}))["choices"]
            await gateway.settled()
            costs = {(row.model, row.cost_nano > 0) for row in await gateway.store.ledger(LedgerQuery(limit=50))}
            assert {("a", False), ("b", True)} <= costs
        assert engines() == 0

    asyncio.run(work())


def test_one_that_is_full_sends_on_to_another_deployment(tmp_path):
    full = provider(admission={"max_in_flight": 1})
    dear = DeploymentConfig(provider=Mock.Config(reply="elsewhere"), price=Price(input=10**9, output=10**9))
    deployments = (DeploymentConfig(provider=full), dear)
    alone = model("b", full)
    both = config(tmp_path, ModelConfig(name="a", deployments=deployments, balance="price"), alone)

    async def work():
        async with Gateway(both) as gateway:
            ask = {"model": "a", "messages": ASKED}
            held = await gateway.achat({**ask, "stream": True, "max_tokens": 1500, "logit_bias": {"256": -100}})
            await anext(held)
            live = gateway.runtime.dispatcher.lives()[0]
            # Asked again it would say the same.
            with pytest.raises(ApiError, match="in flight") as caught:
                await gateway.achat({**ask, "model": "b"})
            assert caught.value.status == 429
            await gateway.settled()
            [row] = await gateway.store.ledger(LedgerQuery(status="error"))
            assert (row.requested, row.attempts) == ("b", 1)
            for _ in range(8):
                answer = await gateway.achat({**ask, "max_tokens": 2})
                assert answer["choices"][0]["message"]["content"].startswith("elsewhere")
            assert (live.breaker.phase, live.rests_until) == ("closed", 0.0)
            await held.aclose()

    asyncio.run(work())


def test_a_path_spelled_otherwise_is_the_same_model(tmp_path):
    (tmp_path / "small-moe").symlink_to(saved_moe())
    (tmp_path / "other").symlink_to(saved_moe())
    made = [
        provider(model=str(tmp_path / name)) for name in ("small-moe", "../" + tmp_path.name + "/small-moe", "other")
    ]

    async def work():
        async with Gateway(config(tmp_path, *(model(f"m{at}", one) for at, one in enumerate(made)))) as gateway:
            # What answers call it differs.
            assert engines() == 2
            for at, name in enumerate(("small-moe", "small-moe", "other")):
                answer = await gateway.achat({"model": f"m{at}", "messages": ASKED, "max_tokens": 1})
                assert answer["model"] == name

    asyncio.run(work())


def test_a_gateway_whose_model_cannot_be_loaded_ends_with_the_reason_and_leaves_nothing(tmp_path):
    broken = provider(engine={"kv_memory": "1KiB", "block_tokens": 64})

    async def work():
        gateway = Gateway(config(tmp_path, model("good", provider()), model("bad", broken)))
        with pytest.raises(ConfigError, match=r"^models\.1\.deployments\.0\.provider: deployment bad cannot start"):
            await gateway.start()
        assert not gateway.is_started
        assert engines() == 0

    asyncio.run(work())


def test_what_nobody_waits_for_is_not_read_on_though_it_has_a_price(tmp_path):
    priced = model("a", provider(engine={**ENGINE, "max_seqs": 1}), price=Price(input=10**9, output=10**9))

    async def work():
        async with Gateway(config(tmp_path, priced)) as gateway:
            [live] = gateway.runtime.dispatcher.lives()
            frontend = live.provider._lent.inside.frontend
            task = asyncio.create_task(gateway.achat({"model": "a", "messages": ASKED, "max_tokens": 1500}))
            while not frontend.admission.in_flight:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while frontend.admission.in_flight:
                await asyncio.sleep(0.001)
            await gateway.settled()
            assert not gateway.runtime.dispatcher.late
            assert live.breaker.counts == ()
            [row] = await gateway.store.ledger(LedgerQuery())
            assert row.completion_tokens < 1500

    asyncio.run(work())


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 40
PRICE = Price(input=10**9, output=2 * 10**9)


@pytest.mark.parametrize("price", [PRICE, None])
@pytest.mark.parametrize("how", ["whole", "stream", "waits", "deadline"])
def test_what_is_given_up_is_charged_what_the_engine_made_of_it(tmp_path, how, price):
    more = {"deadline_s": 0.2} if how == "deadline" else {}
    one = model("a", provider(engine={**ENGINE, "max_seqs": 1}), price=price, **more)
    ask = {"model": "a", "messages": ASKED, "tools": TOOLS, "max_tokens": 1300, "logit_bias": {"256": -100}}

    async def work():
        async with Gateway(config(tmp_path, one)) as gateway:
            [live] = gateway.runtime.dispatcher.lives()
            frontend = live.provider._lent.inside.frontend
            if how == "deadline":
                with pytest.raises(ApiError, match="is up"):
                    await gateway.achat(ask)
            elif how == "stream":
                stream = await gateway.achat({**ask, "stream": True})
                for _ in range(5):
                    await anext(stream)
                await stream.aclose()
            else:
                # Of a stream too before its first token.
                task = asyncio.create_task(gateway.achat({**ask, "stream": how == "waits"}))
                while not frontend.admission.in_flight:
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await gateway.settled()
            [row] = await gateway.store.ledger(LedgerQuery())
            made = frontend.metrics.generation_tokens._value.get()
            assert (row.prompt_tokens, row.completion_tokens, row.is_estimated) == (468, made, False)
            assert row.cost_nano == (0 if price is None else 1000 * 468 + 2000 * made)
            assert made < 1300

    asyncio.run(work())


@pytest.mark.parametrize(
    ("ask", "least"),
    [
        ({"model": "a", "messages": ASKED, "tools": TOOLS}, 300),
        ({"model": "a", "messages": TURNS}, 400),
        ({"model": "auto/cheapest", "messages": ASKED, "tools": TOOLS}, 300),
        # One that fails before it: each attempt is paid for.
        ({"model": "first", "messages": ASKED, "tools": TOOLS}, 300),
        # A deployment elsewhere beside that of the engine.
        ({"model": "both", "messages": ASKED, "tools": TOOLS}, 300),
    ],
)
def test_what_is_reserved_is_what_the_engine_reads_and_not_less(tmp_path, ask, least):
    failing = DeploymentConfig(provider=Mock.Config(fails=1.0), price=Price(input=1, output=1))
    both = (DeploymentConfig(provider=provider(), price=PRICE), DeploymentConfig(provider=Mock.Config(), weight=1e-9))
    models = (
        model("a", provider(), price=PRICE),
        ModelConfig(name="first", deployments=(failing,)),
        ModelConfig(name="both", deployments=both, price=PRICE),
    )

    async def work():
        async with Gateway(config(tmp_path, *models, fallbacks={"first": ("a",)})) as gateway:
            usage = (await gateway.achat({**ask, "max_tokens": 1}))["usage"]
            await gateway.settled()
            [row] = await gateway.store.ledger(LedgerQuery())
            assert usage["prompt_tokens"] > least
            assert row.cost_nano == 1000 * usage["prompt_tokens"] + 2000 * usage["completion_tokens"]
            assert row.reserved_nano >= row.cost_nano
            if ask["model"] == "a":
                assert row.reserved_nano == 1000 * usage["prompt_tokens"] + 2000

    asyncio.run(work())


def test_what_a_strategy_asks_of_an_engine_is_paid_for_as_the_engine_reads_it(tmp_path):
    async def work():
        async with Gateway(config(tmp_path, model("a", provider(), price=PRICE))) as gateway:
            body = {"model": "a", "messages": TURNS, "max_tokens": 1}
            looked = await CallBodies(gateway.runtime, "key:k").look(body)
            said = (await gateway.achat(body))["usage"]["prompt_tokens"]
            assert (looked.count.tokens, looked.count.at_most, looked.count.is_estimate) == (said, said, False)
            # Where the engine has no time to say, it is the most that it can read.
            [live] = gateway.runtime.dispatcher.lives()
            live.provider._lent.inside.frontend.drain()
            looked = await CallBodies(gateway.runtime, "key:k").look(body)
            assert looked.count.at_most == live.provider.context == 2048

    asyncio.run(work())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("chat", {"messages": TURNS, "tools": TOOLS}),
        ("completions", {"prompt": ["one", "three"]}),
        ("embeddings", {"input": ["one", "three"]}),
    ],
)
def test_an_engine_counts_what_it_will_say(tmp_path, kind, body):
    async def work():
        async with Gateway(config(tmp_path, model("a", provider()))) as gateway:
            [live] = gateway.runtime.dispatcher.lives()
            call = live.provider.build(UpstreamRequest(kind, {"model": "a", **body}))
            reply = await live.provider.ask(call)
            usage = json.loads(await reply.read_some())["usage"]
            assert await live.provider.prompt_tokens(call) == usage["prompt_tokens"]
            # It would refuse this.
            call = live.provider.build(UpstreamRequest(kind, {"model": "a", "messages": 5, "prompt": 5, "input": 5}))
            assert await live.provider.prompt_tokens(call) is None

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_for_room_says_nothing_of_its_deployment(tmp_path, stream):
    """It was read as half an answer, and an event behind that: garbage, which is held against the deployment."""

    async def work():
        async with Gateway(config(tmp_path, model("a", provider()))) as gateway:
            [live] = gateway.runtime.dispatcher.lives()
            fields = {"prompt": "one two three " * 20, "echo": True, "logprobs": 20, "max_tokens": 1, "stream": stream}
            reply = await live.provider.ask(
                live.provider.build(UpstreamRequest("completions", {"model": "a", **fields}))
            )
            inside = live.provider._lent.inside
            await until_async(lambda: inside.frontend.answers._read)
            next(iter(inside.frontend.answers._read)).cut_off()
            with pytest.raises(UpstreamError) as caught:
                await read_all(reply)
            failure = caught.value.failure
            assert (failure.kind, failure.status, failure.retry_after_s) == ("busy", 429, 1.0)
            assert "others need the room" in failure.message

    asyncio.run(work())


def test_other_models_answer_while_one_is_loaded(tmp_path, monkeypatch):
    both = config(tmp_path, model("a", provider()), model("b", Mock.Config(reply="yes")))
    goes_on = asyncio.Event()
    start = Local.start

    async def slow(self):
        await goes_on.wait()
        await start(self)

    monkeypatch.setattr(Local, "start", slow)

    async def work():
        gateway = Gateway(both)
        await gateway.start(loads=False)
        loading = asyncio.create_task(gateway.load())
        await asyncio.sleep(0)
        assert (await gateway.achat({"model": "b", "messages": ASKED}))["choices"]
        with pytest.raises(ApiError, match="being loaded") as caught:
            await gateway.achat({"model": "a", "messages": ASKED})
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "2")
        assert not gateway.is_loaded
        goes_on.set()
        await loading
        assert gateway.is_loaded
        assert (await gateway.achat({"model": "a", "messages": ASKED, "max_tokens": 1}))["choices"]
        await gateway.stop()

    asyncio.run(work())


def test_what_is_found_out_while_a_reload_loads_is_known_after_it(tmp_path, monkeypatch):
    old = config(tmp_path, model("b", Mock.Config()))
    new = config(tmp_path, model("b", Mock.Config()), model("a", provider()))
    loads, goes_on = asyncio.Event(), asyncio.Event()
    start = Local.start

    async def slow(self):
        loads.set()
        await goes_on.wait()
        await start(self)

    monkeypatch.setattr(Local, "start", slow)

    async def work():
        async with Gateway(old) as gateway:
            reload = asyncio.create_task(gateway.reload(new))
            await loads.wait()
            assert gateway.config is old
            gateway.runtime.dispatcher.lives()[0].breaker = Breaker("open", 1, 0.0, 1e12, 1)
            goes_on.set()
            await reload
            assert [live.breaker.phase for live in gateway.runtime.dispatcher.lives()] == ["open", "closed"]

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_hedge_whose_attempts_are_both_on_the_engine_is_paid_for_what_both_made(tmp_path, stream):
    deployments = tuple(DeploymentConfig(provider=provider(), price=PRICE) for _ in range(2))
    both = ModelConfig(name="a", deployments=deployments)
    hedged = config(tmp_path, both, hedge=HedgeConfig(min_s=0.0, samples=1))
    ask = {"model": "a", "messages": ASKED, "max_tokens": 60, "logit_bias": {"256": -100}, "stream": stream}

    async def work():
        async with Gateway(hedged) as gateway:
            assert engines() == 1
            group = gateway.runtime.dispatcher.groups["a"]
            frontend = group.lives[0].provider._lent.inside.frontend
            # Every first token has come at once so far.
            for seen in (group.hedge, group.hedge_whole):
                seen.observe(0.0)
            if stream:
                chunks = [
                    chunk async for chunk in await gateway.achat({**ask, "stream_options": {"include_usage": True}})
                ]
                usage = chunks[-1]["usage"]
            else:
                usage = (await gateway.achat(ask))["usage"]
            await gateway.settled()
            [row] = await gateway.store.ledger(LedgerQuery())
            made = frontend.metrics.generation_tokens._value.get()
            assert (row.attempts, row.status, usage["completion_tokens"]) == (2, "ok", 60)
            assert 60 <= made <= 120
            assert row.cost_nano == 2 * 1000 * usage["prompt_tokens"] + 2000 * made
            assert row.reserved_nano >= row.cost_nano
            # Nothing is left of the one that lost, and nothing is held against it.
            assert frontend.admission.in_flight == 0
            assert [(live.in_flight, live.breaker.phase) for live in group.lives] == [(0, "closed")] * 2

    asyncio.run(work())


def test_once_its_engine_was_given_up_a_gateway_is_not_ready_until_a_reload(tmp_path):
    made = config(tmp_path, model("a", provider()), model("b", Mock.Config()))

    async def work():
        async with Gateway(made) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/ready"

            async def ready():
                async with session.get(url) as answer:
                    return answer.status, await answer.json()

            assert (await ready())[0] == 200
            inside = gateway.runtime.dispatcher.groups["a"].lives[0].provider._lent.inside
            inside.frontend.state = "failed"
            status, told = await ready()
            assert (status, told["error"]["code"]) == (503, "failed")
            assert "the engine of a has died" in told["error"]["message"]
            inside.frontend.state = "ready"
            assert (await ready())[0] == 200
            inside.frontend.state = "failed"
            await gateway.reload(made)
            assert (await ready())[0] == 200
            listener.close()
            await server.shutdown(0.1)

    asyncio.run(work())


def test_who_looks_on_says_too_that_an_engine_was_given_up(tmp_path):
    looking = Record.Config(provider=provider(), path=str(tmp_path / "r.jsonl")).build()
    assert not looking.has_failed
    looking.inner._lent = SimpleNamespace(inside=SimpleNamespace(has_failed=True))
    assert looking.has_failed
    assert not Mock.Config().build().has_failed


def test_nothing_of_the_engine_is_imported_before_a_model_is_named():
    """The import contracts let these two modules alone name `anabranch.serving`; here: not at their top."""
    for module in (local, local_engines):
        tree = ast.parse(Path(module.__file__).read_text())
        named = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [name for name in named if name.startswith(("anabranch.serving", "torch"))]

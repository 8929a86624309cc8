"""Webhooks: one POST for each budget, period and share, signed, over restarts, replicas and receivers that fail."""

import asyncio
import dataclasses
import hashlib
import hmac
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, WebhookConfig, load_config
from anabranch.gateway.config.redact import redacted
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.observe import webhooks
from anabranch.gateway.observe.webhooks import Webhooks, is_public
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import Budget, LedgerRow, alerts, open_store
from anabranch.routers.money import Price
from gateway_process import ask, call, served
from gateway_upstream import noting
from waiting import until, until_async

SECRET = "the-secret-of-the-webhook"
DOLLAR = 10**9


@pytest.fixture(autouse=True)
def _secret(monkeypatch):
    monkeypatch.setenv("TEST_HOOK_SECRET", SECRET)


def hook(url, **fields):
    return WebhookConfig(url=url, secret=Secret("env:TEST_HOOK_SECRET"), **{"private": True, **fields})


async def spend(store, nano, number):
    held = await store.reserve(f"r{number}", ("global", "team:blue"), nano)
    await store.settle(held, LedgerRow(request_id=f"r{number}", team="blue", cost_nano=nano))


def told(upstream):
    return [json.loads(body) for _, body in upstream.seen]


def test_each_share_is_told_once_over_restarts_and_replicas(url):
    with noting() as receiver:

        async def main():
            first, second = open_store(url), open_store(url)
            await first.set_budget("team:blue", DOLLAR, "month")
            hooks = {"ops": hook(receiver.url, shares=(0.5, 1.0))}
            ones = [Webhooks(hooks, lambda: first), Webhooks(hooks, lambda: second)]
            await asyncio.gather(*(one.look() for one in ones))
            assert told(receiver) == []
            await spend(first, DOLLAR // 2, 1)
            await asyncio.gather(*(one.look() for one in ones))
            await asyncio.gather(*(one.look() for one in ones))
            assert [one["share"] for one in told(receiver)] == [0.5]
            await spend(second, DOLLAR // 2, 2)
            await asyncio.gather(*(one.look() for one in ones))
            await first.close()
            # Another process, which remembers nothing.
            await Webhooks(hooks, lambda: second).look()
            await second.close()

        asyncio.run(main())
        found = told(receiver)
        assert [one["share"] for one in found] == [0.5, 1.0]
        assert found[0]["budget"]["subject"] == "team:blue"
        assert (found[0]["budget"]["limit_usd"], found[0]["budget"]["spent_usd"]) == (1.0, 0.5)
        assert len({one["id"] for one in found}) == 2


def test_what_is_sent_is_signed_and_names_itself(tmp_path):
    with noting() as receiver:

        async def main():
            store = open_store(str(tmp_path / "g.db"))
            await store.set_budget("team:blue", DOLLAR)
            await spend(store, DOLLAR, 1)
            await Webhooks({"ops": hook(receiver.url, shares=(1.0,))}, lambda: store).look()
            await store.close()

        asyncio.run(main())
        ((headers, body),) = receiver.seen
    parts = dict(part.split("=") for part in headers["x-anabranch-signature"].split(","))
    expected = hmac.new(SECRET.encode(), parts["t"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert parts["v1"] == expected
    assert headers["x-anabranch-id"] == json.loads(body)["id"]
    assert headers["content-type"] == "application/json"


def test_a_receiver_that_fails_is_tried_again_later_and_given_up_in_the_end(tmp_path, caplog):
    now = [1_000_000.0]
    with noting() as receiver:
        receiver.failing = [500, 302]

        async def main():
            store = open_store(str(tmp_path / "g.db"), clock=lambda: now[0])
            await store.set_budget("team:blue", DOLLAR)
            await spend(store, DOLLAR, 1)
            hooks = Webhooks({"ops": hook(f"{receiver.url}/the/secret/path", shares=(1.0,))}, lambda: store)
            counts = []
            for wait_s in (0, 1, 29, 119, 1, 10_000):
                now[0] += wait_s
                await hooks.look()
                counts.append(len(receiver.seen))
            assert counts == [1, 1, 2, 2, 3, 3]
            # Another limit is another budget.
            receiver.failing = [500] * 100
            await store.set_budget("team:blue", DOLLAR // 2)
            for _ in range(20):
                await hooks.look()
                now[0] += 7 * 3600
            assert len(receiver.seen) == 3 + alerts.TRIES
            await store.close()

        asyncio.run(main())
    assert "given up" in caplog.text
    assert "secret/path" not in caplog.text
    assert SECRET not in caplog.text


def test_ten_thousand_budgets_hold_nobody_up_and_what_is_noted_is_not_made_again(monkeypatch):
    """Each look made every alert anew, and held the loop for as long as it took: 350 ms every 5 s."""
    one = Budget(
        id=1, subject="", period="month", limit_nano=10, spent_nano=9, reserved_nano=0, window_us=1, resets_us=2
    )
    budgets = [dataclasses.replace(one, id=number, subject=f"key:{number}") for number in range(1_000)]
    noted, made, turns = [], [], [0]

    class Store:
        def now_us(self):
            return 5

        async def budgets(self):
            return budgets

        async def change(self, work):
            work(None)

        async def look(self, work):
            return []

    real = webhooks._alert
    monkeypatch.setattr(webhooks.alerts, "note", lambda connection, new, now_us: noted.extend(one.id for one in new))
    monkeypatch.setattr(webhooks, "_alert", lambda *told: made.append(told) or real(*told))

    async def main():
        hooks = Webhooks({"ops": hook("http://127.0.0.1:1", shares=(0.9, 0.5, 1.0))}, Store)

        async def tick():
            while True:
                turns[0] += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        await hooks.look()
        assert len(noted) == len(set(noted)) == len(made) == 2_000
        turns[0] = 0
        await hooks.look()
        assert turns[0] >= 3
        assert len(made) == 2_000
        # What a budget has been raised to is another; what it has reached since is new.
        budgets[0] = dataclasses.replace(budgets[0], limit_nano=18)
        budgets[1] = dataclasses.replace(budgets[1], spent_nano=10)
        await hooks.look()
        assert [told[0][-1] for told in made[2_000:]] == [0.5, 1.0]
        ticking.cancel()

    asyncio.run(main())


def test_of_many_alerts_that_are_due_some_are_sent_at_once(monkeypatch):
    """As many connections were opened as budgets had reached a share."""
    open_now, most = [0], [0]

    class Store:
        def now_us(self):
            return 5

        async def budgets(self):
            return []

        async def look(self, work):
            body = {"webhook": "ops", "budget": {"subject": "a"}}
            return [alerts.Alert(id=str(number), period="month", ts_us=1, body=body) for number in range(100)]

    async def sent(self, one):
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        await asyncio.sleep(0)
        open_now[0] -= 1

    monkeypatch.setattr(Webhooks, "_send", sent)
    asyncio.run(Webhooks({"ops": hook("http://127.0.0.1:1")}, Store).look())
    assert most == [8]


class Due:
    """A store in which so many alerts for each of some webhooks are due whenever somebody looks."""

    def __init__(self, **many):
        self.many, self.looks = many, 0

    def now_us(self):
        return 5

    async def budgets(self):
        return []

    async def look(self, work):
        self.looks += 1
        return [
            alerts.Alert(
                id=f"{name}{number}", period="month", ts_us=1, body={"webhook": name, "budget": {"subject": "a"}}
            )
            for name, many in self.many.items()
            for number in range(many)
        ]

    async def change(self, work):
        return True


def posting(monkeypatch):
    """What is sent to whom; what the webhook ``dead`` is sent it does not take before the event that comes with it."""
    sent, gate = [], asyncio.Event()

    async def posted(hook, alert):
        sent.append(hook.name)
        if hook.name == "dead":
            await gate.wait()

    monkeypatch.setattr(webhooks, "_posted", posted)
    monkeypatch.setattr(webhooks, "LOOK_S", 0.001)
    return sent, gate


def test_a_webhook_that_does_not_answer_holds_up_no_other(monkeypatch):
    """All others had their alerts after all of its own, each of which took 10 s."""

    async def main():
        sent, _ = posting(monkeypatch)
        store = Due(dead=100, well=3)
        hooks = Webhooks({"dead": hook("http://127.0.0.1:1"), "well": hook("http://127.0.0.1:2")}, lambda: store)
        watching = asyncio.create_task(hooks.watch())
        # And what is new is looked for all the while.
        await until_async(lambda: sent.count("well") >= 9)
        assert (sent.count("dead"), store.looks >= 3) == (8, True)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1
        assert hooks._telling == {}

    asyncio.run(main())


def test_a_webhook_that_leaves_the_config_ends_nothing(monkeypatch):
    """What waited to be sent to it ended the watch, and nobody was told of anything any more."""

    async def main():
        sent, gate = posting(monkeypatch)
        store = Due(dead=12)
        hooks = Webhooks({"dead": hook("http://127.0.0.1:1")}, lambda: store)
        watching = asyncio.create_task(hooks.watch())
        await until_async(lambda: len(sent) == 8)
        # As a gateway does that is given another config.
        hooks.hooks = webhooks.hooks_of({"new": hook("http://127.0.0.1:1")})
        gate.set()
        await until_async(lambda: not hooks._telling)
        assert sent == ["dead"] * 8
        store.many = {"dead": 12, "new": 2}
        await until_async(lambda: sent.count("new") >= 4)
        assert (sent.count("dead"), watching.done()) == (8, False)
        watching.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("private", [False, True])
def test_a_name_that_nobody_answers_for_keeps_no_thread_from_others(monkeypatch, private):
    """All addresses of upstreams, too, are looked up in a few threads."""
    gate, looked_up = threading.Event(), []

    def hangs(host, *_, **__):
        looked_up.append(host)
        gate.wait()
        raise OSError("no such name")

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        monkeypatch.setattr(webhooks, "POST_S", 0.2)
        hooks = Webhooks({"dead": hook("https://dead.example/x", private=private)}, lambda: Due(dead=20))
        monkeypatch.setattr(socket, "getaddrinfo", hangs)
        looking = asyncio.create_task(hooks.look())
        await until_async(lambda: looked_up)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "goes on"), 60) == "goes on"
        looking.cancel()
        await asyncio.gather(looking, *hooks._telling.values(), return_exceptions=True)
        assert looked_up == ["dead.example"]
        gate.set()

    try:
        asyncio.run(main())
    finally:
        gate.set()


class SlowNames:
    """A system that takes until `gate` to say that every name of ``.example`` means an address, and how often it was asked."""

    def __init__(self, monkeypatch, address="127.0.0.1", real=socket.getaddrinfo):
        self.gate, self.looked_up, self.address = threading.Event(), [], address

        def found(host, *given, **named):
            if not host.endswith(".example"):
                return real(host, *given, **named)
            self.looked_up.append(host)
            self.gate.wait()
            return real(self.address, *given, **named)

        monkeypatch.setattr(socket, "getaddrinfo", found)


def test_what_waits_for_a_name_is_sent_once_it_is_known_however_long_that_took(monkeypatch, caplog):
    """Eight POSTs at a time began with a look-up, which was of their time: where it took 5 s, 14 of 16 failed."""
    names, began, post = SlowNames(monkeypatch), [], aiohttp.ClientSession.post

    def noted(session, *given, **named):
        began.append(names.gate.is_set())
        return post(session, *given, **named)

    monkeypatch.setattr(aiohttp.ClientSession, "post", noted)

    async def main(receiver):
        store = Due(well=20)
        hooks = Webhooks({"well": hook(f"http://hooks.example:{receiver.server_address[1]}/x")}, lambda: store)
        looking = asyncio.create_task(hooks.look())
        await until_async(lambda: names.looked_up)
        # No POST has begun whose time this were.
        await asyncio.sleep(0.05)
        names.gate.set()
        await looking
        assert began == [True] * 20
        assert (len(receiver.seen), names.looked_up, caplog.text) == (20, ["hooks.example"], "")

    with noting() as receiver:
        asyncio.run(main(receiver))


def test_a_name_that_is_looked_up_for_too_long_is_told_and_found_by_the_next(monkeypatch, caplog):
    monkeypatch.setattr(webhooks, "LOOKUP_S", 0.05)
    names = SlowNames(monkeypatch)

    async def main(receiver):
        store = Due(well=2)
        hooks = Webhooks({"well": hook(f"http://hooks.example:{receiver.server_address[1]}/x")}, lambda: store)
        await hooks.look()
        assert caplog.text.count("its name was not looked up within 0.05 s") == 2
        # It goes on, for whoever tries next.
        names.gate.set()
        await until_async(lambda: not hooks.hooks["well"].resolver._looking)
        await hooks.look()
        assert (len(receiver.seen), names.looked_up) == (2, ["hooks.example"])

    with noting() as receiver:
        asyncio.run(main(receiver))


def test_a_name_that_comes_to_mean_a_private_address_is_not_called(monkeypatch):
    """Neither where it meant a public one before, nor where what is kept is used again (DNS rebinding)."""
    names, connected = SlowNames(monkeypatch, "8.8.8.8"), []
    names.gate.set()

    async def main():
        made = webhooks.Hook("ops", hook("https://hooks.example/x", private=False))

        async def connect(self, *given, addr_infos, **named):
            connected.append([info[4][0] for info in addr_infos])
            raise OSError("nobody there")

        monkeypatch.setattr("aiohttp.TCPConnector._wrap_create_connection", connect)

        async def posted():
            return await webhooks._posted(made, alerts.Alert(id="a", period="total", ts_us=0, body={"webhook": "ops"}))

        await posted()
        names.address = "127.0.0.1"
        # As long as it is kept it is the public one that is called, though the name means another.
        await posted()
        assert (connected, names.looked_up) == ([["8.8.8.8"]] * 2, ["hooks.example"])
        monkeypatch.setattr(made.resolver, "_found", {})
        assert "not public" in await posted()
        # Nor is it called by what was found of it just now.
        assert "not public" in await posted()
        assert (len(connected), names.looked_up) == (2, ["hooks.example"] * 2)

    asyncio.run(main())


def test_a_name_that_is_not_there_is_told(monkeypatch):
    def unknown(host, *_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    made = webhooks.Hook("ops", hook("https://hooks.example/x", private=False))
    alert = alerts.Alert(id="a", period="total", ts_us=0, body={"webhook": "ops"})
    assert asyncio.run(webhooks._posted(made, alert)) == "its name was not found: Name or service not known"


def test_what_goes_wrong_with_one_webhook_is_told_and_the_others_are(monkeypatch, caplog):
    async def main():
        sent, _ = posting(monkeypatch)
        real = webhooks._posted
        monkeypatch.setattr(webhooks, "_posted", lambda hook, alert: {}[0] if hook.name == "odd" else real(hook, alert))
        store = Due(odd=1, well=1)
        hooks = Webhooks({"odd": hook("http://127.0.0.1:1"), "well": hook("http://127.0.0.1:2")}, lambda: store)
        with pytest.raises(KeyError):
            await hooks.look()
        watching = asyncio.create_task(hooks.watch())
        await until_async(lambda: sent.count("well") >= 3)
        watching.cancel()

    asyncio.run(main())
    assert "webhook odd is told later: KeyError" in caplog.text


def test_an_alert_whose_process_ended_is_sent_by_another_later(tmp_path):
    now = [1_000_000.0]
    with noting() as receiver:

        async def main():
            store = open_store(str(tmp_path / "g.db"), clock=lambda: now[0])
            await store.set_budget("team:blue", DOLLAR)
            await spend(store, DOLLAR, 1)
            hooks = Webhooks({"ops": hook(receiver.url, shares=(1.0,))}, lambda: store)
            ((reached, budget),) = hooks._reached(await store.budgets())
            alert = webhooks._alert(reached, budget, store.now_us())
            await store.change(lambda connection: alerts.note(connection, [alert], store.now_us()))
            assert await store.change(lambda connection: alerts.claim(connection, alert, store.now_us()))
            await hooks.look()
            assert receiver.seen == []
            now[0] += 61
            await hooks.look()
            await hooks.look()
            assert len(receiver.seen) == 1
            await store.close()

        asyncio.run(main())


def test_only_the_budgets_that_are_asked_for_are_told(tmp_path):
    with noting() as receiver:

        async def main():
            store = open_store(str(tmp_path / "g.db"))
            await store.set_budget("team:blue", DOLLAR)
            await store.set_budget("global", DOLLAR)
            await store.set_budget("team:red", 0)
            await spend(store, DOLLAR, 1)
            await Webhooks({"ops": hook(receiver.url, subjects=("team:red",))}, lambda: store).look()
            assert receiver.seen == []
            await Webhooks({"ops": hook(receiver.url, subjects=("global",), shares=(1,))}, lambda: store).look()
            await store.close()

        asyncio.run(main())
        assert [one["budget"]["subject"] for one in told(receiver)] == ["global"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "224.0.0.1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1"])
def test_a_private_address_is_not_called_unless_the_config_says_so(tmp_path, monkeypatch, host):
    with noting() as receiver:
        monkeypatch.setenv("TEST_HOOK_URL", f"https://{host}:{receiver.server_address[1]}/x")

        async def main():
            made = webhooks.Hook("ops", hook("env:TEST_HOOK_URL", private=False))
            body = {"webhook": "ops"}
            return await webhooks._posted(made, alerts.Alert(id="a", period="total", ts_us=0, body=body))

        why = asyncio.run(main())
        # Not a URL at all for the client, or a name that leads here.
        assert "not public" in why or "InvalidUrl" in why
        assert receiver.seen == []


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"url": "http://example.com/x"}, "https"),
        ({"url": "ftp://example.com"}, "https"),
        ({"url": "nothing"}, "cannot be read"),
        ({"url": "https://example.com:0/x"}, "url cannot be read"),
        ({"url": "https://u:hidden-password@example.com"}, "password in it"),
        ({"url": "https://h\n.example.com"}, "cannot be read"),
        ({"shares": (0,)}, "shares has 0"),
        ({"shares": (float("nan"),)}, "shares"),
        ({"shares": ()}, "shares"),
    ],
)
def test_a_config_that_is_wrong_is_told_and_no_secret_with_it(fields, why):
    with pytest.raises(ConfigError, match=why) as caught:
        hook(**{"url": "https://example.com", "private": False, **fields})
    assert "hidden-password" not in str(caught.value)


def test_a_secret_that_is_not_there_stops_the_gateway_before_it_serves(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_HOOK_SECRET")
    one = ModelConfig(name="m", price=Price(), deployments=(DeploymentConfig(provider=Mock.Config(model="m")),))
    config = GatewayConfig(models=(one,), store=str(tmp_path / "g.db"), webhooks={"ops": hook("https://example.com")})
    with pytest.raises(ConfigError, match="TEST_HOOK_SECRET"):
        Gateway(config)


def test_of_a_url_only_its_host_is_shown():
    shown = redacted({"webhooks": {"ops": {"url": "https://hooks.example.com/T0/B0/xyz", "secret": "env:A"}}})
    assert shown["webhooks"]["ops"]["url"].startswith("https://hooks.example.com/")
    assert "xyz" not in json.dumps(shown)
    assert shown["webhooks"]["ops"]["secret"] == "env:A"


def test_a_gateway_tells_of_a_budget_that_requests_have_used(tmp_path, monkeypatch):
    with noting() as receiver:
        path = tmp_path / "g.toml"
        path.write_text(
            f"""store = "{tmp_path / "g.db"}"
[admin]
key = "env:TEST_HOOK_SECRET"
[webhooks.ops]
url = "{receiver.url}/hook"
secret = "env:TEST_HOOK_SECRET"
shares = [0.2]
private = true
[[models]]
name = "small"
price = {{ input_usd = 1, output_usd = 2 }}
max_tokens = 10
deployments = [{{ provider = {{ kind = "mock", model = "small", tokens = 10 }} }}]
"""
        )
        load_config(path)
        with served("--config", str(path), environment={"TEST_HOOK_SECRET": SECRET}) as running:
            made = call(running.url, "POST", "/admin/keys", {"name": "ci", "budget_usd": 0.0001}, key=SECRET)[1]
            assert ask(running.url, key=made["secret"])[0] == 200
            shown = call(running.url, "GET", "/admin/config", key=SECRET)[1]
            assert "/hook" not in json.dumps(shown)
            until(lambda: receiver.seen)
        (found,) = told(receiver)
        assert found["budget"]["subject"] == f"key:{made['key']['id']}"

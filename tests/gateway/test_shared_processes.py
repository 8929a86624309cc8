"""Two gateways on one store and one Redis, as users start them."""

import itertools
import threading
import time
from pathlib import Path

import pytest

from anabranch.gateway.config import load_config
from gateway_process import ask, call, mock_config, served
from redis_process import missing, redis_server
from waiting import until

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no Redis to test with: {missing()}")
RPM = 5


def statuses(urls, key, each):
    """What each of the gateways answers to ``each`` requests, all at once."""
    found = []

    def run(url, at):
        found.append(ask(url, f"question {url} {at}", key=key)[0])

    threads = [threading.Thread(target=run, args=(url, at)) for at in range(each) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == each * len(urls)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Redis, two gateways on it, and the file of their config."""
    environment, path = {"ADMIN": "admin"}, tmp_path_factory.mktemp("pair") / "gateway.toml"
    with redis_server() as redis:
        config = mock_config(path, top=f'[admin]\nkey = "env:ADMIN"\n[shared]\nurl = "{redis.url}"\n')
        with (
            served("--config", config, environment=environment) as one,
            served("--config", config, environment=environment) as two,
        ):
            yield redis, one, two, path


def ups(urls):
    """Of each gateway, whether Redis answers it and how often it was lost: two equal ones say that it did all the time."""
    lines = [line for url in urls for line in metrics(url).splitlines() if line.startswith("anabranch_shared_")]
    return [line for line in lines if line.split()[0] in ("anabranch_shared_up", "anabranch_shared_lost_total")]


def while_up(urls, work):
    """What ``work`` gives, of a time in which Redis answered both gateways: a machine that is busy may keep it for too long."""
    end = time.monotonic() + 120
    while True:
        before = ups(urls)
        if [line for line in before if "_up " in line] == ["anabranch_shared_up 1.0"] * 2:
            found = work()
            if ups(urls) == before:
                return found
        assert time.monotonic() < end, before
        time.sleep(0.05)


def test_a_hostile_key_gets_its_rate_once_and_goes_on_where_redis_does_not(pair):
    redis, one, two, _ = pair
    urls, numbers = (one.url, two.url), itertools.count()

    def hammered():
        began, key = time.monotonic(), keyed_as(one.url, f"evil {next(numbers)}", rpm=RPM)
        found = statuses(urls, key, 2 * RPM)
        # What a minute allows, and what has come back meanwhile.
        return found, RPM + int((time.monotonic() - began) * RPM / 60) + 1

    found, most = while_up(urls, hammered)
    assert set(found) == {200, 429}
    assert RPM <= found.count(200) <= most

    # An answer that one has kept the other gives.
    calm = keyed_as(one.url, "calm")

    def passed_on():
        # It is kept there beside the answer; whoever asks before that asks the model, and has an answer of its own then.
        text = f"the same {next(numbers)}"
        first = ask(one.url, text, key=calm, headers={"x-cache": "allow"})
        time.sleep(0.02 * min(next(numbers), 40))
        second = ask(two.url, text, key=calm, headers={"x-cache": "allow"})
        return (first, second) if second[2]["x-cache"] == "exact" else None

    first, second = while_up(urls, lambda: until(passed_on))
    assert (first[2]["x-cache"], second[2]["x-cache"], second[1]) == ("miss", "exact", first[1])

    # Without it each has its own counts, and nobody waits.
    redis.hang()
    try:
        lone = keyed_as(one.url, "lone", rpm=RPM)
        found = statuses(urls, lone, 2 * RPM)
        assert set(found) == {200, 429}
        assert found.count(200) >= 2 * RPM
        assert "anabranch_shared_up 0.0" in metrics(one.url)
    finally:
        redis.go_on()


def kept(url, key, text="the same"):
    """What a gateway answers to a question that may be answered from a cache: from which, and what."""
    status, body, headers = ask(url, text, key=key, headers={"x-cache": "allow"})
    assert status == 200, body
    return headers["x-cache"], body["choices"][0]["message"]["content"]


def test_an_operator_clears_and_changes_answers_for_all(pair):
    _, one, two, config = pair
    key, end = keyed_as(one.url, "careful"), time.monotonic() + 120
    # Another test had it away.
    while not all("anabranch_shared_up 1.0" in metrics(each.url) for each in (one, two)):
        assert time.monotonic() < end
        time.sleep(0.05)
    first = kept(one.url, key)
    while (second := kept(two.url, key))[0] != "exact":
        assert time.monotonic() < end
    assert (first[0], second[1]) == ("miss", first[1])

    # Cleared at one: neither Redis has it, nor, soon, the other.
    while call(one.url, "DELETE", "/admin/cache", key="admin")[0] != 200:
        # It did not answer in time, and is to be told again.
        assert time.monotonic() < end
    while kept(two.url, key)[0] != "miss":
        assert time.monotonic() < end
        time.sleep(0.05)

    # Changed at one: what the other still answers is the old model's, and no answer of the new.
    assert kept(two.url, key)[0] == "exact"
    config.write_text(config.read_text().replace("tokens = 4", 'reply = "new"'))
    assert call(one.url, "POST", "/admin/reload", {}, "admin")[0] == 200
    assert kept(one.url, key) == ("miss", "new")
    assert kept(two.url, key) == ("exact", first[1])
    assert call(two.url, "POST", "/admin/reload", {}, "admin")[0] == 200
    while (found := kept(two.url, key))[0] != "exact":
        assert time.monotonic() < end
    assert found[1] == "new"


def keyed_as(url, name, **fields):
    status, made, _ = call(url, "POST", "/admin/keys", {"name": name, **fields}, "admin")
    assert status == 200, made
    return made["secret"]


def metrics(url):
    return call(url, "GET", "/metrics", key="admin")[1]


def test_a_gateway_starts_without_redis_and_says_so(tmp_path):
    top = '[shared]\nurl = "redis://127.0.0.1:1/0"\n'
    config = mock_config(tmp_path / "gateway.toml", top=f"require_key = false\n{top}")
    assert load_config(Path(config)).shared.prefix == "anabranch"
    with served("--config", config) as running:
        assert ask(running.url)[0] == 200
        assert "anabranch_shared_up 0.0" in metrics(running.url)

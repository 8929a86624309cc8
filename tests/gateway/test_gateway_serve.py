"""The server as a process: start, signals, the admin's interface, and what its log may not hold."""

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from gateway_process import SOURCE, served
from waiting import until

ADMIN, UPSTREAM_KEY = "the-admin-key-of-this-test", "sk-upstream-0123456789abcdef"
CONFIG = """
require_key = {require_key}
store = "{store}"
{top}
[admin]
key = "env:TEST_ADMIN_KEY"
[log]
level = "{level}"
[strategies.cheapest]
kind = "cheapest"
{extra}
[[models]]
name = "{name}"
price = {{ input_usd = 1, output_usd = 2 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", tokens = 40, tokens_per_s = 100 }} }}]
"""


def write(path, **fields):
    defaults = {
        "require_key": "false",
        "store": path.parent / "gateway.db",
        "top": "",
        "level": "warning",
        "extra": "",
        "name": "small",
    }
    path.write_text(CONFIG.format(**{**defaults, **fields}))
    return str(path)


def call(url, method, path, body=None, key=None, headers=None):
    link = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        sent = {"authorization": f"Bearer {key}"} if key else {}
        sent |= {} if body is None else {"content-type": "application/json"}
        sent |= headers or {}
        link.request(method, path, None if body is None else json.dumps(body), sent)
        answer = link.getresponse()
        raw = answer.read()
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, json.loads(raw) if is_json else raw.decode(), answer.headers
    finally:
        link.close()


def ask(url, text="hello", model="small", **options):
    return call(
        url,
        "POST",
        "/v1/chat/completions",
        {"model": model, "messages": [{"role": "user", "content": text}]},
        **options,
    )


def test_it_starts_small_quick_and_without_torch():
    with served(environment={"PYTHONPROFILEIMPORTTIME": "1"}) as running:
        process = psutil.Process(running.process.pid)
        assert sum(process.cpu_times()[:2]) < 5  # 0.8 s where nothing else runs and imports are not timed
        assert call(running.url, "GET", "/ready")[0] == 200
        assert process.memory_info().rss < 120 * 2**20
        for model in ("auto", "auto/cheapest", "small"):
            assert ask(running.url, model=model)[0] == 200
        assert call(running.url, "GET", "/ui")[0] == 200
        imported = {line.rpartition("|")[2].strip() for line in running.log.read_text().splitlines()}
    assert "anabranch.gateway.core.request" in imported  # the list is of this process
    assert not {
        name for name in imported if name.split(".")[0] in ("torch", "numba", "scipy", "sklearn", "transformers")
    }


def test_a_stream_under_way_ends_before_the_process_does(tmp_path):
    with served("--config", write(tmp_path / "g.toml")) as running:
        body = json.dumps({"model": "small", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
        link = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=60)
        link.request("POST", "/v1/chat/completions", body)
        answer = link.getresponse()
        first = answer.read(50)
        running.process.send_signal(signal.SIGTERM)
        rest = answer.read()
        link.close()
        assert (first + rest).endswith(b"data: [DONE]\n\n")
        assert running.process.wait(60) == 0
        assert "stopped" in running.log.read_text()


def test_sighup_takes_a_good_config_and_keeps_the_old_one_before_a_bad_one(tmp_path):
    path = tmp_path / "g.toml"
    with served("--config", write(path)) as running:
        write(path, name="other")
        running.process.send_signal(signal.SIGHUP)
        until(lambda: ask(running.url, model="other")[0] == 200)
        path.write_text("models = 3")
        running.process.send_signal(signal.SIGHUP)
        until(lambda: "old one stays" in running.log.read_text())
        assert ask(running.url, model="other")[0] == 200
        status, body, _ = call(running.url, "POST", "/admin/reload", key=ADMIN, headers={"content-length": "0"})
        assert (status, body["error"]["code"]) == (409, "reload_failed")
        write(path, name="third")
        assert call(running.url, "POST", "/admin/reload", key=ADMIN)[0] == 200
        assert ask(running.url, model="third")[0] == 200


@pytest.fixture(autouse=True)
def admin_key(monkeypatch):
    monkeypatch.setenv("TEST_ADMIN_KEY", ADMIN)


def test_operators_make_keys_and_budgets_and_see_what_happened(tmp_path):
    with served("--config", write(tmp_path / "g.toml", require_key="true")) as running:
        url = running.url
        assert ask(url)[0] == 401
        status, made, _ = call(url, "POST", "/admin/keys", {"name": "app", "team": "t"}, key=ADMIN)
        assert status == 200
        secret, id = made["secret"], made["key"]["id"]
        status, budget, _ = call(
            url, "PUT", "/admin/budgets", {"subject": f"key:{id}", "limit_usd": 1, "period": "day"}, key=ADMIN
        )
        assert (status, budget["limit_nano"]) == (200, 10**9)
        status, _, headers = ask(url, model="auto/cheapest", key=secret)
        assert status == 200
        request_id = headers["x-request-id"]
        feedback = {"request_id": request_id, "score": 1, "comment": "good"}
        assert call(url, "POST", "/v1/feedback", feedback, key=secret)[0] == 200
        [row] = call(url, "GET", f"/admin/ledger?key_id={id}", key=ADMIN)[1]["rows"]
        assert (row["request_id"], row["quality"]) == (request_id, 1.0)
        [decision] = call(url, "GET", f"/admin/decisions/{request_id}", key=ADMIN)[1]["decisions"]
        assert decision["model"] == "small"
        [spend] = call(url, "GET", "/admin/spend?by=team", key=ADMIN)[1]["spend"]
        assert spend["group"] == ["t"]
        assert spend["cost_nano"] == row["cost_nano"] > 0
        assert [one["breaker"] for one in call(url, "GET", "/admin/providers", key=ADMIN)[1]["deployments"]] == [
            "closed"
        ]
        assert call(url, "GET", "/admin/strategies", key=ADMIN)[1]["strategies"][0]["name"] == "cheapest"
        explained = call(
            url, "POST", "/admin/explain", {"model": "auto", "messages": [{"role": "user", "content": "x"}]}, key=ADMIN
        )
        assert explained[1]["candidates"][0]["model"] == "small"
        assert "env:TEST_ADMIN_KEY" in json.dumps(call(url, "GET", "/admin/config", key=ADMIN)[1])
        assert call(url, "DELETE", "/admin/cache", key=ADMIN)[0] == 200
        assert call(url, "DELETE", f"/admin/keys/{id}", key=ADMIN)[0] == 200
        assert ask(url, key=secret)[0] == 401
        for path, status in (("/admin/nothing", 404), ("/admin/spend?by=secret", 400), ("/admin/ledger?limit=0", 400)):
            assert call(url, "GET", path, key=ADMIN)[0] == status
        assert call(url, "POST", "/admin/keys", {"nme": "x"}, key=ADMIN)[0] == 400
        assert call(url, "PUT", "/admin/budgets", {"subject": "nobody", "limit_usd": 1}, key=ADMIN)[0] == 400


def test_nobody_else_sees_or_does_what_operators_do(tmp_path):
    with served("--config", write(tmp_path / "g.toml", require_key="true")) as running:
        url = running.url
        user = call(url, "POST", "/admin/keys", {"name": "user"}, key=ADMIN)[1]["secret"]
        boss = call(url, "POST", "/admin/keys", {"name": "boss", "is_admin": True}, key=ADMIN)[1]["secret"]
        for path in ("/admin/keys", "/admin/ledger", "/ui", "/ui/parts", "/ui/ab", "/admin/nothing"):
            for key in (None, user, "wrong", ADMIN + "x"):
                assert call(url, "GET", path, key=key)[0] in (401, 403)
        assert call(url, "GET", "/admin/keys", key=boss)[0] == 200
        password = {"authorization": "Basic " + base64.b64encode(f"me:{ADMIN}".encode()).decode()}
        status, page, headers = call(url, "GET", "/ui", headers=password)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert user not in page
        assert call(url, "GET", "/ui", headers={"authorization": "Basic ???"})[0] == 401


def test_without_an_admin_key_the_page_is_for_this_machine_and_the_rest_is_closed():
    with served() as running:
        url = running.url
        assert call(url, "GET", "/ui")[0] == 200
        assert "No A/B test" in call(url, "GET", "/ui/ab")[1]
        for headers in ({"host": "evil.example"}, {"x-forwarded-for": "8.8.8.8"}, {"host": ""}):
            assert call(url, "GET", "/ui", headers=headers)[0] in (400, 401, 403)
        assert call(url, "GET", "/admin/keys")[0] == 403


def test_a_port_of_its_own_for_operators(tmp_path):
    made = write(tmp_path / "g.toml")
    text = (tmp_path / "g.toml").read_text().replace("[admin]", "[admin]\nport = 0")
    (tmp_path / "g.toml").write_text(text)
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    command = [
        sys.executable,
        "-m",
        "anabranch.cli.main",
        "gateway",
        "serve",
        "--port",
        "0",
        "--json",
        "--config",
        made,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    try:
        said = b""
        while not said.endswith(b"}\n"):
            said += process.stdout.readline()
        urls = json.loads(said)
        assert call(urls["url"], "GET", "/admin/keys", key=ADMIN)[0] == 404
        assert call(urls["url"], "GET", "/ui", key=ADMIN)[0] == 404
        assert call(urls["admin_url"], "GET", "/admin/keys", key=ADMIN)[0] == 200
        assert ask(urls["admin_url"])[0] == 404
        assert ask(urls["url"])[0] == 200
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def test_no_secret_and_no_prompt_is_logged_even_when_all_is(tmp_path):
    """A whole debug run, with failures, refusals and a bad strategy, and then its log is searched."""
    provider = '{ kind = "openai", base_url = "http://127.0.0.1:9/v1", model = "m" }'
    upstream = f'[[models]]\nname = "far"\ndeployments = [{{ provider = {provider} }}]'
    path = write(tmp_path / "g.toml", require_key="true", level="debug", extra=upstream)
    prompt = "PRIVATE-PROMPT-8472"
    with served("--config", path, environment={"OPENAI_API_KEY": UPSTREAM_KEY}) as running:
        url = running.url
        secret = call(url, "POST", "/admin/keys", {"name": "app"}, key=ADMIN)[1]["secret"]
        for model in ("small", "auto", "far", "auto/cheapest?lambda=x", "nothing"):
            ask(url, prompt, model=model, key=secret)
        ask(url, prompt, key="sk-ab-wrong-key-of-somebody")
        call(
            url,
            "POST",
            "/v1/chat/completions",
            {"model": "small", "messages": [{"role": "user", "content": prompt}], "temperature": prompt},
            key=secret,
        )
        call(url, "POST", "/v1/chat/completions", {"model": "small", "messages": prompt}, key=secret)
        call(url, "GET", f"/v1/models/{prompt}", key=secret)
        call(url, "GET", "/ui", key="wrong")
        metrics = call(url, "GET", "/metrics", key=ADMIN)[1]
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(60)
        log = running.log.read_text()
    for text in (log, metrics):
        for hidden in (ADMIN, UPSTREAM_KEY, secret, "sk-ab-wrong-key", prompt):
            assert hidden not in text


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "bad.toml").write_text('[[models]]\nname = "m"\nprize = 3\n')
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    for arguments, says in (
        (["--config", str(tmp_path / "bad.toml")], r"bad\.toml.*3.*prize"),
        (["--config", str(tmp_path / "absent.toml")], "absent"),
        (["--port", "99999"], "port"),
        (["--host", "no.such.host.invalid", "--port", "0"], "cannot listen"),
    ):
        command = [sys.executable, "-m", "anabranch.cli.main", "gateway", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
        assert done.returncode == 2
        assert re.search(says, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1


def test_a_client_that_goes_away_stops_the_upstream_at_once(tmp_path):
    with served("--config", write(tmp_path / "g.toml")) as running:
        body = json.dumps(
            {"model": "small", "stream": True, "max_tokens": 40, "messages": [{"role": "user", "content": "x"}]}
        )
        link = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=60)
        link.request("POST", "/v1/chat/completions", body)
        link.getresponse().read(20)
        link.sock.shutdown(2)
        link.close()
        until(
            lambda: (
                [row["status"] for row in call(running.url, "GET", "/admin/ledger", key=ADMIN)[1]["rows"]]
                == ["cancelled"]
            ),
        )
        [row] = call(running.url, "GET", "/admin/ledger", key=ADMIN)[1]["rows"]
        # It has not come to its end, and nobody knows yet how fast the upstream is: it may have made all by the time it noticed.
        assert row["completion_tokens"] <= 40
        assert 0 < row["cost_nano"] <= row["reserved_nano"]
        assert "anabranch_in_flight 0.0" in call(running.url, "GET", "/metrics", key=ADMIN)[1]


def test_many_clients_at_once_are_all_answered():
    with served() as running:
        statuses = []

        def client():
            statuses.extend(ask(running.url, model="auto/cheapest")[0] for _ in range(5))

        threads = [threading.Thread(target=client) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 80


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ('[strategies.a]\nkind = "linucb"', "strategies.a needs vectors of queries; set embedder.kind"),
        ('[strategies.a]\nkind = "knn"\n[embedder]\nkind = "hashed"', "knn has to learn first"),
        (
            '[strategies.a]\nkind = "ic_cache"\ntrusted = ["smal"]\n[embedder]\nkind = "hashed"',
            "strategies.a.trusted has 'smal'",
        ),
    ],
)
def test_a_check_refuses_what_a_start_would(tmp_path, monkeypatch, capsys, extra, says):
    from anabranch.cli.main import main

    monkeypatch.setenv("TEST_ADMIN_KEY", ADMIN)
    path = write(tmp_path / "gateway.toml", extra=extra)
    assert main(["gateway", "serve", "--check", "-c", path]) == 2
    told = capsys.readouterr().err
    assert says in told
    # With file and line.
    assert re.match(rf"error: {re.escape(path)}:\d+: strategies\.a", told), told
    assert not (tmp_path / "gateway.db").exists()


def test_a_check_looks_where_the_store_would_be_and_makes_none(tmp_path, monkeypatch, capsys):
    from anabranch.cli.main import main

    monkeypatch.setenv("TEST_ADMIN_KEY", ADMIN)
    path = write(tmp_path / "gateway.toml")
    assert main(["gateway", "serve", "--check", "-c", path]) == 0
    assert not (tmp_path / "gateway.db").exists()
    for store, says in (
        (tmp_path, "which is a folder"),
        (f"{path}/g.db", "there is no folder"),
        (tmp_path / "none/g.db", "there is no folder"),
        (":memory:", "':memory:' is no file: what is in SQLite's memory ends with the process; name a file"),
        ("sqlite:///:memory:", "is no file"),
        (tmp_path / ":memory:", "is no file"),
        ("file:g.db?mode=ro", "is a URI of SQLite"),
        ("mysql://x/y", "the URL of the store cannot be read"),
    ):
        assert main(["gateway", "serve", "--check", "-c", path, "--store", str(store)]) == 2
        assert says in capsys.readouterr().err
    assert not os.path.exists(":memory:")


@pytest.mark.slow
@pytest.mark.parametrize("require_key", ["true", "false"])
def test_the_command_that_is_told_next_works(tmp_path, require_key):
    """As it stands, with a key where one is needed."""
    path = write(tmp_path / "gateway.toml", require_key=require_key)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TEST_ADMIN_KEY": ADMIN}
    command = [sys.executable, "-m", "anabranch.cli.main", "gateway"]
    with subprocess.Popen(
        [*command, "serve", "-c", path, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as server:
        try:
            told = {}
            while "next" not in told or (require_key == "true" and "keys" not in told):
                label, _, text = server.stdout.readline().partition(" ")
                told[label] = text.strip()
            assert ("authorization" in told["next"]) == (require_key == "true")
            if require_key == "true":
                words = told["keys"].removeprefix("anabranch gateway ").removesuffix(" makes a $KEY").split()
                made = subprocess.run([*command, *words, "--json"], env=environment, capture_output=True, cwd=tmp_path)
                environment["KEY"] = json.loads(made.stdout)["key"]
            asked = subprocess.run(told["next"], shell=True, capture_output=True, env=environment, timeout=60)
            assert json.loads(asked.stdout)["choices"]
        finally:
            server.terminate()

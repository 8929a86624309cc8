"""Several workers on one port: one store, every signal for all, the dead replaced, numbers and changes of all."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from anabranch.gateway.metrics_text import labelled
from gateway_process import SOURCE, ask, call, mock_config, served
from waiting import until

ADMIN = {"TEST_ADMIN_KEY": "k"}
TOP = '[admin]\nkey = "env:TEST_ADMIN_KEY"'


def workers(running):
    children = psutil.Process(running.process.pid).children()
    return [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def number(text, name):
    """The sum of a metric, and the workers that tell it."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines), {line.split('worker="')[1][0] for line in lines}


def test_workers_share_port_store_and_signals_and_the_dead_are_replaced(tmp_path):
    log = tmp_path / "access.log"
    path = mock_config(tmp_path / "g.toml", top=f'{TOP}\n[log]\naccess = "{log}"')
    with served("--config", path, "--workers", "2", environment=ADMIN) as running:
        url = running.url
        made = call(url, "POST", "/admin/keys", {"name": "ci", "budget_usd": 1}, key="k")[1]
        secret = made["secret"]
        assert [ask(url, text=f"t{at}", key=secret)[0] for at in range(20)] == [200] * 20
        text = call(url, "GET", "/metrics", key="k")[1]
        assert number(text, "anabranch_requests_total")[0] == 20
        assert number(text, "anabranch_in_flight")[1] == {"0", "1"}
        assert text.count("# TYPE anabranch_in_flight ") == 1
        until(lambda: len(call(url, "GET", "/admin/ledger?limit=100", key="k")[1]["rows"]) == 20)
        rows = call(url, "GET", "/admin/ledger?limit=100", key="k")[1]["rows"]
        (budget,) = call(url, "GET", "/admin/budgets", key="k")[1]["budgets"]
        assert budget["spent_nano"] == sum(row["cost_nano"] for row in rows) > 0

        def have_both_answered():
            assert ask(url, key=secret)[0] == 200
            return len(number(call(url, "GET", "/metrics", key="k")[1], "anabranch_requests_total")[1]) == 2

        until(have_both_answered)
        # A dead one is replaced, and nobody notices.
        old = {one.pid for one in workers(running)}
        os.kill(min(old), signal.SIGKILL)
        until(lambda: len({one.pid for one in workers(running)} - old) == 1)
        until(lambda: number(call(url, "GET", "/metrics", key="k")[1], "anabranch_in_flight")[1] == {"0", "1"})
        assert all(ask(url, text=f"again {at}", key=secret)[0] == 200 for at in range(8))
        # An operator's change, and SIGHUP, are for all.
        os.rename(log, tmp_path / "old.log")
        with open(path, "a") as file:
            file.write(
                '[[models]]\nname = "more"\nprice = {}\ndeployments = [{ provider = { kind = "mock", model = "more" } }]\n'
            )
        assert call(url, "POST", "/admin/reload", key="k")[0] == 200
        assert {ask(url, model="more", text=f"m{at}", key=secret)[0] for at in range(10)} == {200}
        until(log.exists)
        os.rename(log, tmp_path / "older.log")
        running.process.send_signal(signal.SIGHUP)
        until(log.exists)

        def is_deleted():
            found = {ask(url, text="same", key=secret, headers={"x-cache": "allow"})[0] for _ in range(8)}
            assert found == {200}
            return call(url, "DELETE", "/admin/cache", key="k")[1]["deleted"] >= 1

        # One that comes to its SIGHUP only now begins with empty caches.
        until(is_deleted)
        assert call(url, "DELETE", "/admin/cache", key="k")[1]["deleted"] == 0
        pids = [one.pid for one in workers(running)]
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert len((tmp_path / "old.log").read_text().splitlines()) >= 28


@pytest.mark.slow
def test_requests_under_way_end_before_workers_do(tmp_path):
    path = mock_config(tmp_path / "g.toml", top="require_key = false", tokens_per_s=4)
    with served("--config", path, "--workers", "2") as running:
        link = socket.create_connection(("127.0.0.1", running.port))
        body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "x"}]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        link.sendall(head + body)
        until(lambda: number(call(running.url, "GET", "/metrics")[1], "anabranch_in_flight")[0] == 1)
        running.process.send_signal(signal.SIGTERM)
        link.settimeout(120)
        assert link.recv(65536).startswith(b"HTTP/1.1 200")
        link.close()
        assert running.process.wait(60) == 0


@pytest.mark.slow
def test_workers_end_when_their_supervisor_is_killed(tmp_path):
    path = mock_config(tmp_path / "g.toml", top="require_key = false")
    with served("--config", path, "--workers", "2") as running:
        pids = [one.pid for one in workers(running)]
        assert len(pids) == 2
        running.process.kill()
        until(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids))


@pytest.mark.parametrize("fault", ["port", pytest.param("store", marks=pytest.mark.slow)])
def test_a_mistake_is_told_once_and_no_worker_stays(tmp_path, fault):
    path = mock_config(tmp_path / "g.toml")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if fault == "port" else 0
        if fault == "store":
            (tmp_path / "gateway.db").write_text("no database" * 1000)
        command = [
            sys.executable,
            "-m",
            "anabranch.cli.main",
            "gateway",
            "serve",
            "--config",
            path,
            "--workers",
            "2",
            "--port",
            str(port),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("choose another port" if fault == "port" else "store") in done.stderr
    assert done.stderr.count("choose another port") <= 1


def test_metrics_of_workers_are_one_text():
    one = b'# HELP a_total A\n# TYPE a_total counter\na_total{x="1"} 2.0\n# HELP b B\n# TYPE b gauge\nb 1.0\n'
    two = b'# HELP a_total A\n# TYPE a_total counter\na_total{x="{"} 3.0\n# HELP c C\n# TYPE c gauge\nc 5.0\n'
    assert labelled({1: two, 0: one}).decode().splitlines() == [
        "# HELP a_total A",
        "# TYPE a_total counter",
        'a_total{worker="0",x="1"} 2.0',
        'a_total{worker="1",x="{"} 3.0',
        "# HELP b B",
        "# TYPE b gauge",
        'b{worker="0"} 1.0',
        "# HELP c C",
        "# TYPE c gauge",
        'c{worker="1"} 5.0',
    ]
    name = 'a "b" \\ c\n'
    told = labelled({name: b"# HELP x X\nx 1.0\n"}, "deployment").decode()
    assert told == '# HELP x X\nx{deployment="a \\"b\\" \\\\ c\\n"} 1.0\n'

"""``anabranch cluster coordinate`` and the processes of ``anabranch train`` that share a run through it, each started by itself."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from anabranch.cluster.elastic.wire import connect
from anabranch.train import read_metrics
from torchruns import children_of, started_by
from waiting import until

MODULE = [sys.executable, "-m", "anabranch"]

HAS_PROC = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes by /proc")


@pytest.fixture
def begun(tmp_path, environment):
    """Starts the command with these words; the process. At the end none is left."""
    running = []

    def start(*words, before=MODULE, **more):
        with (tmp_path / f"said-{len(running)}").open("w") as said:
            process = subprocess.Popen(
                [*before, *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=tmp_path,
                env=environment | more,
            )
        process.said = tmp_path / f"said-{len(running)}"
        running.append(process)
        return process

    yield start
    for process in running:
        # Of a torchrun.
        with suppress(OSError):
            for pid in children_of(process.pid).values():
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=60)


def told(process):
    """The first JSON value that it prints."""
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.said.read_text()
        text += line
    return json.loads(text)


def test_it_says_where_it_is_keeps_strangers_out_and_is_stopped(begun, tmp_path):
    (tmp_path / "secret").write_text("river\n")
    process = begun(
        "cluster", "coordinate", "--listen", "127.0.0.1:0", "--replicas", 3, "--secret-file", "secret", "--json"
    )
    found = told(process)
    assert (found["replicas"], found["stages"], found["has_secret"]) == (3, 1, True)
    host, _, port = found["address"].rpartition(":")
    with pytest.raises(Exception, match="another secret, or no listener of ours"):
        connect(host, int(port), b"delta", on_frame=print, on_close=print)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.said.read_text().splitlines()[-1] == "stopped"


def steps_in(folder):
    return (
        len([line for line in read_metrics(folder) if line["kind"] == "train"])
        if (folder / "metrics.jsonl").exists()
        else 0
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_text_to_a_trained_model_through_a_kill_and_a_newcomer(begun, cli, tmp_path, tiny, data):
    """Two replicas of two stages; the process that writes is killed, and another one comes. The losses are those of one process."""
    told_often = ["--set=train.log_every=1", "--set=train.eval_every=5"]
    settings = ["dense", "--steps=60", "--seed=5", *tiny, *data, *told_often, "--json"]
    plain = cli("train", *settings, "--out", tmp_path / "plain", "--quiet")
    assert plain.returncode == 0, plain.stderr
    secret = {"ANABRANCH_CLUSTER_SECRET": "river"}
    sizes = ["--replicas", 2, "--stages", 2, "--dead-after", 900]
    host = begun("cluster", "coordinate", "--listen", "127.0.0.1:0", *sizes, "--json", **secret)
    address = told(host)["address"]
    where = [f"--set=parallel.elastic.coordinator={address}", "--set=parallel.elastic.timeout_s=900"]
    line = ["train", *settings, "--out", "shared", "--resume", "auto", *where]
    runs = [begun(*line, **secret) for _ in range(4)]
    shared = tmp_path / "shared"
    until(lambda: steps_in(shared) >= 8, 400)
    # The one that writes shows how it goes on.
    writer = next(run for run in runs if "held-out text:" in run.said.read_text())
    writer.kill()
    runs = [run for run in runs if run is not writer]
    until(lambda: "is lost" in host.said.read_text(), 400)
    # So that the end does not come before the newcomer, which takes a while to start.
    runs[0].send_signal(signal.SIGSTOP)
    runs.append(begun(*line, **secret))
    until(lambda: "rank 4 is here" in host.said.read_text(), 400)
    runs[0].send_signal(signal.SIGCONT)
    found = []
    for run in runs:
        out, _ = run.communicate(timeout=400)
        assert run.returncode == 0, run.said.read_text()
        found.append(json.loads(out))
    assert host.wait(60) == 0, host.said.read_text()
    said = host.said.read_text()
    assert said.count("is lost") == 1
    assert "rank 4 is here" in said
    assert said.splitlines()[-1] == "training has ended at step 60"
    alone = json.loads(plain.stdout)
    assert all(one["step"] == 60 and one["checkpoint"] == found[0]["checkpoint"] for one in found)
    assert all(one["nats_per_token"] == pytest.approx(alone["nats_per_token"], rel=1e-4) for one in found)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        for name in ("shared", "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # One process generates from what several learned.
    done = cli("generate", shared, "--prompt", "def ", "--max-tokens", 5)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_lost_too_much_says_what_is_left_and_goes_on_alone(begun, cli, tmp_path, tiny, data):
    settings = ["dense", "--steps", 400, *tiny, *data, "--set=train.checkpoint_every=5", "--set=train.log_every=1"]
    host = begun("cluster", "coordinate", "--listen", "127.0.0.1:0", "--replicas", 2, "--json")
    address = told(host)["address"]
    line = ["train", *settings, "--out", "shared", f"--set=parallel.elastic.coordinator={address}"]
    runs = [begun(*line) for _ in range(2)]
    until(lambda: steps_in(tmp_path / "shared") >= 7, 400)
    for run in runs:
        run.kill()
    assert host.wait(60) == 2
    assert "no rank is left" in (said := host.said.read_text().splitlines()[-1])
    assert "the last checkpoint: shared/checkpoints/step-" in said
    words = ["--resume", "--steps", 12, "--set=parallel.elastic.coordinator=none", "--json", "--quiet"]
    done = cli("train", "--out", tmp_path / "shared", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "finished"
    assert found["step"] >= 12


def losses_in(folder):
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


@pytest.mark.slow
@HAS_PROC
@pytest.mark.timeout(1500)
def test_a_process_that_its_torchrun_starts_again_comes_in_again(begun, cli, tmp_path, tiny, data):
    """A torchrun for each process: one is killed, its torchrun starts it, and the other has gone on meanwhile."""
    settings = ["dense", "--steps=40", "--seed=5", *tiny, *data, "--set=train.log_every=1"]
    plain = cli("train", *settings, "--out", tmp_path / "plain", "--quiet")
    assert plain.returncode == 0, plain.stderr
    host = begun("cluster", "coordinate", "--listen", "127.0.0.1:0", "--replicas", 2, "--dead-after", 900, "--json")
    where = [f"--set=parallel.elastic.coordinator={told(host)['address']}", "--set=parallel.elastic.timeout_s=900"]
    line = ["train", *settings, "--out", "shared", "--resume", "auto", *where]
    runs = [begun(*line, before=started_by(1, restarts=3)) for _ in range(2)]
    until(lambda: steps_in(tmp_path / "shared") >= 5, 400)
    lost, other = (children_of(run.pid)[0] for run in runs)
    os.kill(lost, signal.SIGKILL)
    until(lambda: "is lost" in host.said.read_text(), 400)
    # So that the end does not come before the one that is started again.
    os.kill(other, signal.SIGSTOP)
    until(lambda: "rank 2 is here" in host.said.read_text(), 400)
    os.kill(other, signal.SIGCONT)
    assert [run.wait(400) for run in runs] == [0, 0], [run.said.read_text() for run in runs]
    assert host.wait(60) == 0, host.said.read_text()
    assert losses_in(tmp_path / "shared") == pytest.approx(losses_in(tmp_path / "plain"), rel=1e-4)


@pytest.mark.slow
@HAS_PROC
@pytest.mark.timeout(1500)
def test_processes_that_one_torchrun_ends_together_begin_anew_from_their_checkpoint(begun, cli, tmp_path, tiny, data):
    """One torchrun for both: where one is killed it ends the other too, and starts both; the coordinator waits for them."""
    settings = [
        "dense",
        "--steps=30",
        "--seed=5",
        *tiny,
        *data,
        "--set=train.log_every=1",
        "--set=train.checkpoint_every=4",
    ]
    plain = cli("train", *settings, "--out", tmp_path / "plain", "--quiet")
    assert plain.returncode == 0, plain.stderr
    words = ["--listen", "127.0.0.1:0", "--replicas", 2, "--restarts", 1, "--json"]
    host = begun("cluster", "coordinate", *words)
    line = ["train", *settings, "--out", "shared", "--resume", "auto"]
    run = begun(*line, f"--set=parallel.elastic.coordinator={told(host)['address']}", before=started_by(2, restarts=3))
    until(lambda: steps_in(tmp_path / "shared") >= 6, 400)
    os.kill(children_of(run.pid)[0], signal.SIGKILL)
    assert run.wait(600) == 0, run.said.read_text()
    assert host.wait(60) == 0, host.said.read_text()
    assert host.said.read_text().count("it begins anew when all are there again (0 times more)") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "shared") if line["kind"] == "train"] == list(range(1, 31))
    assert losses_in(tmp_path / "shared") == pytest.approx(losses_in(tmp_path / "plain"), rel=1e-4)

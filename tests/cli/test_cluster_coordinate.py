"""``anabranch cluster coordinate`` and the processes of ``anabranch train`` that share a run through it, each started by itself."""

import json
import signal
import subprocess
import sys

import pytest

from anabranch.cluster.elastic.wire import connect
from anabranch.train import read_metrics
from waiting import until

MODULE = [sys.executable, "-m", "anabranch"]


@pytest.fixture
def begun(tmp_path, environment):
    """Starts the command with these words; the process. At the end none is left."""
    running = []

    def start(*words, **more):
        with (tmp_path / f"said-{len(running)}").open("w") as said:
            process = subprocess.Popen(
                [*MODULE, *map(str, words)],
                stdout=subprocess.PIPE, stderr=said, text=True, cwd=tmp_path, env=environment | more,
            )  # fmt: skip
        process.said = tmp_path / f"said-{len(running)}"
        running.append(process)
        return process

    yield start
    for process in running:
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

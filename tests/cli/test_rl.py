"""``anabranch rl``: train, eval, replay, from a command line to files."""

import json

import pytest

from anabranch.cli.main import main

pytest.importorskip("gymnasium")

FEW = ["--set", "task.eval_episodes=5", "--set", "task.epochs=2"]


def run(capfd, *words):
    code = main([*map(str, words)])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "run"
    assert (
        main(["rl", "train", "cartpole", "--samples", "1100", "--seed", "2", "--out", str(out), "--quiet", *FEW]) == 0
    )
    return out


def test_train_tells_as_json(capfd, tmp_path):
    code, out, _ = run(
        capfd, "rl", "train", "cartpole", "--samples", 600, "--seed", 1, "--out", tmp_path / "run", "--json", *FEW
    )
    told = json.loads(out)
    assert code == 0
    assert told["samples"] == 512
    assert told["mean_return"] > 5
    assert told["samples_per_second"] > 0
    assert (told["status"], told["episodes"], told["seed"]) == ("finished", 5, 1)


def test_train_keeps_the_books_of_what_was_passed_over(capfd, tmp_path):
    """Two rollouts of two mini-batches and two epochs, the second of which is always beyond such a target."""
    given = ["--samples", 512, "--out", tmp_path / "run", "--json", "--quiet", *FEW]
    given += ["--set", "task.target_kl=1e-12", "--set", "train.batch_size=128"]
    told = json.loads(run(capfd, "rl", "train", "cartpole", *given)[1])
    assert (told["step"], told["updates"], told["passed_steps"], told["gradient_steps"]) == (8, 2, 4, 4)
    assert (told["learning_rate"], told["halvings"]) == (1e-3, 0)


def test_eval_says_what_training_said(capfd, trained, tmp_path):
    code, out, _ = run(capfd, "rl", "eval", trained, "--episodes", 5, "--json", "--quiet")
    told = json.loads(out)
    assert code == 0
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert told["mean_return"] == metrics[-1]["mean_return"]
    code, out, _ = run(capfd, "rl", "eval", trained, "--episodes", 3, "--seed", 8, "--csv", tmp_path / "e.csv")
    assert code == 0
    assert "on average of 3 episodes" in out
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 4


def test_eval_tells_how_sure_measures_of_drivers_are(capfd, tmp_path):
    where = tmp_path / "run"
    small = ["--set", "task.eval_episodes=1", "--set", "task.environment.world.timeout_s=2", "--set"]
    small.append("task.environment.world.maps=1")
    assert run(capfd, "rl", "train", "laneworld", "--samples", 128, "--out", where, "--quiet", *small)[0] == 0
    told = json.loads(run(capfd, "rl", "eval", where, "--episodes", 4, "--json", "--quiet")[1])
    assert (
        {"driving_score", "route_completion", "infractions_per_km", "comfort"}
        <= told["intervals"].keys()
        <= told.keys()
    )
    assert told["intervals"]["driving_score"] > 0
    line = next(
        line
        for line in run(capfd, "rl", "eval", where, "--episodes", 4, "--quiet")[1].splitlines()
        if line.startswith("driving_score")
    )
    assert line.split()[1:] == [
        f"{told['driving_score']:.4g}",
        "+-",
        f"{told['intervals']['driving_score']:.2g}",
    ]


def test_eval_draws_the_curve(capfd, trained, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("c.svg", "c.png"):
        code, out, _ = run(capfd, "rl", "eval", trained, "--episodes", 2, "--picture", tmp_path / name, "--quiet")
        assert code == 0
        assert f"wrote   {tmp_path / name}" in out
    assert "episodes of a rollout" in (tmp_path / "c.svg").read_text()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_replay_draws_a_film(capfd, trained, tmp_path):
    pytest.importorskip("pygame")
    code, out, _ = run(capfd, "rl", "replay", trained, "--out", tmp_path / "a.gif", "--frames", 3, "--json")
    assert code == 0
    assert json.loads(out)["frames"] == 3
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF8")
    # One of rl eval's, as its table says.
    assert run(capfd, "rl", "eval", trained, "--episodes", 9, "--csv", tmp_path / "e.csv", "--quiet")[0] == 0
    row = (tmp_path / "e.csv").read_text().splitlines()[8].split(",")
    line = [
        "rl",
        "replay",
        trained,
        "--out",
        tmp_path / "b.gif",
        "--frames",
        1,
        "--episode",
        7,
        "--episodes",
        9,
        "--json",
    ]
    told = json.loads(run(capfd, *line)[1])
    assert (told["episode"], told["return"], told["steps"]) == (int(row[0]), float(row[1]), int(row[2]))
    code, _, err = run(capfd, *line[:-1], "--episode", 9)
    assert (code, "an evaluation of 9 has 0 to 8" in err) == (2, True)


def test_any_environment_of_gymnasium_by_its_id(capfd, tmp_path):
    """Choices are seen, averages are kept and told of by nobody else; what is said of the environment holds in evaluations too."""
    where = tmp_path / "run"
    given = [
        "--samples",
        512,
        "--set",
        "task.environment.arguments={max_episode_steps=7}",
        "--set",
        "task.target_kl=0.01",
    ]
    code, out, err = run(capfd, "rl", "train", "FrozenLake-v1", "--out", where, *given, *FEW)
    assert code == 0
    assert "sees 16 numbers, answers with one of 4 choices" in err
    assert "512 samples" in out
    code, out, _ = run(capfd, "rl", "eval", where, "--episodes", 3, "--json")
    assert code == 0
    assert json.loads(out)["mean_length"] <= 7


def test_a_run_goes_on_for_more_samples(capfd, tmp_path):
    where = tmp_path / "run"
    assert run(capfd, "rl", "train", "cartpole", "--samples", 256, "--out", where, "--quiet", *FEW)[0] == 0
    code, out, _ = run(capfd, "rl", "train", "--out", where, "--resume", "--samples", 768, "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["samples"] == 768


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--out", "x"], "WHAT is missing"),
        (["train", "cartpol", "--out", "x"], "did you mean 'cartpole'"),
        (["train", "Acrobat-v1", "--out", "x"], "Did you mean: `Acrobot`"),
        (["train", "maze", "--out", "x"], "or the id of a gymnasium environment, such as Acrobot-v1"),
        (
            ["train", "pendulum", "--out", "x", "--set", "task.normalize_rewards=true"],
            "leave one of them out (reward_scale=1)",
        ),
        (["train", "cartpole", "--samples", "2", "--out", "x"], "use at least 8"),
        (["train", "cartpole", "--out", "x", "--set", "model.dim=3"], "fields of task and train can be set"),
        (
            ["train", "cartpole", "--out", "x", "--set", "task.environment.id=Nothing-v3"],
            "environment.id is 'Nothing-v3'",
        ),
        (["train", "cartpole", "--out", "x", "--set", "train.batch_size=7"], "does not divide the 256 samples"),
        (["train", "cartpole", "--out", "x", "--resume"], "WHAT is given with --resume"),
        (["train", "--out", "nowhere", "--resume"], "no training run in nowhere"),
        (["eval", "nowhere"], "no training run in nowhere"),
        (["eval", "{run}", "--episodes", "0"], "episodes"),
        (["eval", "{run}", "--csv", "{run}/config.json"], "is read"),
        (["eval", "{run}", "--picture", "a.jpg"], "its name must end in .svg or .png"),
        (["eval", "{run}", "--csv", "a.svg", "--picture", "a.svg"], "is to be written twice"),
        (["eval", "{run}", "--referee", "carla"], "--referee is 'carla'; use sumo"),
        (["eval", "{run}", "--referee", "sumo"], "judges drivers of laneworld, and this one learned in gymnasium"),
        (["replay", "{run}", "--out", "a.bmp"], "ends in .gif, or in .png"),
    ],
)
def test_wrong_lines_are_one_line(capfd, trained, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capfd, "rl", *(word.replace("{run}", str(trained)) for word in words))
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0


@pytest.mark.slow
def test_sumo_judges_a_driver(capfd, tmp_path):
    pytest.importorskip("sumo")
    pytest.importorskip("traci")
    where = tmp_path / "run"
    small = ["--set", "task.eval_episodes=1", "--set", "task.environment.world.timeout_s=5"]
    assert run(capfd, "rl", "train", "laneworld", "--samples", 512, "--out", where, "--quiet", *small)[0] == 0
    code, out, _ = run(
        capfd,
        "rl",
        "eval",
        where,
        "--referee",
        "sumo",
        "--episodes",
        2,
        "--csv",
        tmp_path / "e.csv",
        "--json",
        "--quiet",
    )
    told = json.loads(out)
    assert code == 0
    assert (told["referee"], told["episodes"]) == ("sumo", 2)
    assert {"vehicle", "own_vehicle", "red_light", "sumo_arrived"} <= told.keys()
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_highwayenv_is_learned_in_as_many_processes_as_there_are_processors(capfd, tmp_path):
    pytest.importorskip("highway_env")
    given = ["--samples", 64, "--set", "task.eval_episodes=2", "--set", "task.epochs=1", "--json", "--quiet"]
    found = []
    for name, workers in (("all", 0), ("one", 1)):
        more = ["--out", tmp_path / name, "--set", f"task.environment.workers={workers}"]
        code, out, _ = run(capfd, "rl", "train", "highway", *given, *more)
        assert code == 0
        found.append(json.loads(out))
    # What happens is the same, whoever steps.
    assert found[0]["mean_return"] == found[1]["mean_return"]
    assert {"arrived", "collided", "own_return"} <= found[0].keys()

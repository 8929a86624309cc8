"""What the end of a training by reinforcement says."""

from pathlib import Path
from types import SimpleNamespace

from anabranch.cli.rl.conclusion import Conclusion


def conclusion(seconds):
    result = SimpleNamespace(
        status="finished",
        step=3,
        headline=0.5,
        measures={"step": 3, "kind": "evaluation", "mean_reward": 0.5},
        seconds=seconds,
        skipped_steps=0,
        peak_memory_bytes=1 << 20,
        checkpoint=None,
    )
    return Conclusion(SimpleNamespace(train=SimpleNamespace(steps=4, seed=7)), result, Path("run"), 12, "episodes")


def test_figures_of_a_run(capsys):
    told = conclusion(6.0)
    found = told.to_dict()
    assert (found["folder"], found["samples"], found["samples_per_second"], found["mean_reward"]) == (
        "run",
        12,
        2.0,
        0.5,
    )
    assert "kind" not in found
    assert found["checkpoint"] is None
    told.tell_work()
    assert "12 episodes, 3 of 4 steps in" in capsys.readouterr().out


def test_a_run_that_took_no_time_has_no_rate():
    assert conclusion(0.0).to_dict()["samples_per_second"] == 0.0

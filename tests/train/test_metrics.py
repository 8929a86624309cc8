import json
import math
import sys

import pytest

from anabranch.errors import BackendError, DataError
from anabranch.train import read_metrics
from anabranch.train.metrics import MetricsLog


def write(out, *steps, **options):
    log = MetricsLog(out, **options)
    for step in steps:
        log.write({"step": step, "kind": "train", "loss": 1 / (step + 1)})
    log.close()


def test_lines_are_appended_and_read_back(tmp_path):
    write(tmp_path, 1, 2)
    write(tmp_path, 3, step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path)[1]["loss"] == 1 / 3


def test_resuming_drops_what_came_after_and_a_torn_line(tmp_path):
    write(tmp_path, 1, 2, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    assert len(read_metrics(tmp_path)) == 3
    write(tmp_path, 3, step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "kind": "train", "loss": math.nan, "by_layer": [math.inf, 1.0]})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "kind": "train",
        "loss": None,
        "by_layer": [None, 1.0],
    }


def test_damage_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*metrics\.jsonl"):
        read_metrics(tmp_path)
    write(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(DataError, match=r"line 2 of .* is damaged"):
        read_metrics(tmp_path)


def test_tensorboard_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BackendError, match=r"pip install 'anabranch\[tensorboard\]'"):
        MetricsLog(tmp_path, tensorboard=True)


@pytest.mark.filterwarnings("default")  # the package's own
def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, 1, 2, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
    ]

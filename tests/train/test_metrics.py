import json
import math
import resource
import signal
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import BackendError, CapacityError, DataError
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


def test_metrics_of_a_run_that_begins_again_are_kept_aside(tmp_path, caplog):
    for _ in range(3):
        write(tmp_path, 1, 2, step=0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    names = ["metrics.jsonl", "metrics.jsonl.old1", "metrics.jsonl.old2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1
    assert "training begins again at step 0; the metrics of before go on as" in caplog.text


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


TORN = ['{"step": 4, "ki', '{"step": 4, "note": "caf\u00e9', '{"step": 4, "note": "\U0001f389']


@pytest.mark.parametrize("line", TORN)
def test_a_last_line_torn_anywhere_even_inside_a_character(tmp_path, line):
    for cut in range(1, len(line.encode()) + 1):
        out = tmp_path / str(cut)
        out.mkdir()
        write(out, 1, 2, 3)
        with (out / "metrics.jsonl").open("ab") as file:
            file.write(line.encode()[:cut])
        assert [record["step"] for record in read_metrics(out)] == [1, 2, 3]
        write(out, 3, step=2)
        assert [record["step"] for record in read_metrics(out)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"oops", b'{"step": 4, "ki{"step": 5}', b"\xc3", b"5", b"{}", b"", b"[" * 99999])
def test_a_damaged_line_stops_nobody_from_going_on(tmp_path, damage, caplog):
    write(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage + b"\n")
    with pytest.raises(DataError, match=r"line 3 of .* is damaged"):
        read_metrics(tmp_path)
    write(tmp_path, 3, step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert "damaged line 3" in caplog.text


@given(steps=st.lists(st.integers(0, 400), min_size=1, max_size=12), room=st.integers(0, 700))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_on_a_full_disk_every_line_is_whole_or_absent(tmp_path_factory, steps, room):
    out = tmp_path_factory.mktemp("full")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log, written, told = MetricsLog(out), [], []
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (room, before[1])
    )  # as a full disk: a write that is cut, then one that fails
    try:
        for length in steps:
            try:
                log.write({"step": length, "kind": "train", "note": "\u00e9" * length})
                written.append(length)
            except CapacityError as error:
                told.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        log.close()
    assert [record["step"] for record in read_metrics(out)] == written
    assert len(told) == len(steps) - len(written)
    assert all(text.startswith("no room left on disk to write") for text in told)
    assert (out / "metrics.jsonl").read_bytes()[-1:] in (b"", b"\n")


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

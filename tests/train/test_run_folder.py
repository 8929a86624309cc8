"""The folder of a run that processes share: who writes, what one that takes it over writes, and who waits for whom."""

from types import SimpleNamespace

import pytest

from anabranch.errors import DataError
from anabranch.train import Trainer, checkpoints, read_metrics
from anabranch.train import run_folder as module
from anabranch.train.checkpoint_manager import CheckpointManager, Progress
from anabranch.train.run import run_lock
from anabranch.train.run_folder import RunFolder


class Shared:
    """A process that shares a run: of `Elastic` what a folder asks."""

    def __init__(self, *, is_first=True):
        self.is_first, self.holds_folder, self.has_stopped = is_first, False, False

    def is_stopped(self):
        return self.has_stopped


class Sharing:
    """Of `Workers` what a folder asks."""

    def __init__(self, elastic):
        self.elastic = elastic

    @property
    def is_first(self):
        return self.elastic.holds_folder

    def wait(self):
        """For nobody."""


def folder_of(out, config, elastic, *, step=0, resumes=True):
    """Of a process that is at ``step``, and what it keeps."""
    workers = Sharing(elastic)
    kept = CheckpointManager(out, config, None, None, None, workers, None)
    kept.progress = Progress(step=step)
    return RunFolder(out, config, workers, kept, resumes=resumes), kept


def line(step, kind="train"):
    return {"step": step, "kind": kind, "loss": float(step)}


def test_who_is_not_first_keeps_its_lines_and_takes_nothing_over(make_run, tmp_path):
    folder, _ = folder_of(tmp_path, make_run(), Shared(is_first=False))
    folder.write(line(1))
    assert not folder.take_over()
    assert not folder.is_written
    assert list(tmp_path.iterdir()) == []


def test_one_that_takes_over_writes_the_lines_that_are_missing_and_no_line_twice(make_run, tmp_path):
    config = make_run(steps=6, eval_every=3, checkpoint_every=2)
    Trainer(config, tmp_path).fit()
    elastic = Shared()
    folder, kept = folder_of(tmp_path, config, elastic, step=4)
    # As it saw them while the lost one wrote.
    for record in (line(3), line(3, "validation"), line(4)):
        folder.write({**record, "loss": -1.0})
    with folder.held:
        assert folder.take_over()
        assert elastic.holds_folder
        folder.write(line(5))
        folder.close()
        # Once is enough.
        assert not folder.take_over()
        with pytest.raises(DataError, match="another process is training"), run_lock(tmp_path):
            pass
    records = [(record["step"], record["kind"]) for record in read_metrics(tmp_path)]
    assert records == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "validation"),
        (4, "train"),
        (5, "train"),
    ]
    assert all(record["loss"] != -1.0 for record in read_metrics(tmp_path) if record["kind"] == "train")
    # Of the lost one's later steps nothing is gone on from.
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004"]
    assert kept.newest == checkpoints(tmp_path)[-1]


def test_lines_that_the_lost_one_did_not_come_to_are_written_by_the_next(make_run, tmp_path):
    folder, _ = folder_of(tmp_path, make_run(), Shared(), step=2, resumes=False)
    for step in (1, 2):
        folder.write(line(step))
    with folder.held:
        assert folder.take_over()
        folder.close()
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0]


@pytest.mark.parametrize("is_first", [False, True])
def test_only_who_is_to_write_keeps_all_lines(make_run, tmp_path, is_first):
    """A writer that stands still may hold the folder for long; who is none keeps what passes until a loss is seen."""
    elastic = Shared(is_first=is_first)
    folder, _ = folder_of(tmp_path, make_run(), elastic, step=40, resumes=False)
    for step in range(1, 41):
        folder.write(line(step))
    # The one before it is lost only now.
    elastic.is_first = True
    with folder.held:
        assert folder.take_over()
        folder.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1 if is_first else 25, 41))


def test_a_folder_that_another_holds_is_had_later_or_never(make_run, tmp_path, caplog):
    elastic = Shared()
    folder, _ = folder_of(tmp_path, make_run(), elastic)
    with run_lock(tmp_path):
        with pytest.raises(DataError, match="another process is training"):
            folder.take_over()
        assert not folder.take_over(must=False, tells=False)
        assert not caplog.records
        assert not folder.take_over(must=False)
        assert "nothing is written for now: another process is training" in caplog.text
        assert not elastic.holds_folder
    with folder.held:
        assert folder.take_over()
        folder.close()


def test_at_the_end_one_waits_for_the_folder_and_says_so_once(make_run, tmp_path, caplog, monkeypatch):
    elastic, naps = Shared(), []
    folder, _ = folder_of(tmp_path, make_run(), elastic)
    lock = run_lock(tmp_path)
    lock.__enter__()

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=nap))
    with folder.held:
        assert folder.wait_for_turn()
        assert not folder.wait_for_turn(), "it has it"
        folder.close()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "nothing is written for now",
        "all is learned, and written as soon as that process has ended",
    ]


def test_one_that_is_told_to_stop_waits_no_more(make_run, tmp_path):
    elastic = Shared()
    elastic.has_stopped = True
    folder, _ = folder_of(tmp_path, make_run(), elastic)
    with run_lock(tmp_path), pytest.raises(DataError, match="another process is training"):
        folder.wait_for_turn()

"""Of N subjects, each learned from one drawing, which is it? Files of trials, odds, choices."""

import json
import os
import signal
import zipfile

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("numba")

from anabranch.errors import DataError, InputError
from anabranch.heads.pvchat import (
    Composer,
    Learned,
    Learning,
    OneShotSet,
    PVChat,
    Vocabulary,
    odds,
    portraits,
    read_trials,
    ways,
)
from anabranch.heads.pvchat.questions import question
from anabranch.heads.pvchat.trials import by_ink
from drawn_subjects import made_subjects, write_runs

WAYS = 3
TINY = PVChat.Config(dim=32, frames=4, num_queries=4, personal_tokens=2)
FEW = Learning(
    data=OneShotSet.Config(positives=1, augmented=1, hard_negatives=1, easy_negatives=1, wordings=1),
    image_steps=1,
    video_steps=1,
    batch_size=4,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs") / "all")


@pytest.fixture(scope="module")
def base():
    return PVChat(TINY, Vocabulary(["<a>", "<b>"]), seed=0)


BANK = portraits(made_subjects(4))


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*")):
            file.write(each, each.relative_to(folder))
    return path


def test_runs_are_read_from_a_folder_and_from_a_zip(runs, tmp_path):
    found = read_trials(runs)
    assert [trial.name for trial in found] == ["run01", "run02"]
    assert [trial.answer_N for trial in found] == [(1, 2, 0), (2, 0, 1)]
    assert [each.subject for each in found[0].references] == ["run01/class01", "run01/class02", "run01/class03"]
    assert [each.subject for each in found[0].tests] == ["run01/class02", "run01/class03", "run01/class01"]
    assert found[0].names == ["<s01>", "<s02>", "<s03>"]
    again = read_trials(zipped(runs, tmp_path / "all.zip"))
    for one, other in zip(found, again, strict=True):
        assert (one.name, one.answer_N) == (other.name, other.answer_N)
        for a, b in zip([*one.references, *one.tests], [*other.references, *other.tests], strict=True):
            assert torch.equal(a.ink_SS, b.ink_SS)
    assert [trial.name for trial in read_trials(runs, only=["run02"])] == ["run02"]


def broken(place, what):
    write_runs(place, runs=1)
    run = place / "run01"
    lines = (run / "class_labels.txt").read_text().splitlines()
    if what == "no labels":
        (run / "class_labels.txt").unlink()
    elif what == "no text":
        (run / "class_labels.txt").write_bytes(b"\xff\xfe")
    elif what == "three words":
        (run / "class_labels.txt").write_text("a b c\n")
    elif what == "a picture too many":
        (run / "class_labels.txt").write_text("\n".join(lines[1:]))
    elif what == "a test that is not there":
        (run / "class_labels.txt").write_text("\n".join([*lines, "x/item9.png y/class01.png"]))
    elif what == "a class that is not there":
        (run / "class_labels.txt").write_text("\n".join(lines).replace("class01", "class09"))
    elif what == "one way":
        for name in ("class02", "class03"):
            (run / f"training/{name}.png").unlink()
        for name in ("item01", "item02"):
            (run / f"test/{name}.png").unlink()
        (run / "class_labels.txt").write_text(lines[2])
    elif what == "no tests":
        for path in (run / "test").iterdir():
            path.unlink()
        (run / "class_labels.txt").write_text("")
    elif what == "no picture":
        (run / "test/item01.png").write_bytes(b"no")
    return place


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no labels", r"run01 has no class_labels.txt, which says of whom the drawings in test are"),
        ("no text", r"run01/class_labels.txt is no text in UTF-8"),
        ("three words", r"run01/class_labels.txt, line 1: it must name a picture of test and one of training"),
        ("a picture too many", r"run01/class_labels.txt says nothing of test/item01.png"),
        ("a test that is not there", r"class_labels.txt names test/item9.png, which is not there"),
        ("a class that is not there", r"class_labels.txt names training/class09.png, which is not there"),
        ("one way", r"run01 has 1 drawings in training; to choose, there must be two at least"),
        ("no tests", r"run01/class_labels.txt says nothing of test/\*"),
        ("no picture", r"run01/test/item01.png is no picture that can be read"),
    ],
)
def test_runs_that_cannot_be_read(tmp_path, what, message):
    with pytest.raises(DataError, match=message):
        read_trials(broken(tmp_path / "all", what))


def test_places_without_runs(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no runs: folders with training/, test/ and class_labels.txt"):
        read_trials(tmp_path / "empty")
    with pytest.raises(DataError, match="there is no"):
        read_trials(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no run 'run09'; it has run01, run02"):
        read_trials(runs, only=["run01", "run09"])


@torch.no_grad()
def test_odds_are_those_of_the_first_word_of_an_answer(base):
    generator = torch.Generator().manual_seed(0)
    composer = Composer(Composer.Config(frames=4))
    clips = [composer.compose([each], generator) for each in BANK[:5]]
    found = odds(base, clips, ["<b>", "<a>"], wordings=2, batch_size=3)
    assert found.shape == (5, 2)
    yes, no = (base.vocabulary.encode(word)[0] for word in ("yes", "no"))
    for row, clip in enumerate(clips):
        for column, name in enumerate(("<b>", "<a>")):
            value = 0.0
            for turn in range(2):
                token = torch.tensor([[base.vocabulary.encode(question("existence", name, turn))]])
                subject = torch.tensor([[base.vocabulary.subject(name)]])
                logits, _ = base.eval()(clip.frame_FCHW[None], subject, token)
                said = logits[0, 0, -1].log_softmax(-1)
                value += float(said[yes] - said[no]) / 2
            assert float(found[row, column]) == pytest.approx(value, abs=1e-4)
    with pytest.raises(InputError, match="no subject is named '<c>'"):
        odds(base, clips, ["<c>"])


def test_a_copy_learns_and_chooses_by_the_mean_of_the_odds(base, runs, tmp_path, monkeypatch):
    [trial] = read_trials(runs, only=["run01"])
    asked = []

    def told(model, clips, names, **settings):
        # It knows whom it sees, but for the last test, of which two of three clips mislead.
        asked.append((len(clips), names, [clip.actors[0].subject for clip in clips]))
        made = torch.zeros(len(clips), len(names))
        for row, clip in enumerate(clips):
            made[row, [each.subject for each in trial.references].index(clip.actors[0].subject)] = 1.0
        made[-2:] = torch.tensor([[0.0, 2.0, 0.0]])
        return made

    monkeypatch.setattr("anabranch.heads.pvchat.trials.odds", told)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = ways(base, trial, BANK, tmp_path / "out", FEW, clips=3, device="cpu")
    [(count, names, subjects)] = asked
    assert (count, names) == (9, trial.names)
    assert subjects == [each.subject for each in trial.tests for _ in range(3)]
    assert found.chosen_N == (1, 2, 1)
    assert found.right == 2 / 3
    assert json.loads((tmp_path / "out/ways.json").read_text()) == found.to_dict()
    # The model that it began with is as it was, and knows nobody new.
    assert base.vocabulary.names == ["<a>", "<b>"]
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    # What is there is taken, and nothing asked again.
    assert ways(base, trial, BANK, tmp_path / "out", FEW, clips=3, device="cpu", resume=True) == found
    assert len(asked) == 1
    [other] = read_trials(runs, only=["run02"])
    with pytest.raises(DataError, match="is of another trial than run02"):
        ways(base, other, BANK, tmp_path / "out", FEW, resume=True)
    (tmp_path / "out/ways.json").write_text('{"name": "run01"}')
    with pytest.raises(DataError, match="holds no result of a trial; remove it"):
        ways(base, trial, BANK, tmp_path / "out", FEW, resume=True)


def test_learning_that_is_interrupted_says_by_which_signal(base, runs, tmp_path):
    [trial] = read_trials(runs, only=["run02"])

    sent = []

    def stop(stage, event):
        # Once: the second would end the process.
        if not sent:
            sent.append(stage)
            os.kill(os.getpid(), signal.SIGTERM)

    cut = ways(base, trial, BANK, tmp_path, FEW, clips=2, device="cpu", on_event=stop)
    assert isinstance(cut, Learned)
    assert (cut.is_finished, cut.signal) == (False, "SIGTERM")
    assert not (tmp_path / "ways.json").exists()
    whole = ways(base, trial, BANK, tmp_path, FEW, clips=2, device="cpu", resume=True)
    assert whole == ways(base, trial, BANK, tmp_path / "other", FEW, clips=2, device="cpu")


def test_the_same_seed_gives_the_same_choice(base, runs, tmp_path):
    [trial] = read_trials(runs, only=["run02"])
    one, two = (ways(base, trial, BANK, tmp_path / name, FEW, clips=2, device="cpu") for name in ("one", "two"))
    assert one == two
    assert len(one.chosen_N) == WAYS


def test_the_nearest_drawing_knows_what_is_hardly_changed(runs):
    trials = read_trials(runs)
    assert trials
    assert [by_ink(trial) for trial in trials] == [trial.answer_N for trial in trials]
